"""The loss and its terms (section 3.3 of the paper): each a mean over a group of samples of a micro-batch.

TERMS is the only list of them: metrics, logs and pages follow it. Which samples a group has is in `batch_layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.config import Config


@dataclass
class Samples:
    """What the network says of the samples of a micro-batch, and what it should say.

    Every mean is a sum over all samples with static shares: taking samples out would cost a GPU a sort on the way back.

    Attributes:
        config: of the run.
        logits: (n, L) of the mixup pool, u_1 and the rotated u_1.
        rotation_logits: (n, 4).
        targets: (n, L) float32, mixed as the images are; zeros where a sample does not count.
        rotations: (n,) int64, multiples of 90 degrees.
        shares: (3, n) float32, of each sample in the means over X', U' and u_1.
        rotation_shares: (n,) float32, likewise over the rotated u_1.
    """

    config: Config
    logits: Tensor
    rotation_logits: Tensor
    targets: Tensor
    rotations: Tensor
    shares: Tensor
    rotation_shares: Tensor

    def __post_init__(self) -> None:
        self.log_p = F.log_softmax(self.logits.float(), dim=-1)
        entropies = -(self.targets * self.log_p).sum(-1)  # (n,)
        self.mixed_labeled, self.mixed_unlabeled, self.u_1 = (self.shares * entropies).sum(-1).unbind()


def labeled(samples: Samples) -> Tensor:
    """Cross-entropy of X', the mixed labeled samples."""
    return samples.mixed_labeled


def unlabeled(samples: Samples) -> Tensor:
    """Loss of U', the mixed unlabeled samples: cross-entropy, MixMatch's squared difference, or UDA's KL divergence."""
    targets, share = samples.targets, samples.shares[1]
    if samples.config.unlabeled_loss == "l2":
        return (share * (samples.log_p.exp() - targets).square().mean(-1)).sum()
    if samples.config.unlabeled_loss == "kl":  # less the targets' own entropy
        return samples.mixed_unlabeled + (share * torch.xlogy(targets, targets).sum(-1)).sum()
    return samples.mixed_unlabeled


def unmixed(samples: Samples) -> Tensor:
    """Cross-entropy of u_1, one strong view as it is."""
    return samples.u_1


def rotation(samples: Samples) -> Tensor:
    """Cross-entropy of the rotation that a rotated u_1 has."""
    turned = F.one_hot(samples.rotations, 4) * F.log_softmax(samples.rotation_logits.float(), dim=-1)
    return -(samples.rotation_shares * turned.sum(-1)).sum()


class Term(NamedTuple):
    """A term of the loss.

    Attributes:
        value: its mean over its samples, a scalar.
        weight: what it is multiplied by; a term of weight 0 is not computed.
        ramped: whether the weight rises from 0 over the first `ramp_kimg`.
        unlabeled: whether it is of unlabeled samples, which supervised training does not have.
    """

    value: Callable[[Samples], Tensor]
    weight: Callable[[Config], float]
    ramped: bool = False
    unlabeled: bool = True


# the first is of the labeled samples, has no weight, and is there in every method
TERMS: dict[str, Term] = {
    "loss_x": Term(labeled, lambda c: 1.0, unlabeled=False),
    "loss_u": Term(unlabeled, lambda c: c.w_u, ramped=True),
    "loss_u1": Term(unmixed, lambda c: c.w_u1, ramped=True),
    "loss_rot": Term(rotation, lambda c: c.w_rot),
}
LOSSES = ("loss", *TERMS)


def ramp_up(config: Config, step: Tensor) -> Tensor | float:
    """Return the ramp of the unlabeled terms: linear from 0 to 1 over the first `ramp_kimg` * 1024 labeled images."""
    return (step * (config.batch / (1024 * config.ramp_kimg))).clamp(max=1) if config.ramp_kimg else 1.0


def total_loss(samples: Samples, ramp: Tensor | float) -> tuple[Tensor, Tensor]:
    """Add up the terms.

    Args:
        samples: of a micro-batch.
        ramp: see `ramp_up`.

    Returns:
        The loss, and (len(LOSSES),) float32 without gradient, in their order; 0 for a term that the run does not have.
    """
    c, loss, values = samples.config, None, []
    for term in TERMS.values():
        weight = term.weight(c)
        if not weight or (term.unlabeled and not c.unlabeled):
            values.append(samples.log_p.new_zeros(()))
            continue
        values.append(term.value(samples))
        factor = weight * ramp if term.ramped else weight
        loss = values[-1] if loss is None else loss + factor * values[-1]
    assert loss is not None, "the first term counts fully"
    return loss, torch.stack([loss, *values]).detach()
