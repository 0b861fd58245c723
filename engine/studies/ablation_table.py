"""The table of `remixmatch ablate`: costs, errors, prices, and the noise of all of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.measuring.markdown import table
from engine.studies import jobs, statistics
from engine.studies.paper_tables import REMIXMATCH, Entry

TARGET = "sm_90"  # GPU architecture of the counted launches and bytes.


@dataclass(frozen=True)
class AblationRow:
    """Results of a variant.

    Attributes:
        name: Name of the ablation, or of the full method.
        cost: Cost of its step, see `time_step`; empty if unknown.
        counts: Launches and bytes of its captured step, see `Count.total`; empty if unknown.
        line: Its errors, see `engine.studies.statistics`.
    """

    name: str
    cost: Mapping[str, Any]
    counts: Mapping[str, Any]
    line: statistics.Line

    @property
    def price(self) -> float | None:
        """The additional step time in milliseconds per percentage point of lower error.

        This compares the variant with the full method. None if the slower of the two has no lower error, or if cost or
        error are unknown.
        """
        if not self.cost or self.line.from_full is None:
            return None
        slower = self.cost["step_ms"] * (1 - 1 / self.cost["ratio"])  # Compared with the full method, in milliseconds.
        worse = self.line.from_full.mean
        return -slower / worse if slower * worse < 0 else None


@dataclass(frozen=True)
class Noise:
    """Differences of the full method from itself, to compare those of variants with.

    Attributes:
        ratio: Range of its relative step time: the quartiles, widened to include 1; None if it was not timed.
        difference: See `statistics.noise`; None if it is unknown.
        deviation: Standard deviation of its errors over seeds, in pp.
        seeds: Number of its seeds.
    """

    ratio: tuple[float, float] | None = None
    difference: float | None = None
    deviation: float | None = None
    seeds: int = 0

    @classmethod
    def of(cls, full: AblationRow) -> Noise:
        """Return the noise of the full method's own measurements."""
        cost, line = full.cost, full.line
        ratio = (min(cost["ratio_low"], 1.0), max(cost["ratio_high"], 1.0)) if cost else None
        return cls(ratio, statistics.noise(line), line.error.deviation if line.error else None, len(line.seeds))

    def covers_ratio(self, variant: AblationRow) -> bool:
        """Return whether a variant's relative step time lies within the noise."""
        if not self.ratio or not variant.cost:
            return False
        low, high = self.ratio
        return low <= variant.cost["ratio"] <= high

    def covers_difference(self, variant: AblationRow) -> bool:
        """Return whether a variant's difference in error lies within the noise, or the noise is unknown."""
        found = variant.line.from_full
        if found is None:
            return False
        return self.difference is None or abs(found.mean) <= self.difference

    def of_ratio(self) -> str:
        """Describe the noise of the step times; empty if the full method was not timed."""
        if not self.ratio:
            return ""
        low, high = self.ratio
        return (
            "Noise of the times: timed against itself in the same way, the full method takes "
            f"{low:.2f} to {high:.2f} times its own step time. Relative step times in this range are in parentheses."
        )

    def of_difference(self) -> str:
        """Describe the noise of the errors."""
        if self.difference is None:
            return (
                "Noise of the errors: unknown, since it is estimated from the full method's spread over at least two "
                "--seeds. Differences are in parentheses."
            )
        return (
            f"Noise of the errors: over {self.seeds} seeds, the full method has a standard deviation of "
            f"{self.deviation:.2f} pp, so two such sets of its seeds differ by up to {self.difference:.2f} pp (95 %). "
            "Differences in this range are in parentheses."
        )


def to_csv(
    name: str, entries: Sequence[Entry], found: Mapping[str, jobs.Status], variants: Sequence[AblationRow]
) -> str:
    """Return a CSV table with a line per variant and seed; errors are empty if untrained."""
    of_variant = {variant.name: variant for variant in variants}
    rows = []
    for entry in entries:
        variant, each = of_variant[entry.row], found.get(entry.job.digest)
        done = each.summary if each and each.state == "done" else {}
        rows.append({
            "preset": name, "variant": entry.row, "seed": entry.seed, "cell": entry.job.digest,
            "error_median": 100 - done["median_last_20"] if done else "",
            "error_last": 100 - done["test_accuracy"] if done else "",
            "balanced_accuracy": done.get("balanced_accuracy", ""), "geometric_mean": done.get("geometric_mean", ""),
            "steps": done.get("steps", ""), "train_seconds": done.get("train_seconds", ""),
            **{key: variant.cost.get(key, "") for key in _COST},
            **{key: variant.counts.get(key, "") for key in ("launches", "gigabytes")},
            "device": variant.cost.get("device", ""), "commit": variant.cost.get("commit", ""),
        })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_COST = ("step_ms", "ratio", "ratio_low", "ratio_high", "images_per_second", "memory_mib")


def markdown(title: str, variants: Sequence[AblationRow]) -> str:
    """Return a table with a line per variant, and an explanation of its columns and of their noise.

    The noise is how much the full method differs from itself. Values within it are in parentheses.
    """
    full = next((variant for variant in variants if variant.name == REMIXMATCH), None)
    noise = Noise.of(full) if full else Noise()
    trained = any(variant.line.median for variant in variants)
    counted = any(variant.counts for variant in variants)
    columns: dict[str, Callable[[AblationRow], str]] = {
        "variant": lambda each: each.name,
        "step, ms": lambda each: _shown("{step_ms:.2f}", each.cost),
        "relative step time (quartiles)": lambda each: _shown(
            "({ratio:.2f}; {ratio_low:.2f} to {ratio_high:.2f})"
            if each is not full and noise.covers_ratio(each)
            else "{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})",
            each.cost,
        ),
        "images/s": lambda each: _shown("{images_per_second:,.0f}", each.cost),
        "memory, MiB": lambda each: _shown("{memory_mib:,.0f}", each.cost),
    }
    if counted:
        columns["launches"] = lambda each: _shown("{launches:.0f}", each.counts)
        columns["GB"] = lambda each: _shown("{gigabytes:.2f}", each.counts)
    if trained:
        columns["error, %"] = lambda each: statistics.shown_spread(each.line.error)
        if any(variant.line.balanced for variant in variants):
            columns["balanced accuracy, %"] = lambda each: statistics.shown_spread(each.line.balanced)
            columns["geometric mean of recalls, %"] = lambda each: statistics.shown_spread(each.line.geometric)
        columns["difference, pp (95 % CI)"] = lambda each: (
            f"({statistics.shown_difference(each.line.from_full)})"
            if noise.covers_difference(each)
            else statistics.shown_difference(each.line.from_full)
        )
        columns["price, ms per pp"] = lambda each: _shown_price(each, noise)
    rows = [[cell(variant) for cell in columns.values()] for variant in variants]
    words = [
        "Step times include the views. Each variant is timed in alternation with the full method; its relative step "
        "time is the median over the rounds.",
        noise.of_ratio(),
    ]
    if counted:
        words.append(f"Launches and GB are those of the captured step on a GPU ({TARGET}), counted without a GPU.")
    if trained:
        seeds = {seed for variant in variants for seed in variant.line.seeds}
        medians = all(variant.line.median_first for variant in variants)
        over = f"medians of the {statistics.median_of([each.line for each in variants])} evaluations"
        words.append(
            f"Errors are test errors, {over if medians else 'those of the last evaluation'}: mean ± standard deviation "
            f"over {len(seeds)} seeds. Differences from the full method are paired by seed, with a 95 % confidence "
            "interval (Student's t). The price is the additional step time per percentage point of lower error, if the "
            "slower of variant and full method has the lower error; in parentheses if the interval includes 0 or the "
            "difference is within the noise."
        )
        words.append(noise.of_difference())
        words += statistics.recall_table([variant.line for variant in variants])
    device = next((variant.cost["device"] for variant in variants if variant.cost), "")
    words.append(f"Timed on {device}." if device else "")
    return "\n\n".join([f"# {title}", table(list(columns), rows), *filter(None, words)]) + "\n"


def _shown(form: str, numbers: Mapping[str, Any]) -> str:
    """Format numbers; empty if there are none."""
    return form.format(**numbers) if numbers else ""


def _shown_price(variant: AblationRow, noise: Noise) -> str:
    """Format a price, in parentheses if the difference is not significant or within the noise; empty without one."""
    if variant.price is None or variant.line.from_full is None:
        return ""
    certain = variant.line.from_full.significant and not noise.covers_difference(variant)
    return f"{variant.price:.2f}" if certain else f"({variant.price:.2f})"
