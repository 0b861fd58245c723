"""Charts of studies: benefit and cost of each component of a method, and the test error over K."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.studies.statistics import Line
from pipelines.files import atomic_write

LINEAR_PP = 20  # Differences beyond this many percentage points are drawn on a logarithmic axis.


def cost_and_benefit(variants: Sequence[Any], title: str, path: Path) -> None:
    """Draw each variant's difference in test error and relative step time.

    Args:
        variants: Results of `engine.studies.ablate`; variants that are neither trained nor timed are left out.
        title: Title of the chart.
        path: Path of the PNG.
    """
    found = [(each.name, each.line.from_full, each.cost) for each in variants]
    found = [each for each in found if each[1] or each[2]]
    # Largest error at the top; variants that were only timed come last, the slowest first.
    found.sort(key=lambda each: (each[1].mean if each[1] else -math.inf, each[2].get("ratio", 0.0)))
    benefit, cost = any(each[1] for each in found), any(each[2] for each in found)
    columns = 2 if benefit and cost else 1
    figure, panels = plt.subplots(
        1, columns, sharey=True, squeeze=False, figsize=(4 + 3 * columns, 0.32 * len(found) + 1.6),
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
        left.axvline(0, color="gray", linewidth=0.8)
        left.set_xlabel("difference in test error from the full method, pp (95 % CI)")
        if max(map(abs, left.get_xlim())) > LINEAR_PP:
            left.set_xscale("symlog", linthresh=LINEAR_PP / 4)
    if cost:
        right.axvline(1, color="gray", linewidth=0.8)
        right.set_xlabel("step time relative to the full method (quartiles)")
        right.set_xscale("log")
        right.xaxis.set_minor_formatter("{x:g}")
    for axes in panels[0]:
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_formatter("{x:g}")
    _save(figure, title, path)


def error_over_k(methods: Mapping[str, Mapping[int, Line]], title: str, path: Path) -> None:
    """Draw the test error of methods over K, and its difference from K = 1.

    Args:
        methods: Lines of a table with results, by method and K.
        title: Title of the chart.
        path: Path of the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    every = sorted({k for lines in methods.values() for k in lines})
    for number, (method, lines) in enumerate(methods.items()):
        # Methods are drawn next to each other, so that their intervals do not overlap.
        factor = 1.04 ** (number - (len(methods) - 1) / 2)
        look: dict[str, Any] = {"marker": "o", "capsize": 3, "color": f"C{number}", "label": method}
        errors = {k: lines[k].error for k in sorted(lines)}
        known = [(k * factor, each.mean, each.deviation or 0.0) for k, each in errors.items() if each]
        if known:
            places, means, deviations = zip(*known, strict=True)
            left.errorbar(places, means, deviations, **look)
        differences = {k: lines[k].from_full for k in sorted(lines)}
        points = [
            (k * factor, each.mean, *_sides(each.mean, each.low, each.high)) for k, each in differences.items() if each
        ]
        if points:
            places, means, below, above = zip(*points, strict=True)
            right.errorbar(places, means, [below, above], **look)
    left.set_ylabel("test error, % (mean and standard deviation)")
    right.set_ylabel("difference from K = 1, pp (95 % CI)")
    right.axhline(0, color="gray", linewidth=0.8)
    left.legend()
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(k) for k in every])
        axes.set_xlabel("K, strong views per unlabeled image")
        axes.grid(axis="y", alpha=0.3)
    _save(figure, title, path)


def _sides(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    """Return the lengths of an interval below and above a value; NaN, which is not drawn, if there is no interval."""
    return (math.nan, math.nan) if low is None or high is None else (value - low, high - value)


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize="small", wrap=True)
    with atomic_write(path, shared=True) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _point(axes: Axes, place: int, value: float, low: float | None, high: float | None) -> None:
    """Draw a value with its interval, if it has one."""
    below, above = _sides(value, low, high)
    axes.errorbar(value, place, xerr=[[below], [above]], fmt="o", capsize=3, color="tab:blue")
