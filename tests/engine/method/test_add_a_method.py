"""The example of docs/code.md that adds a method, applied to a copy of the code; and the state of methods."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine.config.config import Config
from engine.config.presets import preset
from engine.method import registry
from engine.method.targets import Targets
from engine.training.cuda_graph import Snapshot
from engine.training.state import make_state
from engine.training.trainer import digests
from tests.pages import ROOT, TEXTS, blocks
from tests.processes import assert_same_bits, final_state

FILES = ("engine/method/debiased_targets.py", "engine/method/registry.py", "engine/config/methods.py")
CODE = [code for language, code in blocks(TEXTS["docs/code.md"]) if language == "py"]
SMALL = (
    "--steps 8 --batch 4 --k 2 --mu 1 --width 16 --blocks 1 --log-every 1 --eval-every 4 --checkpoint-every 4 --quiet"
)
CLASSES = 5


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the packages with the method added as in docs/code.md."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("engine", "kernels", "pipelines", "bench"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for path, code in zip(FILES, CODE, strict=True):
        with (folder / path).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")
    return folder


def train(checkout, out, *flags):
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "engine", "train", "digits-40", "--method", "debiaspl", "--device", "cpu"]
    done = subprocess.run(
        [*command, *SMALL.split(), "--out", str(out), *flags],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_the_example_is_short_and_names_its_files():
    assert sum(len(code.splitlines()) for code in CODE) <= 60
    text = TEXTS["docs/code.md"]
    assert all(f"`{path}`" in text for path in FILES)


def test_the_method_trains_resumes_bitwise_and_runs_on_two_ranks(checkout, tmp_path):
    whole = train(checkout, tmp_path / "whole")
    train(checkout, tmp_path / "resumed", "--steps", "4")
    assert_same_bits(train(checkout, tmp_path / "resumed", "--resume", "--steps", "8"), whole)
    state = final_state(whole)[1]["state"]
    assert not torch.equal(state["class_means"], torch.full((10,), 0.1))
    # Two ranks equal one rank with two micro-batches bit for bit. --check-ranks compares the states of the ranks.
    parts = train(checkout, tmp_path / "parts", "--micro-batches", "2")
    assert_same_bits(
        train(checkout, tmp_path / "ranks", "--micro-batches", "2", "--gpus", "2", "--check-ranks", "1"), parts
    )


def debiased(config, classes):
    """Make the targets of docs/code.md without registering their class."""
    names = {}
    exec(CODE[0], names)
    return names["DebiasedTargets"](config, classes)


def test_the_example_implements_the_paper():
    """Compare with f - log(p^) / 2, in float64 and one image at a time."""
    rng = np.random.default_rng(0)
    targets = debiased(Config(threshold=0.6, hard_labels=True, align=False), CLASSES)
    means = np.full(CLASSES, 1 / CLASSES)
    used = 0
    for step in range(50):
        logits = rng.normal([3.0, 0, 0, 0, 0], 2, size=(16, CLASSES))
        pseudo_labels, weights = targets(torch.tensor(logits, dtype=torch.float32)[None], torch.tensor(step))
        for f, pseudo_label, weight in zip(logits, pseudo_labels, weights, strict=True):
            debiased_logits = f - 0.5 * np.log(means)
            p = np.exp(debiased_logits) / np.exp(debiased_logits).sum()
            assert pseudo_label.tolist() == np.eye(CLASSES)[p.argmax()].tolist() and weight == (p.max() >= 0.6)
            used += int(weight)
        q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        means = 0.999 * means + 0.001 * q.mean(0)
    assert 0 < used < 800
    np.testing.assert_allclose(targets.class_means.numpy(), means, atol=1e-6)


class StatefulTargets(Targets):
    """Targets with buffers of other types: a count, a flag, and a tensor that is not persistent."""

    def __init__(self, config, classes, unlabeled_images=0):
        super().__init__(config, classes, unlabeled_images)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


@pytest.fixture
def state(monkeypatch):
    monkeypatch.setitem(registry.TARGETS, "remixmatch", StatefulTargets)
    return make_state(preset("digits-40"), CLASSES, torch.device("cpu"))


def change(state):
    state.targets.count.add_(1)
    state.targets.flag.logical_not_()
    state.targets.scratch.fill_(7.0)
    state.targets.label_marginal.mul_(0.5)


def test_checkpoints_contain_every_persistent_buffer(state):
    kept = {name: value.clone() for name, value in state.targets.state_dict().items()}
    assert {"count", "flag", "p_model_history", "label_marginal"} == kept.keys() <= state.state_dict().keys()
    saved = {name: value.clone() for name, value in state.state_dict().items() if isinstance(value, torch.Tensor)}
    change(state)
    state.load_state_dict(state.state_dict() | saved)
    assert all(torch.equal(value, kept[name]) for name, value in state.targets.state_dict().items())


def test_the_comparison_of_ranks_covers_every_persistent_buffer(state):
    before = digests(state.state_dict())
    change(state)
    after = digests(state.state_dict())
    assert {name for name in before if before[name] != after[name]} == {"count", "flag", "label_marginal"}


def test_a_snapshot_restores_every_buffer(state):
    kept = {name: buffer.clone() for name, buffer in state.targets.named_buffers()}
    assert "scratch" in kept
    snapshot = Snapshot(state)
    change(state)
    snapshot.restore()
    assert all(torch.equal(buffer, kept[name]) for name, buffer in state.targets.named_buffers())
