"""The loss and its terms (section 3.3 of the paper).

Each term is a mean over one group of samples of a micro-batch; `batch_layout` defines the groups. TERMS is the only
list of the terms: metrics, logs and reports follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.config import Config


@dataclass
class Samples:
    """Predictions and targets for the samples of a micro-batch: the mixup pool, u_1 and the rotated u_1.

    Every mean is computed as a weighted sum over all samples with constant weights. Indexing the samples of a group
    instead would make the backward pass sort indices on a GPU.

    Attributes:
        config: The run's configuration.
        logits: (n, L) class logits.
        rotation_logits: (n, 4).
        targets: (n, L) float32, mixed like the images; zeros for samples whose pseudo-label is not used.
        rotations: (n,) int64, in units of 90 degrees.
        shares: (3, n) float32, weights of each sample in the means over X', U' and u_1.
        rotation_shares: (n,) float32, weights in the mean over the rotated u_1.
        fair_target: (L,) float32, distribution that the fairness term compares with; None without this term.
        log_p: (n, L) float32, log-probabilities of the classes.
        mixed_labeled: (), mean cross-entropy of X'.
        mixed_unlabeled: (), mean cross-entropy of U'.
        u_1: (), mean cross-entropy of u_1.
    """

    config: Config
    logits: Tensor
    rotation_logits: Tensor
    targets: Tensor
    rotations: Tensor
    shares: Tensor
    rotation_shares: Tensor
    fair_target: Tensor | None = None

    def __post_init__(self) -> None:
        self.log_p = F.log_softmax(self.logits.float(), dim=-1)
        cross_entropy = -(self.targets * self.log_p).sum(-1)  # (n,)
        self.mixed_labeled, self.mixed_unlabeled, self.u_1 = (self.shares * cross_entropy).sum(-1).unbind()


def labeled(samples: Samples) -> Tensor:
    """Return the cross-entropy of X', the mixed labeled samples."""
    return samples.mixed_labeled


def unlabeled(samples: Samples) -> Tensor:
    """Return the loss of U', the mixed unlabeled samples: cross-entropy, MixMatch's squared error or UDA's KL."""
    targets, share = samples.targets, samples.shares[1]
    if samples.config.unlabeled_loss == "l2":
        return (share * (samples.log_p.exp() - targets).square().mean(-1)).sum()
    if samples.config.unlabeled_loss == "kl":  # Cross-entropy minus the entropy of the targets.
        return samples.mixed_unlabeled + (share * torch.xlogy(targets, targets).sum(-1)).sum()
    return samples.mixed_unlabeled


def unmixed(samples: Samples) -> Tensor:
    """Return the cross-entropy of u_1, one strong view unmixed."""
    return samples.u_1


def rotation(samples: Samples) -> Tensor:
    """Return the cross-entropy of predicting the rotation of the rotated u_1."""
    log_p = F.one_hot(samples.rotations, 4) * F.log_softmax(samples.rotation_logits.float(), dim=-1)
    return -(samples.rotation_shares * log_p.sum(-1)).sum()


def fairness(samples: Samples) -> Tensor:
    """Return FreeMatch's fairness loss of the unlabeled samples whose pseudo-label is used (equations 9 to 11).

    It is minus the cross-entropy between `fair_target` and the mean prediction divided by the histogram of predicted
    classes, both normalized to sum to 1. Classes that no sample is predicted as have no gradient and count as 0.
    """
    assert samples.fair_target is not None, "the method has a fair target if w_fair is not 0"
    p = samples.log_p.exp()
    weights = (samples.shares[1] * samples.targets.sum(-1))[:, None]  # (n, 1), 0 where no pseudo-label is used.
    histogram = (weights * F.one_hot(p.argmax(-1), p.shape[1])).sum(0)
    present = histogram > 0
    ratio = (weights * p).sum(0) / torch.where(present, histogram, 1.0)
    ratio = torch.where(present, ratio, 0.0)
    ratio = ratio / ratio.sum().clamp(min=torch.finfo(ratio.dtype).tiny)
    return (samples.fair_target * torch.where(present, ratio, 1.0).log()).sum()


class Term(NamedTuple):
    """A term of the loss.

    Attributes:
        value: Computes the mean over the term's samples, a scalar.
        weight: Returns the term's weight; a term of weight 0 is not computed.
        ramped: Whether the weight rises from 0 over the first `ramp_kimg`.
        unlabeled: Whether the term needs unlabeled data. Supervised training omits such terms.
    """

    value: Callable[[Samples], Tensor]
    weight: Callable[[Config], float]
    ramped: bool = False
    unlabeled: bool = True


# The first term is that of the labeled samples. Every method has it, with weight 1.
TERMS: dict[str, Term] = {
    "loss_x": Term(labeled, lambda c: 1.0, unlabeled=False),
    "loss_u": Term(unlabeled, lambda c: c.w_u, ramped=True),
    "loss_u1": Term(unmixed, lambda c: c.w_u1, ramped=True),
    "loss_rot": Term(rotation, lambda c: c.w_rot),
    "loss_fair": Term(fairness, lambda c: c.w_fair),
}
LOSSES = ("loss", *TERMS)


def used_terms(config: Config) -> list[str]:
    """Return the names of the terms that a run computes: those of nonzero weight whose data it has."""
    return [name for name, term in TERMS.items() if term.weight(config) and (config.unlabeled or not term.unlabeled)]


def ramp_up(config: Config, step: Tensor) -> Tensor | float:
    """Return the ramp-up factor, which is 1 after `ramp_kimg` * 1024 labeled images; see `Config.ramp`."""
    if not config.ramp_kimg:
        return 1.0
    progress = (step * (config.batch / (1024 * config.ramp_kimg))).clamp(max=1)
    if config.ramp == "gaussian":
        return (-5 * (1 - progress).square()).exp()
    if config.ramp == "cosine":
        return 0.5 - 0.5 * (math.pi * progress).cos()
    return progress


def total_loss(samples: Samples, ramp: Tensor | float) -> tuple[Tensor, Tensor]:
    """Sum the weighted terms.

    Args:
        samples: The samples of a micro-batch.
        ramp: The factor of `ramp_up`.

    Returns:
        The loss, and a (len(LOSSES),) float32 tensor of the loss and its terms in the order of LOSSES, detached. A term
        that the run does not use is 0.
    """
    loss, values, used = None, [], used_terms(samples.config)
    for name, term in TERMS.items():
        if name not in used:
            values.append(samples.log_p.new_zeros(()))
            continue
        values.append(term.value(samples))
        weight = term.weight(samples.config)
        factor = weight * ramp if term.ramped else weight
        loss = values[-1] if loss is None else loss + factor * values[-1]
    assert loss is not None, "the first term is never omitted"
    return loss, torch.stack([loss, *values]).detach()
