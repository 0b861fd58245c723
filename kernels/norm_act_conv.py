"""Batch norm, leaky ReLU, convolution and residual addition as one operator that reads each activation once.

A pre-activation network (Zagoruyko & Komodakis, 2016) is a chain of these layers. As separate operators each layer
passes over its activations six times: statistics, normalization, convolution, and the addition. This operator computes
`y = conv(leaky_relu(batch_norm(x))) + residual` in one pass, and the statistics of y, for the next layer's batch norm,
in the same pass. `kernels/convolution.py` has the Triton kernels.

The three operators of a layer, for bfloat16 or float16 activations (N, C, H, W) in torch.channels_last:

- `norm_act_conv`: y, and the statistics of each tile of y;
- `norm_act_conv_input_grad`: the gradient of x with its statistics held fixed, and the sums for those of batch norm's
  parameters and statistics per tile;
- `norm_act_conv_weight_grad`: the weight gradient of each split of the pixels.

Batch norm's gradient has a part through the statistics of x. Here it belongs to the layer that computed them: the
statistics are outputs with gradients of their own, from which that layer completes the gradient of its result y, in
the kernel of its input gradient if it can. This saves batch norm's own pass over the activations.

Sums over tiles and splits are taken by the caller in a fixed order, so that results are bitwise deterministic. With
torch.compile these sums fuse with the operations around them.
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


class Result(NamedTuple):
    """Result of `norm_act_conv`.

    Attributes:
        y: (N, O, H / stride, W / stride) like x.
        moments: The statistics of y, with gradient; None without statistics.
        partial: (T, 2, O) float32 for `merge_moments`, without gradient: mean and sum of squared deviations of each of
            T tiles with equally many pixels, sample by sample, before y is rounded to its dtype. Empty without
            statistics. Its memory is that of a contiguous (2, O, T), as for the sums of the input gradient.
        skip: x, or None; see `skips`.
    """

    y: Tensor
    moments: Moments | None
    partial: Tensor
    skip: Tensor | None


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
    folds: bool = False,
    skips: bool = False,
) -> Result:
    """Compute `conv(leaky_relu(batch_norm(x))) + residual` and the statistics of the result.

    The padding is `(taps - 1) / 2`. The gradients of `moments` complete that of x, if they have been computed from x.

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
        folds: Whether the kernel of the input gradient, if there is one, adds the gradient of the statistics to that of
            y. This saves memory traffic if nothing else has to add to the gradient of y.
        skips: Whether to return x for a skip connection, whose gradient the kernel adds to that of x.
    """
    rstd = torch.rsqrt(moments.var + epsilon)
    y, partial, *others = _NormActConv.apply(
        x, moments.mean, rstd, gamma, beta, weight, residual, stride, tilings, statistics, folds, skips
    )
    return Result(y, Moments(*others[:2]) if statistics else None, partial, others[-1] if skips else None)


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
    tiling: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the operator `norm_act_conv` in plain PyTorch on any device, as its reference implementation."""
    with torch.autocast(x.device.type, enabled=False):  # Like the kernel, the convolution sums in float32.
        y = F.conv2d(activate(x, mean, rstd, gamma, beta).float(), weight.float(), None, stride, weight.shape[2] // 2)
    y = y if residual is None else y + residual.float()
    rounded = y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    if not statistics:
        return rounded, empty_partial(mean, 0, y.shape[1])
    tiled = _split_tiles(y, tiling)
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
    skip_grad: Tensor | None = None,
    y: Tensor | None = None,
    factor: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of x with its statistics held fixed, and its sums, in plain PyTorch on any device.

    Args:
        grad: Gradient of y, like y.
        x: See `norm_act_conv`, also for the next six.
        mean: The mean of x, (C,).
        rstd: The reciprocal of its standard deviation, (C,).
        gamma: Batch norm's weight.
        beta: Batch norm's bias.
        weight: Weight of the convolution.
        stride: Stride of the convolution.
        tiling: Tiling of the kernel.
        skip_grad: Gradient to add to that of x, like x.
        y: Result of the layer. If given, `factor * y + offset` is added to `grad`.
        factor: (O,) float32.
        offset: (O,) float32.

    Returns:
        The gradient of x, (N, C, H, W) like x. (T, 2, C) float32: the sums of g and of g * (x - mean) over each tile of
        x, where g is the gradient of batch norm's result. And `grad + factor * y + offset`, like y; empty without y.
    """
    total = grad.new_empty(0)
    if y is not None and factor is not None and offset is not None:
        grad = total = _corrected(grad, y, factor, offset)
    size, padding = list(x.shape), weight.shape[2] // 2
    activation_grad = conv2d_input(size, weight.float(), grad.float(), stride, padding)
    return *_norm_act_grad(activation_grad, x, mean, rstd, gamma, beta, skip_grad, tiling), total


def _norm_act_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    skip_grad: Tensor | None = None,
    tiling: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x and the sums from that of the leaky ReLU's result; see the input gradient."""
    scale, centered = (gamma * rstd)[:, None, None], x.float() - mean[:, None, None]
    g = grad.float() * torch.where(centered * scale + beta[:, None, None] > 0, 1.0, SLOPE)
    sums = _by_channel(*(_split_tiles(values, tiling).sum(1) for values in (g, g * centered)))
    x_grad = scale * g if skip_grad is None else scale * g + skip_grad.float()
    return x_grad.to(x.dtype).contiguous(memory_format=torch.channels_last), sums


def _norm_grads(sums: Tensor, rstd: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of mean, rstd, gamma and beta, (C,) each, from the sums of the input gradient."""
    beta_grad, centered_sum = (each.sum(0) for each in sums.unbind(1))
    return -gamma * rstd * beta_grad, gamma * centered_sum, rstd * centered_sum, beta_grad


def _correction(y: Tensor, mean: Tensor, mean_grad: Tensor, var_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return factor and offset of y in its gradient through its mean and biased variance: (C,) each."""
    pixels = y.numel() // y.shape[1]
    factor = var_grad * (2 / pixels)
    return factor, mean_grad / pixels - factor * mean


def _corrected(grad: Tensor, y: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Return `grad + factor * y + offset` in the dtype and layout of y."""
    total = grad.float() + factor[:, None, None] * y.float() + offset[:, None, None]
    return total.to(y.dtype).contiguous(memory_format=torch.channels_last)


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


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        stride: int,
        tilings: Tilings,
        statistics: bool,
        folds: bool,
        skips: bool,
    ) -> tuple[Tensor, ...]:
        norm = mean, rstd, gamma, beta
        y, partial = torch.ops.remixmatch.norm_act_conv(x, *norm, weight, residual, stride, statistics, tilings.forward)
        moments = merge_moments(partial, y.numel() // y.shape[1]) if statistics else ()
        ctx.save_for_backward(x, *norm, weight, *((y, moments[0]) if moments else ()))
        ctx.stride, ctx.tilings, ctx.has_residual = stride, tilings, residual is not None
        ctx.statistics, ctx.folds, ctx.skips = statistics, folds, skips
        ctx.mark_non_differentiable(partial)
        return y, partial, *moments, *((x.view_as(x),) if skips else ())

    @staticmethod
    def backward(ctx, grad: Tensor, _, *others: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gamma, beta, weight = ctx.saved_tensors[:6]
        norm, taps = (mean, rstd, gamma, beta), weight.shape[2]
        grad = grad.contiguous(memory_format=torch.channels_last)
        skip_grad = others[-1].contiguous(memory_format=torch.channels_last) if ctx.skips else None
        correction: tuple[Tensor, ...] = ()
        if ctx.statistics:
            y, y_mean = ctx.saved_tensors[6:]
            correction = y, *_correction(y, y_mean, *others[:2])
            if not (ctx.folds and ctx.tilings.input_grad):
                grad, correction = _corrected(grad, *correction), ()
        if ctx.tilings.input_grad:
            x_grad, sums, total = torch.ops.remixmatch.norm_act_conv_input_grad(
                grad, x, *norm, weight, ctx.stride, ctx.tilings.input_grad, skip_grad, *correction
            )
            grad = total if correction else grad
        library_passes = [not ctx.tilings.input_grad, not ctx.tilings.weight_grad, False]
        if any(library_passes):
            activation_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
                grad, activate(x, *norm), weight, None, [ctx.stride] * 2, [taps // 2] * 2, [1, 1], False, [0, 0], 1,
                library_passes,
            )  # fmt: skip
        if not ctx.tilings.input_grad:
            x_grad, sums = _norm_act_grad(activation_grad, x, *norm, skip_grad)
        if ctx.tilings.weight_grad:
            partial = torch.ops.remixmatch.norm_act_conv_weight_grad(
                grad, x, *norm, taps, ctx.stride, ctx.tilings.weight_grad
            )
            # With the strides of the weight, also those of dimensions of size 1, which DistributedDataParallel
            # compares.
            weight_grad = torch.empty_like(weight).copy_(partial.sum(0))
        residual_grad = grad if ctx.has_residual else None
        norm_grads = _norm_grads(sums, rstd, gamma)
        return x_grad, *norm_grads, weight_grad, residual_grad, None, None, None, None, None


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, gamma, beta)
        return activate(x, mean, rstd, gamma, beta)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, mean, rstd, gamma, beta = ctx.saved_tensors
        x_grad, sums = _norm_act_grad(grad, x, mean, rstd, gamma, beta)
        return x_grad, *_norm_grads(sums, rstd, gamma)


def norm_act(x: Tensor, moments: Moments, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """Compute `leaky_relu(batch_norm(x))` for layers that do not use `norm_act_conv`; see there for the arguments."""
    return _NormAct.apply(x, moments.mean, torch.rsqrt(moments.var + epsilon), gamma, beta)


class _MomentsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, mean_grad: Tensor, var_grad: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        factor, offset = _correction(x, mean, mean_grad, var_grad)
        return (factor[:, None, None] * x.float() + offset[:, None, None]).to(x.dtype)


def moments_of(x: Tensor) -> Moments:
    """Return the statistics of (N, C, H, W) activations that no `norm_act_conv` has made."""
    return Moments(*_MomentsOf.apply(x))


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
