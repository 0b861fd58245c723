"""Evaluation and prediction with the EMA model."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.config import Config
from engine.distributed import collectives
from engine.models.wide_resnet import Classifier
from engine.training.step import TrainState
from kernels.assemble import assemble_batch
from kernels.guess import EPSILON

REPORTED_EVALUATIONS = 20
CONFIDENCE_BINS = 10


@torch.no_grad()
def class_logits(
    network: Classifier, images: np.ndarray, device: torch.device, rows: int = 512
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of unaugmented images, in fp32, pass by pass.

    Args:
        network: in evaluation mode.
        images: (N, H, W, 3) uint8.
        device: the network's.
        rows: images a pass.

    Yields:
        Which images a pass took, and their logits: (n, L) float32 on the device.
    """
    assert not network.training
    for start in range(0, len(images), rows):
        passed = slice(start, start + rows)
        yield passed, network(_normalised(network, images[passed], device))[0].float()


def _normalised(network: Classifier, images: np.ndarray, device: torch.device) -> Tensor:
    """(n, H, W, 3) uint8 to the network's (n, 3, H, W) input."""
    mean, std = (torch.tensor(levels, device=device) for levels in (network.mean, network.std))
    views = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    own = torch.arange(len(views), device=device)
    ones, zeros = torch.ones(len(views), device=device), torch.zeros_like(own)
    rows = assemble_batch(views, own, own, ones, zeros, mean, std, torch.float32)
    return rows.to(next(network.parameters()).dtype)


def evaluate(network: Classifier, images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[float, float]:
    """Accuracy in percent and mean cross-entropy over (N, H, W, 3) uint8 images with (N,) int64 labels.

    Every rank classifies its share, the images r, r + R, ...
    """
    own = slice(collectives.rank(), None, collectives.ranks())
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    truth = torch.from_numpy(labels[own]).to(device)
    for passed, logits in class_logits(network, images[own], device):
        right = (logits.argmax(-1) == truth[passed]).double().sum()
        sums += torch.stack([right, F.cross_entropy(logits, truth[passed], reduction="sum").double()])
    right, loss = collectives.total(sums) / len(labels)
    return 100.0 * right.item(), loss.item()


@torch.no_grad()
def agreement(
    network: Classifier, ema_model: Classifier, images: np.ndarray, device: torch.device
) -> tuple[float, float]:
    """Share of (n, H, W, 3) uint8 images that f and f_ema classify alike, and what it would be by chance.

    By chance: if each gave as many images to every class as it does, but to any images. f is in training mode and
    leaves its running statistics alone, as when it guesses labels. With batch norm over groups n is a multiple of
    their rows; with batch norm over ranks all of them have to call this together.
    """
    batch = _normalised(network, images, device)
    logits, ema_logits = network(batch, track=False)[0], ema_model(batch)[0]
    guessed, ema_guessed = (
        F.one_hot(each.argmax(-1), each.shape[1]).float() for each in (logits, ema_logits)
    )  # (n, L)
    both = torch.stack([(guessed * ema_guessed).sum(1).mean(), guessed.mean(0) @ ema_guessed.mean(0)])
    share, by_chance = both.tolist()
    return share, by_chance


@torch.no_grad()
def guess_quality(
    config: Config, state: TrainState, images: np.ndarray, labels: np.ndarray, device: torch.device
) -> dict[str, Any]:
    """How confident the network's guesses are, and how often they are right; for a report, never for training.

    Guesses are made as the step makes them (section 3.1 of the paper): f in training mode, whose running statistics
    stay as they are, then alignment and sharpening; but of images that are not augmented. The confidence of hard
    labels is that before they became hard. With batch norm over ranks all of them have to call this together.

    Args:
        config: of the run.
        state: what is trained.
        images: (n, H, W, 3) uint8; with batch norm over groups n is a multiple of their rows.
        labels: (n,) int64.
        device: the network's.

    Returns:
        "images": n; "accuracy" and "confidence": means, in 0..1; "bins": for ten equal intervals of confidence how many
        guesses are in it, and how many of these are right.
    """
    logits = state.network(_normalised(state.network, images, device), track=False)[0].double()
    guesses = logits.softmax(-1)
    if config.align:
        guesses = guesses * (state.label_marginal + EPSILON) / (state.p_model_history.mean(0) + EPSILON)
    sharp = guesses ** (1 if config.hard_labels else 1 / config.temperature)
    # of a network that has diverged, which the trainer tells later, there are NaN
    confidence, classes = (sharp / sharp.sum(-1, keepdim=True)).nan_to_num(0.0).cpu().max(-1)
    right = classes.numpy() == labels
    interval = np.minimum((confidence.numpy() * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    counts = [np.bincount(interval[each], minlength=CONFIDENCE_BINS) for each in (slice(None), right)]
    return {
        "images": len(labels),
        "accuracy": round(float(right.mean()), 4),
        "confidence": round(float(confidence.mean()), 4),
        "bins": np.stack(counts, -1).tolist(),
    }


def median_of_last(accuracies: list[float]) -> float:
    """The paper's reported figure: the median over the last 20 evaluations."""
    return median(accuracies[-REPORTED_EVALUATIONS:])
