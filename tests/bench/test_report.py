"""Tables and charts of measured records."""

import json
import subprocess

import pytest

from bench import registry, report
from engine.errors import UserError
from engine.measuring import provenance, records

TABLES = {kind: table for listed in registry.find().values() for kind, table in listed.load().tables.items()}


def row(method, seed, accuracy, **more):
    common = dict(labels=40, train_seconds=10.0, device="CPU", versions={"torch": "2.0"})
    return dict(method=method, seed=seed, test_accuracy=accuracy) | common | more


def test_report_requires_records_and_markers(tmp_path, capsys):
    with pytest.raises(UserError, match="has no records; measure some with remixmatch bench NAME"):
        report.main(report.TablesOptions(results=tmp_path))
    records.append(tmp_path / "digits.jsonl", row("digits-40", 0, 96.0, median_last_20=95.0))
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(UserError, match="must contain the lines"):
        report.main(report.TablesOptions(results=tmp_path, readme=readme))
    readme.write_text(f"a\n{report.BEGIN}\nold\n{report.END}\nb\n")
    report.main(report.TablesOptions(results=tmp_path, readme=readme))
    text = readme.read_text()
    assert text.startswith(f"a\n{report.BEGIN}\n| method") and text.endswith(f"{report.END}\nb\n") and "old" not in text
    assert capsys.readouterr().out == "## digits\n\n" + text[2:].split("\n", 1)[1].split(f"\n{report.END}")[0] + "\n"


def measured(bench, device="CPU", **values):
    """Return a record of a performance bench, with the fields of its key and a few values."""
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


def test_tables_show_the_newest_record_of_a_case_per_device():
    rows = [
        measured("pipelines", views_per_second=10_000.0, ratio_to_pil=1.0),
        measured("pipelines", backend="fused", views_per_second=70_000.0, ratio_to_pil=7.0),
        measured("pipelines", views_per_second=11_000.0, ratio_to_pil=1.0),
        measured("pipelines", "H200", views_per_second=12_000.0, ratio_to_pil=1.0),
    ]
    first, second = TABLES["pipelines"].markdown(rows).split("\n\n| ")
    assert first.splitlines()[2:4] == [
        "| pil |  | 11,000 |  | 1.00 |  |  |  |",
        "| fused |  | 70,000 |  | 7.00 |  |  |  |",
    ]
    assert first.endswith("Measured on CPU; torch 2.0, triton 3.0; abc.")
    assert second.splitlines()[2] == "| pil |  | 12,000 |  | 1.00 |  |  |  |" and "Measured on H200" in second


def test_missing_values_are_left_empty():
    row = measured("throughput", step_ms=2.0, floor_ms=None, images_per_second=1234.5)
    assert TABLES["throughput"].markdown([row]).splitlines()[2] == (
        "| bench | 1 | 2 | eager | dali | 1 | fp32 | torch |  | 2.00 |  | 1,234 |  |  |  |  |"
    )


def test_charts_are_drawn_for_existing_records(tmp_path):
    folder = tmp_path / "charts"
    for k in (1, 2):
        records.append(tmp_path / "throughput.jsonl", measured("throughput", k=k, images_per_second=100.0 * k))
        records.append(tmp_path / "baseline.jsonl", measured("baseline", k=k, images_per_second=10.0 * k))
    records.append(tmp_path / "kernels.jsonl", measured("kernels", share_of_copy=0.5))
    report.main(report.TablesOptions(results=tmp_path, charts=folder))
    assert {path.name for path in folder.iterdir()} == {"throughput.png", "kernels.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    records.append(tmp_path / "pipelines.jsonl", measured("pipelines", views_per_second=1.0))
    report.main(report.TablesOptions(results=tmp_path, charts=folder))
    assert (folder / "pipelines.png").exists()


def test_records_come_from_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"bench-results has no records; .* --results CHECKOUT/bench/results"):
        report.main(report.TablesOptions())
    records.append(records.OUT / "digits.jsonl", row("mine", 0, 96.0))
    report.main(report.TablesOptions())
    out, err = capsys.readouterr()
    assert "| mine | 40 | 1 | 96.0 |" in out and err == "remixmatch: records from bench-results\n"


def test_the_commit_is_that_of_the_engines_repository(tmp_path, monkeypatch):
    """If the package is installed inside another repository, that repository's commit is not used."""
    monkeypatch.delenv("REMIXMATCH_COMMIT", raising=False)
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c", "--allow-empty"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit.__wrapped__() == "unknown"


def test_every_committed_record_says_how_it_was_measured():
    for path in records.RESULTS.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            assert {"bench", "device", "versions", "commit", "command", "date"} <= json.loads(line).keys(), path


def test_the_fused_step_is_compared_with_its_own_prediction():
    case = {"preset": "cifar10-250", "k": 8, "batch": 64}
    counts = [{**case, "predicted_ms_h100": 8.0}, {**case, "convolutions": "triton", "predicted_ms_h100": 5.0}]
    measured = [
        {"bench": "variants", "variant": name, "k": 8, "batch": 64, "device": "NVIDIA H100", "step_ms": milliseconds}
        for name, milliseconds in (("baseline", 8.8), ("Triton convolutions", 6.0), ("one stream", 9.0))
    ]
    assert report.predictions(counts, measured) == [
        "K = 8, B = 64, NVIDIA H100 (variants): predicted 8.00 ms, measured 8.80 ms, 1.10 times as long",
        "K = 8, B = 64, NVIDIA H100 (Triton convolutions): predicted 5.00 ms, measured 6.00 ms, 1.20 times as long",
    ]
