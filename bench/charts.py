"""PNG charts of the benches' rows, each of the device that was measured last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

from engine.measuring.records import Row, newest

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_RIVALS = {"plain": "plain PyTorch", "usb": "USB's step", "torchssl": "TorchSSL's step"}  # of `bench baseline`


def draw(rows: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Writes throughput.png, kernels.png and pipelines.png; none where its bench has no rows.

    Args:
        rows: by bench.
        folder: is made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for bench, chart in CHARTS.items():
        if not rows.get(bench):
            continue
        device = rows[bench][-1]["device"]
        shown = {name: newest(name, found).get(device, []) for name, found in rows.items() if name != "digits"}
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        chart(axes, shown)
        axes.set_title(device, fontsize="small")
        figure.savefig(folder / f"{bench}.png", dpi=120)
        plt.close(figure)


def _throughput(axes: Axes, rows: Mapping[str, list[Row]]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    preset = rows["throughput"][-1]["preset"]  # rates of several networks on one axis would say nothing
    for row in rows["throughput"]:
        if row["preset"] != preset:
            continue
        name = f"{row['mode']}, {row['views']} views, {row['precision']}, {row['optimizer']}"
        if row.get("micro_batches", 1) > 1:
            name += f", {row['micro_batches']} micro-batches"
        lines.setdefault(name, []).append((row["k"], row["images_per_second"]))
    rivals: dict[str, dict[int, float]] = {}
    for row in rows.get("baseline", []) if preset == "bench" else []:
        trainer = row.get("trainer", "plain")  # rows of before there were others have no such column
        if trainer in _RIVALS:
            name = f"{_RIVALS[trainer]}, {row['data']} views, {row['precision']}"
            rivals.setdefault(name, {})[row["k"]] = row["images_per_second"]
    lines |= {name: list(points.items()) for name, points in rivals.items()}
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "--s" if name in rivals else "-o", label=name)
    ks = sorted({k for points in lines.values() for k, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="K", ylabel="trained rows a second", ylim=(0, None))
    axes.legend(fontsize="small")


def _kernels(axes: Axes, rows: Mapping[str, list[Row]]) -> None:
    cases = list(dict.fromkeys((row["kernel"], row["size"]) for row in rows["kernels"]))
    providers = list(dict.fromkeys(row["provider"] for row in rows["kernels"]))
    width = 0.8 / len(providers)
    for number, provider in enumerate(providers):
        shares = {
            (r["kernel"], r["size"]): 100 * r["share_of_copy"] for r in rows["kernels"] if r["provider"] == provider
        }
        places = [place + (number - (len(providers) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, [shares.get(case, 0.0) for case in cases], width, label=provider)
    axes.set_xticks(range(len(cases)), [f"{kernel}\n{size}" for kernel, size in cases], fontsize="small")
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.set_ylabel("share of copy bandwidth, %")
    axes.legend(fontsize="small")


def _pipelines(axes: Axes, rows: Mapping[str, list[Row]]) -> None:
    # points, since a bar on a logarithmic scale has no foot
    for row in sorted(rows["pipelines"], key=lambda row: row["views_per_second"]):
        axes.plot(row["views_per_second"], row["backend"], "o", color="tab:blue")
        at = (row["views_per_second"], row["backend"])
        axes.annotate(f"{row['views_per_second']:,.0f}", at, (8, -3), textcoords="offset points", fontsize="small")
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    axes.set_xlabel("strong views a second")


CHARTS: dict[str, Callable[[Axes, Mapping[str, list[Row]]], None]] = {
    "throughput": _throughput,
    "kernels": _kernels,
    "pipelines": _pipelines,
}
