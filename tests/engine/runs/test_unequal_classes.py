"""Runs with unequal classes: their data on every rank and after a resume, their recalls, and p(y)."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from engine import run
from engine.commands import main as cli
from engine.errors import RankError, UserError
from engine.inference.trained import load_ema_model
from engine.method.losses import LOSSES
from engine.runs.progress import read_metrics
from engine.runs.setup import setup_run, write_run_files
from engine.training.feed import plan_spec
from engine.training.state import make_state
from engine.training.trainer import Trainer
from pipelines.data.datasets import digits
from tests.processes import assert_same_bits, train

RATIOS = dict(imbalance=5.0, imbalance_unlabeled=-8.0)


def test_a_run_trains_on_the_chosen_images_only(tiny):
    setup = setup_run(tiny(**RATIOS))
    spec = plan_spec(setup.config, setup.data, setup.split)
    assert spec.unlabeled_images == len(setup.data.unlabeled) < len(digits().train_images)
    assert setup.data.test_images is digits().test_images
    assert setup.data.unlabeled.tolist() == setup.identity["unlabeled_rows"]
    assert "unlabeled_rows" not in setup_run(tiny(method="supervised", **RATIOS)).identity
    plain = setup_run(tiny())
    assert plain.data is digits() and not {"imbalance", "labels_per_class"} & plain.identity.keys()


def test_another_ratio_is_another_run(tiny, tmp_path):
    write_run_files(setup_run(tiny(**RATIOS), tmp_path))
    setup_run(tiny(**RATIOS), tmp_path, resume=True)
    for changes in (dict(imbalance=6.0), dict(imbalance_unlabeled=8.0), dict(m1=20), dict(n1=12)):
        with pytest.raises(UserError, match=f"another configuration: {next(iter(changes))} "):
            setup_run(tiny(**RATIOS | changes), tmp_path, resume=True)


def test_every_rank_chooses_the_same_images(tiny, monkeypatch):
    setup = setup_run(tiny(**RATIOS))
    shared = []
    monkeypatch.setattr(run.collectives, "run_on_rank_0", lambda function: shared.append(function()) or shared[0])
    assert run.share(lambda: setup) is setup
    monkeypatch.setattr(run.collectives, "run_on_rank_0", lambda function: shared[0])
    other = run.share(lambda: None)
    np.testing.assert_array_equal(other.data.unlabeled, setup.data.unlabeled)
    np.testing.assert_array_equal(other.split, setup.split)
    labels = digits().train_labels
    swapped = dataclasses.replace(digits(), train_labels=np.where(labels == 1, 2, np.where(labels == 2, 1, labels)))
    monkeypatch.setattr(run, "open_data", lambda *_, **__: swapped)
    with pytest.raises(RankError, match="unlabeled images"):
        run.share(lambda: None)


def test_two_ranks_and_a_resumed_run_equal_one_rank_bitwise(tmp_path):
    flags = [
        "--imbalance",
        5,
        "--imbalance-unlabeled",
        -8,
        "--marginal",
        "labels",
        "--micro-batches",
        2,
        "--bn",
        "split",
    ]
    flags += ["--bn-groups", 2, "--batch", 8, "--width", 8, "--device", "cpu", "--quiet", "--eval-every", 3]
    one = train(tmp_path / "one", 1, *flags, "--steps", 6)
    train(tmp_path / "two", 2, *flags, "--steps", 3)
    train(tmp_path / "two", 2, *flags, "--steps", 6, "--resume")
    assert_same_bits(one, tmp_path / "two")
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert first["recall"] == second["recall"]
    assert (tmp_path / "one" / "split.json").read_bytes() == (tmp_path / "two" / "split.json").read_bytes()


def test_recalls_are_those_of_the_final_model(tiny, tmp_path, capsys):
    config = tiny(steps=4, eval_every=2, checkpoint_every=100, **RATIOS)
    summary = run.train(setup_run(config, tmp_path / "run"), quiet=True)
    data, network = digits(), load_ema_model(tmp_path / "run").network
    with torch.no_grad():
        views = torch.from_numpy(data.test_images).permute(0, 3, 1, 2) / 127.5 - 1
        best = network(views)[0].argmax(1).numpy()
    recalls = [100 * (best[data.test_labels == c] == c).mean() for c in range(10)]
    assert list(summary["recall"].values()) == pytest.approx(recalls)
    assert summary["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert summary["geometric_mean"] == pytest.approx(np.prod(recalls) ** 0.1)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "test_accuracy" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for name in ("balanced_accuracy", "geometric_mean"):
        assert rows[-1][name] == summary[name] and 0 <= rows[0][name] <= 100
    # A run that has ended keeps its recalls when it is resumed.
    (tmp_path / "run" / "summary.json").unlink()
    again = run.train(setup_run(config, tmp_path / "run", resume=True), quiet=True)
    assert again["recall"] == summary["recall"]
    cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert f"{summary['balanced_accuracy']:.2f} %" in page and "Means of recalls" in page


def test_checkpoints_of_earlier_versions_have_no_recalls(tiny, tmp_path, monkeypatch):
    config = tiny(steps=2, eval_every=2, checkpoint_every=100)
    with monkeypatch.context() as patched:
        patched.setattr("engine.training.trainer.class_recalls", lambda *_: [])
        summary = run.train(setup_run(config, tmp_path / "run"), quiet=True)
    assert not {"recall", "balanced_accuracy", "geometric_mean"} & summary.keys()


@pytest.mark.parametrize("marginal", ["running", "labels", "uniform"])
def test_what_alignment_aims_at(tiny, tmp_path, marginal):
    config = tiny(steps=3, eval_every=3, marginal=marginal, **RATIOS)
    setup = setup_run(config, tmp_path / "run")
    trainer = Trainer(setup, run.ProgressLine(3, True))
    frequencies = np.array(setup.identity["labels_per_class"]) / 40
    expected = {"running": np.full(10, 0.1), "labels": frequencies, "uniform": np.full(10, 0.1)}[marginal]
    found = trainer.state.targets.label_marginal
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(trainer.health.p_data, frequencies if marginal != "uniform" else expected)
    one_hot = torch.eye(10)[:4]
    trainer.state.targets.observe(one_hot, torch.zeros(len(LOSSES)))
    moved = 0.999 * expected + 0.001 * one_hot.mean(0).numpy() if marginal == "running" else expected
    np.testing.assert_allclose(found.numpy(), moved, rtol=1e-6)
    assert make_state(config, 10, torch.device("cpu"), (16, 16)).targets.label_marginal.sum() == pytest.approx(1)


def test_two_distributions_contradict_each_other(tiny, tmp_path):
    words = "--marginal uniform and a given class distribution are mutually exclusive"
    with pytest.raises(UserError, match=words):
        setup_run(tiny(marginal="uniform", class_distribution=(0.1,) * 10))
    (tmp_path / "p.json").write_text(json.dumps(dict.fromkeys(map(str, range(10)), 1)))
    with pytest.raises(UserError, match=words):
        setup_run(tiny(marginal="uniform"), class_prior=tmp_path / "p.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(imbalance=0.5), "--imbalance must be at least 1, or at most -1, got 0.5"),
        (dict(imbalance=0.0), "--imbalance must be at least 1, or at most -1, got 0.0"),
        (dict(imbalance_labeled=-0.1), "--imbalance-labeled must be at least 1, or at most -1, got -0.1"),
        (dict(imbalance_unlabeled=float("nan")), "--imbalance-unlabeled must be"),
        (dict(n1=5), "--n1 requires --imbalance or --imbalance-labeled"),
        (dict(imbalance=2.0, m1=-1), "--m1 must be at least 0, got -1"),
        (
            dict(imbalance=100.0),
            "--labels 40 with imbalance 100 leaves 4 of 10 classes without a label; use at least 242",
        ),
        (dict(imbalance=2.0, split="all"), "--split all labels every image, so --imbalance has no images"),
    ],
)
def test_invalid_ratios(tiny, changes, words):
    with pytest.raises(UserError, match=words):
        setup_run(tiny(**changes))
