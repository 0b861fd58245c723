"""The digits bench and the table made from its records."""

from bench import report
from bench.runs import digits
from engine.measuring import records
from tests.pages import TEXTS


def row(method, seed, accuracy, **more):
    common = dict(labels=40, train_seconds=10.0, device="CPU", versions={"torch": "2.0"})
    return dict(method=method, seed=seed, test_accuracy=accuracy) | common | more


def test_table_has_mean_and_sample_deviation_over_seeds():
    rows = [row("digits-40", seed, accuracy, median_last_20=90.0) for seed, accuracy in enumerate((94.0, 96.0, 98.0))]
    table = digits.digits_table(rows).splitlines()
    assert table[2] == "| digits-40 | 40 | 3 | 96.0 ± 2.0 | 94.0 | 1 | 90.0 ± 0.0 |"


def test_every_machine_has_its_own_table():
    devices = ("CPU, A, 1 threads of 2", "CPU, A, 2 threads of 2", "CPU, B, 1 threads of 2")
    one, two = digits.digits_table([row("digits-40", 0, 95.0, device=device) for device in devices]).split("\n\n| ")
    assert "| digits-40 | 40 | 2 | 95.0 ± 0.0 |" in one
    assert one.endswith("Measured on CPU, A, 2 threads of 2; torch 2.0.")
    assert "| digits-40 | 40 | 1 | 95.0 |" in two and two.endswith("Measured on CPU, B, 1 threads of 2; torch 2.0.")


def test_label_spreading_is_shown_with_its_best_neighbor_count():
    rows = [
        row("LabelSpreading, 40 labels", s, a + n, neighbours=n) for n in (5, 7) for s, a in enumerate((80.0, 81.0))
    ]
    lines = [line for line in digits.digits_table(rows).splitlines() if "LabelSpreading" in line]
    assert len(lines) == 1 and "7 neighbors" in lines[0] and "87.5 ± 0.7" in lines[0]


def test_the_results_page_shows_the_table_of_the_committed_records():
    rows = records.read(records.RESULTS / "digits.jsonl")
    assert rows
    assert f"{report.BEGIN}\n{digits.digits_table(rows)}\n{report.END}" in TEXTS["docs/results.md"]


def test_bench_measures_only_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "NEIGHBORS", (15,))
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
