"""CTAugment's point operations, filters, cutout and rescale on batches of images, in plain PyTorch; PIL is the oracle.

ReMixMatch (arXiv 1911.09785), section 3.2.2. One transformation at a time over rows of a batch. These are the twins
of what `kernels/augment.py` does in one launch, and what the DALI graph executes. PIL's results do not
follow from a library's operators: each has its own border, rounding and order of passes, which are kept here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class OpLevels:
    """What a photometric operation is given; n rows.

    Attributes:
        level: (n, 1, 1, 1) float32 in [0, 1).
        second: (n,) float32 in [0, 1), rescale's filter.
        centre: (n, 2) float32 in [0, 1), cutout's centre (y, x).
    """

    level: torch.Tensor
    second: torch.Tensor
    centre: torch.Tensor

    def rows(self, first: int, last: int) -> OpLevels:
        """Rows first to last - 1."""
        return OpLevels(self.level[first:last], self.second[first:last], self.centre[first:last])


Operation = Callable[[torch.Tensor, OpLevels], torch.Tensor]
# how a function's result is used: as it is; as blend(image, result, v); as blend(result, image, 0.1 + 1.9 v), which is
# ImageEnhance
REPLACED, BLENDED, ENHANCED = range(3)
PHOTOMETRIC: dict[str, tuple[int, Operation]] = {}


def photometric(use: int) -> Callable[[Operation], Operation]:
    """Registers a function of (images (n, H, W, 3) uint8, OpLevels) to integers that broadcast to them."""

    def register(function: Operation) -> Operation:
        PHOTOMETRIC[function.__name__] = (use, function)
        return function

    return register


def blend(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PIL's Image.blend: `a + v (b - a)` in single precision, clipped, then truncated. Returns uint8."""
    a = a.to(torch.float32)
    mixed = b.to(torch.float32).sub_(a).mul_(v).add_(a).clamp_(0, 255)
    # by way of int32, for which processors have an instruction: half the time of going straight to bytes
    return mixed.to(torch.int32).to(torch.uint8)


def grey(images: torch.Tensor) -> torch.Tensor:
    """PIL's mode L, weights in units of 2^-16: (n, H, W, 3) uint8 to (n, H, W) int32."""
    red, green, blue = images.permute(3, 0, 1, 2).to(torch.int32, memory_format=torch.contiguous_format)
    return red.mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).bitwise_right_shift_(16)


def cells(images: torch.Tensor) -> torch.Tensor:
    """Where each value is in a table (n, 3, 256) laid end to end: (n, H, W * 3) int64."""
    n, height, width, _ = images.shape
    table = torch.arange(0, 768 * n, 256, device=images.device).view(n, 1, 3).repeat(1, 1, width)
    return images.view(n, height, -1).long().add_(table)


def looked_up(curves: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    """The curve's value at each of `cells`: of a channel's values (n, 3, 256), in the shape of `cell`.

    A curve is blended before: 256 values instead of all the pixels.
    """
    return curves.view(-1).gather(0, cell.view(-1)).view(cell.shape)


def planes(images: torch.Tensor) -> torch.Tensor:
    """Channel by channel, on which reductions are many times as fast: (n, H, W, 3) to (n, 3, H * W)."""
    return images.view(len(images), -1, 3).transpose(1, 2).contiguous()


@photometric(REPLACED)
def autocontrast(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    values = planes(images)
    low, high = values.amin(dim=2, keepdim=True).double(), values.amax(dim=2, keepdim=True).double()
    # PIL's very operations in double precision: it truncates, and a product may be just short of an integer
    scale = torch.where(high > low, torch.full_like(low, 255) / (high - low), 1.0)
    offset = torch.where(high > low, -low * scale, 0.0)
    value = torch.arange(256, dtype=torch.float64, device=images.device)
    curves = (value * scale).add_(offset).clamp_(0, 255).floor_()
    return looked_up(blend(value, curves, given.level[..., 0]), cells(images)).view(images.shape)


@photometric(BLENDED)
def blur(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    """PIL's BLUR: ones on the outer ring of 5x5, sum 16; the outermost two pixels stay as they are."""
    if min(images.shape[1:3]) < 5:
        return images
    whole, row = _in_a_row(images)
    ends = whole[:, : -4 * row] + whole[:, 4 * row :]
    middle = (whole[:, row : -3 * row] + whole[:, 2 * row : -2 * row]).add_(whole[:, 3 * row : -row]).add_(ends)
    total = middle[:, :-12] + middle[:, 12:]
    for x in (3, 6, 9):
        total += ends[:, x : x - 12]
    return _framed(images, total.add_(8).bitwise_right_shift_(4), 2)


def smoothed(images: torch.Tensor) -> torch.Tensor:
    """PIL's SMOOTH: 3x3, centre 5 and others 1, sum 13; the outermost pixel stays as it is."""
    if min(images.shape[1:3]) < 3:
        return images
    whole, row = _in_a_row(images)
    down = (whole[:, : -2 * row] + whole[:, row:-row]).add_(whole[:, 2 * row :])
    total = (down[:, :-6] + down[:, 3:-3]).add_(down[:, 6:]).add_(whole[:, row + 3 : -row - 3], alpha=4)
    return _framed(images, total.to(torch.float32).mul_(1 / 13).add_(0.5).floor_(), 1)


def _in_a_row(images: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All values of an image in one row, (n, H * W * 3) int16, and how far the next line is.

    Filters run along such a row from the first inner pixel to the last: several times as fast as line by line,
    and what runs over from one line into the next is in the border, which `_framed` drops.
    """
    return images.view(len(images), -1).to(torch.int16), images.shape[2] * 3


def _framed(images: torch.Tensor, inside: torch.Tensor, border: int) -> torch.Tensor:
    n, height, width, _ = images.shape
    out = images.to(torch.float32)
    lines = (n, height - 2 * border, 3 * (width - 2 * border))
    out.view(n, height, -1)[:, border:-border, 3 * border : -3 * border] = inside.as_strided(
        lines, (inside.shape[1], 3 * width, 1)
    )
    return out


@photometric(ENHANCED)
def brightness(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    return images.new_zeros(1)


@photometric(ENHANCED)
def color(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    # a last dimension of 1 that broadcasts to 3 would be slow, in each pass of the blend
    return torch.stack((grey(images).to(torch.uint8),) * 3, dim=3)


@photometric(ENHANCED)
def contrast(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    return grey(images).double().mean(dim=(1, 2)).add_(0.5).floor_().view(-1, 1, 1, 1)


@photometric(REPLACED)
def cutout(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    """A grey square of side 1 + floor(0.499 v min(H, W)) about pixel (floor(cy H), floor(cx W)), clipped."""
    n, height, width, channels = images.shape
    side = 1 + (0.499 * min(height, width) * given.level.double()).floor_().view(n, 1)
    inside = []
    for axis, length in enumerate((height, width)):
        first = (given.centre[:, axis, None].double() * length).floor_() - (side / 2).floor_()
        place = torch.arange(length, device=images.device)
        inside.append((place >= first) & (place < first + side))
    # as bits, with channels as columns: many times as fast as a mask of booleans
    down, across = (mask.to(torch.uint8).mul_(255) for mask in inside)
    square = down[:, :, None] & across.repeat_interleave(channels, dim=1)[:, None, :]
    return ((images.view(n, height, -1) & ~square) | (square & 127)).view(images.shape)


@photometric(REPLACED)
def equalize(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    n, pixels = len(images), images.shape[1] * images.shape[2]
    # one histogram of 256 cells for each channel of each image, end to end
    cell = cells(images)
    # integers in double precision: exact, and torch divides them faster than int64
    count = torch.bincount(cell.view(-1), minlength=768 * n).view(n, 3, 256).double()
    below = count.cumsum(dim=-1).sub_(count)
    # below the brightest value there is: above it, all pixels are below
    step = (below.lt(pixels).double().mul_(below).amax(dim=-1, keepdim=True) / 255).floor_()
    curves = below.add_((step / 2).floor_()).div_(step.clamp(min=1)).floor_().clamp_(max=255)
    # with fewer than 255 pixels below the brightest value PIL leaves the channel alone
    value = torch.arange(256, dtype=torch.float64, device=images.device)
    curves = torch.where(step > 0, curves, value)
    return looked_up(blend(value, curves, given.level[..., 0]), cell).view(images.shape)


@photometric(BLENDED)
def invert(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    return 255 - images


@photometric(REPLACED)
def posterize(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    dropped = 7 - (7.999 * given.level.double()).to(torch.int32)
    return images & (0xFF << dropped).to(torch.uint8)


@photometric(ENHANCED)
def sharpness(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    return smoothed(images)


@photometric(BLENDED)
def smooth(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    return smoothed(images)


@photometric(REPLACED)
def solarize(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    threshold = (255.999 * given.level.double()).to(torch.uint8)
    return images ^ (images >= threshold).to(torch.uint8).mul_(255)


# ---------------------------------------------------------------- rescale


def _hamming(x: np.ndarray) -> np.ndarray:
    return np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x))


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.sinc(x) * np.sinc(x / 3)


# PIL's filters in the order of rescale's second level: NEAREST, BOX, BILINEAR, HAMMING, BICUBIC, LANCZOS;
# half widths, and weights by distance. Enlarging, NEAREST and BOX are both the one pixel that a position
# falls into
_SUPPORT = np.array([0.5, 0.5, 1.0, 1.0, 2.0, 3.0])
_REACH = 6  # pixels that the widest one covers
_WEIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: 1 - np.abs(x),
    3: _hamming,
    4: _bicubic,
    5: _lanczos,
}
_PRECISION = 1 << 22


def _filters(level: np.ndarray, chosen: np.ndarray, length: int) -> np.ndarray:
    """PIL's resampling coefficients along one side: (n, out, in) float64, multiples of 2^-22.

    Args:
        level: (n, 1) float64.
        chosen: (n,) filters.
        length: pixels of the side.
    """
    support = _SUPPORT[chosen][:, None]
    # PIL takes the box, and its size, in single precision
    start, end = (0.25 * level * length).astype(np.float32), (length - 0.25 * level * length).astype(np.float32)
    centre = start + (np.arange(length) + 0.5) * ((end - start).astype(np.float64) / length)  # (n, out)
    first, last = np.floor(centre - support + 0.5)[..., None], np.floor(centre + support + 0.5)[..., None]
    reached = first + np.arange(_REACH)  # (n, out, reach)
    distance = reached + 0.5 - centre[..., None]
    # the filter is cut off at the image's border, and what is left of it sums to 1
    weights = ((reached >= 0) & (reached < last) & (reached < length)).astype(np.float64)
    for index, weight in _WEIGHT.items():
        (rows,) = np.nonzero(chosen == index)
        taps = int(2 * _SUPPORT[index])
        weights[rows, :, :taps] *= weight(distance[rows, :, :taps])
    weights /= weights.sum(axis=-1, keepdims=True)
    weights = np.rint(weights * _PRECISION) / _PRECISION
    filters = np.zeros((len(level), length, length + 2 * _REACH))
    row, out = np.arange(len(level))[:, None, None], np.arange(length)[:, None]
    filters[row, out, reached.astype(np.int64) + _REACH] = weights
    return np.ascontiguousarray(filters[:, :, _REACH:-_REACH])


@photometric(REPLACED)
def rescale(images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    """The centre crop of side (1 - 0.5 v) of the image, resized back: across, to 8 bits, then down."""
    n, height, width, _ = images.shape
    # filters are small and many operations away from levels: the host is quickest
    level = given.level.view(n, 1).cpu().numpy().astype(np.float64)
    chosen = (len(_SUPPORT) * given.second.cpu().numpy().astype(np.float64)).astype(np.int64)
    across = torch.from_numpy(_filters(level, chosen, width)).to(images.device)
    down = across if height == width else torch.from_numpy(_filters(level, chosen, height)).to(images.device)

    # every product is a multiple of 2^-22 below 2^10, so sums are exact in whatever order
    lines = images.transpose(2, 3).to(torch.float64, memory_format=torch.contiguous_format)
    middle = (lines.view(n, -1, width) @ across.transpose(1, 2)).add_(0.5).floor_().clamp_(0, 255)
    out = (down @ middle.view(n, height, -1)).add_(0.5).clamp_(0, 255).to(torch.int32).to(torch.uint8)
    return torch.stack(out.view(lines.shape).unbind(2), dim=3)


# ---------------------------------------------------------------- a transformation as it is used


def apply(name: str, images: torch.Tensor, given: OpLevels) -> torch.Tensor:
    """One operation, by its name in PHOTOMETRIC: (n, H, W, 3) uint8 to the same."""
    use, function = PHOTOMETRIC[name]
    result = function(images, given)
    if use == BLENDED:
        return blend(images, result, given.level)
    if use == ENHANCED:
        return blend(result, images, (0.1 + 1.9 * given.level.double()).to(torch.float32))
    return result
