"""`remixmatch bench report`: tables and charts of the measured records."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import registry
from bench.registry import Bench, Table
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.records import Row
from pipelines.files import write_text

BEGIN, END = "<!-- digits table: remixmatch bench report -->", "<!-- end of digits table -->"


@dataclass
class TablesOptions:
    """Print records as Markdown tables."""

    results: Path = records.OUT
    """Folder of the records, one file per kind: digits.jsonl, throughput.jsonl and so on."""
    readme: Path | None = None
    """Replace the digits table in this page, between its markers."""
    charts: Path | None = None
    """Write PNG charts to this folder."""


def main(options: TablesOptions) -> None:
    """Print the tables of all benches that have records, update the digits table of a page, and draw charts.

    Raises:
        UserError: There are no records, or the page lacks the markers.
    """

    def path(kind: str) -> Path:
        return options.results / f"{kind}.jsonl"

    benches = [listed.load() for name, listed in registry.find().items() if path(name).exists()]
    tables = {kind: table for bench in benches for kind, table in bench.tables.items()}
    rows = {kind: found for kind in tables if (found := records.read(path(kind)))}
    if not rows:
        raise UserError(
            f"{options.results} has no records; measure some with remixmatch bench NAME, or show the project's own "
            "with --results CHECKOUT/bench/results"
        )
    # On stderr, because stdout may be redirected to a file.
    print(f"remixmatch: records from {options.results}", file=sys.stderr)
    shown = {kind: tables[kind].markdown(found) for kind, found in rows.items()}
    if options.readme and "digits" in shown:
        _replace(options.readme, shown["digits"])
    if options.charts:
        _draw(tables, rows, options.charts)
    print("\n\n".join(f"## {kind}\n\n{text}" for kind, text in shown.items()))
    counts = rows.get("count") or records.read(records.RESULTS / "count.jsonl")
    measured = rows.get("throughput", []) + rows.get("variants", [])
    if lines := predictions(counts, measured):
        print("\n## predictions\n\n" + "\n".join(lines))


def predictions(counts: Sequence[Row], measured: Sequence[Row]) -> list[str]:
    """Compare the predictions of `bench count` for a device with measurements on it, one line per case.

    Args:
        counts: Records of `bench count`; the newest of a case is used.
        measured: Records of `bench throughput` or `bench variants`; only captured steps of the paper are used.
    """
    lines = []
    papers = [
        row
        for row in counts
        if row["preset"].startswith("cifar10-") and "method" not in row and row.get("ablate", "k=").startswith("k=")
    ]
    newest = {(row["k"], row["batch"], row.get("convolutions", "cudnn")): row for row in papers}
    for row in measured:
        fused = row.get("variant") == "Triton convolutions"
        captured = row.get("variant") == "baseline" or (row.get("mode") == "graph" and row.get("views") == "synthetic")
        count = newest.get((row["k"], row["batch"], "triton" if fused else "cudnn"))
        if not (captured or fused) or count is None:
            continue
        name = row["variant"] if fused else row["bench"]
        for device in (field.removeprefix("predicted_ms_") for field in count if field.startswith("predicted_ms_")):
            if device.upper() in row["device"].upper():
                predicted, found = count[f"predicted_ms_{device}"], row["step_ms"]
                lines.append(
                    f"K = {row['k']}, B = {row['batch']}, {row['device']} ({name}): predicted {predicted:.2f} ms, "
                    f"measured {found:.2f} ms, {found / predicted:.2f} times as long"
                )
    return lines


def _replace(path: Path, table: str) -> None:
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"{path} must contain the lines '{BEGIN}' and '{END}', in this order")
    write_text(path, f"{before}{begin}\n{table}\n{end}{after}")


def _draw(tables: Mapping[str, Table], rows: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Write KIND.png for each kind of record that has a chart, for the device measured last."""
    import matplotlib  # Importing it takes a second, which tables do not need.

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for kind, chart in ((kind, tables[kind].chart) for kind in rows):
        if chart is None:
            continue
        device = rows[kind][-1]["device"]
        newest = {name: tables[name].newest(found).get(device, []) for name, found in rows.items()}
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        chart(axes, newest)
        axes.set_title(device, fontsize="small")
        figure.savefig(folder / f"{kind}.png", dpi=120)
        plt.close(figure)


BENCH = Bench(options=TablesOptions, main=main, quick="")
