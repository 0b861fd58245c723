"""The digits bench and the table made from its rows."""

import json
from pathlib import Path

import pytest

from bench import digits, records, report
from engine.errors import UserError

ROOT = Path(__file__).parents[2]


def row(method, seed, accuracy, **more):
    common = dict(labels=40, train_seconds=10.0, device="CPU", versions={"torch": "2.0"})
    return dict(method=method, seed=seed, test_accuracy=accuracy) | common | more


def test_table_has_mean_and_sample_deviation_over_seeds():
    rows = [row("digits-40", seed, accuracy, median_last_20=90.0) for seed, accuracy in enumerate((94.0, 96.0, 98.0))]
    table = report.digits_table(rows).splitlines()
    assert table[2] == "| digits-40 | 40 | 3 | 96.0 ± 2.0 | 94.0 | 90.0 ± 0.0 |"


def test_label_spreading_stands_with_its_best_neighbour_count():
    rows = [
        row("LabelSpreading, 40 labels", s, a + n, neighbours=n) for n in (5, 7) for s, a in enumerate((80.0, 81.0))
    ]
    lines = [line for line in report.digits_table(rows).splitlines() if "LabelSpreading" in line]
    assert len(lines) == 1 and "7 neighbours" in lines[0] and "87.5 ± 0.7" in lines[0]


def test_report_needs_rows_and_markers(tmp_path, capsys):
    with pytest.raises(UserError, match="has no rows; measure them with"):
        report.main(report.ReportOptions(results=tmp_path / "none.jsonl"))
    records.append(tmp_path / "rows.jsonl", row("digits-40", 0, 96.0, median_last_20=95.0))
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(UserError, match="has no line"):
        report.main(report.ReportOptions(results=tmp_path / "rows.jsonl", readme=readme))
    readme.write_text(f"a\n{report.BEGIN}\nold\n{report.END}\nb\n")
    report.main(report.ReportOptions(results=tmp_path / "rows.jsonl", readme=readme))
    text = readme.read_text()
    assert text.startswith(f"a\n{report.BEGIN}\n| method") and text.endswith(f"{report.END}\nb\n") and "old" not in text
    assert capsys.readouterr().out.strip() in text


def test_readme_shows_the_table_of_the_committed_results():
    rows = records.read(records.RESULTS / "digits.jsonl")
    assert rows
    assert f"{report.BEGIN}\n{report.digits_table(rows)}\n{report.END}" in (ROOT / "README.md").read_text()


def test_every_committed_row_says_how_it_was_measured():
    for path in records.RESULTS.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            assert {"bench", "device", "versions", "commit", "command", "date"} <= json.loads(line).keys(), path


def test_bench_measures_what_is_missing_and_only_that(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "NEIGHBOURS", (15,))
    out = tmp_path / "digits.jsonl"
    options = digits.DigitsOptions(presets=("digits-40-supervised",), seeds=(0,), out=out, steps=2)
    digits.main(options)
    rows = records.read(out)
    assert [r["method"] for r in rows] == [
        "LabelSpreading, 40 labels", "LabelSpreading, 10 labels", "digits-40-supervised",
    ]  # fmt: skip
    assert rows[0]["test_accuracy"] > 80 and rows[2]["steps"] == 2 and rows[2]["peak_memory_mib"] > 0
    digits.main(options)
    assert records.read(out) == rows
