"""Data saved for reports: bounded, independent of resuming, and without effect on training."""

import dataclasses
import errno
import itertools

import numpy as np
import pytest
import torch

from engine import run
from engine.config.config import load_config
from engine.config.presets import preset
from engine.inference import evaluation
from engine.runs import history
from engine.runs.history import History, guessed_images, read_history, read_results
from engine.runs.progress import read_metrics
from engine.runs.setup import RunSetup, setup_run
from engine.training import diagnostics
from engine.training.state import make_state
from pipelines.ctaugment import BINS, NAMES, initial_weights
from pipelines.data.datasets import digits
from pipelines.data.splits import RULES
from tests.logs import no_warnings
from tests.processes import repeatable_metrics


def steps_of(folder):
    return [row["step"] for row in read_history(folder)]


def fill(folder, first, last, begin=0, every=10):
    with no_warnings():
        kept = History(folder, begin, every)
        for step in range(first, last + 1, every):
            kept.add(step, {"p_model": [step / 7, 0.5]})


def test_every_second_record_is_dropped_and_the_newest_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST_ROWS", 20)
    fill(tmp_path, 10, 10 * history.MOST_ROWS)
    assert steps_of(tmp_path) == list(range(10, 10 * history.MOST_ROWS + 1, 10))
    fill(tmp_path / "more", 10, 10 * history.MOST_ROWS + 10)
    found = steps_of(tmp_path / "more")
    assert found == [*range(20, 10 * history.MOST_ROWS + 1, 20), 10 * history.MOST_ROWS + 10]
    assert read_history(tmp_path / "more")[0]["p_model"] == [20 / 7, 0.5]


@pytest.mark.parametrize("rows", [3, 19, 20, 21, 41, 90])
@pytest.mark.parametrize("back", [0, 1, 7, 25])
def test_a_resumed_run_has_the_history_of_an_undisturbed_one(tmp_path, monkeypatch, rows, back):
    """From any step, including steps before records that were dropped later."""
    monkeypatch.setattr(history, "MOST_ROWS", 20)
    end = 10 * rows + 300
    fill(tmp_path / "one", 10, end)
    fill(tmp_path / "two", 10, 10 * rows)
    step = max(10 * (rows - back), 0)
    fill(tmp_path / "two", step + 10, end, begin=step)
    assert steps_of(tmp_path / "two")[-1] == end
    assert (tmp_path / "one" / history.HISTORY).read_bytes() == (tmp_path / "two" / history.HISTORY).read_bytes()


def test_resuming_drops_records_of_later_steps_at_once(tmp_path):
    fill(tmp_path, 10, 100)
    with no_warnings():
        History(tmp_path, 45, 10)
    assert steps_of(tmp_path) == [10, 20, 30, 40]


def test_damaged_records_are_skipped(tmp_path):
    fill(tmp_path, 10, 30)
    path = tmp_path / history.HISTORY
    path.write_bytes(path.read_bytes()[:-5] + b'\n[1]\n{"step": "x"}\n\xff\n{"st')
    assert steps_of(tmp_path) == [10, 20]


def test_a_full_disk_is_reported_once_and_records_are_written_later(tmp_path, monkeypatch, caplog):
    kept = History(tmp_path, 0, 10)
    write, full = history.write_text, True

    def guarded(path, text):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(history, "write_text", guarded)
    for step in (10, 20, 30):
        kept.add(step, {})
    kept.catch_up()
    (said,) = caplog.messages
    assert "No space left" in said and steps_of(tmp_path) == []
    full = False
    kept.catch_up()
    assert steps_of(tmp_path) == [10, 20, 30]
    (tmp_path / history.HISTORY).unlink()  # for example together with its folder
    kept.catch_up()
    assert steps_of(tmp_path) == [10, 20, 30]


def test_bins_are_named_and_missing_ones_omitted():
    found = history.named_bins(initial_weights())
    assert sum(len(bins) for parameters in found.values() for bins in parameters) == BINS.sum()
    assert found["rescale"] == [[1.0] * 17, [1.0] * 6] and "identity" not in found and set(found) < set(NAMES)


@pytest.mark.parametrize("name", ["digits-40", "digits-10", "fashion-100-small", "cifar10-250", "stl10-1000"])
def test_pseudo_labels_are_compared_on_hidden_labels_and_rarely_enough(name):
    """A pass without gradient costs a third of a training pass; at most half a percent of a run is allowed."""
    config, data = preset(name), digits()
    split = RULES["balanced"](data, 40, 0)
    trained = config.batch * (1 + config.k + 1 + 2)
    found = guessed_images(config, data, split, trained)
    assert not set(found.rows) & set(split) and 128 <= len(found.rows) <= 256
    due = sum(found.due(step, config) for step in range(config.eval_every, config.steps + 1, config.eval_every))
    assert 0 < (due - 1) * len(found.rows) / 3 <= 0.005 * config.steps * trained
    assert found.due(config.steps, config)


def test_without_hidden_labels_there_is_no_comparison():
    data, config = digits(), preset("digits-40")
    split = RULES["balanced"](data, 40, 0)
    unknown = dataclasses.replace(data, train_labels=np.where(np.isin(np.arange(1437), split), data.train_labels, -1))
    assert not guessed_images(config, unknown, split, 96).due(config.steps, config)
    supervised = preset("digits-40-supervised")
    assert not guessed_images(supervised, data, split, 96).due(supervised.steps, supervised)


def test_the_number_of_images_fills_batch_norm_groups(tiny):
    config = tiny(batch=48, bn="split", bn_groups=1)
    found = guessed_images(config, digits(), np.arange(40), 500)
    assert len(found.rows) % 48 == 0 and len(found.rows) >= 96


def test_pseudo_label_quality_matches_numpy(tiny):
    """Softmax, alignment and sharpening in numpy; the network and its statistics do not change."""
    config, data = tiny(), digits()
    state = make_state(config, 10, torch.device("cpu"), (16, 16))
    state.targets.label_marginal.copy_(torch.linspace(0.05, 0.15, 10))
    state.targets.p_model_history.copy_(torch.linspace(0.15, 0.05, 10).expand_as(state.targets.p_model_history))
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    images, labels = data.train_images[:64], data.train_labels[:64]
    found = diagnostics.guess_quality(state, images, labels, torch.device("cpu"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.network.state_dict().items())
    with torch.no_grad():
        logits = state.network(evaluation.normalized(state.network, images, "cpu"), track=False)[0].double().numpy()
    q = np.exp(logits) * np.linspace(0.05, 0.15, 10) / np.linspace(0.15, 0.05, 10)
    q = (q / q.sum(1, keepdims=True)) ** 2
    q /= q.sum(1, keepdims=True)
    assert found["images"] == 64 and found["accuracy"] == pytest.approx((q.argmax(1) == labels).mean(), abs=1e-4)
    assert found["confidence"] == pytest.approx(q.max(1).mean(), abs=1e-4)
    counts = np.array(found["bins"])
    assert counts[:, 0].sum() == 64 and counts[:, 1].sum() == (q.argmax(1) == labels).sum()
    assert (counts[:, 0] == np.histogram(q.max(1), 10, (0, 1))[0]).all()


def test_pseudo_label_quality_accepts_a_diverged_network(tiny):
    """The trainer reports divergence, by the next checkpoint at the latest."""
    config, data = tiny(), digits()
    state = make_state(config, 10, torch.device("cpu"), (16, 16))
    for parameter in state.network.parameters():
        parameter.data.fill_(float("nan"))
    images, labels = data.train_images[:64], data.train_labels[:64]
    found = diagnostics.guess_quality(state, images, labels, torch.device("cpu"))
    assert found["confidence"] == 0 and found["bins"][0][0] == 64


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with 6 evaluations."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    small = dict(batch=8, width=8, steps=12, lag=2, view_steps=1, eval_every=2, log_every=1, checkpoint_every=6)
    config = dataclasses.replace(preset("digits-40"), device="cpu", **small)
    run.train(setup_run(config, folder), quiet=True)
    return folder


def test_a_run_writes_its_history_and_results(finished):
    rows = read_history(finished)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(len(row["p_model"]) == len(row["label_marginal"]) == 10 for row in rows)
    assert all(sum(row["p_model"]) == pytest.approx(1, abs=1e-3) for row in rows)
    assert rows[-1]["bins"] != rows[0]["bins"] and rows[-1]["guesses"]["images"] == 128
    found, data = read_results(finished), digits()
    assert (found["labels"] == data.test_labels).all() and found["test_images"] == 360
    last = read_metrics(finished / "metrics.jsonl")[-1]
    assert 100 * (found["predicted"] == found["labels"]).mean() == pytest.approx(last["test_accuracy"])
    wrong = np.flatnonzero(found["predicted"] != found["labels"])
    assert len(found["errors"]) == min(24, len(wrong)) and set(found["errors"]) <= set(wrong)
    assert (np.diff(found["confidence"][found["errors"]].astype(float)) <= 0).all()
    assert found["confidence"][found["errors"][0]] == found["confidence"][wrong].max()
    assert (found["error_images"] == data.test_images[found["errors"]]).all()
    assert found["views"].shape == (6, 4, 16, 16, 3) and found["captions"].shape == (6, 4)
    assert (found["captions"][:, :2] == ["image", "weak"]).all()


def test_labels_for_the_report_do_not_affect_training(finished, tmp_path, monkeypatch):
    """Compare with runs with other labels of the unlabeled images, and without any comparison."""
    config, data = load_config(finished / "config.json"), digits()
    split = RULES["balanced"](data, 40, 0)
    labels = np.where(np.isin(np.arange(len(data.train_labels)), split), data.train_labels, 0)
    other = dataclasses.replace(data, train_labels=labels)
    run.train(RunSetup(config, other, split, tmp_path / "labels"), quiet=True)
    assert read_history(tmp_path / "labels")[-1]["guesses"] != read_history(finished)[-1]["guesses"]
    monkeypatch.setattr(history.GuessedImages, "due", lambda *_: False)
    run.train(setup_run(config, tmp_path / "none"), quiet=True)
    for name, (one, two) in itertools.product(("labels", "none"), [(finished, tmp_path)]):
        assert repeatable_metrics(one) == repeatable_metrics(two / name) != []


def test_large_images_and_many_predictions_are_reduced(tmp_path, monkeypatch):
    data = digits()
    large = np.zeros((360, 200, 250, 3), np.uint8)
    large[:, :, 125:] = 255
    data = dataclasses.replace(data, test_images=large)
    monkeypatch.setattr(history, "MOST_PREDICTIONS", 100)
    rows = history.predicted_rows(data)
    probabilities = np.full((90, 10), 0.05, np.float32)
    probabilities[:, 3] = 0.55
    views = history.SampleViews(np.zeros((2, 3, 200, 200, 3), np.uint8), [["image", "weak", "x"]] * 2)
    history.save_results(tmp_path, probabilities, rows, data, views)
    found = read_results(tmp_path)
    assert len(found["labels"]) == 90 and (found["labels"] == data.test_labels[::4]).all()
    assert found["error_images"].shape == (24, 67, 84, 3) and found["views"].shape == (2, 3, 67, 67, 3)
    assert found["error_images"][0, 0, 0].max() == 0 and found["error_images"][0, 0, -1].min() == 255
    (tmp_path / history.RESULTS).write_bytes(b"PK")
    assert read_results(tmp_path) is None
