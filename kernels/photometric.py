"""CTAugment's photometric operations (point operations, filters, cutout, rescale) on batches, in plain PyTorch.

ReMixMatch (arXiv 1911.09785), section 3.2.2. These are the reference implementation of `kernels/augment.py`, and what
the DALI graph executes. They reproduce PIL, which library operators do not: each PIL operation has its own borders,
rounding and order of passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class OpLevels:
    """Levels of a photometric operation for n images.

    Attributes:
        level: (n, 1, 1, 1) float32 in [0, 1).
        second: (n,) float32 in [0, 1), the filter of rescale.
        center: (n, 2) float32 in [0, 1), the center of cutout (y, x).
    """

    level: torch.Tensor
    second: torch.Tensor
    center: torch.Tensor

    def rows(self, first: int, last: int) -> OpLevels:
        """Return the levels of images first to last - 1."""
        return OpLevels(self.level[first:last], self.second[first:last], self.center[first:last])


Operation = Callable[[torch.Tensor, OpLevels], torch.Tensor]
# How an operation uses its function's result: directly, as blend(image, result, v), or as blend(result, image,
# 0.1 + 1.9 v) like PIL's ImageEnhance.
REPLACED, BLENDED, ENHANCED = range(3)
PHOTOMETRIC: dict[str, tuple[int, Operation]] = {}


def photometric(use: int) -> Callable[[Operation], Operation]:
    """Register a function of (images (n, H, W, 3) uint8, OpLevels) whose integer result broadcasts to the images."""

    def register(function: Operation) -> Operation:
        PHOTOMETRIC[function.__name__] = (use, function)
        return function

    return register


def blend(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return `a + v (b - a)` in single precision, clipped and truncated to uint8, like PIL's Image.blend."""
    a = a.to(torch.float32)
    mixed = b.to(torch.float32).sub_(a).mul_(v).add_(a).clamp_(0, 255)
    # CPUs have an instruction for float32 to int32: converting via int32 takes half as long as directly to uint8.
    return mixed.to(torch.int32).to(torch.uint8)


def to_gray(images: torch.Tensor) -> torch.Tensor:
    """Convert (n, H, W, 3) uint8 to PIL's mode L, (n, H, W) int32. The weights are in units of 2^-16."""
    red, green, blue = images.permute(3, 0, 1, 2).to(torch.int32, memory_format=torch.contiguous_format)
    return red.mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).bitwise_right_shift_(16)


def table_indices(images: torch.Tensor) -> torch.Tensor:
    """Return the index of each value into a flattened table (n, 3, 256): (n, H, W * 3) int64."""
    n, height, width, _ = images.shape
    first = torch.arange(0, 768 * n, 256, device=images.device).view(n, 1, 3).repeat(1, 1, width)
    return images.view(n, height, -1).long().add_(first)


def look_up(curves: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Look up `curves` (n, 3, 256) at `indices` (see `table_indices`), in the shape of `indices`.

    Blend curves before the lookup: they have only 256 values per channel.
    """
    return curves.view(-1).gather(0, indices.view(-1)).view(indices.shape)


def planes(images: torch.Tensor) -> torch.Tensor:
    """Convert (n, H, W, 3) to channel planes (n, 3, H * W), on which reductions are many times faster."""
    return images.view(len(images), -1, 3).transpose(1, 2).contiguous()


@photometric(REPLACED)
def autocontrast(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    values = planes(images)
    low, high = values.amin(dim=2, keepdim=True).double(), values.amax(dim=2, keepdim=True).double()
    # The same double-precision operations as in PIL, which truncates: a product can be just below an integer.
    scale = torch.where(high > low, torch.full_like(low, 255) / (high - low), 1.0)
    offset = torch.where(high > low, -low * scale, 0.0)
    value = torch.arange(256, dtype=torch.float64, device=images.device)
    curves = (value * scale).add_(offset).clamp_(0, 255).floor_()
    return look_up(blend(value, curves, levels.level[..., 0]), table_indices(images)).view(images.shape)


@photometric(BLENDED)
def blur(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    """Apply PIL's BLUR: 5x5, ones on the outer ring, sum 16. The outermost two pixels are unchanged."""
    if min(images.shape[1:3]) < 5:
        return images
    values, stride = _flatten(images)
    ends = values[:, : -4 * stride] + values[:, 4 * stride :]
    middle = values[:, stride : -3 * stride] + values[:, 2 * stride : -2 * stride]
    middle = middle.add_(values[:, 3 * stride : -stride]).add_(ends)
    total = middle[:, :-12] + middle[:, 12:]
    for x in (3, 6, 9):
        total += ends[:, x : x - 12]
    return _restore_border(images, total.add_(8).bitwise_right_shift_(4), 2)


def apply_smooth_filter(images: torch.Tensor) -> torch.Tensor:
    """Apply PIL's SMOOTH: 3x3, center 5, others 1, sum 13. The outermost pixel is unchanged."""
    if min(images.shape[1:3]) < 3:
        return images
    values, stride = _flatten(images)
    down = (values[:, : -2 * stride] + values[:, stride:-stride]).add_(values[:, 2 * stride :])
    total = (down[:, :-6] + down[:, 3:-3]).add_(down[:, 6:]).add_(values[:, stride + 3 : -stride - 3], alpha=4)
    return _restore_border(images, total.to(torch.float32).mul_(1 / 13).add_(0.5).floor_(), 1)


def _flatten(images: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return flattened images (n, H * W * 3) int16 and the stride between lines.

    Filtering the flat array from the first inner pixel to the last is several times faster than line by line. Sums
    that wrap from one line to the next are in the border, which `_restore_border` drops.
    """
    return images.view(len(images), -1).to(torch.int16), images.shape[2] * 3


def _restore_border(images: torch.Tensor, inside: torch.Tensor, border: int) -> torch.Tensor:
    """Place `inside`, filtered from the first inner pixel to the last, into the images."""
    n, height, width, _ = images.shape
    out = images.to(torch.float32)
    lines = (n, height - 2 * border, 3 * (width - 2 * border))
    out.view(n, height, -1)[:, border:-border, 3 * border : -3 * border] = inside.as_strided(
        lines, (inside.shape[1], 3 * width, 1)
    )
    return out


@photometric(ENHANCED)
def brightness(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    return images.new_zeros(1)


@photometric(ENHANCED)
def color(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    # Broadcasting a last dimension of 1 to 3 would slow down every pass of the blend.
    return torch.stack((to_gray(images).to(torch.uint8),) * 3, dim=3)


@photometric(ENHANCED)
def contrast(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    return to_gray(images).double().mean(dim=(1, 2)).add_(0.5).floor_().view(-1, 1, 1, 1)


@photometric(REPLACED)
def cutout(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    """Draw a gray square of side 1 + floor(0.499 v min(H, W)) around pixel (floor(cy H), floor(cx W)), clipped."""
    n, height, width, channels = images.shape
    side = 1 + (0.499 * min(height, width) * levels.level.double()).floor_().view(n, 1)
    inside = []
    for axis, length in enumerate((height, width)):
        first = (levels.center[:, axis, None].double() * length).floor_() - (side / 2).floor_()
        place = torch.arange(length, device=images.device)
        inside.append((place >= first) & (place < first + side))
    # Bit masks with channels as columns are many times faster than boolean masks.
    down, across = (mask.to(torch.uint8).mul_(255) for mask in inside)
    square = down[:, :, None] & across.repeat_interleave(channels, dim=1)[:, None, :]
    return ((images.view(n, height, -1) & ~square) | (square & 127)).view(images.shape)


@photometric(REPLACED)
def equalize(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    n, pixels = len(images), images.shape[1] * images.shape[2]
    # One histogram of 256 bins per image and channel.
    indices = table_indices(images)
    # Integers are exact in double precision, and torch divides them faster than int64.
    count = torch.bincount(indices.view(-1), minlength=768 * n).view(n, 3, 256).double()
    below = count.cumsum(dim=-1).sub_(count)
    # Only values up to the brightest count: above it, `below` is the number of all pixels.
    step = (below.lt(pixels).double().mul_(below).amax(dim=-1, keepdim=True) / 255).floor_()
    curves = below.add_((step / 2).floor_()).div_(step.clamp(min=1)).floor_().clamp_(max=255)
    # PIL leaves a channel unchanged if fewer than 255 of its pixels are below the brightest value.
    value = torch.arange(256, dtype=torch.float64, device=images.device)
    curves = torch.where(step > 0, curves, value)
    return look_up(blend(value, curves, levels.level[..., 0]), indices).view(images.shape)


@photometric(BLENDED)
def invert(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    return 255 - images


@photometric(REPLACED)
def posterize(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    dropped = 7 - (7.999 * levels.level.double()).to(torch.int32)
    return images & (0xFF << dropped).to(torch.uint8)


@photometric(ENHANCED)
def sharpness(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    return apply_smooth_filter(images)


@photometric(BLENDED)
def smooth(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    return apply_smooth_filter(images)


@photometric(REPLACED)
def solarize(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    threshold = (255.999 * levels.level.double()).to(torch.uint8)
    return images ^ (images >= threshold).to(torch.uint8).mul_(255)


# ---------------------------------------------------------------- rescale


def _hamming(x: np.ndarray) -> np.ndarray:
    return np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x))


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.sinc(x) * np.sinc(x / 3)


# Half widths and weight functions of PIL's filters, in the order of rescale's second level: NEAREST, BOX, BILINEAR,
# HAMMING, BICUBIC, LANCZOS. When enlarging, NEAREST and BOX both take the one pixel that contains the position.
_SUPPORT = np.array([0.5, 0.5, 1.0, 1.0, 2.0, 3.0])
_MAX_TAPS = 6  # Pixels under the widest filter.
_WEIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: 1 - np.abs(x),
    3: _hamming,
    4: _bicubic,
    5: _lanczos,
}
_PRECISION = 1 << 22


def _resampling_weights(level: np.ndarray, filter_indices: np.ndarray, length: int) -> np.ndarray:
    """Return PIL's resampling weights along one side: (n, out, in) float64, multiples of 2^-22.

    Args:
        level: (n, 1) float64.
        filter_indices: (n,) integers, indices into the filters.
        length: Pixels along the side.
    """
    support = _SUPPORT[filter_indices][:, None]
    # PIL stores the box and its size in single precision.
    start, end = (0.25 * level * length).astype(np.float32), (length - 0.25 * level * length).astype(np.float32)
    center = start + (np.arange(length) + 0.5) * ((end - start).astype(np.float64) / length)  # (n, out)
    first, last = np.floor(center - support + 0.5)[..., None], np.floor(center + support + 0.5)[..., None]
    pixel = first + np.arange(_MAX_TAPS)  # (n, out, taps)
    distance = pixel + 0.5 - center[..., None]
    # The filter is cut off at the image border and renormalized.
    weights = ((pixel >= 0) & (pixel < last) & (pixel < length)).astype(np.float64)
    for index, weight in _WEIGHT.items():
        (chosen,) = np.nonzero(filter_indices == index)
        taps = int(2 * _SUPPORT[index])
        weights[chosen, :, :taps] *= weight(distance[chosen, :, :taps])
    weights /= weights.sum(axis=-1, keepdims=True)
    weights = np.rint(weights * _PRECISION) / _PRECISION
    matrices = np.zeros((len(level), length, length + 2 * _MAX_TAPS))
    image, out = np.arange(len(level))[:, None, None], np.arange(length)[:, None]
    matrices[image, out, pixel.astype(np.int64) + _MAX_TAPS] = weights
    return np.ascontiguousarray(matrices[:, :, _MAX_TAPS:-_MAX_TAPS])


@photometric(REPLACED)
def rescale(images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    """Resize the center crop, 1 - 0.5 v of each side, to the image size: across, rounded to 8 bits, then down."""
    n, height, width, _ = images.shape
    # The weights are small and take many operations to compute, so the host is fastest.
    level = levels.level.view(n, 1).cpu().numpy().astype(np.float64)
    filter_indices = (len(_SUPPORT) * levels.second.cpu().numpy().astype(np.float64)).astype(np.int64)
    across = torch.from_numpy(_resampling_weights(level, filter_indices, width)).to(images.device)
    down = across
    if height != width:
        down = torch.from_numpy(_resampling_weights(level, filter_indices, height)).to(images.device)

    # Every product is a multiple of 2^-22 below 2^10, so sums are exact in any order.
    lines = images.transpose(2, 3).to(torch.float64, memory_format=torch.contiguous_format)
    middle = (lines.view(n, -1, width) @ across.transpose(1, 2)).add_(0.5).floor_().clamp_(0, 255)
    out = (down @ middle.view(n, height, -1)).add_(0.5).clamp_(0, 255).to(torch.int32).to(torch.uint8)
    return torch.stack(out.view(lines.shape).unbind(2), dim=3)


# ---------------------------------------------------------------- dispatch


def apply(name: str, images: torch.Tensor, levels: OpLevels) -> torch.Tensor:
    """Apply the operation `name` of PHOTOMETRIC to images (n, H, W, 3) uint8. Returns images of the same shape."""
    use, function = PHOTOMETRIC[name]
    result = function(images, levels)
    if use == BLENDED:
        return blend(images, result, levels.level)
    if use == ENHANCED:
        return blend(result, images, (0.1 + 1.9 * levels.level.double()).to(torch.float32))
    return result
