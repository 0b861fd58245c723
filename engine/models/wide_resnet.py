"""Wide ResNet with a rotation head, the network of the ReMixMatch paper.

It follows Zagoruyko & Komodakis (2016) with the details of Oliver et al. (2018): pre-activation, leaky ReLU with slope
0.1, and a first convolution with 16 channels. Convolutions have no bias.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models import fused
from engine.models.batch_norm import BatchNorm
from kernels.convolution import SLOPE

# oneDNN's gradients of a 1x1 convolution with a stride are wrong, or end the process, with fewer input channels.
_STRIDED_CHANNELS = 16


def _activate(norm: BatchNorm, x: Tensor, track: bool, stats_samples: int | None) -> Tensor:
    """Apply batch norm and leaky ReLU.

    Where `_overwrites` allows it, the leaky ReLU overwrites the result of batch norm, which no gradient needs. With
    statistics over groups or ranks it does not: their result is a view, whose gradient autograd would copy.
    """
    overwrite = _overwrites(norm, x) and not (norm.group_size or norm.over_ranks)
    return F.leaky_relu(norm(x, track, stats_samples), SLOPE, inplace=overwrite)


def _overwrites(norm: BatchNorm, x: Tensor) -> bool:
    """Return whether activations are overwritten: on a CPU, in training.

    Hooks see wrong values otherwise, and full backward hooks do not allow it, which is how activations of a trained
    network are inspected.
    """
    return norm.training and not x.is_cuda


class ResidualBlock(nn.Module):
    """Residual block of two 3x3 convolutions, each preceded by batch norm and leaky ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        activate_first: bool,
        momentum: float,
        group_size: int | None,
        over_ranks: bool,
    ) -> None:
        super().__init__()
        self.activate_first = activate_first
        self.norm1 = BatchNorm(inputs, momentum, group_size, over_ranks)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs, momentum, group_size, over_ranks)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.step = stride if inputs < _STRIDED_CHANNELS else 1  # Between the pixels that the shortcut receives.
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride // self.step, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, track: bool, stats_samples: int | None = None) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride); see `BatchNorm.forward` for the arguments."""
        activated = _activate(self.norm1, x, track, stats_samples)
        residual = self.conv1(activated)
        residual = self.conv2(_activate(self.norm2, residual, track, stats_samples))
        skip = activated if self.activate_first else x
        if self.shortcut is not None:
            skip = self.shortcut(skip[..., :: self.step, :: self.step] if self.step > 1 else skip)
        # In place, too: no gradient needs the result of a convolution.
        return residual.add_(skip) if _overwrites(self.norm2, x) else skip + residual


class TwoHeadNetwork(nn.Module):
    """Base class of networks with a classifier and a rotation head.

    Attributes:
        mean: Mean of each channel that images are normalized with, in pixel values 0..255.
        std: Standard deviation of each channel, likewise.
        head: Linear layer of the class logits.
        rotation_head: Linear layer of the rotation logits.
    """

    mean: tuple[float, ...] = (127.5, 127.5, 127.5)  # Maps pixels to [-1, 1], as in the authors' code.
    std: tuple[float, ...] = (127.5, 127.5, 127.5)
    head: nn.Linear
    rotation_head: nn.Linear

    @torch.no_grad()
    def running_statistics(self) -> Tensor:
        """Return the running statistics of all batch norms, concatenated."""
        buffers = self._statistics()
        return torch.cat(buffers) if buffers else next(self.parameters()).new_empty(0)

    @torch.no_grad()
    def set_running_statistics(self, statistics: Tensor) -> None:
        """Set the running statistics to a result of `running_statistics`."""
        buffers = self._statistics()
        if buffers:
            torch._foreach_copy_(buffers, statistics.split([len(buffer) for buffer in buffers]))

    @torch.no_grad()
    def copy_running_statistics(self, other: TwoHeadNetwork) -> None:
        """Copy the running statistics of a network of the same architecture."""
        if buffers := self._statistics():
            torch._foreach_copy_(buffers, other._statistics())

    def in_training_mode(self) -> Self:
        """Return a network in training mode that shares all tensors with this one, whose mode does not change."""
        tensors = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        return copy.deepcopy(self, tensors).train()  # type: ignore[arg-type]

    @cached_property
    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]

    def _statistics(self) -> list[Tensor]:
        return [buffer for norm in self._norms for buffer in (norm.running_mean, norm.running_var)]  # type: ignore[misc]


def initialize_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """Initialize weights by Xavier normal and biases with zeros."""
    nn.init.xavier_normal_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)


class WideResNet(TwoHeadNetwork):
    """Wide ResNet: groups of residual blocks of widths w, 2w, 4w, ..., global average pooling, two linear heads.

    Zagoruyko & Komodakis name these networks WRN-depth-widen_factor, with depth = scales * (2 * blocks + 1) + 1 and
    widen_factor = width / 16. WRN-28-2 is (scales=3, blocks=4, width=32), WRN-37-2 is (4, 4, 32). The paper's network
    for STL-10 is WRN-37-2 with twice the channels, (4, 4, 64).

    Args:
        classes: L.
        scales: Number of groups. Each group after the first starts with stride 2.
        blocks: Number of residual blocks per group.
        width: Channels of the first group, 16 times the widen factor.
        seed: Seed of the initial weights.
        bn_momentum: Momentum of batch norm; see `BatchNorm`.
        group_size: See `BatchNorm`.
        over_ranks: See `BatchNorm`.

    Attributes:
        tilings: Tilings of fused convolutions for some kinds of passes; see `engine.models.fused`. Empty without.
    """

    tilings: Mapping[fused.Pass | None, tuple[fused.BlockTilings, ...]]

    def __init__(
        self,
        classes: int,
        scales: int = 3,
        blocks: int = 4,
        width: int = 32,
        seed: int = 0,
        bn_momentum: float = 0.001,
        group_size: int | None = None,
        over_ranks: bool = False,
    ) -> None:
        super().__init__()
        self.tilings = {}
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.body = nn.ModuleList()
        channels = 16
        for scale in range(scales):
            for block in range(blocks):
                stride = 2 if scale > 0 and block == 0 else 1
                first = scale == 0 and block == 0
                outputs = width << scale
                self.body.append(ResidualBlock(channels, outputs, stride, first, bn_momentum, group_size, over_ranks))
                channels = outputs
        self.norm = BatchNorm(channels, bn_momentum, group_size, over_ranks)
        self.head = nn.Linear(channels, classes)
        self.rotation_head = nn.Linear(channels, 4)
        self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out), generator=generator)
            elif isinstance(module, nn.Linear):
                initialize_linear(module, generator)

    def forward(self, images: Tensor, track: bool = True, stats_samples: int | None = None) -> tuple[Tensor, Tensor]:
        """Compute the logits of both heads.

        Args:
            images: (N, C, H, W) normalized, channels-last in memory. C is 3, or more if the other channels are zeros.
            track: Whether to update the running statistics of batch norm in training.
            stats_samples: Number of first samples that update them; None for all. See `BatchNorm.forward`.

        Returns:
            (N, L) class logits and (N, 4) rotation logits.
        """
        if self.tilings and (tilings := self.tilings.get(fused.pass_of(self, images))):
            return fused.forward(self, images, tilings, track, stats_samples)
        x = self.first_convolution(images)
        for block in self.body:
            x = block(x, track, stats_samples)
        features = _activate(self.norm, x, track, stats_samples).mean((2, 3))
        return self.head(features), self.rotation_head(features)

    def first_convolution(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) images to (N, 16, H, W); see `forward`."""
        if zeros := images.shape[1] - self.stem.in_channels:
            return F.conv2d(images, F.pad(self.stem.weight, (0, 0, 0, 0, 0, zeros)), padding=1)
        return self.stem(images)
