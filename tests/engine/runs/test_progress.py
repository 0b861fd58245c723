"""What a run tells: TensorBoard reads what was written, and trouble with the folder loses no row."""

import itertools
import shutil
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.runs.progress import MetricsLog, read_metrics


def board(folder):
    """Steps and values of `loss` as TensorBoard reads them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("first", [0, 9])
def test_tensorboard_reads_the_rows_and_forgets_those_of_steps_that_were_trained_again(tmp_path, monkeypatch, first):
    """Also where a process's tenth file follows its ninth within a second."""
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
def test_rows_outlive_their_files(tmp_path, gone):
    folder = tmp_path / "run"
    log = MetricsLog(folder, 0)
    log._flush()  # TensorBoard's file is there from now on
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


def test_a_row_that_could_not_be_written_is_there_after_catching_up(tmp_path, caplog):
    def full(text):
        raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path, 0)
    log.add(1, loss=1.0)
    log._file = SimpleNamespace(write=full, close=lambda: None)
    log.add(2, loss=2.0)
    assert caplog.messages == ["metrics cannot be written (No space left on device); they are kept and tried again"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    log.catch_up()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    log.close()
    assert board(tmp_path) == [(1, 1.0), (2, 2.0)]
