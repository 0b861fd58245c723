"""Tables of test errors over seeds: statistics, Markdown and JSON.

All values are test errors of the EMA model in percent: the median over the last 20 evaluations, as in the paper, and
that of the last evaluation. Neither involves model selection. Differences are shown for the error that comes first in
the table (see `engine.runs.headline`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, median, stdev
from typing import Any

from engine.config.presets import PublishedError
from engine.inference.confusion import geometric_mean
from engine.measuring.markdown import table
from engine.runs.headline import MEDIAN_OF, Evaluations

CONFIDENCE = 0.95
ENOUGH = Evaluations(MEDIAN_OF, MEDIAN_OF)
LAST_FIRST = (
    f"Fewer than {MEDIAN_OF} evaluations of some runs follow the ramp, so the errors of the last evaluation come first."
)


@dataclass(frozen=True)
class Result:
    """A finished run of a table.

    Attributes:
        median: Median error over the last 20 evaluations, in percent.
        last: Error of the last evaluation, in percent.
        steps: Number of training steps.
        split: Name of the rule that chose the labeled images.
        seconds: Training time, including evaluations; None if unknown. On a CPU this is the CPU time of all threads,
            because other work on the machine hardly affects it.
        evaluations: Its numbers of evaluations.
        recalls: Recall of each class at the last evaluation, in percent, if classes are unequal; otherwise empty.
    """

    median: float
    last: float
    steps: int
    split: str
    seconds: float | None = None
    evaluations: Evaluations = ENOUGH
    recalls: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over seeds; the deviation is None for one seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Difference:
    """Difference in error between two methods or variants, in percentage points (pp), paired by seed.

    Attributes:
        mean: Mean of the differences.
        low: Lower end of the 95 % confidence interval (Student's t); None for one seed.
        high: Its upper end.
        seeds: The seeds that both have.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]

    @property
    def significant(self) -> bool:
        """Whether there is an interval and it excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Line:
    """One line of a table: a method or ablation on one preset.

    Attributes:
        row: Name of the method or ablation.
        preset: Name of the preset.
        seeds: Seeds of the finished runs.
        wanted: Seeds that the table should have.
        median: Medians over the last 20 evaluations, over seeds; None before any run is finished.
        last: Errors of the last evaluation, over seeds.
        paper: The published error.
        to_paper: Difference from the published error, in pp.
        to_full: Difference from the full method.
        papers_difference: The same difference in the paper, perhaps on other data, in pp.
        steps: Numbers of training steps of the runs.
        split: Split rules of the runs.
        seconds: Median training time; None if unknown.
        last_to_paper: Like `to_paper`, for the last evaluation.
        last_to_full: Like `to_full`, for the last evaluation.
        evaluations: The runs' numbers of evaluations, each the smallest.
        median_first: Whether the table shows the median first, and the differences of the medians.
        balanced: Balanced accuracy of the last evaluation, in percent, over seeds; None if classes are equal.
        geometric: Geometric mean of the recalls, likewise.
        balanced_to_full: Difference in balanced accuracy from the full method.
        recalls: Mean recall of each class over seeds, in percent.
    """

    row: str
    preset: str
    seeds: tuple[int, ...]
    wanted: tuple[int, ...]
    median: Spread | None
    last: Spread | None
    paper: PublishedError | None
    to_paper: float | None
    to_full: Difference | None
    steps: tuple[int, ...]
    split: tuple[str, ...]
    seconds: float | None
    papers_difference: float | None = None
    last_to_paper: float | None = None
    last_to_full: Difference | None = None
    evaluations: Evaluations | None = None
    median_first: bool = True
    balanced: Spread | None = None
    geometric: Spread | None = None
    balanced_to_full: Difference | None = None
    recalls: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def error(self) -> Spread | None:
        """The error that the table shows first."""
        return self.median if self.median_first else self.last

    @property
    def from_paper(self) -> float | None:
        """Its difference from the published error, in pp."""
        return self.to_paper if self.median_first else self.last_to_paper

    @property
    def from_full(self) -> Difference | None:
        """Its difference from the full method."""
        return self.to_full if self.median_first else self.last_to_full

    @property
    def sign(self) -> str:
        """Sign of the difference from the full method compared with the paper's: "same", "opposite", "n.s." or ""."""
        found, papers = self.from_full, self.papers_difference
        if found is None or papers is None:
            return ""
        if not found.significant:
            return "n.s."
        return "same" if found.mean * papers > 0 else "opposite"


def choose_first(lines: Sequence[Line]) -> list[Line]:
    """Return lines that all show the same error first: the median, unless it comes second in some run."""
    first = all(each.evaluations.median_first for each in lines if each.evaluations)
    return [dataclasses.replace(each, median_first=first) for each in lines]


def median_of(lines: Sequence[Line]) -> str:
    """Return what the medians are over, such as "last 20" or "all 6"."""
    counts = {min(each.evaluations.count, MEDIAN_OF) for each in lines if each.evaluations} or {MEDIAN_OF}
    if len(counts) > 1:
        return f"last {min(counts)} to {max(counts)}"
    return f"last {MEDIAN_OF}" if counts == {MEDIAN_OF} else f"all {min(counts)}"


def spread(values: Sequence[float]) -> Spread | None:
    """Return the mean and sample standard deviation; None if there are no values."""
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None)


def difference(errors: Mapping[int, float], full: Mapping[int, float]) -> Difference | None:
    """Return the difference from the full method, paired by seed; None if they share no seed.

    Args:
        errors: Errors by seed.
        full: Errors of the full method by seed.
    """
    seeds = tuple(sorted(errors.keys() & full.keys()))
    if not seeds:
        return None
    ours, theirs = [errors[seed] for seed in seeds], [full[seed] for seed in seeds]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(seeds) == 1:
        return Difference(differences[0], None, None, seeds)
    if max(differences) == min(differences):  # scipy warns if there is no spread.
        return Difference(differences[0], differences[0], differences[0], seeds)
    from scipy.stats import ttest_rel  # Takes most of a second.

    interval = ttest_rel(ours, theirs).confidence_interval(CONFIDENCE)
    return Difference(mean(differences), float(interval.low), float(interval.high), seeds)


def noise(full: Line) -> float | None:
    """Return how far apart two sets of runs of the full method itself would be, in pp, with a probability of 95 %.

    This follows from its sample standard deviation s over n seeds: t(0.975, n - 1) s sqrt(2 / n), with Student's t.
    None if it is unknown, for fewer than two seeds.
    """
    if full.error is None or full.error.deviation is None:
        return None
    from scipy.stats import t  # Takes most of a second.

    n = len(full.seeds)
    return float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * full.error.deviation * sqrt(2 / n)


def line(
    row: str,
    preset: str,
    wanted: Sequence[int],
    runs: Mapping[int, Result],
    full: Mapping[int, Result] | None,
    paper: PublishedError | None,
    papers_difference: float | None = None,
) -> Line:
    """Summarize the runs of one method or ablation on one preset.

    Args:
        row: Name of the method or ablation.
        preset: Name of the preset.
        wanted: Seeds that the table should have.
        runs: Finished runs by seed.
        full: Runs of the full method on the same preset; None if this is the full method.
        paper: The published error.
        papers_difference: See `Line`.
    """
    medians, lasts = ({seed: getattr(run, name) for seed, run in runs.items()} for name in ("median", "last"))
    median, last = spread(list(medians.values())), spread(list(lasts.values()))
    counts = [run.evaluations for run in runs.values()]
    balanced, of_full = _balanced(runs), _balanced(full or {})
    recalls = [run.recalls for run in runs.values() if run.recalls]
    return Line(
        row=row,
        preset=preset,
        seeds=tuple(sorted(runs)),
        wanted=tuple(wanted),
        median=median,
        last=last,
        paper=paper,
        to_paper=median.mean - paper.error if median and paper else None,
        to_full=None if full is None else difference(medians, {seed: run.median for seed, run in full.items()}),
        steps=tuple(sorted({run.steps for run in runs.values()})),
        split=tuple(sorted({run.split for run in runs.values()})),
        seconds=median_or_none([run.seconds for run in runs.values() if run.seconds is not None]),
        papers_difference=papers_difference,
        last_to_paper=last.mean - paper.error if last and paper else None,
        last_to_full=None if full is None else difference(lasts, {seed: run.last for seed, run in full.items()}),
        evaluations=Evaluations(min(e.count for e in counts), min(e.after_ramp for e in counts)) if counts else None,
        balanced=spread(list(balanced.values())),
        geometric=spread([geometric_mean(list(each.values())) for each in recalls]),
        balanced_to_full=difference(balanced, of_full),
        recalls={name: mean(each[name] for each in recalls) for name in (recalls[0] if recalls else ())},
    )


def _balanced(runs: Mapping[int, Result]) -> dict[int, float]:
    """Return the balanced accuracy by seed, of the runs with recalls."""
    return {seed: mean(run.recalls.values()) for seed, run in runs.items() if run.recalls}


def median_or_none(values: Sequence[float]) -> float | None:
    """Return the median; None if there are no values."""
    return median(values) if values else None


def markdown(title: str, lines: Sequence[Line], full: str, notes: Sequence[str] = ()) -> str:
    """Return a table as Markdown, with an explanation of its columns.

    Args:
        title: First line.
        lines: Lines of the table.
        full: Name of the method that differences are taken from.
        notes: Further paragraphs below the table.
    """
    medians = all(each.median_first for each in lines)
    errors: list[tuple[str, Callable[[Line], str]]] = [
        (f"error, % (median of {median_of(lines)})", lambda each: shown_spread(each.median)),
        ("error, % (last)", lambda each: shown_spread(each.last)),
    ]
    compared = any(each.from_full for each in lines)
    signed = any(each.papers_difference is not None for each in lines)
    unequal = any(each.balanced for each in lines)
    timed = any(each.seconds is not None for each in lines)
    means: dict[str, Callable[[Line], str]] = {
        "balanced accuracy, % (last)": lambda each: shown_spread(each.balanced),
        "geometric mean of recalls, % (last)": lambda each: shown_spread(each.geometric),
    }
    columns: dict[str, Callable[[Line], str]] = {
        "preset": lambda each: each.preset,
        "method": lambda each: each.row,
        "seeds": _seeds,
        **dict(errors if medians else reversed(errors)),
        **(means if unequal else {}),
        "paper: error, %": lambda each: _paper(each.paper),
        "difference from paper, pp": lambda each: _shown("{:+.2f}", each.from_paper),
    }
    if compared:
        columns[f"difference from {full}, pp (95 % CI)"] = lambda each: shown_difference(each.from_full)
    if compared and unequal:
        columns["difference in balanced accuracy, pp (95 % CI)"] = lambda each: shown_difference(each.balanced_to_full)
    if signed:
        columns["difference in the paper, pp"] = lambda each: _shown("{:+.2f}", each.papers_difference)
        columns["sign"] = lambda each: each.sign
    if timed:
        columns["minutes per run"] = lambda each: "" if each.seconds is None else f"{each.seconds / 60:.1f}"
    columns["steps"] = lambda each: ", ".join(f"{steps:,}" for steps in each.steps)
    columns["split"] = lambda each: ", ".join(each.split)
    rows = [[cell(each) for cell in columns.values()] for each in lines]
    words = [
        "Test errors of the EMA model: mean ± sample standard deviation over seeds. Each seed has its own label split "
        "and initial weights. No evaluation or seed was selected by its test error.",
    ]
    if not medians:
        words.append(LAST_FIRST)
    if compared:
        words.append(
            f"Differences from {full} are those of the {'medians' if medians else 'last evaluations'}, paired by seed: "
            "mean and 95 % confidence interval (Student's t). One seed has no interval."
        )
    if signed:
        words.append(
            "Differences in the paper are on CIFAR-10 with 250 labels, one split; for K they are relative to the "
            'preset\'s K. The sign is "n.s." (not significant) if the interval includes 0 or is missing.'
        )
    if timed:
        words.append("Minutes are the median over the runs; on a CPU they are CPU time of all threads.")
    recalls = recall_table(lines)
    return "\n\n".join([f"# {title}", table(list(columns), rows), *words, *recalls, *notes]) + "\n"


MOST_CLASSES = 20  # in a table of recalls


def recall_table(lines: Sequence[Line]) -> list[str]:
    """Return a table of the mean recall of each class as Markdown paragraphs; none if all classes are equal."""
    known = [each for each in lines if each.recalls]
    names = list(dict.fromkeys(name for each in known for name in each.recalls))
    if not known:
        return []
    note = (
        "Balanced accuracy is the mean recall over classes; it equals the accuracy if the test set has equally many "
        "images of each class. Recalls and their means are those of the last evaluation."
    )
    if len(names) > MOST_CLASSES:
        return [note]
    rows = [[each.preset, each.row, *(_shown("{:.1f}", each.recalls.get(name)) for name in names)] for each in known]
    return [f"{note} Recall of each class, in percent, mean over seeds:", table(["preset", "method", *names], rows)]


def to_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return the lines of a table as plain values."""
    return [dataclasses.asdict(each) for each in lines]


def _seeds(each: Line) -> str:
    count, wanted = len(each.seeds), len(each.wanted)
    names = " ".join(map(str, each.seeds))
    if count < wanted:
        return f"{count} of {wanted}" + (f" ({names})" if names else "")
    return f"{count} ({names})"


def shown_spread(found: Spread | None) -> str:
    """Format mean ± deviation; empty if there is nothing to show."""
    if found is None:
        return ""
    return f"{found.mean:.2f}" + (", one seed" if found.deviation is None else f" ± {found.deviation:.2f}")


def _shown(form: str, value: float | None) -> str:
    """Format a number; empty for None."""
    return "" if value is None else form.format(value)


def _paper(figure: PublishedError | None) -> str:
    if figure is None:
        return ""
    return f"{figure.error:.2f}" + ("" if figure.deviation is None else f" ± {figure.deviation:.2f}")


def shown_difference(found: Difference | None) -> str:
    """Format a difference with its interval; empty for None."""
    if found is None:
        return ""
    if found.low is None:
        return f"{found.mean:+.2f} (one seed)"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}], n = {len(found.seeds)}"
