"""FlexMatch, Dash, FreeMatch and SoftMatch against second implementations of their papers in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from engine.config.config import Config
from engine.config.methods import with_method
from engine.method.losses import LOSSES, Samples, fairness
from engine.method.registry import make_targets

CLASSES, IMAGES, BATCH, STEPS = 5, 40, 4, 50
UNLABELED = 12


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


class FlexMatch:
    """Algorithm 1 of arXiv 2110.08263."""

    def __init__(self, config):
        self.tau, self.warmup = config.threshold, config.flex_warmup
        self.last = [-1] * IMAGES

    def step(self, step, predictions, images):
        sigma = [self.last.count(c) for c in range(CLASSES)]
        most = max(*sigma, self.last.count(-1)) if self.warmup else max(sigma)
        beta = [each / most if most else 0.0 for each in sigma]
        thresholds = [each / (2 - each) * self.tau for each in beta]
        targets, weights = [], []
        for q, image in zip(predictions, images, strict=True):
            c = int(q.argmax())
            targets.append(np.eye(CLASSES)[c])
            weights.append(float(q[c] > thresholds[c]))
            if q[c] > self.tau:
                self.last[image] = c
        return targets, weights

    def finish(self, loss_x):
        pass

    def state(self):
        return {"confident_classes": self.last}


class Dash:
    """Algorithm 1 of arXiv 2109.00650, with epochs of `length` steps."""

    def __init__(self, config):
        self.length = round(config.dash_epoch_kimg * 1024 / config.batch)
        self.losses = []
        self.temperature = config.temperature

    def step(self, step, predictions, images):
        stage = (step - 10 * self.length) // (9 * self.length)
        last_epoch = self.losses[9 * self.length : 10 * self.length]
        self.rho_hat = sum(last_epoch) / self.length
        rho = 1.0001 * 1.27 ** -max(stage, 0) * self.rho_hat
        targets, used = [], []
        for q in predictions:
            c = int(q.argmax())
            sharpened = q ** (1 / self.temperature)
            targets.append(sharpened / sharpened.sum() if rho > 0.05 else np.eye(CLASSES)[c])
            used.append(step >= 10 * self.length and -math.log(q[c]) < max(rho, 0.05))
        return targets, [each * len(used) / max(1, sum(used)) for each in used]

    def finish(self, loss_x):
        self.losses.append(loss_x)

    def state(self):
        return {"rho_hat": sum(self.losses[9 * self.length : 10 * self.length]) / self.length}


class FreeMatch:
    """Equations 5 to 8 and 10 of arXiv 2205.07246."""

    def __init__(self, config):
        self.decay = config.threshold_decay
        self.tau, self.p, self.h = 1 / CLASSES, np.full(CLASSES, 1 / CLASSES), np.full(CLASSES, 1 / CLASSES)

    def step(self, step, predictions, images):
        mean_confidence = sum(q.max() for q in predictions) / len(predictions)
        histogram = np.zeros(CLASSES)
        for q in predictions:
            histogram[q.argmax()] += 1 / len(predictions)
        self.tau = self.decay * self.tau + (1 - self.decay) * mean_confidence
        self.p = self.decay * self.p + (1 - self.decay) * sum(predictions) / len(predictions)
        self.h = self.decay * self.h + (1 - self.decay) * histogram
        thresholds = [self.tau * each / max(self.p) for each in self.p]
        hard = [int(q.argmax()) for q in predictions]
        weights = [float(q[c] >= thresholds[c]) for q, c in zip(predictions, hard, strict=True)]
        return [np.eye(CLASSES)[c] for c in hard], weights

    def finish(self, loss_x):
        pass

    def state(self):
        return {"threshold": self.tau, "class_means": self.p, "class_shares": self.h}


class SoftMatch:
    """Equations 7 to 11 of arXiv 2301.10921, with half the standard deviation."""

    def __init__(self, config):
        self.decay = config.threshold_decay
        self.p, self.mu, self.variance = np.full(CLASSES, 1 / CLASSES), 1 / CLASSES, 1.0

    def step(self, step, predictions, images):
        n = len(predictions)
        self.p = self.decay * self.p + (1 - self.decay) * sum(predictions) / n
        confidence = []
        for q in predictions:
            aligned = q * (1 / CLASSES) / self.p
            confidence.append(max(aligned / aligned.sum()))
        mean = sum(confidence) / n
        unbiased = sum((each - mean) ** 2 for each in confidence) / (n - 1)
        self.mu = self.decay * self.mu + (1 - self.decay) * mean
        self.variance = self.decay * self.variance + (1 - self.decay) * unbiased
        sigma = math.sqrt(self.variance) / 2
        weights = [1.0 if each >= self.mu else math.exp(-((each - self.mu) ** 2) / 2 / sigma**2) for each in confidence]
        return [np.eye(CLASSES)[q.argmax()] for q in predictions], weights

    def finish(self, loss_x):
        pass

    def state(self):
        return {"class_means": self.p, "confidence_mean": self.mu, "confidence_variance": self.variance}


CASES = {
    "flexmatch": (FlexMatch, dict(threshold=0.6)),
    "flexmatch without warm-up": (FlexMatch, dict(threshold=0.6, flex_warmup=False)),
    # rho^ is about 0.1, so that rho reaches its minimum of 0.05 after three or four stages.
    "dash": (Dash, dict(dash_epoch_kimg=BATCH / 1024)),
    "dash with two steps an epoch": (Dash, dict(dash_epoch_kimg=2 * BATCH / 1024)),
    "freematch": (FreeMatch, dict(threshold_decay=0.9)),
    "softmatch": (SoftMatch, dict(threshold_decay=0.9)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("views", [1, 3])
def test_targets_weights_and_state_after_every_step(name, views):
    reference, changes = CASES[name]
    config = dataclasses.replace(with_method(Config(batch=BATCH), name.split()[0]), **changes)
    mine, theirs = make_targets(config, CLASSES, IMAGES), reference(config)
    rng = np.random.default_rng(3)
    seen = []
    for step in range(STEPS):
        # Growing logits of uneven classes, and images that occur twice in a step.
        logits = rng.normal([1.5, 0.5, 0, 0, -1], 1 + step / 20, size=(views, UNLABELED, CLASSES))
        images = rng.integers(IMAGES, size=UNLABELED)
        predictions = list(np.mean([[softmax(each) for each in view] for view in logits], axis=0))
        expected_targets, expected_weights = theirs.step(step, predictions, images)
        targets, weights = mine(torch.tensor(logits).float(), torch.tensor(step), torch.tensor(images))
        np.testing.assert_allclose(targets.numpy(), np.array(expected_targets), atol=1e-5)
        np.testing.assert_allclose(weights.float().numpy(), np.array(expected_weights, float), atol=1e-5)
        losses = torch.zeros(len(LOSSES))
        losses[LOSSES.index("loss_x")] = loss_x = rng.uniform(0.05, 0.15)
        mine.observe(torch.eye(CLASSES), losses)
        theirs.finish(loss_x)
        for key, value in theirs.state().items():
            np.testing.assert_allclose(mine.state_dict()[key].numpy(), value, atol=1e-5, err_msg=key)
        seen += list(expected_weights)
    assert min(seen) < 0.5 <= max(seen), "weights are only tested if they differ"


def test_flexmatch_counts_the_last_confident_prediction_of_an_image_that_occurs_twice():
    targets = make_targets(with_method(Config(), "flexmatch"), 3, 4)
    sure = torch.eye(3) * 20
    targets(sure[None, [0, 1, 2]], torch.tensor(0), torch.tensor([2, 2, 0]))
    assert targets.confident_classes.tolist() == [2, -1, 1, -1]
    unsure = torch.zeros(1, 3, 3)
    targets(unsure, torch.tensor(1), torch.tensor([2, 1, 0]))
    assert targets.confident_classes.tolist() == [2, -1, 1, -1]


def test_dash_decays_its_threshold_every_nine_epochs_after_the_first_ten():
    config = dataclasses.replace(with_method(Config(batch=64), "dash"), dash_epoch_kimg=0.0625)  # A step.
    targets = make_targets(config, CLASSES)
    logits = torch.tensor([[[0.0, 0, 0, 0, 0.5]]])
    loss = -float(logits[0, 0].log_softmax(-1).max())
    targets.rho_hat.fill_(loss / 1.0001 * 1.27**1.5)  # The threshold is above the loss in the first two stages.
    used = {step: bool(targets(logits, torch.tensor(step))[1] > 0) for step in (9, 10, 18, 19, 27, 28)}
    assert used == {9: False, 10: True, 18: True, 19: True, 27: True, 28: False}


@pytest.mark.parametrize("absent", [False, True], ids=["all classes predicted", "a class not predicted"])
def test_the_fairness_loss_is_equation_11(absent):
    rng = np.random.default_rng(4)
    n, unlabeled = 15, slice(3, 13)
    logits = torch.tensor(rng.normal(size=(n, CLASSES)), requires_grad=True)
    with torch.no_grad():
        logits[torch.arange(n), torch.arange(n) % (4 if absent else 5)] += 4.0
    used = np.array([True, False, True, True, True, True, True, False, True, True])
    targets = torch.zeros(n, CLASSES, dtype=torch.float64)
    targets[0:3, 0] = 1.0
    targets[unlabeled, 1] = torch.tensor(used.astype(float))
    shares = torch.zeros(3, n)
    shares[0, :3], shares[1, unlabeled], shares[2, 13:] = 1 / 3, 1 / 10, 1 / 2
    fair_target = torch.tensor(softmax(rng.normal(size=CLASSES)))
    samples = Samples(
        Config(),
        logits,
        torch.zeros(n, 4),
        targets,
        torch.zeros(n, dtype=torch.int64),
        shares,
        torch.zeros(n),
        fair_target,
    )
    loss = fairness(samples)
    (gradient,) = torch.autograd.grad(loss, logits)

    again = logits.detach().double().requires_grad_()
    p = again[unlabeled][torch.tensor(used)].softmax(-1)
    histogram = torch.tensor([sum(int(row.argmax()) == c for row in p) / len(used) for c in range(CLASSES)])
    assert (0 in histogram.tolist()) == absent
    mean = p.sum(0) / len(used)
    ratios = [mean[c] / histogram[c] for c in range(CLASSES) if histogram[c] > 0]
    expected = sum(
        fair_target[c] * (mean[c] / histogram[c] / sum(ratios)).log() for c in range(CLASSES) if histogram[c] > 0
    )
    (expected_gradient,) = torch.autograd.grad(expected, again)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


def test_the_fairness_loss_without_used_pseudo_labels_is_0():
    logits = torch.randn(4, CLASSES, requires_grad=True)
    samples = Samples(
        Config(), logits, torch.zeros(4, 4), torch.zeros(4, CLASSES), torch.zeros(4, dtype=torch.int64),
        torch.full((3, 4), 0.25), torch.zeros(4), torch.full((CLASSES,), 1 / CLASSES),
    )  # fmt: skip
    loss = fairness(samples)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_freematch_compares_with_the_normalized_ratio_of_its_averages():
    targets = make_targets(with_method(Config(), "freematch"), 3)
    targets.class_means.copy_(torch.tensor([0.5, 0.3, 0.2]))
    targets.class_shares.copy_(torch.tensor([0.25, 0.75, 0.0]))  # 2, 0.4 and nothing.
    assert targets.fair_target.tolist() == pytest.approx([2 / 2.4, 0.4 / 2.4, 0.0])
