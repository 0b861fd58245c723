"""`remixmatch bench report`: Markdown tables from the files under bench/results/, also put into the README."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench import records
from engine.errors import UserError

BEGIN, END = "<!-- digits table: remixmatch bench report -->", "<!-- end of digits table -->"


@dataclass
class ReportOptions:
    """Prints the results as a Markdown table."""

    results: Path = records.RESULTS / "digits.jsonl"
    """Rows of `remixmatch bench digits`."""
    readme: Path | None = None
    """Replace the table in this file, between its two markers."""


def main(options: ReportOptions) -> None:
    """Prints the table, and puts it into a README.

    Raises:
        UserError: no results yet, or a README without the markers.
    """
    rows = records.read(options.results)
    if not rows:
        raise UserError(f"{options.results} has no rows; measure them with: remixmatch bench digits")
    table = digits_table(rows)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            raise UserError(f"{options.readme} has no line '{BEGIN}' with '{END}' after it")
        before, rest = text.split(BEGIN, 1)
        options.readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    print(table)


def digits_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a method: mean and sample standard deviation over seeds, in percent.

    LabelSpreading stands with the neighbour count of the best mean, chosen on the test images in its favour.
    """
    methods: dict[str, dict[Any, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        methods[row["method"]][row.get("neighbours")].append(row)
    lines = [
        "| method | labels | seeds | test accuracy, % | lowest seed | median of last 20, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, variants in sorted(
        methods.items(), key=lambda item: (-item[1][next(iter(item[1]))][0]["labels"], item[0])
    ):
        neighbours, runs = max(variants.items(), key=lambda item: mean(r["test_accuracy"] for r in item[1]))
        name = method if neighbours is None else f"{method.split(',')[0]} of scikit-learn, {neighbours} neighbours"
        accuracies = [r["test_accuracy"] for r in runs]
        medians = [r["median_last_20"] for r in runs if "median_last_20" in r]
        cells = [
            name,
            str(runs[0]["labels"]),
            str(len(runs)),
            _spread(accuracies),
            f"{min(accuracies):.1f}",
            _spread(medians) if medians else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    newest = rows[-1]
    lines += ["", f"Measured on {newest['device']}; torch {newest['versions']['torch']}."]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"
