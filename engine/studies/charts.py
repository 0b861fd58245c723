"""The chart of `remixmatch ablate`: what components bring, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from pipelines.files import atomic_write

FEW_POINTS = 20  # of error: larger differences are drawn logarithmically


def cost_and_benefit(variants: Sequence[Any], title: str, path: Path) -> None:
    """Draws what variants bring and what they cost, a line each: the difference in test error, and a step's time.

    Args:
        variants: of `engine.studies.ablate`; those that are neither trained nor timed are left out.
        title: of the chart.
        path: of the PNG.
    """
    found = [(each.name, each.line.to_full, each.cost) for each in variants]
    found = [each for each in found if each[1] or each[2]]
    # the worst at the top; below, what was only timed, the dearest first
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
    with atomic_write(path, shared=True) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _point(axes: Axes, place: int, value: float, low: float | None, high: float | None) -> None:
    """One value with its interval, where it has one."""
    sides = None if low is None or high is None else [[value - low], [high - value]]
    axes.errorbar(value, place, xerr=sides, fmt="o", capsize=3, color="tab:blue")
