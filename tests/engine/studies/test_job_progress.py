"""Progress of a table's jobs: status, time left, and predictions for a GPU."""

import dataclasses
import re

import pytest

from engine.config.methods import with_method
from engine.config.presets import preset
from engine.config.scaling import trained_samples
from engine.measuring import records
from engine.studies import job_progress, reproduce
from engine.studies.jobs import Status
from tests.engine.studies.made_jobs import entries, finish
from tests.terminals import on_terminal

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_status_changes_are_printed_one_per_line(tmp_path, capsys):
    found = entries("digits", rows=("remixmatch", "uda"), seeds=(0, 1))
    done = Status("done", 2500, {"median_last_20": 96.5, "test_accuracy": 97.0, "train_seconds": 60.0})
    show = job_progress.Progress([*found], 2)
    waiting = [Status("waiting")] * 4
    for statuses in (waiting, [Status("running", host="here"), *waiting[1:]], [Status("running", 50), *waiting[1:]]):
        show(statuses)
    show([done, Status("failed", reason="exit code 2: no [memory]"), *waiting[2:]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0] == f"[1 running, 3 waiting] {found[0].job.name}: running on here"
    assert ": done, error 3.50 % (median of the last 20 evaluations), 3.00 % after the last step; about " in lines[1]
    assert ": failed: exit code 2: no [memory]" in lines[2]
    finish(tmp_path / "out", found[0], 97.0)
    reproduce.main(
        ["digits", "--methods", "remixmatch", "--seeds", "0", "1", "--status", "--out", str(tmp_path / "out")]
    )
    first, second, counts = capsys.readouterr().out.splitlines()
    assert first.endswith("done, error 4.00 % (median of the last 20 evaluations), 3.00 % after the last step")
    assert second.endswith(": waiting")
    assert counts == "1 done, 1 waiting; about 10 s left"
    grid = job_progress.Progress(found, 1)._grid([done, *waiting[1:]])
    assert grid.row_count == 4 and "1 done, 3 waiting" in grid.title


JOBS = """
from engine.studies.job_progress import Progress
from engine.studies.jobs import Status
from tests.engine.studies.made_jobs import entries
found = entries("digits", rows=("remixmatch", "uda"), seeds=(0, 1))
reason = "exit code 2: " + "a long reason " * 8 + "end"
done = Status("done", 2500, {"median_last_20": 96.5, "test_accuracy": 97.0, "train_seconds": 60.0})
with Progress(found, 1) as show:
    show([Status("waiting")] * 4)
    show([done, Status("failed", reason=reason), Status("running", 1250, host="another"), Status("waiting")])
"""


def test_a_terminal_of_80_columns_has_one_line_per_job():
    """The whole reason of a failure follows the table."""
    last = on_terminal(JOBS).rpartition("1 done, 1 running, 1 failed, 1 waiting")[2]
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in last.splitlines()]
    # 30 s for half a run of ReMixMatch, and 80 s for one of UDA, which trains on 8 B samples instead of 6 B.
    assert "about 110 s left" in lines[0]
    rows = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith("  digits-40")]
    runs = [f"digits-40-{row}-seed{seed}" for seed in (0, 1) for row in ("remixmatch", "uda")]
    assert [row[0] for row in rows] == runs
    assert rows[0][1] == "done, error 3.50 %" and rows[1][1].startswith("failed: exit code 2: a long reason a long")
    assert rows[2][1] == "running, step 1250/2500 on another" and rows[3][1] == "waiting"
    assert lines[-1].endswith("end") and ": failed: exit code 2: " in lines[-1]


def test_a_dumb_terminal_gets_a_line_per_change():
    printed = on_terminal(JOBS, TERM="dumb")
    assert "\x1b" not in printed and printed.count("\r\n") == 3 and "step 1250 of 2500" in printed


def test_time_left_is_proportional_to_trained_samples():
    base = preset("cifar10-250")
    half = dataclasses.replace(base, steps=base.steps // 2)
    done = Status("done", base.steps, {"train_seconds": 100.0})
    assert job_progress.time_left([base, half], [Status("waiting")] * 2, 1) is None
    assert job_progress.time_left([base, half], [done, Status("waiting")], 1) == pytest.approx(50)
    assert job_progress.time_left([base, half], [done, Status("running", base.steps // 4)], 2) == pytest.approx(12.5)
    assert job_progress.time_left([base, half], [done, Status("failed")], 1) == 0
    # Before any is finished: 2 ms per step of a running job with a quarter of its steps done.
    running = Status("running", base.steps // 4, step_ms=2.0)
    seconds = base.steps * 2e-3 * (3 / 4 + 1 / 2)
    assert job_progress.time_left([base, half], [running, Status("waiting")], 1) == pytest.approx(seconds)
    assert job_progress.time_left([base, half], [running, done], 1) == pytest.approx(2 * 100 * 3 / 4)
    assert trained_samples(base) == 64 * 12 and trained_samples(dataclasses.replace(base, method="supervised")) == 64
    assert trained_samples(dataclasses.replace(base, anchor="guess-only", mu=7, k=1, w_u1=0.0, w_rot=0.0)) == 64 * 8
    assert [job_progress.duration(seconds) for seconds in (5, 600, 36000)] == ["5 s", "10 min", "10 h 0 min"]


def test_predicted_times_pass_through_those_of_bench_count():
    rows = records.read(records.RESULTS / "count.jsonl")
    rows = [row for row in rows if not row.keys() & {"method", "ablate"}]  # K = 1 and 8.
    base, one, three = (dataclasses.replace(preset("cifar10-250"), k=k, seed=5) for k in (8, 1, 3))
    known = {row["k"]: row["predicted_ms_h100"] for row in rows if "convolutions" not in row}
    hours = [job_progress.predicted_hours(config, "h100", rows) for config in (one, three, base)]
    assert hours[0] == pytest.approx(known[1] * 2**20 / 3.6e6) and hours[2] == pytest.approx(known[8] * 2**20 / 3.6e6)
    assert hours[1] == pytest.approx(hours[0] + (hours[2] - hours[0]) * 2 / 7)
    # FixMatch is counted with 8 B samples; it has 22 B at K = 3. ReMixMatch has 7 B more at K = 8 than at K = 1.
    fixmatch = with_method(base, "fixmatch")
    counted = {"bench": "count", "preset": "cifar10-250", "method": "fixmatch", "k": 1, "batch": 64}
    more = [*rows, counted | {"predicted_ms_h100": 9.0}]
    found = [job_progress.predicted_hours(dataclasses.replace(fixmatch, k=k), "h100", more) for k in (1, 3)]
    expected = [9.0, 9.0 + 14 / 7 * (known[8] - known[1])]
    assert found == pytest.approx([ms * 2**20 / 3.6e6 for ms in expected])
    assert job_progress.predicted_hours(preset("stl10-1000"), "h100", rows) is None
    assert job_progress.predicted_hours(preset("digits-40"), "h100", rows) is None
    assert job_progress.predicted_hours(base, "h100", []) is None


def test_the_plan_is_marked_as_a_prediction(capsys):
    reproduce.main(["svhn", "--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("svhn-250-remixmatch-seed1-") and "not measured" in lines[-1]
    assert len(lines) == 90 + 3 + 6 + 4 + 1  # Jobs, presets, methods, numbers of workers, total.


def test_a_plan_without_predictions_states_no_hours(capsys):
    reproduce.main(["digits", "--plan", "--methods", "uda", "softmatch", "--workers", "2"])
    *jobs, uda, softmatch, total = capsys.readouterr().out.splitlines()
    assert len(jobs) == 10 and all(line.endswith("no prediction") for line in jobs)
    assert (uda, softmatch) == ("row uda: 5 jobs, no prediction", "row softmatch: 5 jobs, no prediction")
    assert total.startswith("10 jobs; no prediction") and "0.0" not in total


def test_a_plan_has_subtotals_and_the_wall_clock_time(capsys, monkeypatch):
    """Jobs of 3, 5, 2, 3, 5 and 2 hours: seeds 0 and 1 of ReMixMatch, MixMatch and UDA."""
    hours = {"remixmatch": 3.0, "mixmatch": 5.0, "uda": 2.0}
    monkeypatch.setattr(job_progress, "predicted_hours", lambda config, gpu, rows: hours[config.method])
    words = ["cifar10", "--plan", "--methods", *hours, "--preset", "cifar10-250", "--seeds", "1", "2"]
    reproduce.main([*words, "--workers", "2"])
    lines = capsys.readouterr().out.splitlines()
    order = [re.search(r"-(remixmatch|mixmatch|uda)-", line)[1] for line in lines[:6]]
    assert lines[6:9] == [f"row {row}: 2 jobs, {2 * hours[row]:.1f} H100 hours" for row in order[:3]]
    assert order == ["remixmatch", "mixmatch", "uda"] * 2
    # The first worker takes 3, 2, 3, and 2 hours, the second 5 and 5.
    assert lines[9] == "2 at a time (--workers 2): 10.0 hours of wall-clock time" and len(lines) == 11
    assert lines[10].startswith("6 jobs; 20.0 H100 hours without evaluations")
    reproduce.main(words)
    times = re.findall(r"(\d) at a time .*: ([\d.]+) hours", capsys.readouterr().out)
    # With four, the fifth job (of 5 hours) starts after 2 hours, and the sixth (of 2) after 3.
    assert times == [("1", "20.0"), ("2", "10.0"), ("4", "7.0"), ("8", "5.0")]
