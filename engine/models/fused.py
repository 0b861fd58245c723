"""Forward pass of a Wide ResNet whose convolutions compute batch norm, leaky ReLU and statistics themselves.

It has the parameters, the results and the running statistics of `WideResNet.forward` up to rounding, for bfloat16 and
float16. Each convolution of a residual block uses the operator `kernels.norm_act_conv` or, if its tilings are None,
torch's convolution. Every activation has its statistics with it: those that an operator computes while it writes the
activation, or else those of a pass over it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.batch_norm import BN_EPS, BatchNorm
from kernels.convolution import Shape
from kernels.norm_act_conv import Moments, Tilings, merge_moments, moments_of, norm_act, norm_act_conv

if TYPE_CHECKING:
    from engine.models.wide_resnet import ResidualBlock, WideResNet


class Pass(NamedTuple):
    """A kind of forward pass that tilings are chosen for.

    Attributes:
        mode: "train"; "guess", in training mode without gradient; or "eval", in evaluation mode without gradient.
        samples: Batch size.
        height: Of the images.
        width: Of the images.
    """

    mode: str
    samples: int
    height: int
    width: int


class BlockTilings(NamedTuple):
    """Tilings of a residual block's convolutions; None uses torch's convolution.

    Attributes:
        conv1: Of the first convolution.
        conv2: Of the second one.
        shortcut: Of the shortcut if the block activates first, together with `conv1`. Other shortcuts convolve the
            block's input.
    """

    conv1: Tilings | None
    conv2: Tilings | None
    shortcut: Tilings | None


class BlockShapes(NamedTuple):
    """Shapes of the convolutions in `BlockTilings`; None where the operator cannot be used."""

    conv1: Shape | None
    conv2: Shape | None
    shortcut: Shape | None


def pass_of(network: WideResNet, images: Tensor) -> Pass | None:
    """Return which pass a call of the network is; None in full precision, and for gradients in evaluation mode."""
    if images.dtype not in (torch.bfloat16, torch.float16) or (torch.is_grad_enabled() and not network.training):
        return None
    mode = "eval" if not network.training else "train" if torch.is_grad_enabled() else "guess"
    samples, _, height, width = images.shape
    return Pass(mode, samples, height, width)


def shapes(network: WideResNet, samples: int, height: int, width: int) -> list[BlockShapes]:
    """Return the shapes of each block's convolutions for images of `height` x `width`."""
    found = []
    for block in cast("Iterable[ResidualBlock]", network.body):
        first, shortcut = _shape(block.conv1, samples, height, width), None
        if block.activate_first:  # The shortcut receives what the first convolution does.
            shortcut = _shape(block.shortcut, samples, height, width) if block.step == 1 and block.shortcut else None
            first = first if shortcut else None
        stride = block.conv1.stride[0]
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        found.append(BlockShapes(first, _shape(block.conv2, samples, height, width), shortcut))
    return found


def _shape(conv: nn.Conv2d, samples: int, height: int, width: int) -> Shape | None:
    taps, stride = conv.kernel_size[0], conv.stride[0]
    if height % stride or width % stride:
        return None
    return Shape(samples, conv.in_channels, height, width, conv.out_channels, taps, stride)


def gradients(network: WideResNet) -> tuple[list[bool], list[bool]]:
    """Return how the kernels of each block's input gradients add other gradients; see `norm_act_conv`.

    Returns:
        `folds` of the second convolution: the next block has no shortcut, so that its first convolution returns the
        whole gradient of this block's result. A pass over gradients adds that of a shortcut, and can add that of the
        statistics. `folds` of the first convolution is always true.
        `skips` of the first convolution: the block has no shortcut.
    """
    skips = [block.shortcut is None for block in cast("Iterable[ResidualBlock]", network.body)]
    return [*skips[1:], False], skips


class _Activations(NamedTuple):
    """(N, C, H, W) activations with their statistics in training mode, and those of the first samples."""

    values: Tensor
    moments: Moments | None
    tracked: Moments | None


class _Layers:
    """The layers of one forward pass.

    Args:
        dtype: Dtype of the activations.
        training: Whether the network is in training mode.
        track: Whether to update the running statistics.
        stats_samples: See `BatchNorm.forward`.
    """

    def __init__(self, dtype: torch.dtype, training: bool, track: bool, stats_samples: int | None) -> None:
        self.dtype, self.training, self.track = dtype, training, track
        self.stats_samples = stats_samples

    def measure(self, values: Tensor) -> _Activations:
        """Return activations with their statistics, from a pass over them."""
        if not self.training:
            return _Activations(values, None, None)
        moments = moments_of(values)
        return _Activations(values, moments, self._moments_of_first(values) if self.track else None)

    def _moments_of_first(self, values: Tensor) -> Moments | None:
        partly = self.stats_samples is not None and self.stats_samples < len(values)
        return moments_of(values[: self.stats_samples].detach()) if partly else None

    def moments(self, norm: BatchNorm, x: _Activations) -> Moments:
        """Return the statistics that batch norm uses, and update its running statistics."""
        if x.moments is None:
            return Moments(norm.running_mean, norm.running_var)
        if self.track:
            samples, _, height, width = x.values.shape
            count = height * width * (samples if x.tracked is None else self.stats_samples or samples)
            tracked = x.tracked or x.moments
            with torch.no_grad():
                norm.running_mean.lerp_(tracked.mean, norm.momentum)
                norm.running_var.lerp_(tracked.var * (count / (count - 1)), norm.momentum)
        return x.moments

    def activate(self, norm: BatchNorm, x: _Activations, moments: Moments) -> Tensor:
        """Compute batch norm and leaky ReLU alone."""
        return norm_act(x.values, moments, norm.weight, norm.bias, BN_EPS)

    def convolve(self, conv: nn.Conv2d, activated: Tensor, residual: Tensor | None = None) -> _Activations:
        """Compute `conv(activated) + residual` with torch's convolution, and its statistics."""
        y = conv(activated)
        return self.measure(y if residual is None else y + residual)

    def fused(
        self,
        conv: nn.Conv2d,
        norm: BatchNorm,
        x: _Activations,
        moments: Moments,
        tilings: Tilings,
        residual: Tensor | None = None,
        statistics: bool = True,
        folds: bool = False,
        skips: bool = False,
    ) -> tuple[_Activations, Tensor | None]:
        """Compute `conv(leaky_relu(norm(x))) + residual` with the operator, and its statistics if needed.

        Also returns x for a skip connection if `skips`; see `norm_act_conv`.
        """
        weight, statistics = conv.weight.to(self.dtype), statistics and self.training
        y, its_moments, partial, skip = norm_act_conv(
            x.values, moments, norm.weight, norm.bias, BN_EPS, weight, residual, conv.stride[0], tilings, statistics,
            folds, skips,
        )  # fmt: skip
        tracked, first = None, self.stats_samples
        if its_moments is None:
            return _Activations(y, None, None), skip
        samples, _, height, width = y.shape
        if self.track and first is not None and first < samples:
            block = tilings.forward[0]
            assert not first * width % block, "these tilings are for other running statistics"
            tracked = merge_moments(partial[: len(partial) * first // samples], first * height * width)
        return _Activations(y, its_moments, tracked), skip

    def block(
        self, block: ResidualBlock, x: _Activations, tilings: BlockTilings, folds: bool, skips: bool
    ) -> _Activations:
        """Compute a residual block; see `ResidualBlock.forward`, and `gradients` for the last two arguments."""
        moments = self.moments(block.norm1, x)
        skip: Tensor | None = x.values
        if tilings.conv1 is not None:
            inner, skip = self.fused(block.conv1, block.norm1, x, moments, tilings.conv1, folds=True, skips=skips)
        else:
            activated = self.activate(block.norm1, x, moments)
            inner = self.convolve(block.conv1, activated)
        if block.shortcut is None:
            skip = activated if block.activate_first else skip
        elif tilings.shortcut is not None:
            other, _ = self.fused(block.shortcut, block.norm1, x, moments, tilings.shortcut, statistics=False)
            skip = other.values
        elif block.activate_first:
            skip = block.shortcut(activated)
        else:
            # Only these pixels are copied, convolved and given a gradient, instead of all. Slicing (N, H, W, C) gives
            # gradients in torch.channels_last.
            stride = block.conv1.stride[0]
            pixels = x.values.permute(0, 2, 3, 1)[:, ::stride, ::stride].contiguous().permute(0, 3, 1, 2)
            skip = F.conv2d(pixels, block.shortcut.weight)
        moments = self.moments(block.norm2, inner)
        if tilings.conv2 is not None:
            return self.fused(block.conv2, block.norm2, inner, moments, tilings.conv2, skip, folds=folds)[0]
        return self.convolve(block.conv2, self.activate(block.norm2, inner, moments), skip)


def forward(
    network: WideResNet, images: Tensor, tilings: tuple[BlockTilings, ...], track: bool, stats_samples: int | None
) -> tuple[Tensor, Tensor]:
    """Compute the logits of both heads like `WideResNet.forward`, in autocast.

    Args:
        network: The network; its batch norms normalize over all samples.
        images: (N, C, H, W) bfloat16 or float16, normalized, in torch.channels_last.
        tilings: Tilings of each block.
        track: See `WideResNet.forward`.
        stats_samples: See `WideResNet.forward`.
    """
    layers = _Layers(images.dtype, network.training, track, stats_samples)
    x = layers.measure(network.first_convolution(images))
    for block, chosen, folds, skips in zip(network.body, tilings, *gradients(network), strict=True):
        x = layers.block(cast("ResidualBlock", block), x, chosen, folds, skips)
    features = layers.activate(network.norm, x, layers.moments(network.norm, x)).mean((2, 3))
    return network.head(features), network.rotation_head(features)
