"""Wide ResNet with a rotation head, and batch norm over all rows or over groups of them.

The network of ReMixMatch's experiments (Zagoruyko & Komodakis 2016, as Oliver et al. 2018 fix it): pre-activation,
leaky ReLU of slope 0.1, first convolution of 16 channels. No convolution has a bias: batch norm follows each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.batch_norm import BatchNorm

_SLOPE = 0.1


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and leaky ReLU, around a shortcut."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        activate_first: bool,
        momentum: float,
        rows_per_group: int | None,
        over_ranks: bool,
    ) -> None:
        super().__init__()
        self.activate_first = activate_first
        self.norm1 = BatchNorm(inputs, momentum, rows_per_group, over_ranks)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs, momentum, rows_per_group, over_ranks)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, track: bool, stats_rows: int | None = None) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        activated = F.leaky_relu(self.norm1(x, track, stats_rows), _SLOPE)
        residual = self.conv1(activated)
        residual = self.conv2(F.leaky_relu(self.norm2(residual, track, stats_rows), _SLOPE))
        carried = activated if self.activate_first else x
        if self.shortcut is not None:
            carried = self.shortcut(carried)
        return carried + residual


class TwoHeadNetwork(nn.Module):
    """A network with class and rotation logits, and what a step needs of it beside them.

    Attributes:
        mean: of the pixels of each channel, in grey levels, by which images are normalised.
        std: likewise.
    """

    mean: tuple[float, ...] = (127.5, 127.5, 127.5)  # pixels to [-1, 1], as in the paper's code
    std: tuple[float, ...] = (127.5, 127.5, 127.5)
    head: nn.Linear
    rotation_head: nn.Linear

    @torch.no_grad()
    def running_statistics(self) -> Tensor:
        """Every batch norm's running statistics, end to end."""
        return torch.cat(self._statistics()) if self._statistics() else next(self.parameters()).new_empty(0)

    @torch.no_grad()
    def set_running_statistics(self, statistics: Tensor) -> None:
        """Takes back what `running_statistics` gave."""
        buffers = self._statistics()
        if buffers:
            torch._foreach_copy_(buffers, statistics.split([len(buffer) for buffer in buffers]))

    @torch.no_grad()
    def copy_running_statistics(self, other: TwoHeadNetwork) -> None:
        """Takes those of another network of the same kind."""
        if buffers := self._statistics():
            torch._foreach_copy_(buffers, other._statistics())

    def _statistics(self) -> list[Tensor]:
        norms = [module for module in self.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
        return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]  # type: ignore[misc]


def initialize_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """Xavier's normal weights, no bias."""
    nn.init.xavier_normal_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)


class WideResNet(TwoHeadNetwork):
    """`scales` groups of `blocks` residual blocks of widths w, 2w, 4w, ..., global mean, two linear heads.

    In the names of Zagoruyko & Komodakis, WRN-depth-widen_factor: depth = scales * (2 * blocks + 1) + 1, widen_factor =
    width / 16. WRN-28-2 is (scales=3, blocks=4, width=32), WRN-37-2 is (4, 4, 32); the paper's network for STL-10 is
    WRN-37-2 with twice the channels, (4, 4, 64).

    Args:
        classes: L.
        scales: groups of blocks; stride 2 from the second on.
        blocks: residual blocks a group.
        width: channels of the first group, 16 times the widen factor.
        seed: of the initial weights.
        bn_momentum: see `BatchNorm`.
        rows_per_group: see `BatchNorm`.
        over_ranks: see `BatchNorm`.
    """

    def __init__(
        self,
        classes: int,
        scales: int = 3,
        blocks: int = 4,
        width: int = 32,
        seed: int = 0,
        bn_momentum: float = 0.001,
        rows_per_group: int | None = None,
        over_ranks: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.body = nn.ModuleList()
        channels = 16
        for scale in range(scales):
            for block in range(blocks):
                stride = 2 if scale > 0 and block == 0 else 1
                first = scale == 0 and block == 0
                outputs = width << scale
                self.body.append(
                    ResidualBlock(channels, outputs, stride, first, bn_momentum, rows_per_group, over_ranks)
                )
                channels = outputs
        self.norm = BatchNorm(channels, bn_momentum, rows_per_group, over_ranks)
        self.head = nn.Linear(channels, classes)
        self.rotation_head = nn.Linear(channels, 4)
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out), generator=generator)
            elif isinstance(module, nn.Linear):
                initialize_linear(module, generator)

    def forward(self, images: Tensor, track: bool = True, stats_rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Classifies images.

        Args:
            images: (N, 3, H, W) normalised, channels-last in memory; channels after the third are zeros.
            track: in training, whether running statistics of batch norm move.
            stats_rows: how many of the first rows they move by; None for all. See `BatchNorm.forward`.

        Returns:
            (N, L) class logits and (N, 4) rotation logits.
        """
        if zeros := images.shape[1] - self.stem.in_channels:
            x = F.conv2d(images, F.pad(self.stem.weight, (0, 0, 0, 0, 0, zeros)), padding=1)
        else:
            x = self.stem(images)
        for block in self.body:
            x = block(x, track, stats_rows)
        features = F.leaky_relu(self.norm(x, track, stats_rows), _SLOPE).mean((2, 3))
        return self.head(features), self.rotation_head(features)
