"""The step of TorchSSL and USB: formulas, network, views and learning."""

import copy
import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from bench.rivals import baseline, ports
from engine.models.wide_resnet import WideResNet
from pipelines.data.datasets import DATASETS
from pipelines.data.splits import balanced

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(
    baseline.step_config(ports.K, CPU), dataset="digits", labels=40, batch=6, max_shift=2, flip=False, steps=128
)
TERMS = ("loss", "loss_x", "loss_u", "loss_u1", "loss_rot")


@pytest.fixture(autouse=True)
def seeded():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)


def make(interleaved=False, **changes):
    """Return a step on digits and its loaders."""
    config = dataclasses.replace(CONFIG, **changes)
    data = DATASETS["digits"]()
    split = balanced(data, config.labels, 0)
    step = ports.PortStep(config, data, split, CPU, interleaved)
    return step, ports.loaders(config, data, split, CPU, workers=0)


def log_softmax(logits):
    return logits - logits.exp().sum(1, keepdim=True).log()


def cross_entropy(logits, targets):
    """Compute the mean cross-entropy sample by sample."""
    return sum(-(target @ log) for target, log in zip(targets, log_softmax(logits), strict=True)) / len(logits)


def pass_groups(batch, interleaved):
    """Return the indices of the mixed pool that share each of the four forward passes."""
    groups = [list(range(4 * batch))[first : first + batch] for first in range(0, 4 * batch, batch)]
    if interleaved:
        for other, places in enumerate(np.array_split(np.arange(batch), 4)):
            for place in places:
                groups[0][place], groups[other][place] = groups[other][place], groups[0][place]
    return groups


def reference(step, labeled, unlabeled, lam, partner):
    """Compute a step from its formulas in float64; return its terms, the network for their gradients, and new p~(y)."""
    network = copy.deepcopy(step.network).double()
    x, y = labeled
    weak, u1, u2, rotated, quarters = unlabeled
    x, weak, u1, u2, rotated = (images.double() for images in (x, weak, u1, u2, rotated))
    batch = len(x)

    q = log_softmax(network(weak)[0].detach()).exp()
    before = q.mean(0) if step.p_model is None else step.p_model.double()
    p_model = 0.999 * before + 0.001 * q.mean(0)
    p_target = torch.full((10,), 0.1, dtype=torch.float64)  # 40 labels, 4 per class.
    guess = q * (p_target + 1e-6) / (p_model + 1e-6)
    guess /= guess.sum(1, keepdim=True)
    guess = guess**2 / (guess**2).sum(1, keepdim=True)

    one_hot = torch.eye(10, dtype=torch.float64)[y]
    images, targets = torch.cat([x, u1, u2, weak]), torch.cat([one_hot, guess, guess, guess])
    mixed = [lam * images[i] + (1 - lam) * images[partner[i]] for i in range(4 * batch)]
    mixed_targets = torch.stack([lam * targets[i] + (1 - lam) * targets[partner[i]] for i in range(4 * batch)])
    logits = [None] * len(mixed)
    for group in pass_groups(batch, step.interleaved):
        for index, output in zip(group, network(torch.stack([mixed[i] for i in group]))[0], strict=True):
            logits[index] = output
    logits = torch.stack(logits)

    ramp = min(1.0, 64 * step.steps / step.config.steps)
    terms = {
        "loss_x": cross_entropy(logits[:batch], mixed_targets[:batch]),
        "loss_u": cross_entropy(logits[batch:], mixed_targets[batch:]),
        "loss_u1": cross_entropy(network(u1)[0], guess),
        "loss_rot": cross_entropy(network(rotated)[1], torch.eye(4, dtype=torch.float64)[quarters]),
    }
    weighted = 1.5 * ramp * terms["loss_u"] + 0.5 * ramp * terms["loss_u1"] + 0.5 * terms["loss_rot"]
    terms["loss"] = terms["loss_x"] + weighted
    return terms, network, p_model


def next_mixup(batch):
    """Return the lambda and the partners of the next step, leaving the random state unchanged."""
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    lam = np.random.beta(0.75, 0.75)
    partner = torch.randperm(4 * batch)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    return max(lam, 1 - lam), partner


@pytest.mark.parametrize("interleaved", [False, True])
def test_losses_match_a_float64_reference(interleaved):
    """Compare three steps, with the ramp at 0, 0.5 and 1, as p~(y) starts and is updated."""
    step, batches = make(interleaved)
    for labeled, unlabeled in itertools.islice(zip(*batches, strict=True), 3):
        expected, _, p_model = reference(step, labeled, unlabeled, *next_mixup(6))
        terms = step.step(labeled, unlabeled)
        torch.testing.assert_close(step.p_model.double(), p_model, rtol=2e-5, atol=0)
        assert tuple(terms) == TERMS
        for name in TERMS:
            assert terms[name] == pytest.approx(expected[name].item(), rel=2e-4), name


def test_a_step_uses_sgd_and_only_its_first_pass_updates_statistics():
    step, batches = make()
    labeled, unlabeled = (next(loader) for loader in batches)
    before = {name: tensor.clone() for name, tensor in step.network.state_dict().items()}
    lam, partner = next_mixup(6)
    terms, network, _ = reference(step, labeled, unlabeled, lam, partner)
    terms["loss"].backward()
    step.step(labeled, unlabeled)
    after = step.network.state_dict()

    for name, parameter in network.named_parameters():  # Nesterov's first step is (1 + momentum) * gradient.
        decay = 5e-4 if parameter.ndim > 1 else 0.0
        expected = parameter - 0.03 * 1.9 * (parameter.grad + decay * parameter)
        torch.testing.assert_close(after[name].double(), expected.detach(), rtol=1e-4, atol=1e-6)
        average = 0.001 * expected.detach() + 0.999 * before[name].double()
        torch.testing.assert_close(step.ema[name].double(), average, rtol=1e-4, atol=1e-6)

    x, (weak, u1, u2, _, _) = labeled[0], unlabeled
    pool = torch.cat([x, u1, u2, weak])
    stem = before["stem.weight"]
    first = torch.nn.functional.conv2d((lam * pool + (1 - lam) * pool[partner])[:6], stem, padding=1)
    name = "blocks.0.bn1.running_mean"
    torch.testing.assert_close(after[name], 0.001 * first.mean((0, 2, 3)))
    assert after["blocks.0.bn1.num_batches_tracked"] == 1 and torch.equal(step.ema[name], after[name])


def test_the_network_matches_the_engines():
    config = dataclasses.replace(CONFIG, blocks=2)
    ours = WideResNet(10, config.scales, config.blocks, config.width, bn_momentum=0.001)
    theirs = ports.PortNetwork(10, config)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.data.copy_(q)
    images = torch.randn(4, 3, 16, 16)
    for expected, found in zip(ours(images), theirs(images), strict=True):
        torch.testing.assert_close(found, expected)


def test_interleaving_mixes_all_batches_into_the_first_and_is_its_own_inverse():
    batches = [torch.arange(10 * n, 10 * n + 6) for n in range(4)]
    mixed = ports.interleave(batches)
    assert mixed[0].tolist() == [0, 1, 12, 13, 24, 35] and mixed[2].tolist() == [20, 21, 22, 23, 4, 25]
    assert all(torch.equal(a, b) for a, b in zip(ports.interleave(mixed), batches, strict=True))


def test_a_batch_has_the_expected_views():
    _, batches = make(flip=True)
    (x, y), (weak, u1, u2, rotated, quarters) = (next(loader) for loader in batches)
    for images in (x, weak, u1, u2, rotated):
        assert images.shape == (6, 3, 16, 16) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert y.shape == quarters.shape == (6,) and quarters.unique().numel() > 1
    assert not torch.equal(u1, u2) and not torch.equal(u1, weak)
    for image, image_rotated, turns in zip(u1, rotated, quarters.tolist(), strict=True):
        assert torch.equal(image_rotated, image.rot90(turns, (1, 2)))


def test_it_learns_digits():
    """Train 100 steps, with the ramp rising to 0.5: every term decreases, including those of unlabeled images."""
    step, batches = make(batch=16, width=16, labels=100, steps=12_800)
    terms = [step.step(*batch) for batch in itertools.islice(zip(*batches, strict=True), 100)]
    assert all(np.isfinite(list(each.values())).all() for each in terms)
    first, last = (
        {name: np.mean([each[name] for each in part]) for name in TERMS} for part in (terms[:10], terms[90:])
    )
    ratios = {name: last[name] / first[name] for name in TERMS[1:]}
    assert max(ratios.values()) < 0.8, ratios
