"""Evaluation and prediction with the EMA model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.distributed import collectives
from engine.inference.confusion import recalls_of
from engine.models.wide_resnet import TwoHeadNetwork
from kernels.assemble import assemble_batch


@torch.no_grad()
def class_logits(
    network: TwoHeadNetwork, images: np.ndarray, device: torch.device, rows: int = 512
) -> Iterator[tuple[slice, Tensor]]:
    """Yield logits of unaugmented images, in float32, batch by batch.

    Args:
        network: Network in evaluation mode.
        images: (N, H, W, 3) uint8.
        device: Device of the network.
        rows: Batch size.

    Yields:
        The slice of images in a batch, and their logits: (n, L) float32 on the device.
    """
    assert not network.training
    for start in range(0, len(images), rows):
        passed = slice(start, start + rows)
        yield passed, network(normalized(network, images[passed], device))[0].float()


def normalized(network: TwoHeadNetwork, images: np.ndarray, device: torch.device) -> Tensor:
    """Convert (n, H, W, 3) uint8 images to the network's (n, 3, H, W) input."""
    mean, std = (torch.tensor(levels, device=device) for levels in (network.mean, network.std))
    views = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    own = torch.arange(len(views), device=device)
    ones, zeros = torch.ones(len(views), device=device), torch.zeros_like(own)
    rows = assemble_batch(views, own, own, ones, zeros, mean, std, torch.float32)
    return rows.to(next(network.parameters()).dtype)


def evaluate(
    network: TwoHeadNetwork, images: np.ndarray, labels: np.ndarray, device: torch.device
) -> tuple[float, float, Tensor]:
    """Classify (N, H, W, 3) uint8 images with (N,) int64 labels.

    Each rank r of R classifies the images r, r + R, ...

    Returns:
        Accuracy in percent and mean cross-entropy over all images, and the classes that this rank predicts: (n,) int64.
    """
    own = slice(collectives.rank(), None, collectives.ranks())
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    truth = torch.from_numpy(labels[own]).to(device)
    predicted = torch.empty_like(truth)
    for passed, logits in class_logits(network, images[own], device):
        predicted[passed] = logits.argmax(-1)
        right = (predicted[passed] == truth[passed]).double().sum()
        sums += torch.stack([right, F.cross_entropy(logits, truth[passed], reduction="sum").double()])
    right, loss = collectives.total(sums) / len(labels)
    return 100.0 * right.item(), loss.item(), predicted


def class_recalls(predicted: Tensor, labels: np.ndarray, classes: int) -> list[float | None]:
    """Return the recall of each class in percent over all ranks; None for a class without images.

    Args:
        predicted: (n,) int64, the classes that `evaluate` returned on this rank.
        labels: (N,) int64, labels of all images.
        classes: L.
    """
    own = labels[collectives.rank() :: collectives.ranks()]
    correct = np.bincount(own[predicted.cpu().numpy() == own], minlength=classes)
    total = collectives.total(torch.from_numpy(correct).to(predicted.device)).cpu().numpy()
    return recalls_of(total, np.bincount(labels, minlength=classes))
