"""Tables of test errors over seeds: statistics, Markdown and JSON.

All figures are errors in percent on the test images, of the EMA model: the median over the last 20 evaluations, as the
paper reports, and the last one. Neither picks an evaluation by how good it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from engine.config.presets import Figure
from engine.measuring.markdown import table

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Result:
    """A finished run of a table.

    Attributes:
        median: error, the median over the last 20 evaluations, in percent.
        last: error of the last evaluation, in percent.
        steps: that it was trained.
        split: rule by which its seed chose the labeled images.
        seconds: of training, evaluations included: on a CPU of its time in all threads, which other work on the machine
            does not change much; None where that is not known.
    """

    median: float
    last: float
    steps: int
    split: str
    seconds: float | None = None


@dataclass(frozen=True)
class Spread:
    """Errors over seeds: mean, and sample standard deviation (n - 1), None with one seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Difference:
    """How much larger one row's errors are than another's, in points, paired by seed.

    Attributes:
        mean: of the differences.
        low: lower end of the 95 % interval of Student's t; None with one seed.
        high: its upper end.
        seeds: that both rows have.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]

    @property
    def significant(self) -> bool:
        """Whether it is told from 0: there is an interval, and it does not hold 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Line:
    """One row of a table, for one preset.

    Attributes:
        row: method or ablation.
        preset: which data set and how many labels.
        seeds: that are finished.
        wanted: that the table is to have.
        median: errors by the paper's protocol, over seeds; None before any is finished.
        last: errors of the last evaluation, over seeds.
        paper: the published figure.
        to_paper: difference of the means, in points.
        to_full: difference to the full method.
        papers_difference: what that is in the paper, perhaps on other data, in points.
        steps: of the runs.
        split: their rule.
        seconds: their median; None where none is known.
    """

    row: str
    preset: str
    seeds: tuple[int, ...]
    wanted: tuple[int, ...]
    median: Spread | None
    last: Spread | None
    paper: Figure | None
    to_paper: float | None
    to_full: Difference | None
    steps: tuple[int, ...]
    split: tuple[str, ...]
    seconds: float | None
    papers_difference: float | None = None

    @property
    def sign(self) -> str:
        """Whether the difference to the full method has the sign that it has in the paper."""
        found, papers = self.to_full, self.papers_difference
        if found is None or papers is None:
            return ""
        if not found.significant:
            return "n.s."
        return "same" if found.mean * papers > 0 else "opposite"


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None)


def difference(errors: Mapping[int, float], full: Mapping[int, float]) -> Difference | None:
    """Errors less those of the full method for the same seeds; None where they have no seed in common.

    Args:
        errors: by seed.
        full: by seed.
    """
    seeds = tuple(sorted(errors.keys() & full.keys()))
    if not seeds:
        return None
    ours, theirs = [errors[seed] for seed in seeds], [full[seed] for seed in seeds]
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(seeds) == 1:
        return Difference(apart[0], None, None, seeds)
    if max(apart) == min(apart):  # no spread, of which scipy would warn
        return Difference(apart[0], apart[0], apart[0], seeds)
    from scipy.stats import ttest_rel  # takes most of a second

    interval = ttest_rel(ours, theirs).confidence_interval(CONFIDENCE)
    return Difference(mean(apart), float(interval.low), float(interval.high), seeds)


def line(
    row: str,
    preset: str,
    wanted: Sequence[int],
    runs: Mapping[int, Result],
    full: Mapping[int, Result] | None,
    paper: Figure | None,
    papers_difference: float | None = None,
) -> Line:
    """One row of a table.

    Args:
        row: method or ablation.
        preset: of its runs.
        wanted: seeds that there should be.
        runs: finished ones, by seed.
        full: those of the full method for the same preset; None where this row is the full method.
        paper: the published figure.
        papers_difference: see `Line`.
    """
    medians = {seed: run.median for seed, run in runs.items()}
    median = spread(list(medians.values()))
    return Line(
        row=row,
        preset=preset,
        seeds=tuple(sorted(runs)),
        wanted=tuple(wanted),
        median=median,
        last=spread([run.last for run in runs.values()]),
        paper=paper,
        to_paper=median.mean - paper.error if median and paper else None,
        to_full=None if full is None else difference(medians, {seed: run.median for seed, run in full.items()}),
        steps=tuple(sorted({run.steps for run in runs.values()})),
        split=tuple(sorted({run.split for run in runs.values()})),
        seconds=median_or_none([run.seconds for run in runs.values() if run.seconds is not None]),
        papers_difference=papers_difference,
    )


def median_or_none(values: Sequence[float]) -> float | None:
    """Median; None of nothing."""
    return median(values) if values else None


def markdown(title: str, lines: Sequence[Line], full: str, notes: Sequence[str] = ()) -> str:
    """A table as Markdown, with what its figures are.

    Args:
        title: first line.
        lines: rows.
        full: name of the row that differences are to.
        notes: further lines below it.
    """
    compared = any(each.to_full for each in lines)
    signed = any(each.papers_difference is not None for each in lines)
    timed = any(each.seconds is not None for each in lines)
    columns: dict[str, Callable[[Line], str]] = {
        "preset": lambda each: each.preset,
        "method": lambda each: each.row,
        "seeds": _seeds,
        "error, %: median of last 20": lambda each: shown_spread(each.median),
        "last evaluation": lambda each: shown_spread(each.last),
        "paper": lambda each: _paper(each.paper),
        "ours - paper": lambda each: _shown("{:+.2f}", each.to_paper),
    }
    if compared:
        columns[f"difference to {full}"] = lambda each: shown_difference(each.to_full)
    if signed:
        columns["difference in the paper"] = lambda each: _shown("{:+.2f}", each.papers_difference)
        columns["sign"] = lambda each: each.sign
    if timed:
        columns["minutes a run"] = lambda each: "" if each.seconds is None else f"{each.seconds / 60:.1f}"
    columns["steps"] = lambda each: ", ".join(f"{steps:,}" for steps in each.steps)
    columns["split"] = lambda each: ", ".join(each.split)
    rows = [[cell(each) for cell in columns.values()] for each in lines]
    words = [
        "Test errors of the EMA model: mean ± sample standard deviation over seeds, each with a label split and "
        "initial weights of its own. No evaluation and no seed was chosen by its test error.",
    ]
    if compared:
        words.append(
            f"Differences to {full} are in points of the median, over the seeds that both have: their mean and the "
            "95 % interval of Student's t for paired samples. One seed has no interval."
        )
    if signed:
        words.append(
            "Differences in the paper are on CIFAR-10 with 250 labels, one split; those of K are to the K that the "
            'preset has. A sign is "n.s." where the interval holds 0, or there is none.'
        )
    if timed:
        words.append("Minutes are the median over the runs; on a CPU, of its time in all threads.")
    return "\n\n".join([f"# {title}", table(list(columns), rows), *words, *notes]) + "\n"


def to_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [dataclasses.asdict(each) for each in lines]


def _seeds(each: Line) -> str:
    count, wanted = len(each.seeds), len(each.wanted)
    names = " ".join(map(str, each.seeds))
    if count < wanted:
        return f"{count} of {wanted}" + (f" ({names})" if names else "")
    return f"{count} ({names})"


def shown_spread(found: Spread | None) -> str:
    """Mean ± deviation; empty of nothing."""
    if found is None:
        return ""
    return f"{found.mean:.2f}" + (", one seed" if found.deviation is None else f" ± {found.deviation:.2f}")


def _shown(form: str, value: float | None) -> str:
    """A number; empty of nothing."""
    return "" if value is None else form.format(value)


def _paper(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{figure.error:.2f}" + ("" if figure.deviation is None else f" ± {figure.deviation:.2f}")


def shown_difference(found: Difference | None) -> str:
    """A difference with its interval; empty of nothing."""
    if found is None:
        return ""
    if found.low is None:
        return f"{found.mean:+.2f}, one seed: no interval"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}] of {len(found.seeds)} pairs"
