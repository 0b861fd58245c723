"""The page's worked example of a new method, applied to a copy of the code: it trains like those that are there."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine.config.config import Config
from engine.config.presets import preset
from engine.method import targets as targets_module
from engine.method.targets import Targets
from engine.training.cuda_graph import Snapshot
from engine.training.state import make_state
from engine.training.trainer import digests
from tests.pages import ROOT, TEXTS, blocks
from tests.processes import assert_same_bits, final_state

FILES = ("engine/method/targets.py", "engine/config/methods.py")
RULE, SETTINGS = (code for language, code in blocks(TEXTS["docs/code.md"]) if language == "py")
SMALL = (
    "--steps 8 --batch 4 --k 2 --mu 1 --width 16 --blocks 1 --log-every 1 --eval-every 4 --checkpoint-every 4 --quiet"
)
CLASSES = 5


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The packages with the method added as the page says."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("engine", "kernels", "pipelines", "bench"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for path, code in zip(FILES, (RULE, SETTINGS), strict=True):
        with (folder / path).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")
    return folder


def train(checkout, out, *flags):
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "engine", "train", "digits-40", "--method", "freematch", "--device", "cpu"]
    done = subprocess.run(
        [*command, *SMALL.split(), "--out", str(out), *flags],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_the_example_is_short_and_in_two_files():
    assert len(RULE.splitlines()) + len(SETTINGS.splitlines()) <= 60
    text = TEXTS["docs/code.md"]
    assert all(f"](../{path})" in text for path in FILES)


def test_it_trains_resumes_bit_for_bit_and_on_two_ranks(checkout, tmp_path):
    whole = train(checkout, tmp_path / "whole")
    train(checkout, tmp_path / "resumed", "--steps", "4")
    assert_same_bits(train(checkout, tmp_path / "resumed", "--resume", "--steps", "8"), whole)
    state = final_state(whole)[1]["state"]
    assert state["threshold"] != 0.1 and not torch.equal(state["class_means"], torch.full((10,), 0.1))
    # two ranks as one rank with as many micro-batches, bit for bit; the ranks' states are compared on the way
    parts = train(checkout, tmp_path / "parts", "--micro-batches", "2")
    assert_same_bits(
        train(checkout, tmp_path / "ranks", "--micro-batches", "2", "--gpus", "2", "--check-ranks", "1"), parts
    )


def adaptive(config, classes):
    """The page's class, without entering it."""
    names = dict(vars(targets_module), TARGETS={})
    exec(RULE, names)
    return names["SelfAdaptiveTargets"](config, classes)


def test_the_example_is_the_papers_rule():
    """Equations 5 to 8 of FreeMatch, in float64 and one image at a time."""
    chance = np.random.default_rng(0)
    made = adaptive(Config(threshold=0.0, hard_labels=True, align=False), CLASSES)
    tau, means = 1 / CLASSES, np.full(CLASSES, 1 / CLASSES)
    for step in range(50):
        logits = chance.normal(scale=2, size=(16, CLASSES))
        q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        tau = 0.999 * tau + 0.001 * np.mean([row.max() for row in q])
        means = 0.999 * means + 0.001 * q.mean(0)
        local = [tau * mean / max(means) for mean in means]
        found, weights = made(torch.tensor(logits, dtype=torch.float32)[None], torch.tensor(step))
        for row, target, weight in zip(q, found, weights, strict=True):
            c = int(row.argmax())
            assert target.tolist() == np.eye(CLASSES)[c].tolist() and weight == (row[c] >= local[c])
    assert made.threshold.item() == pytest.approx(tau, abs=1e-6)
    np.testing.assert_allclose(made.class_means.numpy(), means, atol=1e-6)


class Counting(Targets):
    """Targets with state of other kinds: a count, a flag, and a tensor that is not saved."""

    def __init__(self, config, classes):
        super().__init__(config, classes)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


@pytest.fixture
def state(monkeypatch):
    monkeypatch.setitem(targets_module.TARGETS, "remixmatch", Counting)
    return make_state(preset("digits-40"), CLASSES, torch.device("cpu"))


def change(state):
    state.targets.count.add_(1)
    state.targets.flag.logical_not_()
    state.targets.scratch.fill_(7.0)
    state.targets.label_marginal.mul_(0.5)


def test_checkpoints_find_every_buffer(state):
    kept = {name: value.clone() for name, value in state.targets.state_dict().items()}
    assert {"count", "flag", "p_model_history", "label_marginal"} == kept.keys() <= state.state_dict().keys()
    saved = {name: value.clone() for name, value in state.state_dict().items() if isinstance(value, torch.Tensor)}
    change(state)
    state.load_state_dict(state.state_dict() | saved)
    assert all(torch.equal(value, kept[name]) for name, value in state.targets.state_dict().items())


def test_the_comparison_of_ranks_finds_every_buffer(state):
    before = digests(state.state_dict())
    change(state)
    after = digests(state.state_dict())
    assert {name for name in before if before[name] != after[name]} == {"count", "flag", "label_marginal"}


def test_the_warm_up_of_a_capture_restores_every_buffer(state):
    kept = {name: buffer.clone() for name, buffer in state.targets.named_buffers()}
    assert "scratch" in kept
    snapshot = Snapshot(state)
    change(state)
    snapshot.restore()
    assert all(torch.equal(buffer, kept[name]) for name, buffer in state.targets.named_buffers())
