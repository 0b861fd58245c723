"""How training goes, for warnings and reports: nothing here changes what is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine.inference.evaluation import normalized
from engine.models.wide_resnet import TwoHeadNetwork
from engine.training.state import TrainState

CONFIDENCE_BINS = 10


@torch.no_grad()
def agreement(
    network: TwoHeadNetwork, ema_model: TwoHeadNetwork, images: np.ndarray, device: torch.device
) -> tuple[float, float]:
    """Share of (n, H, W, 3) uint8 images that f and f_ema classify alike, and what it would be by chance.

    By chance: if each gave as many images to every class as it does, but to any images. f is in training mode and
    leaves its running statistics alone, as when it guesses labels. With batch norm over groups n is a multiple of
    their rows; with batch norm over ranks all of them have to call this together.
    """
    batch = normalized(network, images, device)
    logits, ema_logits = network(batch, track=False)[0], ema_model(batch)[0]
    guessed, ema_guessed = (
        F.one_hot(each.argmax(-1), each.shape[1]).float() for each in (logits, ema_logits)
    )  # (n, L)
    both = torch.stack([(guessed * ema_guessed).sum(1).mean(), guessed.mean(0) @ ema_guessed.mean(0)])
    share, by_chance = both.tolist()
    return share, by_chance


@torch.no_grad()
def guess_quality(state: TrainState, images: np.ndarray, labels: np.ndarray, device: torch.device) -> dict[str, Any]:
    """How confident the network's guesses are, and how often they are right; for a report, never for training.

    Guesses are made as the step makes them (`Targets.predict`): of f in training mode, whose running statistics stay as
    they are; but of images that are not augmented. With batch norm over ranks all of them have to call this together.

    Args:
        state: what is trained.
        images: (n, H, W, 3) uint8; with batch norm over groups n is a multiple of their rows.
        labels: (n,) int64.
        device: the network's.

    Returns:
        "images": n; "accuracy" and "confidence": means, in 0..1; "bins": for ten equal intervals of confidence how many
        guesses are in it, and how many of these are right.
    """
    logits = state.network(normalized(state.network, images, device), track=False)[0]
    # of a network that has diverged, which the trainer tells later, there are NaN
    confidence, classes = state.targets.predict(logits).nan_to_num(0.0).cpu().max(-1)
    right = classes.numpy() == labels
    interval = np.minimum((confidence.numpy() * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    counts = [np.bincount(interval[each], minlength=CONFIDENCE_BINS) for each in (slice(None), right)]
    return {
        "images": len(labels),
        "accuracy": round(float(right.mean()), 4),
        "confidence": round(float(confidence.mean()), 4),
        "bins": np.stack(counts, -1).tolist(),
    }
