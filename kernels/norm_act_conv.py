"""Batch norm, leaky ReLU, convolution and residual addition as one operator that reads each activation once.

A pre-activation network (Zagoruyko & Komodakis, 2016) is a chain of these layers. As separate operators each layer
passes over its activations six times: statistics, normalization, convolution, and the addition. This operator computes
`y = conv(leaky_relu(batch_norm(x))) + residual` in one pass, and the statistics of y, for the next layer's batch norm,
in the same pass. `kernels/convolution.py` has the Triton kernels.

The three operators of a layer, for bfloat16 or float16 activations (N, C, H, W) in torch.channels_last:

- `norm_act_conv`: y, and the statistics of each tile of y;
- `norm_act_conv_input_grad`: the gradient before the leaky ReLU, and both sums of batch norm's backward per tile;
- `norm_act_conv_weight_grad`: the weight gradient of each split of the pixels.

Sums over tiles and splits are taken by the caller in a fixed order, so that results are bitwise deterministic. With
torch.compile these sums, and batch norm's gradient, fuse with the operations around them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from kernels import convolution
from kernels.convolution import SLOPE, empty_input_grad, empty_partial, empty_result, empty_weight_grad


class Moments(NamedTuple):
    """Statistics of the channels of a batch: mean and biased variance, (C,) float32 each."""

    mean: Tensor
    var: Tensor


class Tilings(NamedTuple):
    """Tilings of a layer's three kernels; see `convolution.tilings`. () runs cuDNN on stored activations instead."""

    forward: tuple[int, ...]
    input_grad: tuple[int, ...] = ()
    weight_grad: tuple[int, ...] = ()


def norm_act_conv(
    x: Tensor,
    moments: Moments,
    gamma: Tensor,
    beta: Tensor,
    epsilon: float,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    tilings: Tilings,
    statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute `conv(leaky_relu(batch_norm(x))) + residual` and the statistics of the result.

    The padding is `(taps - 1) / 2`. The gradient treats `moments` as the statistics of x, like batch norm in training.

    Args:
        x: (N, C, H, W) bfloat16 or float16 in torch.channels_last.
        moments: The statistics to normalize with.
        gamma: (C,) float32, batch norm's weight.
        beta: (C,) float32, batch norm's bias.
        epsilon: Added to the variance.
        weight: (O, C, taps, taps), of the dtype of x in torch.channels_last; taps is 1 or 3.
        residual: (N, O, H / stride, W / stride), like x, or None.
        stride: 1 or 2.
        tilings: Tilings of the kernels, each supported for this shape.
        statistics: Whether to compute the statistics.

    Returns:
        y, (N, O, H / stride, W / stride) like x. And (T, 2, O) float32 for `merge_moments`: mean and sum of squared
        deviations of each of T tiles with equally many pixels, sample by sample, before y is rounded to its dtype.
        Empty without statistics. Its memory is that of a contiguous (2, O, T), as for the sums of the input gradient.
    """
    rstd = torch.rsqrt(moments.var + epsilon)
    return torch.ops.remixmatch.norm_act_conv(
        x, moments.mean, rstd, gamma, beta, weight, residual, stride, statistics, *tilings
    )


def merge_moments(partial: Tensor, pixels: int) -> Moments:
    """Merge the statistics of tiles with equally many pixels into those of all: (T, 2, C) float32 to two (C,).

    Args:
        partial: Mean and sum of squared deviations of each tile.
        pixels: Number of pixels of all tiles.
    """
    means, deviations = partial.unbind(1)
    mean = means.mean(0)
    between = (means - mean).square().sum(0) * (pixels // len(partial))
    return Moments(mean, (deviations.sum(0) + between) / pixels)


def activate(x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Compute `leaky_relu(batch_norm(x))` in float32 and round it to the dtype of x."""
    scale = (gamma * rstd)[:, None, None]
    return F.leaky_relu((x.float() - mean[:, None, None]) * scale + beta[:, None, None], SLOPE).to(x.dtype)


def norm_act_conv_reference(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    statistics: bool,
    forward_tiling: Sequence[int],
    input_grad_tiling: Sequence[int],
    weight_grad_tiling: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the operator `norm_act_conv` in plain PyTorch on any device, as its reference implementation."""
    with torch.autocast(x.device.type, enabled=False):  # Like the kernel, the convolution sums in float32.
        y = F.conv2d(activate(x, mean, rstd, gamma, beta).float(), weight.float(), None, stride, weight.shape[2] // 2)
    y = y if residual is None else y + residual.float()
    rounded = y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    if not statistics:
        return rounded, empty_partial(mean, 0, y.shape[1])
    tiled = _split_tiles(y, forward_tiling)
    means = tiled.mean(1)
    return rounded, _by_channel(means, (tiled - means[:, None]).square().sum(1))


def norm_act_conv_input_grad_reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    stride: int,
    tiling: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the gradient before the leaky ReLU, and its sums, in plain PyTorch on any device.

    Returns:
        g, (N, C, H, W) like x: the gradient of batch norm's result. And (T, 2, C) float32: the sums of g and of
        g * (x - mean) over each tile of x.
    """
    size, padding = list(x.shape), weight.shape[2] // 2
    g = conv2d_input(size, weight.float(), grad.float(), stride, padding)
    return leaky_relu_grad(g, x, mean, rstd, gamma, beta, tiling)


def leaky_relu_grad(
    activation_grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, tiling: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradient before the leaky ReLU and its sums, from the one after; see the input gradient."""
    g, centered = _leaky_relu_grad(activation_grad, x, mean, rstd, gamma, beta)
    sums = _by_channel(*(_split_tiles(values, tiling).sum(1) for values in (g, g * centered)))
    return g.to(x.dtype).contiguous(memory_format=torch.channels_last), sums


def _leaky_relu_grad(
    activation_grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient before the leaky ReLU, and x - mean, in float32."""
    centered = x.float() - mean[:, None, None]
    positive = centered * (gamma * rstd)[:, None, None] + beta[:, None, None] > 0
    return activation_grad.float() * torch.where(positive, 1.0, SLOPE), centered


def norm_act_conv_weight_grad_reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    taps: int,
    stride: int,
    tiling: Sequence[int],
) -> Tensor:
    """Compute the weight gradient of each split of the pixels in plain PyTorch on any device.

    Returns:
        (S, O, C, taps, taps) float32, each in torch.channels_last; the gradient is the sum over S.
    """
    size = (grad.shape[1], x.shape[1], taps, taps)
    activated = activate(x, mean, rstd, gamma, beta).float()
    whole = conv2d_weight(activated, size, grad.float(), stride, taps // 2)
    partial = empty_weight_grad(grad, x, mean, rstd, gamma, beta, taps, stride, tiling).zero_()
    partial[0] = whole  # Only the sum is specified.
    return partial


def _by_channel(*partial: Tensor) -> Tensor:
    """Stack two (T, C) results of tiles to (T, 2, C) in the memory layout of (2, C, T); see `empty_partial`."""
    return torch.stack([one.T for one in partial]).permute(2, 0, 1)


def _split_tiles(values: Tensor, tiling: Sequence[int]) -> Tensor:
    """Split (N, C, H, W) into the tiles of a kernel's result: (T, pixels, C)."""
    _, channels, height, _ = values.shape
    if not len(tiling):
        return values.permute(0, 2, 3, 1).reshape(1, -1, channels)
    block, rows = tiling[:2]
    by_row = values.permute(0, 3, 2, 1).reshape(-1, block, height // rows, rows, channels)  # Samples and columns first.
    return by_row.transpose(1, 2).reshape(-1, block * rows, channels)


def _setup_context(ctx, inputs, output) -> None:
    x, mean, rstd, gamma, beta, weight, residual, stride, _, _, input_grad_tiling, weight_grad_tiling = inputs
    ctx.save_for_backward(x, mean, rstd, gamma, beta, weight)
    ctx.stride, ctx.has_residual = stride, residual is not None
    ctx.input_grad_tiling, ctx.weight_grad_tiling = list(input_grad_tiling), list(weight_grad_tiling)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    x, mean, rstd, gamma, beta, weight = ctx.saved_tensors
    norm, taps = (mean, rstd, gamma, beta), weight.shape[2]
    grad = grad.contiguous(memory_format=torch.channels_last)
    library_passes = [not ctx.input_grad_tiling, not ctx.weight_grad_tiling, False]
    if any(library_passes):
        by_library = torch.ops.aten.convolution_backward(
            grad, activate(x, *norm), weight, None, [ctx.stride] * 2, [taps // 2] * 2, [1, 1], False, [0, 0], 1,
            library_passes,
        )  # fmt: skip
    if ctx.weight_grad_tiling:
        partial = torch.ops.remixmatch.norm_act_conv_weight_grad(
            grad, x, *norm, taps, ctx.stride, ctx.weight_grad_tiling
        )
        # With the strides of the weight, also those of dimensions of size 1, which DistributedDataParallel compares.
        weight_grad = torch.empty_like(weight).copy_(partial.sum(0))
    else:
        weight_grad = by_library[1]
    if ctx.input_grad_tiling:
        g, sums = torch.ops.remixmatch.norm_act_conv_input_grad(
            grad, x, *norm, weight, ctx.stride, ctx.input_grad_tiling
        )
    else:
        g, sums = leaky_relu_grad(by_library[0], x, *norm, [])
    x_grad, gamma_grad, beta_grad = batch_norm_grad(g, sums, x, mean, rstd, gamma)
    residual_grad = grad if ctx.has_residual else None
    return (
        x_grad, None, None, gamma_grad, beta_grad, weight_grad, residual_grad,
        None, None, None, None, None,
    )  # fmt: skip


def batch_norm_grad(
    g: Tensor, sums: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gamma and beta from that of batch norm's result (Ioffe & Szegedy, 2015, section 3).

    Args:
        g: (N, C, H, W), the gradient of batch norm's result.
        sums: (T, 2, C) float32, the sums of g and of g * (x - mean) over each tile.
        x: (N, C, H, W), batch norm's input.
        mean: (C,) float32, the mean of x.
        rstd: (C,) float32, the reciprocal of its standard deviation.
        gamma: (C,) float32, batch norm's weight.
    """
    beta_grad, centered_sum = sums.sum(0).unbind(0)  # (C,)
    pixels = x.numel() // x.shape[1]
    normalized_part = (x.float() - mean[:, None, None]) * (rstd.square() * centered_sum / pixels)[:, None, None]
    x_grad = (gamma * rstd)[:, None, None] * (g.float() - (beta_grad / pixels)[:, None, None] - normalized_part)
    return x_grad.to(x.dtype), rstd * centered_sum, beta_grad


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, gamma, beta)
        return activate(x, mean, rstd, gamma, beta)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gamma, beta = ctx.saved_tensors
        g, centered = _leaky_relu_grad(grad, x, mean, rstd, gamma, beta)
        sums = torch.stack([g.sum((0, 2, 3)), (g * centered).sum((0, 2, 3))])[None]
        x_grad, gamma_grad, beta_grad = batch_norm_grad(g, sums, x, mean, rstd, gamma)
        return x_grad, None, None, gamma_grad, beta_grad


def norm_act(x: Tensor, moments: Moments, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """Compute `leaky_relu(batch_norm(x))` for layers that do not use `norm_act_conv`; see there for the arguments."""
    return _NormAct.apply(x, moments.mean, torch.rsqrt(moments.var + epsilon), gamma, beta)


def moments_of(x: Tensor) -> Moments:
    """Return the statistics of (N, C, H, W) activations that no `norm_act_conv` has made, without gradient."""
    var, mean = torch.var_mean(x.detach().float(), (0, 2, 3), correction=0)
    return Moments(mean, var)


# See kernels/assemble.py for why this does not use `triton_op`.
for _name, _launch, _reference, _empty in (
    ("norm_act_conv", convolution.launch_forward, norm_act_conv_reference, empty_result),
    (
        "norm_act_conv_input_grad",
        convolution.launch_input_grad,
        norm_act_conv_input_grad_reference,
        empty_input_grad,
    ),
    (
        "norm_act_conv_weight_grad",
        convolution.launch_weight_grad,
        norm_act_conv_weight_grad_reference,
        empty_weight_grad,
    ),
):
    torch.library.define(f"remixmatch::{_name}", torch.library.infer_schema(_reference, mutates_args=()))
    torch.library.impl(f"remixmatch::{_name}", "cuda", _launch)
    torch.library.impl(f"remixmatch::{_name}", "cpu", _reference)
    torch.library.register_fake(f"remixmatch::{_name}", _empty)
torch.library.register_autograd("remixmatch::norm_act_conv", _backward, setup_context=_setup_context)
