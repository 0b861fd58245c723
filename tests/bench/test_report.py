"""The digits bench and the table made from its rows."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest

from bench import cli, report
from bench.runs import digits
from engine import run
from engine.errors import UserError
from engine.measuring import provenance, records

ROOT = Path(__file__).parents[2]


def row(method, seed, accuracy, **more):
    common = dict(labels=40, train_seconds=10.0, device="CPU", versions={"torch": "2.0"})
    return dict(method=method, seed=seed, test_accuracy=accuracy) | common | more


def test_table_has_mean_and_sample_deviation_over_seeds():
    rows = [row("digits-40", seed, accuracy, median_last_20=90.0) for seed, accuracy in enumerate((94.0, 96.0, 98.0))]
    table = report.digits_table(rows).splitlines()
    assert table[2] == "| digits-40 | 40 | 3 | 96.0 ± 2.0 | 94.0 | 1 | 90.0 ± 0.0 |"


def test_every_machine_has_a_table_of_its_own():
    devices = ("CPU, A, 1 threads of 2", "CPU, A, 2 threads of 2", "CPU, B, 1 threads of 2")
    one, two = report.digits_table([row("digits-40", 0, 95.0, device=device) for device in devices]).split("\n\n| ")
    assert "| digits-40 | 40 | 2 | 95.0 ± 0.0 |" in one
    assert one.endswith("Measured on CPU, A, 2 threads of 2; torch 2.0.")
    assert "| digits-40 | 40 | 1 | 95.0 |" in two and two.endswith("Measured on CPU, B, 1 threads of 2; torch 2.0.")


def test_label_spreading_stands_with_its_best_neighbour_count():
    rows = [
        row("LabelSpreading, 40 labels", s, a + n, neighbours=n) for n in (5, 7) for s, a in enumerate((80.0, 81.0))
    ]
    lines = [line for line in report.digits_table(rows).splitlines() if "LabelSpreading" in line]
    assert len(lines) == 1 and "7 neighbours" in lines[0] and "87.5 ± 0.7" in lines[0]


def test_report_needs_rows_and_markers(tmp_path, capsys):
    with pytest.raises(UserError, match="has no rows; measure them with"):
        report.main(report.ReportOptions(results=tmp_path))
    records.append(tmp_path / "digits.jsonl", row("digits-40", 0, 96.0, median_last_20=95.0))
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(UserError, match="has no line"):
        report.main(report.ReportOptions(results=tmp_path, readme=readme))
    readme.write_text(f"a\n{report.BEGIN}\nold\n{report.END}\nb\n")
    report.main(report.ReportOptions(results=tmp_path, readme=readme))
    text = readme.read_text()
    assert text.startswith(f"a\n{report.BEGIN}\n| method") and text.endswith(f"{report.END}\nb\n") and "old" not in text
    assert capsys.readouterr().out == "## digits\n\n" + text[2:].split("\n", 1)[1].split(f"\n{report.END}")[0] + "\n"


def measured(bench, device="CPU", **values):
    """Rows of a performance bench that hold what tells them apart, and a few figures."""
    known = dict(
        kernel="guess",
        size="step",
        provider="eager",
        backend="pil",
        rows=8,
        side=8,
        k=1,
        batch=2,
        mode="eager",
        micro_batches=1,
    )
    return dict(
        known, bench=bench, preset="bench", optimizer="torch", views="dali", data="real", precision="fp32",
        device=device, commit="abc", versions={"torch": "2.0", "triton": "3.0"},
    ) | values  # fmt: skip


def test_the_newest_row_of_a_case_stands_a_device_a_table():
    rows = [
        measured("pipelines", views_per_second=10_000.0, ratio_to_pil=1.0),
        measured("pipelines", backend="fused", views_per_second=70_000.0, ratio_to_pil=7.0),
        measured("pipelines", views_per_second=11_000.0, ratio_to_pil=1.0),
        measured("pipelines", "H200", views_per_second=12_000.0, ratio_to_pil=1.0),
    ]
    first, second = report.table("pipelines", rows).split("\n\n| ")
    assert first.splitlines()[2:4] == ["| pil |  | 11,000 |  | 1.00 |  |", "| fused |  | 70,000 |  | 7.00 |  |"]
    assert first.endswith("Measured on CPU; torch 2.0, triton 3.0; abc.")
    assert second.splitlines()[2] == "| pil |  | 12,000 |  | 1.00 |  |" and "Measured on H200" in second


def test_what_was_not_measured_is_left_empty():
    row = measured("throughput", step_ms=2.0, floor_ms=None, images_per_second=1234.5)
    assert report.table("throughput", [row]).splitlines()[2] == (
        "| bench | 1 | 2 | eager | dali | 1 | fp32 | torch |  | 2.00 |  | 1,234 |  |  |  |  |"
    )


def test_readme_has_a_performance_table_where_it_has_markers(tmp_path):
    begin, end = report.PERFORMANCE
    records.append(tmp_path / "pipelines.jsonl", measured("pipelines", views_per_second=1.0))
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    report.main(report.ReportOptions(results=tmp_path, readme=readme))
    assert readme.read_text() == "no markers"
    readme.write_text(f"a\n{begin}\nold\n{end}\nb\n")
    report.main(report.ReportOptions(results=tmp_path, readme=readme))
    text = readme.read_text()
    assert "| pil |" in text and "old" not in text and text.startswith(f"a\n{begin}\n**pipelines**\n\n|")
    assert text.endswith(f"abc.\n{end}\nb\n")


def test_charts_are_drawn_of_what_has_rows(tmp_path):
    folder = tmp_path / "charts"
    for k in (1, 2):
        records.append(tmp_path / "throughput.jsonl", measured("throughput", k=k, images_per_second=100.0 * k))
        records.append(tmp_path / "baseline.jsonl", measured("baseline", k=k, images_per_second=10.0 * k))
    records.append(tmp_path / "kernels.jsonl", measured("kernels", share_of_copy=0.5))
    report.main(report.ReportOptions(results=tmp_path, charts=folder))
    assert {path.name for path in folder.iterdir()} == {"throughput.png", "kernels.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    records.append(tmp_path / "pipelines.jsonl", measured("pipelines", views_per_second=1.0))
    report.main(report.ReportOptions(results=tmp_path, charts=folder))
    assert (folder / "pipelines.png").exists()


def test_rows_are_those_of_the_current_folder_or_else_the_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report.main(report.ReportOptions())
    out, err = capsys.readouterr()
    assert out.startswith("## digits\n") and err == f"remixmatch: rows of {records.RESULTS}\n"
    records.append(records.OUT / "digits.jsonl", row("mine", 0, 96.0))
    report.main(report.ReportOptions())
    out, err = capsys.readouterr()
    assert "| mine | 40 | 1 | 96.0 |" in out and "digits-40" not in out and err == "remixmatch: rows of bench-results\n"


@pytest.mark.parametrize("bench", [name for name in cli.BENCHES if name != "report"])
def test_a_bench_writes_to_the_current_folder_unless_told_otherwise(bench):
    options = getattr(importlib.import_module(cli.module(bench)), cli.BENCHES[bench][0])()
    assert options.out == Path("bench-results", f"{bench}.jsonl")


def test_the_commit_is_that_of_our_own_repository(tmp_path, monkeypatch):
    """Not that of a repository in whose environment the package is installed."""
    monkeypatch.delenv("REMIXMATCH_COMMIT", raising=False)
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c", "--allow-empty"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert provenance.commit.__wrapped__() == "unknown"


def test_the_page_of_results_shows_the_table_of_the_committed_rows():
    rows = records.read(records.RESULTS / "digits.jsonl")
    assert rows
    assert f"{report.BEGIN}\n{report.digits_table(rows)}\n{report.END}" in (ROOT / "docs" / "results.md").read_text()


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
