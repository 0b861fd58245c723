"""CTAugment's point operations, filters, cutout and rescale on batches of images, in plain PyTorch; PIL is the oracle.

ReMixMatch (arXiv 1911.09785), section 3.2.2. One transformation at a time over rows of a batch. These are the twins
of what `kernels/augment.py` does in one launch, and what the view pipeline executes on CPUs. PIL's results do not
follow from a library's operators: each has its own border, rounding and order of passes, which are kept here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch


@dataclass(frozen=True)
class Parameters:
    """What a repainting is given; n rows.

    Attributes:
        level: (n, 1, 1, 1) float32 in [0, 1).
        second: (n,) float32 in [0, 1), rescale's filter.
        centre: (n, 2) float32 in [0, 1), cutout's centre (y, x).
    """

    level: torch.Tensor
    second: torch.Tensor
    centre: torch.Tensor

    def rows(self, first: int, last: int) -> Parameters:
        """Rows first to last - 1."""
        return Parameters(self.level[first:last], self.second[first:last], self.centre[first:last])


Repaint = Callable[[torch.Tensor, Parameters], torch.Tensor]
# how a function's result is used, and in this order rows are sorted: as it is; blend(image, result, v);
# blend(result, image, 0.1 + 1.9 v), which is ImageEnhance
REPLACED, BLENDED, ENHANCED = range(3)
REPAINTS: dict[str, tuple[int, Repaint]] = {}


def repaint(use: int) -> Callable[[Repaint], Repaint]:
    """Registers a function of (images (n, H, W, 3) uint8, Parameters) to integers that broadcast to them."""

    def register(function: Repaint) -> Repaint:
        REPAINTS[function.__name__] = (use, function)
        return function

    return register


def blend(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PIL's Image.blend: `a + v (b - a)` in single precision, clipped, then truncated. Returns uint8."""
    a = a.to(torch.float32)
    return b.to(torch.float32).sub_(a).mul_(v).add_(a).clamp_(0, 255).to(torch.uint8)


def grey(images: torch.Tensor) -> torch.Tensor:
    """PIL's mode L, weights in units of 2^-16: (n, H, W, 3) uint8 to (n, H, W, 1) float64 of integers."""
    weights = torch.tensor([19595.0, 38470.0, 7471.0], dtype=torch.float64, device=images.device)
    return (images.double() @ weights).add_(32768).mul_(1 / 65536).floor_()[..., None]


@repaint(BLENDED)
def autocontrast(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    low, high = images.amin(dim=(1, 2), keepdim=True).double(), images.amax(dim=(1, 2), keepdim=True).double()
    # PIL's very operations in double precision: it truncates, and a product may be just short of an integer
    scale = torch.where(high > low, torch.full_like(low, 255) / (high - low), 1.0)
    offset = torch.where(high > low, -low * scale, 0.0)
    return (images * scale).add_(offset).clamp_(0, 255).to(torch.uint8)


@repaint(BLENDED)
def blur(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    """PIL's BLUR: ones on the outer ring of 5x5, sum 16; the outermost two pixels stay as they are."""
    if min(images.shape[1:3]) < 5:
        return images
    whole = images.to(torch.int16)
    height, width = images.shape[1] - 4, images.shape[2] - 4
    ends = whole[:, :height] + whole[:, 4:]
    middle = (whole[:, 1:-3] + whole[:, 2:-2]).add_(whole[:, 3:-1])
    total = (ends + middle)[:, :, :width] + (ends + middle)[:, :, 4:]
    for x in range(1, 4):
        total += ends[:, :, x : x + width]
    return _framed(images, (total + 8) >> 4, 2)


def smoothed(images: torch.Tensor) -> torch.Tensor:
    """PIL's SMOOTH: 3x3, centre 5 and others 1, sum 13; the outermost pixel stays as it is."""
    if min(images.shape[1:3]) < 3:
        return images
    whole = images.to(torch.int16)
    down = (whole[:, :-2] + whole[:, 1:-1]).add_(whole[:, 2:])
    total = (down[:, :, :-2] + down[:, :, 1:-1]).add_(down[:, :, 2:]).add_(whole[:, 1:-1, 1:-1], alpha=4)
    return _framed(images, (total * (1 / 13)).add_(0.5), 1)


def _framed(images: torch.Tensor, inside: torch.Tensor, border: int) -> torch.Tensor:
    out = images.clone()
    out[:, border:-border, border:-border] = inside
    return out


@repaint(ENHANCED)
def brightness(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    return torch.zeros_like(images)


@repaint(ENHANCED)
def color(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    return grey(images)


@repaint(ENHANCED)
def contrast(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    return grey(images).mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()


@repaint(REPLACED)
def cutout(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    """A grey square of side 1 + floor(0.499 v min(H, W)) about pixel (floor(cy H), floor(cx W)), clipped."""
    n, height, width, channels = images.shape
    side = 1 + (0.499 * min(height, width) * given.level.double()).floor_().view(n, 1)
    inside = []
    for axis, length in enumerate((height, width)):
        first = (given.centre[:, axis, None].double() * length).floor_() - (side / 2).floor_()
        place = torch.arange(length, device=images.device)
        inside.append((place >= first) & (place < first + side))
    # channels count as columns: a mask without a broadcast dimension inside is several times as fast
    square = inside[0][:, :, None] & inside[1].repeat_interleave(channels, dim=1)[:, None, :]
    return images.view(n, height, -1).masked_fill(square, 127).view(images.shape)


@repaint(BLENDED)
def equalize(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    n, pixels = len(images), images.shape[1] * images.shape[2]
    value = torch.arange(256, device=images.device)
    # one histogram of 256 cells for each channel of each image, end to end
    cell = images.view(n, -1, 3) + 256 * torch.arange(3 * n, device=images.device).view(n, 1, 3)
    # integers in double precision: exact, and torch divides them faster than int64
    count = torch.bincount(cell.view(-1), minlength=768 * n).view(n, 3, 256).double()
    brightest = torch.where(count > 0, value, 0).amax(dim=-1, keepdim=True)
    step = ((pixels - count.gather(2, brightest)) / 255).floor_()
    below = count.cumsum(dim=-1).sub_(count)
    curve = below.add_((step / 2).floor_()).div_(step.clamp(min=1)).floor_().clamp_(max=255)
    # with fewer than 255 pixels below the brightest value PIL leaves the channel alone
    curve = torch.where(step > 0, curve, value).to(torch.uint8)
    return curve.view(-1)[cell].view(images.shape)


@repaint(BLENDED)
def invert(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    return 255 - images


@repaint(REPLACED)
def posterize(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    dropped = 7 - (7.999 * given.level.double()).to(torch.int32)
    return images & (0xFF << dropped).to(torch.uint8)


@repaint(ENHANCED)
def sharpness(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    return smoothed(images)


@repaint(BLENDED)
def smooth(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    return smoothed(images)


@repaint(REPLACED)
def solarize(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    threshold = (255.999 * given.level.double()).to(torch.uint8)
    return images ^ (images >= threshold).to(torch.uint8).mul_(255)


# ---------------------------------------------------------------- rescale


def _hamming(x: torch.Tensor) -> torch.Tensor:
    return torch.sinc(x) * (0.54 + 0.46 * torch.cos(np.pi * x))


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    x = x.abs()
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


def _lanczos(x: torch.Tensor) -> torch.Tensor:
    return torch.sinc(x) * torch.sinc(x / 3)


# PIL's filters in the order of rescale's second level: NEAREST, BOX, BILINEAR, HAMMING, BICUBIC, LANCZOS;
# half widths, and weights by distance. Enlarging, NEAREST and BOX are both the one pixel that a position
# falls into
_SUPPORT = (0.5, 0.5, 1.0, 1.0, 2.0, 3.0)
_WEIGHT: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    2: lambda x: 1 - x.abs(),
    3: _hamming,
    4: _bicubic,
    5: _lanczos,
}
_PRECISION = 1 << 22


def _kernels(level: torch.Tensor, chosen: list[int], length: int) -> torch.Tensor:
    """PIL's resampling coefficients along one side: (n, out, in) float64 of integers, in units of 2^-22.

    Args:
        level: (n, 1) float64.
        chosen: n filters.
        length: pixels of the side.
    """
    support = level.new_tensor([_SUPPORT[index] for index in chosen])[:, None]
    # PIL takes the box, and its size, in single precision
    start, end = (0.25 * level * length).float(), (length - 0.25 * level * length).float()
    place = torch.arange(length, dtype=torch.float64, device=level.device)
    centre = start + (place + 0.5) * ((end - start).double() / length)  # (n, out)
    first, last = (centre - support + 0.5).floor_()[..., None], (centre + support + 0.5).floor_()[..., None]
    # the kernel is cut off at the image's border, and what is left of it sums to 1
    kernels = ((place >= first) & (place < last)).double()
    distance = place + 0.5 - centre[..., None]
    first_row = 0
    for index, run in groupby(chosen):
        last_row = first_row + len(list(run))
        if index in _WEIGHT:
            kernels[first_row:last_row] *= _WEIGHT[index](distance[first_row:last_row])
        first_row = last_row
    kernels /= kernels.sum(dim=-1, keepdim=True)
    return kernels.mul_(_PRECISION).round_()


@repaint(REPLACED)
def rescale(images: torch.Tensor, given: Parameters) -> torch.Tensor:
    """The centre crop of side (1 - 0.5 v) of the image, resized back: across, to 8 bits, then down."""
    n, height, width, _ = images.shape
    level = given.level.view(n, 1).double()
    chosen = [int(len(_SUPPORT) * second) for second in given.second.tolist()]

    # integers below 2^53, so sums are exact in whatever order
    def along_rows(kernels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out = kernels @ values.reshape(n, values.shape[1], -1)
        return out.mul_(1 / _PRECISION).add_(0.5).floor_().clamp_(0, 255).view(values.shape)

    across = _kernels(level, chosen, width)
    down = across if height == width else _kernels(level, chosen, height)
    middle = along_rows(across, images.double().transpose(1, 2))
    return along_rows(down, middle.transpose(1, 2)).to(torch.uint8)


# ---------------------------------------------------------------- a transformation as it is used


def apply(name: str, images: torch.Tensor, given: Parameters) -> torch.Tensor:
    """One repainting, by its name in REPAINTS: (n, H, W, 3) uint8 to the same."""
    use, function = REPAINTS[name]
    result = function(images, given)
    if use == BLENDED:
        return blend(images, result, given.level)
    if use == ENHANCED:
        return blend(result, images, (0.1 + 1.9 * given.level.double()).to(torch.float32))
    return result
