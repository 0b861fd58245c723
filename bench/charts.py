"""PNG charts of the benches' rows, each of the device that was measured last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from bench.records import Row, newest

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FEW_POINTS = 20  # of error: larger differences are drawn logarithmically
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


def cost_and_benefit(variants: Sequence[Any], title: str, path: Path) -> None:
    """Draws what variants bring and what they cost, a line each: the difference in test error, and a step's time.

    Args:
        variants: of `bench.ablate`; those that are neither trained nor timed are left out.
        title: of the chart.
        path: of the PNG.
    """
    found = [(each.name, each.line.to_full, each.cost) for each in variants]
    found = [each for each in found if each[1] or each[2]]
    # the worst at the top; below, what was only timed, the dearest first
    found.sort(key=lambda each: (each[1].mean if each[1] else -math.inf, each[2].get("ratio", 0.0)))
    benefit, cost = any(each[1] for each in found), any(each[2] for each in found)
    figure, panels = plt.subplots(
        1, benefit + cost, sharey=True, squeeze=False, figsize=(4 + 3 * (benefit + cost), 0.32 * len(found) + 1.6),
        layout="constrained",
    )  # fmt: skip
    left, right = panels[0, 0], panels[0, -1]
    for place, (_, difference, timed) in enumerate(found):
        if difference:
            _point(left, place, difference.mean, difference.low, difference.high)
        if timed:
            _point(right, place, timed["ratio"], timed["ratio_low"], timed["ratio_high"])
    left.set_yticks(range(len(found)), [name for name, *_ in found])
    if benefit:
        left.axvline(0, color="grey", linewidth=0.8)
        left.set_xlabel("test error less the full method's, points, 95 %")
        if max(map(abs, left.get_xlim())) > FEW_POINTS:
            left.set_xscale("symlog", linthresh=FEW_POINTS / 4)
    if cost:
        right.axvline(1, color="grey", linewidth=0.8)
        right.set_xlabel("time a step, times the full method's, quartiles")
        right.set_xscale("log")
        right.xaxis.set_minor_formatter("{x:g}")
    for axes in panels[0]:
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_formatter("{x:g}")
    figure.suptitle(title, fontsize="small", wrap=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _point(axes: Axes, place: int, value: float, low: float | None, high: float | None) -> None:
    """One value with its interval, where it has one."""
    sides = None if low is None or high is None else [[value - low], [high - value]]
    axes.errorbar(value, place, xerr=sides, fmt="o", capsize=3, color="tab:blue")


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
