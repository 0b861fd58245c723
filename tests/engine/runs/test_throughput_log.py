"""Throughput in the metrics: values by hand, with a clock that only the tests move."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import run
from engine.method.losses import LOSSES
from engine.runs import throughput
from engine.runs.progress import THROUGHPUT, ProgressLine, read_metrics
from engine.runs.setup import setup_run
from engine.runs.throughput import Throughput
from engine.training import trainer
from engine.training.step import METRICS
from tests.pages import TEXTS
from tests.processes import repeatable_metrics


@pytest.fixture
def clock(replace_clock):
    return replace_clock(throughput, "perf_counter", 100.0)


def test_steps_on_a_cpu_end_when_they_were_launched(clock, monkeypatch):
    monkeypatch.setattr(throughput, "peak_memory", lambda: 512.5)
    timed = Throughput(96, 0.002, torch.device("cpu"))
    clock.now = 110.0  # Compilation, which does not count.
    timed.start(40)
    clock.now = 114.0
    timed.launched()  # Four seconds for two steps.
    clock.now = 117.0
    with timed.paused():
        clock.now = 1000.0
    clock.now = 1002.0
    timed.launched()  # Three and two seconds for another five.
    clock.now = 1050.0
    assert timed.measure(42) == {"images_per_second": 48.0, "step_ms": 2000.0, "memory_mib": 512.5, "lr": 0.002}
    assert timed.measure(47) == {"images_per_second": 96.0, "step_ms": 1000.0, "memory_mib": 512.5, "lr": 0.002}


def test_steps_on_a_gpu_end_when_their_metrics_are_read(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    timed = Throughput(100, 0.1, torch.device("cuda"))
    clock.now = 101.0
    timed.launched()  # Launched long before it is done.
    clock.now = 104.0
    assert timed.measure(2) == {"images_per_second": 50.0, "step_ms": 2000.0, "memory_mib": 3072.0, "lr": 0.1}
    clock.now = 105.0
    assert timed.measure(4)["step_ms"] == 500.0


def test_a_pause_ends_with_an_exception(clock):
    timed = Throughput(1, 0.1, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), timed.paused():
        clock.now = 130.0
        raise ZeroDivisionError
    clock.now = 131.0
    timed.launched()
    assert timed.measure(1)["step_ms"] == 1000.0


@pytest.fixture
def slow_everything(clock, monkeypatch):
    """Let a step take 2 s, an evaluation 1000 s, a checkpoint 500 s and a callback 300 s."""

    def slowed(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*arguments, **options):
            clock.now += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    slowed(trainer.Trainer, "advance", 2.0)
    slowed(trainer, "evaluate", 1000.0)
    slowed(trainer.Trainer, "save", 500.0)

    def callback(step, metrics):
        clock.now += 300.0

    return callback


def test_evaluations_checkpoints_and_callbacks_do_not_count(tiny, tmp_path, slow_everything):
    """Also after resuming, whose first steps are timed from there."""
    config = tiny(steps=12, log_every=3, eval_every=2, checkpoint_every=4)
    setup = setup_run(config, tmp_path / "run")
    run.train(setup, quiet=True, callback=slow_everything)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "step_ms" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12] and all(row.keys() == {"step", *THROUGHPUT} for row in rows)
    assert {row["step_ms"] for row in rows} == {2000.0} and {row["lr"] for row in rows} == {0.002}
    # 8 labeled images, and 8 each of u_weak, u_1, u_2, the unmixed u_1 and the rotated u_1, in 2 s.
    assert {row["images_per_second"] for row in rows} == {8 * 6 / 2}
    assert all(50 < row["memory_mib"] < 50_000 for row in rows)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in THROUGHPUT:
        values = [(row["step"], pytest.approx(row[name])) for row in rows]
        assert [(event.step, event.value) for event in events.Scalars(name)] == values
    more = tiny(steps=18, log_every=3, eval_every=2, checkpoint_every=4)
    run.train(setup_run(more, tmp_path / "run", resume=True), quiet=True)
    later = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "step_ms" in row]
    assert later[:4] == rows and [(row["step"], row["step_ms"]) for row in later[4:]] == [(15, 2000.0), (18, 2000.0)]


def test_the_callback_receives_every_new_line_between_two_steps(tiny, tmp_path):
    seen = []
    config = tiny(steps=6, log_every=2, eval_every=3, checkpoint_every=100)

    def callback(step, metrics):
        seen.append({"step": step, **metrics})
        metrics.clear()  # This has no effect on what is written.

    run.train(setup_run(config, tmp_path / "run"), quiet=True, callback=callback)
    assert seen == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in seen if "test_accuracy" in row] == [3, 6]
    del seen[:]
    run.train(setup_run(tiny(steps=8, log_every=2, eval_every=3, checkpoint_every=100), tmp_path / "run", True),
              quiet=True, callback=callback)  # fmt: skip
    assert {row["step"] for row in seen} == {8}


@pytest.mark.parametrize("error", [KeyError("stop"), KeyboardInterrupt()])
def test_an_exception_of_the_callback_propagates_and_the_step_is_saved(tiny, tmp_path, error):
    config = tiny(steps=8, log_every=1, eval_every=4, checkpoint_every=100, lag=4, view_steps=1)
    run.train(setup_run(config, tmp_path / "whole"), quiet=True)

    def callback(step, metrics):
        if "test_loss" in metrics:
            raise error

    with pytest.raises(type(error)) as raised:
        run.train(setup_run(config, tmp_path / "run"), quiet=True, callback=callback)
    assert raised.value is error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004.pt"]
    assert not (tmp_path / "run" / "summary.json").exists()
    run.train(setup_run(config, tmp_path / "run", resume=True), quiet=True)
    assert repeatable_metrics(tmp_path / "run") == repeatable_metrics(tmp_path / "whole") != []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 8


def test_the_page_names_all_metrics():
    text = TEXTS["docs/profile.md"].partition("## Follow a run")[2]
    for name in (*LOSSES, *METRICS, *THROUGHPUT, "test_accuracy", "test_loss"):
        assert f"`{name}`" in text or name == "stop", name


def test_the_progress_line_shows_the_newest_accuracy_first(tiny, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(ProgressLine, "update", lambda self, step, values: shown.append((step, dict(values))))
    config = tiny(steps=4, log_every=1, eval_every=2, checkpoint_every=100)
    run.train(setup_run(config, tmp_path / "run"), quiet=True)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (middle, end) = [row["test_accuracy"] for row in rows if "test_accuracy" in row]
    names = ("loss", "loss_x", "loss_u", "loss_u1", "loss_rot")
    losses = {row["step"]: [row[name] for name in names] for row in rows if "loss" in row}
    assert [step for step, _ in shown] == [1, 2, 2, 3, 4, 4]
    assert list(shown[0][1].values()) == losses[1] and list(shown[2][1].values()) == [middle, *losses[2]]
    assert shown[-1] == (4, {"test %": end} | dict(zip(names, losses[4], strict=True)))
