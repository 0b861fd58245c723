"""The chart of `remixmatch ablate`: benefit and cost of each component."""

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
    figure.suptitle(title, fontsize="small", wrap=True)
    with atomic_write(path, shared=True) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _point(axes: Axes, place: int, value: float, low: float | None, high: float | None) -> None:
    """Draw a value with its interval, if it has one."""
    sides = None if low is None or high is None else [[value - low], [high - value]]
    axes.errorbar(value, place, xerr=sides, fmt="o", capsize=3, color="tab:blue")
