"""AdaMatch against its paper: the rule for pseudo-labels over many steps, and one step in double precision."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from engine.config.checks import validate
from engine.config.config import Config
from engine.config.methods import METHODS, with_method
from engine.config.presets import preset
from engine.errors import UserError
from engine.method.registry import make_targets
from tests import processes
from tests.engine.method.one_step import START, OneStep, cross_entropy
from tests.processes import assert_same_bits
from tests.running_statistics import statistics_of_first_samples

CLASSES = 5


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("changes", [dict(), dict(hard_labels=False), dict(align=False), dict(threshold=0.5)], ids=str)
def test_the_rule_for_pseudo_labels(changes):
    """Section 3.3: relative threshold, and alignment to the predictions for labeled images; one image at a time."""
    config = dataclasses.replace(with_method(Config(), "adamatch"), **changes)
    targets, rng = make_targets(config, CLASSES), np.random.default_rng(0)
    of_labels, of_guesses = np.full(CLASSES, 1 / CLASSES), [np.full(CLASSES, 1 / CLASSES)] * 128
    used = []
    for step in range(150):
        logits, labeled = (rng.normal(scale=1.5, size=(count, CLASSES)) + np.arange(CLASSES) for count in (12, 4))
        found, weights = targets(
            torch.tensor(logits, dtype=torch.float32)[None],
            torch.tensor(step),
            labeled=torch.tensor(labeled, dtype=torch.float32),
        )
        q, x = softmax(logits), softmax(labeled)
        of_labels = 0.999 * of_labels + 0.001 * x.mean(0)
        of_guesses = [*of_guesses[1:], q.mean(0)]
        threshold = config.threshold * np.mean([prediction.max() for prediction in x])
        for prediction, target, weight in zip(q, found.double().numpy(), weights.tolist(), strict=True):
            if config.align:
                prediction = prediction * (of_labels + 1e-6) / (np.mean(of_guesses, 0) + 1e-6)
                prediction = prediction / prediction.sum()
            expected = np.eye(CLASSES)[prediction.argmax()]
            if not config.hard_labels:
                expected = prediction**2 / (prediction**2).sum()
            np.testing.assert_allclose(target, expected, atol=1e-5)
            assert weight == (prediction.max() >= threshold)
            used.append(weight)
        targets.observe(torch.eye(CLASSES)[:4], torch.zeros(5))
    assert 0.05 < np.mean(used) < 0.98
    np.testing.assert_allclose(targets.label_marginal, of_labels, atol=1e-6)
    np.testing.assert_allclose(targets.p_model, np.mean(of_guesses, 0), atol=1e-6)


@pytest.mark.parametrize("changes", [{"class_distribution": (0.5, 0.2, 0.1, 0.1, 0.1)}, {"marginal": "uniform"}])
def test_a_given_class_distribution_replaces_the_predictions_for_labeled_images(changes):
    targets = make_targets(dataclasses.replace(with_method(Config(), "adamatch"), **changes), CLASSES)
    p = changes.get("class_distribution", np.full(CLASSES, 1 / CLASSES))
    targets(torch.randn(1, 6, CLASSES), torch.tensor(0), labeled=torch.randn(4, CLASSES))
    np.testing.assert_allclose(targets.label_marginal, p)


@pytest.fixture
def config_of(tiny):
    """Make small configurations of AdaMatch in double precision."""

    def make(**changes):
        small = tiny(precision="fp64", bn_momentum=0.1, scales=2, blocks=1)
        return dataclasses.replace(with_method(small, "adamatch"), **(dict(ramp_kimg=1.0) | changes))

    return make


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(k=2, mu=1),
        dict(interpolate_logits=False),
        dict(labeled_augment="weak"),
        dict(guess_pass="joint"),
        dict(bn_stats="pool", guess_pass="joint"),
    ],
    ids=str,
)
def test_one_step(config_of, changes):
    step = OneStep(config_of(**changes))
    c, before = step.config, step.before
    u_weak, *strong = step.unlabeled
    x, x_weak = torch.cat(step.labeled), step.labeled[-1]
    assert len(step.labeled) == (2 if c.labeled_augment == "both" else 1) and len(strong) == c.k
    labels = step.labels.repeat(len(step.labeled))
    network = step.network()
    trained, guessed = torch.cat([x, *strong]), torch.cat([x_weak, u_weak])
    if c.guess_pass == "joint":
        trained = torch.cat([trained, guessed])
        logits, guesses = network(trained)[0].split([len(trained) - len(guessed), len(guessed)])
    else:
        logits, guesses = network(trained)[0], network(guessed, track=False)[0]

    guesses = guesses.detach().softmax(-1)
    of_labeled, q = guesses.split([len(x_weak), len(u_weak)])
    history = before.targets.p_model_history.double()
    history[START] = q.mean(0)
    of_labels = 0.999 * before.targets.label_marginal.double() + 0.001 * of_labeled.mean(0)
    aligned = q * (of_labels + 1e-6) / (history.mean(0) + 1e-6)
    aligned = aligned / aligned.sum(-1, keepdim=True)
    mask = (aligned.amax(-1) >= 0.9 * of_labeled.amax(-1).mean()).double()
    assert 0 < mask.mean() < 1

    of_x, of_u = logits.split([len(x), len(logits) - len(x)])
    if c.interpolate_logits:
        lam = torch.tensor(step.plan.interpolation).double()
        assert lam.shape == of_x.shape and 0 <= lam.min() < 0.1 < 0.9 < lam.max() < 1
        of_x = lam * of_x + (1 - lam) * network(x, track=False)[0]
    loss_x = cross_entropy(of_x, labels)
    each = torch.nn.functional.cross_entropy(of_u, aligned.argmax(-1).repeat(c.k), reduction="none")
    loss_u = (mask.repeat(c.k) * each).mean()
    loss = loss_x + (0.5 - math.cos(math.pi * step.ramp_progress) / 2) * loss_u
    step.assert_same(network, loss_x, loss_u, loss)
    assert step.metrics["guesses_used"] == pytest.approx(mask.mean().item())
    np.testing.assert_allclose(step.state.targets.label_marginal, of_labels, rtol=1e-5)
    # The labeled images alone do not update the running statistics.
    updating = len(x) + sum(map(len, strong)) if c.bn_stats == "pool" else len(trained)
    expected = statistics_of_first_samples(before.network, trained, updating, c.bn_momentum)
    torch.testing.assert_close(step.state.network.running_statistics(), expected, atol=1e-6, rtol=1e-6)


def test_other_methods_can_interpolate_logits(tiny):
    """The labeled samples of the pool are mixed ones here."""
    changes = dict(precision="fp64", scales=2, blocks=1, w_u1=0.0, w_rot=0.0, w_u=0.0)
    for settings in (dict(bn="joint"), dict(bn="split", bn_groups=2)):
        config = tiny(**changes, **settings, interpolate_logits=True)
        step, plain = OneStep(config), OneStep(dataclasses.replace(config, interpolate_logits=False))
        assert torch.equal(torch.tensor(step.plan.lam), torch.tensor(plain.plan.lam)), (
            "other random numbers are the same"
        )
        assert step.metrics["loss_x"] != pytest.approx(plain.metrics["loss_x"], rel=1e-4)


def test_the_ramp_ends_after_half_of_the_preset():
    for name in ("digits-40", "cifar10-250"):
        config = with_method(preset(name), "adamatch")
        assert config.ramp_kimg * 1024 == config.steps * config.batch / 2
    assert "ramp_kimg" not in METHODS["adamatch"]


def test_a_strong_view_alone_is_refused(config_of):
    with pytest.raises(UserError, match="--method adamatch requires --labeled-augment both, weak or none"):
        validate(config_of(labeled_augment="strong"))


RUN = (
    *(
        "--device",
        "cpu",
        "--quiet",
        "--method",
        "adamatch",
        "--mu",
        "2",
        "--batch",
        "8",
        "--width",
        "16",
        "--scales",
        "2",
    ),
    *("--blocks", "1", "--log-every", "1", "--eval-every", "3", "--checkpoint-every", "3", "--micro-batches", "2"),
)


def test_runs_resume_bitwise_and_on_two_ranks(tmp_path):
    whole = processes.train(tmp_path / "whole", 1, *RUN, "--steps", 6)
    for ranks, steps in ((2, 3), (1, 6)):
        processes.train(tmp_path / "resumed", ranks, *RUN, "--steps", steps, "--resume")
    assert_same_bits(whole, tmp_path / "resumed")


def test_a_timm_model_has_a_labeled_pass_with_gradient(tiny):
    pytest.importorskip("timm")
    config = with_method(tiny(network="timm:resnet10t", bn_momentum=0.1), "adamatch")
    step = OneStep(config)
    plain = OneStep(dataclasses.replace(config, interpolate_logits=False))
    for (name, mine), other in zip(step.state.network.named_buffers(), plain.state.network.buffers(), strict=True):
        assert torch.equal(mine, other), name
    assert step.metrics["loss_x"] != plain.metrics["loss_x"]


@pytest.mark.compiler
@pytest.mark.long
def test_a_compiled_step_agrees_with_an_eager_one(tiny):
    torch._dynamo.reset()
    config = with_method(tiny(scales=1, blocks=1), "adamatch")
    eager, compiled = OneStep(config), OneStep(config, compiled=True)
    assert compiled.metrics == pytest.approx(eager.metrics, rel=1e-4, abs=1e-5)
    for mine, theirs in zip(eager.gradients(), compiled.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
