"""Measurements of the training state for warnings and reports; nothing here affects training."""

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
    """Return the share of images on which f and f_ema predict the same class, and the share expected by chance.

    The share expected by chance is that of independent predictions with the same class frequencies. f is in training
    mode and keeps its running statistics, as for label guessing. With batch norm over groups, the number of images must
    be a multiple of the group size. With batch norm over ranks, all ranks must call this together.

    Args:
        network: f.
        ema_model: f_ema.
        images: (n, H, W, 3) uint8.
        device: The device of the networks.
    """
    batch = normalized(network, images, device)
    logits, ema_logits = network(batch, track=False)[0], ema_model(batch)[0]
    predicted, ema_predicted = (
        F.one_hot(each.argmax(-1), each.shape[1]).float() for each in (logits, ema_logits)
    )  # (n, L)
    both = torch.stack([(predicted * ema_predicted).sum(1).mean(), predicted.mean(0) @ ema_predicted.mean(0)])
    share, by_chance = both.tolist()
    return share, by_chance


@torch.no_grad()
def guess_quality(state: TrainState, images: np.ndarray, labels: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Compute confidence and accuracy of the pseudo-labels, for reports only.

    Pseudo-labels are made as in the step (`Targets.predict`), by the same network in training mode with its running
    statistics kept, but from images without augmentation. With batch norm over ranks, all ranks must call this
    together.

    Args:
        state: The training state.
        images: (n, H, W, 3) uint8. With batch norm over groups, n must be a multiple of the group size.
        labels: (n,) int64, the true classes.
        device: The device of the network.

    Returns:
        "images": n; "accuracy" and "confidence": means, in 0..1; "bins": for ten equal intervals of confidence the
        number of pseudo-labels and the number of correct ones.
    """
    logits = state.guess_network()(normalized(state.network, images, device), track=False)[0]
    # A network that has diverged predicts NaN. The trainer reports that later.
    confidence, classes = state.targets.predict(logits).nan_to_num(0.0).cpu().max(-1)
    correct = classes.numpy() == labels
    interval = np.minimum((confidence.numpy() * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    counts = [np.bincount(interval[each], minlength=CONFIDENCE_BINS) for each in (slice(None), correct)]
    return {
        "images": len(labels),
        "accuracy": round(float(correct.mean()), 4),
        "confidence": round(float(confidence.mean()), 4),
        "bins": np.stack(counts, -1).tolist(),
    }
