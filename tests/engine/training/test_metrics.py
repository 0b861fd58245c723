"""Every logged metric against a value worked out by hand, from the formulas of the papers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine.inference.evaluation import evaluate
from engine.method.losses import LOSSES, Samples, total_loss
from engine.training.diagnostics import agreement, guess_quality
from engine.training.step import METRICS
from tests.engine.training.test_step import Bench

CPU = torch.device("cpu")
LN = math.log

# Probabilities of five samples: one of X', two of U', u_1 and the rotated u_1; and their targets.
PROBABILITIES = [[0.8, 0.2], [0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [0.5, 0.5]]
TARGETS = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.2, 0.8], [0.0, 0.0]]
ROTATION = [0.1, 0.2, 0.3, 0.4]

LOSS_X = -LN(0.8)
CROSS_ENTROPY_U = (LN(2) - LN(0.75)) / 2
LOSS_U1 = -0.2 * LN(0.1) - 0.8 * LN(0.9)
LOSS_ROT = -LN(0.4)  # The third of the turns 0 to 3.


def losses_by_name(config, ramp):
    def weights(*samples):
        return [1 / len(samples) if n in samples else 0.0 for n in range(5)]

    samples = Samples(
        config,
        torch.tensor(PROBABILITIES).log(),
        torch.tensor([ROTATION] * 5).log(),
        torch.tensor(TARGETS),
        torch.tensor([0, 1, 2, 0, 3]),
        torch.tensor([weights(0), weights(1, 2), weights(3)]),
        torch.tensor(weights(4)),
    )
    loss, terms = total_loss(samples, torch.tensor(ramp))
    assert loss == terms[0]
    return dict(zip(LOSSES, terms.tolist(), strict=True))


@pytest.mark.parametrize(
    ("kind", "loss_u"),
    [
        ("cross-entropy", CROSS_ENTROPY_U),
        ("l2", ((0.4**2 + 0.4**2) / 2 + (0.25**2 + 0.25**2) / 2) / 2),  # Brier score, mean over classes (MixMatch).
        ("kl", CROSS_ENTROPY_U + (0.9 * LN(0.9) + 0.1 * LN(0.1)) / 2),  # Minus the entropy of the targets (UDA).
    ],
)
def test_losses(tiny, kind, loss_u):
    config = tiny(unlabeled_loss=kind, w_u=1.5, w_u1=0.5, w_rot=0.25)
    found = losses_by_name(config, 0.5)
    expected = {"loss_x": LOSS_X, "loss_u": loss_u, "loss_u1": LOSS_U1, "loss_rot": LOSS_ROT, "loss_fair": 0.0}
    expected["loss"] = LOSS_X + 0.5 * (1.5 * loss_u + 0.5 * LOSS_U1) + 0.25 * LOSS_ROT
    assert found == pytest.approx(expected, rel=1e-5)


def finished(bench, pseudo_labels, probe_logits=None):
    """Return the metrics that a step ends with, by name, and omega."""
    losses = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    labels = torch.from_numpy(bench.labels)
    metrics, omega = bench.step.finish(losses, torch.tensor([0.5]), probe_logits, torch.tensor(pseudo_labels), labels)
    found = dict(zip(METRICS, metrics.tolist(), strict=True))
    assert [found[name] for name in LOSSES] == losses.tolist() and found["stop"] == 0.5
    return found, omega


def test_the_alignment_gap_is_the_total_variation_distance(tiny):
    """Half of |0.4 - 0.4| + |0.3 - 0.15| + 3 |0.1 - 0.15|; p~(y) is the mean over 128 steps."""
    bench = Bench(tiny())
    bench.state.targets.label_marginal.copy_(torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]))
    bench.state.targets.p_model_history[:64] = torch.tensor([0.2] * 5)
    bench.state.targets.p_model_history[64:] = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])
    assert finished(bench, [[0.2] * 5] * 8)[0]["alignment_gap"] == pytest.approx(0.15)
    bench = Bench(tiny())
    bench.state.targets.label_marginal.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
    bench.state.targets.p_model_history[:] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    assert finished(bench, [[0.2] * 5] * 8)[0]["alignment_gap"] == pytest.approx(1.0)  # The largest distance.


def test_confidence_is_the_mean_largest_probability(tiny):
    soft = [[0.7, 0.3, 0.0, 0.0, 0.0], [0.1, 0.5, 0.4, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0, 0.0], [0.2, 0.2, 0.3, 0.2, 0.1]]
    found, _ = finished(Bench(tiny()), soft * 2)
    assert found["confidence"] == pytest.approx((0.7 + 0.5 + 0.9 + 0.3) / 4)
    assert found["guesses_used"] == pytest.approx(1.0)


def test_confidence_is_that_of_the_used_pseudo_labels(tiny):
    """With a threshold, unused ones are zeros: two of four are used, and none."""
    unused = [0.0] * 5
    soft = [[0.96, 0.04, 0.0, 0.0, 0.0], unused, [0.0, 0.0, 0.99, 0.01, 0.0], unused]
    found, _ = finished(Bench(tiny(threshold=0.95)), soft * 2)
    assert found["confidence"] == pytest.approx((0.96 + 0.99) / 2) and found["guesses_used"] == pytest.approx(0.5)
    found, _ = finished(Bench(tiny(threshold=0.95)), [unused] * 8)
    assert found["confidence"] == found["guesses_used"] == 0


def test_omega_is_1_minus_half_the_absolute_difference(tiny):
    """From a one-hot label this is the probability of the label: 1 - (1 - p + the rest) / 2 = p."""
    bench = Bench(tiny())
    p = np.array([0.9, 0.1, 0.5, 0.2, 1.0, 0.3, 0.6, 0.4])
    probabilities = np.full((8, 5), 0.0)
    for row, label in enumerate(bench.labels):
        probabilities[row] = (1 - p[row]) / 4
        probabilities[row, label] = p[row]
    logits = torch.empty(8, 5)
    logits[bench.step.probe_order] = torch.tensor(probabilities).clamp(min=1e-30).log().float()
    found, omega = finished(bench, [[0.2] * 5] * 8, logits)
    np.testing.assert_allclose(omega.numpy(), p, atol=1e-6)
    assert found["omega"] == pytest.approx(4.0 / 8)
    assert finished(Bench(tiny()), [[0.2] * 5] * 8)[0]["omega"] == 0  # Without probes.


class Brightness(nn.Module):
    """Stand-in for a network: the logits of an image are its mean normalized colors, times a factor.

    Args:
        factors: Factor of each class.
    """

    mean, std = (100.0, 100.0, 100.0), (50.0, 25.0, 100.0)

    def __init__(self, *factors):
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors))

    def forward(self, images, track=True):
        return images.mean((2, 3)) * self.factors, None


def colored(*colors):
    return np.array(colors, np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)


def test_test_accuracy_and_test_loss():
    """Logits are (r - 100) / 50, (g - 100) / 25 and (b - 100) / 100."""
    images = colored((150, 100, 100), (100, 150, 100), (100, 100, 200), (200, 125, 0))  # Of classes 0, 1, 2 and 0.
    logits = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 1], [2, 1, -1]], float)
    labels = np.array([0, 1, 0, 2])  # The last two are wrong.
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    accuracy, loss, *_ = evaluate(Brightness(1.0, 1.0, 1.0).eval(), images, labels, CPU)
    assert accuracy == 50.0 and loss == pytest.approx(-log_p[[0, 1, 2, 3], labels].mean(), rel=1e-5)
    many = np.tile(images, (300, 1, 1, 1))  # Three batches.
    accuracy, again, *_ = evaluate(Brightness(1.0, 1.0, 1.0).eval(), many, np.tile(labels, 300), CPU)
    assert accuracy == 50.0 and again == pytest.approx(loss, rel=1e-6)


def test_agreement_is_the_share_of_equal_classes_and_that_of_chance():
    """The network predicts the classes 0, 1, 2 and 0."""
    images = colored((150, 100, 100), (100, 150, 100), (100, 100, 200), (200, 125, 0))
    f, f_ema = Brightness(1.0, 1.0, 1.0), Brightness(1.0, -1.0, -1.0)
    # The logits of f_ema are 1, 0, 0; 0, -2, 0; 0, 0, -1; and 2, -1, 1. The first of equal ones counts: always class 0.
    assert agreement(f, f_ema, images, "cpu") == (0.5, 0.5)  # Two of four; 0.5 * 1.
    f_ema = Brightness(-1.0, 1.0, 1.0)  # -1, 0, 0; 0, 2, 0; 0, 0, 1; -2, 1, -1: classes 1, 1, 2 and 1.
    share, by_chance = agreement(f, f_ema, images, "cpu")
    assert share == 0.5 and by_chance == pytest.approx(0.5 * 0 + 0.25 * 0.75 + 0.25 * 0.25)


def test_the_quality_of_pseudo_labels():
    """Predictions of 0.75, 0.25; 0.45, 0.55; 1, 0; and 0.55, 0.45. The first and the third are correct."""
    predicted = torch.tensor([[0.75, 0.25], [0.45, 0.55], [1.0, 0.0], [0.55, 0.45]])
    network = Brightness(1.0, 1.0, 1.0)
    state = SimpleNamespace(
        network=network, guess_network=lambda: network, targets=SimpleNamespace(predict=lambda logits: predicted)
    )
    found = guess_quality(state, colored(*[(0, 0, 0)] * 4), np.array([0, 0, 0, 1]), CPU)
    assert (
        found["images"] == 4 and found["accuracy"] == 0.5 and found["confidence"] == pytest.approx(2.85 / 4, abs=1e-4)
    )
    counts = {5: [2, 0], 7: [1, 1], 9: [1, 1]}  # Of all and of correct ones, from 0.5, 0.7 and 0.9 on.
    assert found["bins"] == [counts.get(interval, [0, 0]) for interval in range(10)]
