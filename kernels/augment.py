"""CTAugment's views in one launch: the weak augmentation and two transformations, a program a view.

ReMixMatch (arXiv 1911.09785), section 3.2.2; the weak augmentation is section 4's. What each transformation does to
a pixel, borders and roundings are PIL's, as `kernels/photometric.py` states them. An intermediate image is in global
memory, where every thread of its program can read any pixel of it: a few kilobytes that stay in L1 and L2.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.photometric import PHOTOMETRIC, OpLevels, apply

# what the numbers in `ops` stand for: a photometric operation, or an affine map; no change is the identity's matrix
OPS = (*PHOTOMETRIC, "affine")
CODES = {name: code for code, name in enumerate(OPS)}
MAX_SIDE = 256  # coefficients of affine maps are exact in single precision up to here

_AUTOCONTRAST = tl.constexpr(CODES["autocontrast"])
_BLUR = tl.constexpr(CODES["blur"])
_BRIGHTNESS = tl.constexpr(CODES["brightness"])
_COLOR = tl.constexpr(CODES["color"])
_CONTRAST = tl.constexpr(CODES["contrast"])
_CUTOUT = tl.constexpr(CODES["cutout"])
_EQUALIZE = tl.constexpr(CODES["equalize"])
_INVERT = tl.constexpr(CODES["invert"])
_POSTERIZE = tl.constexpr(CODES["posterize"])
_RESCALE = tl.constexpr(CODES["rescale"])
_SHARPNESS = tl.constexpr(CODES["sharpness"])
_SMOOTH = tl.constexpr(CODES["smooth"])
_SOLARIZE = tl.constexpr(CODES["solarize"])
_AFFINE = tl.constexpr(CODES["affine"])
# sets of operations, a bit each: blend(image, result, v), and ImageEnhance's blend(result, image, 0.1 + 1.9 v)
_BLENDED_OPS = tl.constexpr(sum(1 << CODES[name] for name in ("autocontrast", "blur", "equalize", "invert", "smooth")))
_ENHANCED_OPS = tl.constexpr(sum(1 << CODES[name] for name in ("brightness", "color", "contrast", "sharpness")))


def augment_views(
    images: torch.Tensor,
    image: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor,
    ops: torch.Tensor,
    parameters: torch.Tensor,
) -> torch.Tensor:
    """Make view rows from images: a weak augmentation (paper, section 4), then two transformations (section 3.2.2).

    The weak augmentation moves the image by `shift` = (dy, dx), down and to the right for positive numbers, with what
    is missing reflected as `numpy.pad(mode="reflect")` does, then mirrors it where `flip` is 1. The operations follow,
    left to right. There is no host synchronisation.

    Args:
        images: (M, H, W, 3) uint8 contiguous, H and W from 1 to 96.
        image: (V,) int64 contiguous, rows of `images` (0..M-1), V >= 1. A CPU checks the range (IndexError), a GPU,
            which could tell the host only by a synchronisation, does not.
        shift: (V, 2) int32 contiguous, pixels, each less than its side. A CPU checks that, a GPU does not.
        flip: (V,) int32 contiguous, 0 or 1.
        ops: (V, 2) int32 contiguous, places in `OPS`. A CPU checks the range, a GPU takes others for no change.
        parameters: (V, 2, 6) float32 contiguous. Of a photometric operation: a number that is not used, level,
            second level, cutout's centre (y, x), nothing; all in [0, 1). Of "affine", PIL's AFFINE coefficients
            (a, b, c, d, e, f): output pixel (x, y) is the one that input position (a (x + 1/2) + b (y + 1/2) + c,
            d (x + 1/2) + e (y + 1/2) + f) falls into, and black outside. Steps a, b, d and e are multiples of 2^-16.

    Returns:
        views: (V, H, W, 3) uint8.

    Raises:
        ValueError: a shape, dtype, layout, device, shift or operation other than the above.
    """
    if images.dim() != 4 or images.shape[3] != 3 or images.numel() == 0:
        raise ValueError(f"images must be (M, H, W, 3) and not empty, got {tuple(images.shape)}")
    if max(images.shape[1:3]) > MAX_SIDE:
        raise ValueError(f"images must be of at most {MAX_SIDE} x {MAX_SIDE} pixels, got {tuple(images.shape[1:3])}")
    if images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(
            f"images must be uint8 and contiguous, got {images.dtype} with strides {tuple(images.stride())}"
        )
    if image.dim() != 1 or image.shape[0] < 1:
        raise ValueError(f"image must be (V >= 1,), got {tuple(image.shape)}")
    views = image.shape[0]
    for name, tensor, shape, expected in (
        ("image", image, (views,), torch.int64),
        ("shift", shift, (views, 2), torch.int32),
        ("flip", flip, (views,), torch.int32),
        ("ops", ops, (views, 2), torch.int32),
        ("parameters", parameters, (views, 2, 6), torch.float32),
    ):
        if tensor.shape != shape or tensor.dtype != expected or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {shape} {expected} contiguous, "
                f"got {tuple(tensor.shape)} {tensor.dtype} with strides {tuple(tensor.stride())}"
            )
        if tensor.device != images.device:
            raise ValueError(f"{name} must be on {images.device}, where images is, got {tensor.device}")
    return torch.ops.remixmatch.augment_views(images, image, shift, flip, ops, parameters)


def augment_views_reference(
    images: torch.Tensor,
    image: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor,
    ops: torch.Tensor,
    parameters: torch.Tensor,
) -> torch.Tensor:
    """State in plain PyTorch what `augment_views` computes; same arguments and result, on any device."""
    sides = images.shape[1:3]
    if bool((shift.abs() >= shift.new_tensor(sides)).any()):
        raise ValueError(f"shifts must be less than the sides of {tuple(sides)}, got up to {int(shift.abs().max())}")
    if bool(((ops < 0) | (ops >= len(OPS))).any()):
        raise ValueError(f"ops must be from 0 to {len(OPS) - 1}, got {int(ops.min())} to {int(ops.max())}")
    views = weak_views(images, image, shift, flip)
    for stage in range(2):
        for code in ops[:, stage].unique().tolist():
            rows = (ops[:, stage] == code).nonzero()[:, 0]
            numbers = parameters[rows, stage]
            if OPS[code] == "affine":
                views[rows] = _affine(views[rows], numbers)
            else:
                given = OpLevels(numbers[:, 1].view(-1, 1, 1, 1), numbers[:, 2], numbers[:, 3:5])
                views[rows] = apply(OPS[code], views[rows], given)
    return views


def weak_views(images: torch.Tensor, image: torch.Tensor, shift: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Shift, with reflection, and mirror images: the weak part of `augment_views`, in plain PyTorch.

    Args:
        images: (M, H, W, 3).
        image: (V,) int64.
        shift: (V, 2) integers, (dy, dx).
        flip: (V,) integers.

    Returns:
        (V, H, W, 3).
    """
    height, width = images.shape[1:3]
    y = torch.arange(height, device=images.device) - shift[:, :1]  # (V, H)
    x = torch.arange(width, device=images.device)
    x = torch.where(flip[:, None] != 0, width - 1 - x, x) - shift[:, 1:]  # (V, W)
    y = height - 1 - (height - 1 - y.abs()).abs()
    x = width - 1 - (width - 1 - x.abs()).abs()
    return images[image[:, None, None], y[:, :, None], x[:, None, :]]


def _affine(images: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """The nearest pixel's colour; (n, H, W, 3) uint8 and (n, 6) to (n, H, W, 3) uint8."""
    height, width = images.shape[1:3]
    y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
    x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    a, b, c, d, e, f = coefficients.double()[:, :, None, None].unbind(1)
    # sums of products of few bits each: exact in double precision, in whatever order
    column, row = (a * x + b * y + c).floor_().long(), (d * x + e * y + f).floor_().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    n = torch.arange(len(images), device=images.device)[:, None, None]
    return images[n, row.clamp(0, height - 1), column.clamp(0, width - 1)] * inside[..., None]


# ---------------------------------------------------------------- the kernel
# An image is a row of H * W * 3 elements; `at` are places in it. Everything that decides which way a program takes is
# one number for all its threads, so that its branches, and barriers in them, are real ones.


@triton.jit
def _place(at, W: tl.constexpr):
    """Give row, column and channel of elements."""
    pixel = at // 3
    return pixel // W, pixel % W, at % 3


@triton.jit
def _reflected(place, LENGTH: tl.constexpr):
    return LENGTH - 1 - tl.abs(LENGTH - 1 - tl.abs(place))


@triton.jit
def _weak(source, to, down, right, mirrored, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, H * W * 3, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W * 3
        y, x, channel = _place(at, W)
        y = _reflected(y - down, H)
        x = _reflected(tl.where(mirrored, W - 1 - x, x) - right, W)
        tl.store(to + at, tl.load(source + (y * W + x) * 3 + channel, mask=inside), mask=inside)


@triton.jit
def _stays(op, numbers):
    """Tell whether the operation is the affine map that changes nothing."""
    column = (tl.load(numbers) == 1.0) & (tl.load(numbers + 1) == 0.0) & (tl.load(numbers + 2) == 0.0)
    row = (tl.load(numbers + 3) == 0.0) & (tl.load(numbers + 4) == 1.0) & (tl.load(numbers + 5) == 0.0)
    return (op == _AFFINE) & column & row


@triton.jit
def _units(coefficient):
    # in units of 2^-17, where the steps and half of them are integers; a position's floor is not changed by the
    # floor of the one coefficient that may be no multiple
    return tl.floor(tl.load(coefficient) * 131072.0).to(tl.int32)


@triton.jit
def _geometric(source, to, numbers, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    # integers: the same positions as PIL's fixed-point ones, however the compiler orders the sum
    a, b, c = _units(numbers) >> 1, _units(numbers + 1) >> 1, _units(numbers + 2)
    d, e, f = _units(numbers + 3) >> 1, _units(numbers + 4) >> 1, _units(numbers + 5)
    for start in range(0, H * W * 3, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W * 3
        y, x, channel = _place(at, W)
        column = (a * (2 * x + 1) + b * (2 * y + 1) + c) >> 17
        row = (d * (2 * x + 1) + e * (2 * y + 1) + f) >> 17
        seen = inside & (column >= 0) & (column < W) & (row >= 0) & (row < H)
        tl.store(to + at, tl.load(source + (row * W + column) * 3 + channel, mask=seen, other=0), mask=inside)


@triton.jit
def _sine(x):
    """Give sin(pi x) in double precision, to 1e-11: a library's takes registers that spill."""
    nearest = tl.floor(x + 0.5)
    x -= nearest
    s = x * x
    # Taylor's series, pi^k / k!
    sine = -2.1915353447830204e-05 * s + 0.00046630280576761234
    sine = sine * s - 0.007370430945714348
    sine = sine * s + 0.08214588661112819
    sine = sine * s - 0.5992645293207919
    sine = sine * s + 2.550164039877345
    sine = sine * s - 5.167712780049969
    sine = sine * s + 3.141592653589793
    odd = nearest - 2.0 * tl.floor(0.5 * nearest)
    return sine * x * (1.0 - 2.0 * odd)


@triton.jit
def _filter(distance, chosen):
    """Give the weight at `distance`, inside the support, by the filter's number as in `kernels/photometric.py`."""
    x = tl.abs(distance)
    weight = tl.full(x.shape, 1.0, tl.float64)
    divisor = tl.full(x.shape, 1.0, tl.float64)
    if chosen == 2:
        weight = 1.0 - x
    elif chosen == 3:
        weight = _sine(x) * (0.54 + 0.46 * _sine(x + 0.5))
        divisor = 3.141592653589793 * x
    elif chosen == 4:
        weight = tl.where(x < 1.0, (1.5 * x - 2.5) * x * x + 1.0, ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0)
    elif chosen == 5:
        weight = _sine(x) * _sine(x * 0.3333333333333333)
        divisor = 3.289868133696453 * x * x
    return tl.where(x == 0.0, 1.0, weight / tl.where(x == 0.0, 1.0, divisor))


@triton.jit
def _resampling(table, level, chosen, taps, LENGTH: tl.constexpr, LINES: tl.constexpr):
    """Write PIL's resampling coefficients along one side: in 2^-22, six rows of LENGTH, then the first pixels."""
    tap = tl.arange(0, 8)[:, None]
    line = tl.arange(0, LINES)[None, :]
    # PIL takes the box, and its size, in single precision
    margin = 0.25 * level * LENGTH
    begin = margin.to(tl.float32)
    end = (LENGTH - margin).to(tl.float32)
    centre = begin.to(tl.float64) + (line.to(tl.float64) + 0.5) * ((end - begin).to(tl.float64) / LENGTH)
    first = tl.floor(centre - 0.5 * taps.to(tl.float64) + 0.5).to(tl.int32)
    place = first + tap
    # the filter is cut off at the image's border, and what is left of it sums to 1
    inside = (tap < taps) & (place >= 0) & (place < LENGTH)
    weight = tl.where(inside, _filter(place.to(tl.float64) + 0.5 - centre, chosen), 0.0)
    scale = 4194304.0 / tl.where(line < LENGTH, tl.sum(weight, axis=0)[None, :], 1.0)
    units = tl.floor(weight * scale + 0.5).to(tl.int32)
    tl.store(table + tap * LENGTH + line, tl.where(tap == 6, first, units), mask=(tap < 7) & (line < LENGTH))


@triton.jit
def _resampled(
    source,
    to,
    table,
    taps,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Resample along the side of LENGTH pixels that lie STRIDE elements apart."""
    for start in range(0, H * W * 3, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W * 3
        line = at // STRIDE % LENGTH
        first = tl.load(table + 6 * LENGTH + line)
        # as in PIL, 32 bits hold the sum: the weights' sizes sum to less than 2
        total = tl.full([BLOCK], 1 << 21, tl.int32)
        k = 0
        while k < taps:
            # a place outside has weight 0
            place = tl.minimum(tl.maximum(first + k, 0), LENGTH - 1)
            weight = tl.load(table + k * LENGTH + line)
            total += weight * tl.load(source + at + (place - line) * STRIDE, mask=inside, other=0).to(tl.int32)
            k += 1
        tl.store(to + at, tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.uint8), mask=inside)


@triton.jit
def _rescale(
    source, to, middle, table, numbers, H: tl.constexpr, W: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr
):
    level = tl.load(numbers + 1).to(tl.float64)
    chosen = (6.0 * tl.load(numbers + 2).to(tl.float64)).to(tl.int32)
    # twice the filter's support; NEAREST and BOX are the one pixel that a position falls into
    taps = tl.where(chosen < 2, 1, tl.where(chosen < 4, 2, tl.where(chosen == 4, 4, 6)))
    _resampling(table, level, chosen, taps, W, LINES)
    down = table
    if H != W:
        down = table + 7 * W
        _resampling(down, level, chosen, taps, H, LINES)
    tl.debug_barrier()
    _resampled(source, middle, table, taps, H, W, BLOCK // 2, W, 3)
    tl.debug_barrier()
    _resampled(middle, to, down, taps, H, W, BLOCK // 2, H, 3 * W)


@triton.jit
def _curves(source, table, op, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Write what autocontrast or equalize makes of each value: 256 numbers for each channel."""
    value = tl.arange(0, 256)
    for channel in range(3):
        count = tl.zeros([256], tl.int32)
        for start in range(0, PIXELS, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < PIXELS
            seen = tl.load(source + 3 * pixel + channel, mask=inside, other=0).to(tl.int32)
            count += tl.histogram(seen, 256, mask=inside)
        brightest = tl.max(tl.where(count > 0, value, 0), axis=0)
        if op == _EQUALIZE:
            of_brightest = tl.sum(tl.where(value == brightest, count, 0), axis=0)
            step = (PIXELS - of_brightest) // 255
            below = tl.cumsum(count, axis=0) - count
            curve = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
            # with fewer than 255 pixels below the brightest value PIL leaves the channel alone
            curve = tl.where(step > 0, curve, value)
        else:
            darkest = tl.min(tl.where(count > 0, value, 255), axis=0)
            # PIL's very operations in double precision: it truncates, and a product may be just short of an integer
            scale = 255.0 / tl.maximum(brightest - darkest, 1).to(tl.float64)
            stretched = (value.to(tl.float64) * scale + -darkest.to(tl.float64) * scale).to(tl.int32)
            curve = tl.where(brightest > darkest, tl.minimum(tl.maximum(stretched, 0), 255), value)
        tl.store(table + 256 * channel + value, curve)


@triton.jit
def _grey(pixel, inside):
    """Give PIL's mode L of the pixels at these addresses."""
    red = tl.load(pixel, mask=inside, other=0).to(tl.int32)
    green = tl.load(pixel + 1, mask=inside, other=0).to(tl.int32)
    blue = tl.load(pixel + 2, mask=inside, other=0).to(tl.int32)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


@triton.jit
def _mean_grey(source, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    total = 0
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        inside = pixel < PIXELS
        total += tl.sum(tl.where(inside, _grey(source + 3 * pixel, inside), 0), axis=0)
    return (2 * total + PIXELS) // (2 * PIXELS)


@triton.jit
def _neighbours(source, at, inside, total, BORDER: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Add the pixels of a square of sides 1 + 2 BORDER to `total`: all of 3x3, the outer ring of 5x5.

    Returns:
        the sum, and whether the square is inside the image; the sum is meaningless where it is not.
    """
    y, x, _ = _place(at, W)
    framed = inside & (y >= BORDER) & (y < H - BORDER) & (x >= BORDER) & (x < W - BORDER)
    SIDE: tl.constexpr = 1 + 2 * BORDER
    for k in tl.static_range(SIDE * SIDE):
        if k // SIDE % (SIDE - 1) == 0 or k % SIDE % (SIDE - 1) == 0 or BORDER == 1:
            near = source + at + (k // SIDE - BORDER) * (3 * W) + (k % SIDE - BORDER) * 3
            total += tl.load(near, mask=framed, other=0).to(tl.int32)
    return total, framed


@triton.jit
def _blurred(source, at, inside, value, H: tl.constexpr, W: tl.constexpr):
    total, framed = _neighbours(source, at, inside, tl.zeros_like(value), 2, H, W)
    return tl.where(framed, (total + 8) >> 4, value)


@triton.jit
def _smoothed(source, at, inside, value, H: tl.constexpr, W: tl.constexpr):
    total, framed = _neighbours(source, at, inside, 4 * value, 1, H, W)
    # thirteenths, rounded to nearest; there is no tie
    return tl.where(framed, (2 * total + 13) // 26, value)


@triton.jit
def _cut_out(at, value, level, numbers, H: tl.constexpr, W: tl.constexpr):
    SHORT: tl.constexpr = H if H < W else W
    side = 1 + ((0.499 * SHORT) * level).to(tl.int32)
    top = (tl.load(numbers + 3).to(tl.float64) * H).to(tl.int32) - side // 2
    left = (tl.load(numbers + 4).to(tl.float64) * W).to(tl.int32) - side // 2
    y, x, _ = _place(at, W)
    return tl.where((y >= top) & (y < top + side) & (x >= left) & (x < left + side), 127, value)


@triton.jit
def _photometric(source, to, table, op, numbers, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """Do one photometric operation but rescale; every one is a blend of the image with another one."""
    # passes with many numbers at once take half a block, and so no more registers than the others
    if (op == _AUTOCONTRAST) | (op == _EQUALIZE):
        _curves(source, table, op, H * W, BLOCK // 2)
        tl.debug_barrier()
    mean = 0
    if op == _CONTRAST:
        mean = _mean_grey(source, H * W, BLOCK // 2)

    level = tl.load(numbers + 1)
    exact = level.to(tl.float64)
    enhanced = ((_ENHANCED_OPS >> op) & 1) != 0
    blended = ((_BLENDED_OPS >> op) & 1) != 0
    # what replaces the image is blended with it at level 1: in single precision that is the other itself
    weight = tl.where(enhanced, (0.1 + 1.9 * exact).to(tl.float32), tl.where(blended, level, 1.0))

    for start in range(0, H * W * 3, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W * 3
        value = tl.load(source + at, mask=inside, other=0).to(tl.int32)
        other = value
        if (op == _AUTOCONTRAST) | (op == _EQUALIZE):
            other = tl.load(table + 256 * (at % 3) + value, mask=inside, other=0)
        elif op == _BLUR:
            other = _blurred(source, at, inside, value, H, W)
        elif (op == _SMOOTH) | (op == _SHARPNESS):
            other = _smoothed(source, at, inside, value, H, W)
        elif op == _BRIGHTNESS:
            other = tl.zeros_like(value)
        elif op == _COLOR:
            other = _grey(source + at // 3 * 3, inside)
        elif op == _CONTRAST:
            other = tl.zeros_like(value) + mean
        elif op == _CUTOUT:
            other = _cut_out(at, value, exact, numbers, H, W)
        elif op == _INVERT:
            other = 255 - value
        elif op == _POSTERIZE:
            other = value & (255 << (7 - (7.999 * exact).to(tl.int32)))
        elif op == _SOLARIZE:
            other = tl.where(value >= (255.999 * exact).to(tl.int32), 255 - value, value)
        a = tl.where(enhanced, other, value).to(tl.float32)
        b = tl.where(enhanced, value, other).to(tl.float32)
        mixed = tl.minimum(tl.maximum(a + weight * (b - a), 0.0), 255.0)
        tl.store(to + at, mixed.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit
def _augment_kernel(
    images,  # (M, H, W, 3)
    image,  # (V,)
    shift,  # (V, 2)
    flip,  # (V,)
    ops,  # (V, 2)
    parameters,  # (V, 2, 6)
    views,  # (V, H, W, 3)
    work,  # (V, 2, H, W, 3)
    tables,  # (V, TABLE)
    H: tl.constexpr,
    W: tl.constexpr,
    TABLE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = H * W * 3
    # Row offsets in int64: 2 ** 31 bytes are only 77 672 images of 96 x 96.
    v = tl.program_id(0).to(tl.int64)
    ops += 2 * v
    parameters += 12 * v
    table = tables + v * TABLE
    out = views + v * SIZE
    current = work + v * (2 * SIZE)
    spare = current + SIZE

    second_stays = _stays(tl.load(ops + 1), parameters + 6)
    if _stays(tl.load(ops), parameters) & second_stays:
        current = out
    source = images + tl.load(image + v) * SIZE
    mirrored = tl.load(flip + v) != 0
    _weak(source, current, tl.load(shift + 2 * v), tl.load(shift + 2 * v + 1), mirrored, H, W, BLOCK)
    for stage in range(2):
        op = tl.load(ops + stage)
        numbers = parameters + 6 * stage
        if not _stays(op, numbers):
            last = (stage == 1) | second_stays
            to = tl.where(last, out, spare)
            middle = tl.where(last, spare, out)
            # What was written is read by other threads of the program; what was read may be written again.
            tl.debug_barrier()
            if op == _AFFINE:
                _geometric(current, to, numbers, H, W, BLOCK)
            elif op == _RESCALE:
                _rescale(current, to, middle, table, numbers, H, W, LINES, BLOCK)
            else:
                _photometric(current, to, table, op, numbers, H, W, BLOCK)
            spare = current
            current = to


def augment_parameters(height: int, width: int) -> dict[str, Any]:
    """Choose the compile-time sizes and the number of warps for images of `height` x `width`."""
    small = height * width <= 48 * 48
    return {
        "H": height,
        "W": width,
        # Three curves, or two sets of resampling coefficients.
        "TABLE": max(3 * 256, 7 * (height + width)),
        "LINES": max(triton.next_power_of_2(max(height, width)), 16),
        "BLOCK": 1024 if small else 2048,
        "num_warps": 4 if small else 8,
        # The time goes into waiting for loads, so programs had better be there all at once: with 80 registers six of
        # 32 x 32 share a multiprocessor, 792 an H200, and a step has 704. Fewer would spill.
        "maxnreg": 80,
    }


def launch_augment_views(
    images: torch.Tensor,
    image: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor,
    ops: torch.Tensor,
    parameters: torch.Tensor,
) -> torch.Tensor:
    """Launch the Triton kernel; arguments and result as for `augment_views`, unchecked."""
    rows, (height, width) = image.shape[0], images.shape[1:3]
    sizes = augment_parameters(height, width)
    views = images.new_empty((rows, height, width, 3))
    work = images.new_empty((rows, 2, height, width, 3))
    tables = images.new_empty((rows, sizes["TABLE"]), dtype=torch.int32)
    _augment_kernel[(rows,)](
        images,
        image,
        shift,
        flip,
        ops,
        parameters,
        views,
        work,
        tables,
        **sizes,
        # PIL rounds a product before it adds, then truncates: a fused operation would be a level off here and there.
        enable_fp_fusion=False,
    )
    return views


def _empty_views(
    images: torch.Tensor,
    image: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor,
    ops: torch.Tensor,
    parameters: torch.Tensor,
) -> torch.Tensor:
    return images.new_empty((image.shape[0], *images.shape[1:]))


# see kernels/assemble.py; here the twin goes by the values of `ops`, which a compiler does not have
torch.library.define("remixmatch::augment_views", torch.library.infer_schema(launch_augment_views, mutates_args=()))
torch.library.impl("remixmatch::augment_views", "cuda", launch_augment_views)
torch.library.impl("remixmatch::augment_views", "cpu", augment_views_reference)
torch.library.register_fake("remixmatch::augment_views", _empty_views)
