"""Batch norm over all samples, over groups of samples, or over the samples of all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import collectives

BN_EPS = 1e-3


class BatchNorm(nn.Module):
    """Batch norm with statistics over all samples, over equal groups of consecutive samples, or over all ranks.

    The authors' code runs the training batch in several passes with separate statistics. One pass over groups computes
    the same. A pass updates the running statistics once, with the mean over its groups. It can be restricted to the
    groups of the first samples; normalization does not depend on that. The authors' code updates them with the last of
    the K + 2 interleaved passes over the mixup pool. The mean over the pool has the same expectation and less noise.

    Args:
        channels: C.
        momentum: Momentum of the running statistics, in PyTorch's convention.
        group_size: Number of samples that share statistics; None for all.
        over_ranks: Whether to compute statistics over all ranks, which must have equal numbers of samples. torch's
            SyncBatchNorm does the same, but only on GPUs and without an option to keep the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float, group_size: int | None, over_ranks: bool = False) -> None:
        super().__init__()
        self.momentum = momentum
        self.group_size = group_size
        self.over_ranks = over_ranks
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, track: bool, stats_samples: int | None = None) -> Tensor:
        """Normalize a batch.

        Args:
            x: (N, C, H, W).
            track: Whether to update the running statistics in training.
            stats_samples: Number of first samples, in whole groups, that update the running statistics; None for all.
        """
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, BN_EPS)
        counted = x.shape[0] if stats_samples is None else stats_samples
        separate = track and counted < x.shape[0]
        over_ranks = self.over_ranks and collectives.ranks() > 1
        if not over_ranks and self.group_size in (None, x.shape[0]):
            mean, var = (self.running_mean, self.running_var) if track else (None, None)
            if separate:
                # Called to update the running statistics; a compiler removes the rest. torch.var_mean takes ten times
                # as long on a CPU.
                with torch.no_grad():
                    F.batch_norm(x[:counted], mean, var, self.weight, self.bias, True, self.momentum, BN_EPS)
                mean = var = None
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, BN_EPS)
        at_least_single = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = at_least_single.unflatten(0, (-1, self.group_size or x.shape[0]))  # (G, n, C, H, W)
        mean, var = _moments(grouped)
        samples, groups = grouped.shape[1], counted // grouped.shape[1]
        tracked = mean[:groups], var[:groups]  # For the running statistics.
        if over_ranks:
            local = [mean, var]
            if separate:
                with torch.no_grad():
                    local += _moments(grouped[:, :counted])
            exchanged = collectives.stack(torch.stack(local)).unbind(1)  # each (R, 1, 1, C, 1, 1)
            mean, var = _combined(*exchanged[:2])
            tracked = _combined(*exchanged[2:]) if separate else (mean, var)
            samples = counted * collectives.ranks()
        if track:
            with torch.no_grad():
                count = samples * x[0, 0].numel()
                unbiased = tracked[1].mean(0).flatten() * (count / (count - 1))
                self.running_mean.lerp_(tracked[0].mean(0).flatten(), self.momentum)
                self.running_var.lerp_(unbiased, self.momentum)
        scale = torch.rsqrt(var + BN_EPS) * self.weight[:, None, None]
        shift = self.bias[:, None, None] - mean * scale
        return (grouped * scale + shift).flatten(0, 1).to(x.dtype)


def _moments(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each group: (G, n, C, H, W) to two tensors (G, 1, C, 1, 1)."""
    var, mean = torch.var_mean(grouped, dim=(1, 3, 4), correction=0, keepdim=True)
    return mean, var


def _combined(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Combine the means and biased variances of the ranks into those of all samples: (R, ...) to (...)."""
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)
