"""Metrics: TensorBoard can read them, and write failures lose none."""

import itertools
import shutil
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.runs.progress import MetricsLog, read_metrics


def board(folder):
    """Return steps and values of `loss` as TensorBoard reads them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("first", [0, 9])
def test_tensorboard_discards_metrics_of_steps_that_are_trained_again(tmp_path, monkeypatch, first):
    """Also if a process writes its ninth and tenth file within a second."""
    monkeypatch.setattr("engine.runs.loggers.Board._files", itertools.count(first))
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.add(step, loss=0.5 * step)
    log.close()
    log = MetricsLog(tmp_path, 3)
    log.add(4, loss=7.0)
    log.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == board(tmp_path)
    assert board(tmp_path) == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 7.0)]


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("gone", ["", "metrics.jsonl", "tensorboard"])
def test_metrics_survive_removal_of_their_files(tmp_path, gone):
    folder = tmp_path / "run"
    log = MetricsLog(folder, 0)
    log._flush()  # creates TensorBoard's file
    log.add(1, loss=1.0)
    path = folder / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    log.add(2, loss=2.0)
    log.close()
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert board(folder) == [(1, 1.0), (2, 2.0)]


def test_metrics_are_written_after_a_failure_ends(tmp_path, caplog):
    def full(text):
        raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path, 0)
    log.add(1, loss=1.0)
    log._file = SimpleNamespace(write=full, close=lambda: None)
    log.add(2, loss=2.0)
    assert caplog.messages == ["cannot write metrics (No space left on device); they are kept; retrying"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    log.catch_up()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    log.close()
    assert board(tmp_path) == [(1, 1.0), (2, 2.0)]
