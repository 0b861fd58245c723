"""Batch norm over all rows, over groups of them, or over the rows of all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import collectives

_BN_EPS = 1e-3


class BatchNorm(nn.Module):
    """Batch norm whose training statistics are over all rows, over equal groups of consecutive rows, or over all ranks.

    The paper's code runs the training batch in several passes, each with statistics of its own; one pass over groups
    computes the same. Running statistics move once a pass, by the mean over the groups; or over those of the pass's
    first rows alone, which does not change what is normalised by what. In the authors' code they move by the last of
    the K + 2 interleaved passes over the mixup pool: the pool's mean has the same expectation, and less noise.

    Args:
        channels: C.
        momentum: of the running statistics, in PyTorch's convention.
        rows_per_group: rows that share statistics; None for all.
        over_ranks: statistics over the rows of all ranks, which have equally many. torch's own SyncBatchNorm does
            that on GPUs alone, and always moves the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float, rows_per_group: int | None, over_ranks: bool = False) -> None:
        super().__init__()
        self.momentum = momentum
        self.rows_per_group = rows_per_group
        self.over_ranks = over_ranks
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, track: bool, stats_rows: int | None = None) -> Tensor:
        """Normalises (N, C, H, W).

        Args:
            x: the rows.
            track: in training, whether running statistics move.
            stats_rows: how many rows, the first of all and whole groups, they move by; None for all.
        """
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, _BN_EPS)
        counted = x.shape[0] if stats_rows is None else stats_rows
        apart = track and counted < x.shape[0]
        over_ranks = self.over_ranks and collectives.ranks() > 1
        if not over_ranks and self.rows_per_group in (None, x.shape[0]):
            mean, var = (self.running_mean, self.running_var) if track else (None, None)
            if apart:
                # for its side effect, which is all that a compiler leaves of it: torch.var_mean takes ten times as long
                # on a CPU
                with torch.no_grad():
                    F.batch_norm(x[:counted], mean, var, self.weight, self.bias, True, self.momentum, _BN_EPS)
                mean = var = None
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, _BN_EPS)
        at_least_single = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = at_least_single.unflatten(0, (-1, self.rows_per_group or x.shape[0]))  # (G, n, C, H, W)
        mean, var = _moments(grouped)
        rows, groups = grouped.shape[1], counted // grouped.shape[1]
        moving = mean[:groups], var[:groups]  # what running statistics move by
        if over_ranks:
            local = [mean, var]
            if apart:
                with torch.no_grad():
                    local += _moments(grouped[:, :counted])
            exchanged = collectives.stack(torch.stack(local)).unbind(1)  # each (R, 1, 1, C, 1, 1)
            mean, var = _combined(*exchanged[:2])
            moving = _combined(*exchanged[2:]) if apart else (mean, var)
            rows = counted * collectives.ranks()
        if track:
            with torch.no_grad():
                count = rows * x[0, 0].numel()
                unbiased = moving[1].mean(0).flatten() * (count / (count - 1))
                self.running_mean.lerp_(moving[0].mean(0).flatten(), self.momentum)
                self.running_var.lerp_(unbiased, self.momentum)
        scale = torch.rsqrt(var + _BN_EPS) * self.weight[:, None, None]
        shift = self.bias[:, None, None] - mean * scale
        return (grouped * scale + shift).flatten(0, 1).to(x.dtype)


def _moments(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group: (G, n, C, H, W) to twice (G, 1, C, 1, 1)."""
    var, mean = torch.var_mean(grouped, dim=(1, 3, 4), correction=0, keepdim=True)
    return mean, var


def _combined(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Those of all ranks' rows together, from each rank's: (R, ...) to (...)."""
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)
