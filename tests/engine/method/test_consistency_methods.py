"""The Pi model and Mean Teacher against their papers, in double precision and with gradients of autograd."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from engine.config.checks import validate
from engine.config.methods import with_method
from engine.errors import UserError
from engine.method.losses import ramp_up
from tests import processes
from tests.engine.method.one_step import OneStep, cross_entropy
from tests.processes import assert_close, assert_same_bits

RUN = (
    "--device",
    "cpu",
    "--quiet",
    "--batch",
    "8",
    "--width",
    "8",
    "--scales",
    "2",
    "--blocks",
    "1",
    "--log-every",
    "1",
)


@pytest.fixture
def config_of(tiny):
    """Make small configurations of a method in double precision."""

    def make(method, **changes):
        small = tiny(precision="fp64", ramp_kimg=1.0, bn_momentum=0.1, scales=2, blocks=1)
        return dataclasses.replace(with_method(small, method), **changes)

    return make


@pytest.mark.parametrize("mu", [1, 2])
def test_the_pi_model_is_the_squared_difference_of_two_predictions(config_of, mu):
    """Section 2.1 of Laine & Aila: the gradient passes through both predictions, the weight is that of a Gaussian."""
    step = OneStep(config_of("pi-model", mu=mu))
    (x,), (u_1, u_2) = step.labeled, step.unlabeled
    network, batch = step.network(), len(x)
    logits = network(torch.cat([x, u_1, u_2]))[0]
    loss_x = cross_entropy(logits[:batch], step.labels)
    first, second = logits[batch:].softmax(-1).chunk(2)
    difference = (first - second).square().mean()
    weight = 10 * math.exp(-5 * (1 - step.ramp_progress) ** 2)
    step.assert_same(network, loss_x, difference / 4, loss_x + weight * difference)
    assert 0 < step.ramp_progress < 1 and step.metrics["guesses_used"] == 1


def test_the_pi_model_compares_any_number_of_views(config_of):
    step = OneStep(config_of("pi-model", k=4))
    network, (x,) = step.network(), step.labeled
    logits = network(torch.cat([x, *step.unlabeled]))[0]
    loss_x = cross_entropy(logits[: len(x)], step.labels)
    views = logits[len(x) :].softmax(-1).unflatten(0, (4, -1))
    pairs = [(views[i] - views[j]).square().mean() for i in range(4) for j in range(i)]
    loss_u = sum(pairs) / len(pairs) * 3 / 8  # (K - 1) / (2 K) of the mean over all pairs.
    loss = loss_x + 40 * math.exp(-5 * (1 - step.ramp_progress) ** 2) * loss_u
    step.assert_same(network, loss_x, loss_u, loss)


@pytest.mark.parametrize("value", ["separate", "joint"])
def test_the_pi_model_needs_the_gradient_through_all_its_predictions(config_of, value):
    with pytest.raises(UserError, match=f"sets its own --guess-pass; leave out --guess-pass {value}$"):
        OneStep(config_of("pi-model", guess_pass=value))


@pytest.mark.parametrize(("k", "mu"), [(1, 1), (3, 2)])
def test_mean_teacher_follows_the_average_of_the_parameters(config_of, k, mu):
    """Section 2 of Tarvainen & Valpola: the target is a prediction of the teacher, the gradient that of the student."""
    step = OneStep(config_of("mean-teacher", k=k, mu=mu))
    (x,), (u_weak, *views) = step.labeled, step.unlabeled
    assert len(views) == k and len(u_weak) == mu * len(x)
    with torch.no_grad():
        target = copy.deepcopy(step.before.ema_model).train()(u_weak)[0].softmax(-1)
    network = step.network()
    logits = network(torch.cat([x, *views]))[0]
    loss_x = cross_entropy(logits[: len(x)], step.labels)
    loss_u = (logits[len(x) :].softmax(-1) - target.repeat(k, 1)).square().mean()
    step.assert_same(network, loss_x, loss_u, loss_x + 8 * math.exp(-5 * (1 - step.ramp_progress) ** 2) * loss_u)
    found = step.state.targets.p_model_history[40]
    np.testing.assert_allclose(found, target.mean(0), rtol=1e-5)


@pytest.mark.parametrize("network", ["wide-resnet", "timm:resnet10t"])
def test_the_teacher_changes_neither_statistics_nor_mode(tiny, network):
    if network.startswith("timm"):
        pytest.importorskip("timm")
    config = with_method(tiny(network=network, bn_momentum=0.1, blocks=1), "mean-teacher")
    step = OneStep(config)
    assert not step.state.ema_model.training and step.state.guess_network().training
    for mine, expected in zip(step.state.ema_model.buffers(), step.state.network.buffers(), strict=True):
        # The step copies the running statistics of the student, not their count.
        assert mine.ndim == 0 or torch.equal(mine, expected)
    teacher = step.state.guess_network()
    shared = zip(teacher.parameters(), step.state.ema_model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in shared)
    before = {name: value.clone() for name, value in step.state.ema_model.state_dict().items()}
    with torch.no_grad():
        teacher(torch.randn(4, 3, 8, 8), track=False)
    after = step.state.ema_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("shape", ["linear", "gaussian", "cosine"])
def test_ramps(tiny, shape):
    config = tiny(ramp=shape, ramp_kimg=2.0, batch=16)
    expected = {
        "linear": lambda t: t,
        "gaussian": lambda t: math.exp(-5 * (1 - t) ** 2),
        "cosine": lambda t: 0.5 - math.cos(min(math.pi, math.pi * t)) / 2,
    }[shape]
    for step in (0, 1, 50, 127, 128, 129, 10_000):
        found = float(ramp_up(config, torch.tensor(step)))
        assert found == pytest.approx(expected(min(1.0, step * 16 / 2048)), abs=1e-6), step
    assert ramp_up(dataclasses.replace(config, ramp_kimg=0.0), torch.tensor(0)) == 1


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("pi-model", dict(k=1), "--method pi-model requires --k 2 or more"),
        ("pi-model", dict(mixup_alpha=0.5), "--guess-pass trained requires --mixup-alpha 0"),
        ("pi-model", dict(micro_batches=2), "--guess-pass trained needs .* use --micro-batches 1"),
        ("fixmatch", dict(guess_pass="trained"), "--guess-pass trained requires --anchor trained or none"),
        ("mean-teacher", dict(guess_pass="joint"), "--guess-network ema requires --guess-pass separate, got joint"),
        ("mean-teacher", dict(ema_decay=0.0), "--guess-network ema requires --ema-decay above 0"),
    ],
)
def test_contradictions_are_reported(config_of, method, changes, message):
    with pytest.raises(UserError, match=message):
        validate(config_of(method, **changes))


@pytest.mark.parametrize("method", ["pi-model", "mean-teacher"])
def test_runs_resume_bitwise(tmp_path, method):
    flags = (*RUN, "--method", method, "--eval-every", "3", "--checkpoint-every", "3")
    whole = processes.train(tmp_path / "whole", 1, *flags, "--steps", 6)
    for steps in (3, 6):
        processes.train(tmp_path / "resumed", 1, *flags, "--steps", steps, "--resume")
    assert_same_bits(whole, tmp_path / "resumed")


def test_two_ranks_of_the_pi_model_equal_one(tmp_path):
    """Pseudo-labels are made by the training pass, so there are no micro-batches to compare with."""
    flags = (
        *RUN,
        "--method",
        "pi-model",
        "--precision",
        "fp64",
        "--eval-every",
        "3",
        "--steps",
        3,
        "--ramp-kimg",
        "0.01",
    )
    one = processes.train(tmp_path / "one", 1, *flags)
    assert_close(one, processes.train(tmp_path / "two", 2, *flags, "--bn", "sync", "--check-ranks", 1))
