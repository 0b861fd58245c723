"""Make CTAugment views in one launch: weak augmentation and two transformations, one program per view.

ReMixMatch (arXiv 1911.09785), section 3.2.2, and section 4 for the weak augmentation. Pixel values, borders and
rounding follow PIL; `kernels/photometric.py` is the reference implementation. Intermediate images are kept in global
memory, where every thread of a program can read any pixel. They take a few kilobytes and stay in L1 and L2.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.photometric import PHOTOMETRIC, OpLevels, apply

# The operations in the order of their codes in `ops`. The identity is the affine map with the identity matrix.
OPS = (*PHOTOMETRIC, "affine")
CODES = {name: code for code, name in enumerate(OPS)}
MAX_SIDE = 256  # Up to this side, coefficients of affine maps are exact in single precision.

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
# Bit sets of operations: those used as blend(image, result, v), and those used as blend(result, image, 0.1 + 1.9 v) as
# in PIL's ImageEnhance.
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
    """Make views of images: a weak augmentation (paper, section 4), then two transformations (section 3.2.2).

    The weak augmentation shifts the image by `shift` = (dy, dx), where positive values are down and right, and fills
    the gap by reflection as in `numpy.pad(mode="reflect")`. It then mirrors the image if `flip` is 1. The operations
    are applied from left to right. There is no host synchronization, so a GPU does not check values.

    Args:
        images: (M, H, W, 3) uint8 contiguous, H and W from 1 to 256.
        image: (V,) int64 contiguous, indices into `images` (0..M-1), V >= 1. Indices outside -M..M-1 raise IndexError
            on a CPU.
        shift: (V, 2) int32 contiguous, in pixels, less than the side in magnitude. A CPU checks the range.
        flip: (V,) int32 contiguous, 0 or 1.
        ops: (V, 2) int32 contiguous, indices into `OPS`. A CPU checks the range; a GPU leaves the image unchanged for
            other values.
        parameters: (V, 2, 6) float32 contiguous. For photometric operations: unused, level, second level, center of
            cutout (y, x), unused; all in [0, 1). For "affine": PIL's AFFINE coefficients (a, b, c, d, e, f). Output
            pixel (x, y) is the input pixel that contains (a (x + 1/2) + b (y + 1/2) + c, d (x + 1/2) + e (y + 1/2) +
            f), or black if that is outside the image. a, b, d and e are multiples of 2^-16.

    Returns:
        views: (V, H, W, 3) uint8.

    Raises:
        ValueError: A shape, dtype, layout, device, shift or operation differs from the above.
    """
    if images.dim() != 4 or images.shape[3] != 3 or images.numel() == 0:
        raise ValueError(f"images must be (M, H, W, 3) and not empty, got {tuple(images.shape)}")
    if max(images.shape[1:3]) > MAX_SIDE:
        raise ValueError(f"images must be at most {MAX_SIDE} x {MAX_SIDE} pixels, got {tuple(images.shape[1:3])}")
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
            raise ValueError(f"{name} must be on {images.device} like images, got {tensor.device}")
    return torch.ops.remixmatch.augment_views(images, image, shift, flip, ops, parameters)


def augment_views_reference(
    images: torch.Tensor,
    image: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor,
    ops: torch.Tensor,
    parameters: torch.Tensor,
) -> torch.Tensor:
    """Compute `augment_views` in plain PyTorch on any device, as its reference implementation."""
    sides = images.shape[1:3]
    if bool((shift.abs() >= shift.new_tensor(sides)).any()):
        raise ValueError(f"shifts must be smaller than the image {tuple(sides)}, got up to {int(shift.abs().max())}")
    if bool(((ops < 0) | (ops >= len(OPS))).any()):
        raise ValueError(f"ops must be from 0 to {len(OPS) - 1}, got {int(ops.min())} to {int(ops.max())}")
    views = weak_views(images, image, shift, flip)
    for stage in range(2):
        for code in ops[:, stage].unique().tolist():
            rows = (ops[:, stage] == code).nonzero()[:, 0]
            values = parameters[rows, stage]
            if OPS[code] == "affine":
                views[rows] = _affine(views[rows], values)
            else:
                levels = OpLevels(values[:, 1].view(-1, 1, 1, 1), values[:, 2], values[:, 3:5])
                views[rows] = apply(OPS[code], views[rows], levels)
    return views


def weak_views(images: torch.Tensor, image: torch.Tensor, shift: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Shift images with reflection and mirror them: the weak augmentation of `augment_views` in plain PyTorch.

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
    """Apply affine maps (n, 6) to images (n, H, W, 3) uint8 by nearest neighbor."""
    height, width = images.shape[1:3]
    y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
    x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    a, b, c, d, e, f = coefficients.double()[:, :, None, None].unbind(1)
    # The factors have few bits, so the sums are exact in double precision in any order.
    column, row = (a * x + b * y + c).floor_().long(), (d * x + e * y + f).floor_().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    n = torch.arange(len(images), device=images.device)[:, None, None]
    return images[n, row.clamp(0, height - 1), column.clamp(0, width - 1)] * inside[..., None]


# ---------------------------------------------------------------- the kernel
# An image is a flat array of H * W * 3 elements, indexed by `at`. All branch conditions are scalars, the same for all
# threads of a program, so branches do not diverge and may contain barriers.


@triton.jit
def _coordinates(at, W: tl.constexpr):
    """Return row, column and channel of elements."""
    pixel = at // 3
    return pixel // W, pixel % W, at % 3


@triton.jit
def _reflect(index, LENGTH: tl.constexpr):
    return LENGTH - 1 - tl.abs(LENGTH - 1 - tl.abs(index))


@triton.jit
def _weak_view(source, to, down, right, mirrored, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, H * W * 3, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W * 3
        y, x, channel = _coordinates(at, W)
        y = _reflect(y - down, H)
        x = _reflect(tl.where(mirrored, W - 1 - x, x) - right, W)
        tl.store(to + at, tl.load(source + (y * W + x) * 3 + channel, mask=inside), mask=inside)


@triton.jit
def _is_identity(op, parameters):
    """Return whether the operation is the identity map."""
    column = (tl.load(parameters) == 1.0) & (tl.load(parameters + 1) == 0.0) & (tl.load(parameters + 2) == 0.0)
    row = (tl.load(parameters + 3) == 0.0) & (tl.load(parameters + 4) == 1.0) & (tl.load(parameters + 5) == 0.0)
    return (op == _AFFINE) & column & row


@triton.jit
def _fixed_point(coefficient):
    # In units of 2^-17, a, b, d, e and half of them are integers. c and f may not be, but rounding them down does not
    # change the floor of a position.
    return tl.floor(tl.load(coefficient) * 131072.0).to(tl.int32)


@triton.jit
def _geometric(source, to, parameters, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    # Integers give PIL's fixed-point positions regardless of how the compiler orders the sum.
    a, b, c = _fixed_point(parameters) >> 1, _fixed_point(parameters + 1) >> 1, _fixed_point(parameters + 2)
    d, e, f = _fixed_point(parameters + 3) >> 1, _fixed_point(parameters + 4) >> 1, _fixed_point(parameters + 5)
    for start in range(0, H * W * 3, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W * 3
        y, x, channel = _coordinates(at, W)
        column = (a * (2 * x + 1) + b * (2 * y + 1) + c) >> 17
        row = (d * (2 * x + 1) + e * (2 * y + 1) + f) >> 17
        visible = inside & (column >= 0) & (column < W) & (row >= 0) & (row < H)
        tl.store(to + at, tl.load(source + (row * W + column) * 3 + channel, mask=visible, other=0), mask=inside)


@triton.jit
def _sin_pi(x):
    """Return sin(pi x) in double precision to 1e-11. The library function spills registers."""
    nearest = tl.floor(x + 0.5)
    x -= nearest
    s = x * x
    # Taylor series with coefficients pi^k / k!.
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
def _filter_weight(distance, filter_index):
    """Return the filter's weight at `distance`, inside its support. `kernels/photometric.py` has the same indices."""
    x = tl.abs(distance)
    weight = tl.full(x.shape, 1.0, tl.float64)
    divisor = tl.full(x.shape, 1.0, tl.float64)
    if filter_index == 2:
        weight = 1.0 - x
    elif filter_index == 3:
        weight = _sin_pi(x) * (0.54 + 0.46 * _sin_pi(x + 0.5))
        divisor = 3.141592653589793 * x
    elif filter_index == 4:
        weight = tl.where(x < 1.0, (1.5 * x - 2.5) * x * x + 1.0, ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0)
    elif filter_index == 5:
        weight = _sin_pi(x) * _sin_pi(x * 0.3333333333333333)
        divisor = 3.289868133696453 * x * x
    return tl.where(x == 0.0, 1.0, weight / tl.where(x == 0.0, 1.0, divisor))


@triton.jit
def _resampling_weights(table, level, filter_index, taps, LENGTH: tl.constexpr, LINES: tl.constexpr):
    """Write PIL's resampling weights along one side: 6 x LENGTH in units of 2^-22, then LENGTH first pixels."""
    tap = tl.arange(0, 8)[:, None]
    line = tl.arange(0, LINES)[None, :]
    # PIL stores the box and its size in single precision.
    margin = 0.25 * level * LENGTH
    begin = margin.to(tl.float32)
    end = (LENGTH - margin).to(tl.float32)
    center = begin.to(tl.float64) + (line.to(tl.float64) + 0.5) * ((end - begin).to(tl.float64) / LENGTH)
    first = tl.floor(center - 0.5 * taps.to(tl.float64) + 0.5).to(tl.int32)
    place = first + tap
    # The filter is cut off at the image border and renormalized.
    inside = (tap < taps) & (place >= 0) & (place < LENGTH)
    weight = tl.where(inside, _filter_weight(place.to(tl.float64) + 0.5 - center, filter_index), 0.0)
    scale = 4194304.0 / tl.where(line < LENGTH, tl.sum(weight, axis=0)[None, :], 1.0)
    units = tl.floor(weight * scale + 0.5).to(tl.int32)
    tl.store(table + tap * LENGTH + line, tl.where(tap == 6, first, units), mask=(tap < 7) & (line < LENGTH))


@triton.jit
def _resample(
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
    """Resample along the axis that has LENGTH pixels at a distance of STRIDE elements."""
    for start in range(0, H * W * 3, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W * 3
        line = at // STRIDE % LENGTH
        first = tl.load(table + 6 * LENGTH + line)
        # As in PIL, the sum fits in 32 bits: the absolute weights sum to less than 2.
        total = tl.full([BLOCK], 1 << 21, tl.int32)
        k = 0
        while k < taps:
            # Pixels outside the image have weight 0.
            place = tl.minimum(tl.maximum(first + k, 0), LENGTH - 1)
            weight = tl.load(table + k * LENGTH + line)
            total += weight * tl.load(source + at + (place - line) * STRIDE, mask=inside, other=0).to(tl.int32)
            k += 1
        tl.store(to + at, tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.uint8), mask=inside)


@triton.jit
def _rescale(
    source, to, middle, table, parameters, H: tl.constexpr, W: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr
):
    level = tl.load(parameters + 1).to(tl.float64)
    filter_index = (6.0 * tl.load(parameters + 2).to(tl.float64)).to(tl.int32)
    # Twice the filter's support. NEAREST and BOX take the one pixel that contains the position.
    taps = tl.where(filter_index < 2, 1, tl.where(filter_index < 4, 2, tl.where(filter_index == 4, 4, 6)))
    _resampling_weights(table, level, filter_index, taps, W, LINES)
    down = table
    if H != W:
        down = table + 7 * W
        _resampling_weights(down, level, filter_index, taps, H, LINES)
    tl.debug_barrier()
    _resample(source, middle, table, taps, H, W, BLOCK // 2, W, 3)
    tl.debug_barrier()
    _resample(middle, to, down, taps, H, W, BLOCK // 2, H, 3 * W)


@triton.jit
def _curves(source, table, op, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the curve of autocontrast or equalize: 256 values per channel."""
    value = tl.arange(0, 256)
    for channel in range(3):
        count = tl.zeros([256], tl.int32)
        for start in range(0, PIXELS, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < PIXELS
            values = tl.load(source + 3 * pixel + channel, mask=inside, other=0).to(tl.int32)
            count += tl.histogram(values, 256, mask=inside)
        brightest = tl.max(tl.where(count > 0, value, 0), axis=0)
        if op == _EQUALIZE:
            of_brightest = tl.sum(tl.where(value == brightest, count, 0), axis=0)
            step = (PIXELS - of_brightest) // 255
            below = tl.cumsum(count, axis=0) - count
            curve = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
            # PIL leaves a channel unchanged if fewer than 255 of its pixels are below the brightest value.
            curve = tl.where(step > 0, curve, value)
        else:
            darkest = tl.min(tl.where(count > 0, value, 255), axis=0)
            # The same double-precision operations as in PIL, which truncates: a product can be just below an integer.
            scale = 255.0 / tl.maximum(brightest - darkest, 1).to(tl.float64)
            stretched = (value.to(tl.float64) * scale + -darkest.to(tl.float64) * scale).to(tl.int32)
            curve = tl.where(brightest > darkest, tl.minimum(tl.maximum(stretched, 0), 255), value)
        tl.store(table + 256 * channel + value, curve)


@triton.jit
def _gray(pixel, inside):
    """Return PIL's mode L of the pixels at these addresses."""
    red = tl.load(pixel, mask=inside, other=0).to(tl.int32)
    green = tl.load(pixel + 1, mask=inside, other=0).to(tl.int32)
    blue = tl.load(pixel + 2, mask=inside, other=0).to(tl.int32)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


@triton.jit
def _mean_gray(source, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    total = 0
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        inside = pixel < PIXELS
        total += tl.sum(tl.where(inside, _gray(source + 3 * pixel, inside), 0), axis=0)
    return (2 * total + PIXELS) // (2 * PIXELS)


@triton.jit
def _add_neighbors(source, at, inside, total, BORDER: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Add the pixels of a square of side 1 + 2 BORDER to `total`: all of 3x3, the outer ring of 5x5.

    Returns:
        The sum, and whether the square is inside the image. Outside, the sum is meaningless.
    """
    y, x, _ = _coordinates(at, W)
    interior = inside & (y >= BORDER) & (y < H - BORDER) & (x >= BORDER) & (x < W - BORDER)
    SIDE: tl.constexpr = 1 + 2 * BORDER
    for k in tl.static_range(SIDE * SIDE):
        if k // SIDE % (SIDE - 1) == 0 or k % SIDE % (SIDE - 1) == 0 or BORDER == 1:
            neighbor = source + at + (k // SIDE - BORDER) * (3 * W) + (k % SIDE - BORDER) * 3
            total += tl.load(neighbor, mask=interior, other=0).to(tl.int32)
    return total, interior


@triton.jit
def _blur(source, at, inside, value, H: tl.constexpr, W: tl.constexpr):
    total, interior = _add_neighbors(source, at, inside, tl.zeros_like(value), 2, H, W)
    return tl.where(interior, (total + 8) >> 4, value)


@triton.jit
def _smooth(source, at, inside, value, H: tl.constexpr, W: tl.constexpr):
    total, interior = _add_neighbors(source, at, inside, 4 * value, 1, H, W)
    # Divide by 13 and round to nearest. There are no ties.
    return tl.where(interior, (2 * total + 13) // 26, value)


@triton.jit
def _cutout(at, value, level, parameters, H: tl.constexpr, W: tl.constexpr):
    SHORT: tl.constexpr = H if H < W else W
    side = 1 + ((0.499 * SHORT) * level).to(tl.int32)
    top = (tl.load(parameters + 3).to(tl.float64) * H).to(tl.int32) - side // 2
    left = (tl.load(parameters + 4).to(tl.float64) * W).to(tl.int32) - side // 2
    y, x, _ = _coordinates(at, W)
    return tl.where((y >= top) & (y < top + side) & (x >= left) & (x < left + side), 127, value)


@triton.jit
def _photometric(source, to, table, op, parameters, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """Apply one photometric operation other than rescale. Each is a blend of the image with another image."""
    # Passes with many live values use half a block, to need no more registers than the other passes.
    if (op == _AUTOCONTRAST) | (op == _EQUALIZE):
        _curves(source, table, op, H * W, BLOCK // 2)
        tl.debug_barrier()
    mean = 0
    if op == _CONTRAST:
        mean = _mean_gray(source, H * W, BLOCK // 2)

    level = tl.load(parameters + 1)
    level_64 = level.to(tl.float64)
    enhanced = ((_ENHANCED_OPS >> op) & 1) != 0
    blended = ((_BLENDED_OPS >> op) & 1) != 0
    # Operations that replace the image use weight 1, for which the blend is exact in single precision.
    weight = tl.where(enhanced, (0.1 + 1.9 * level_64).to(tl.float32), tl.where(blended, level, 1.0))

    for start in range(0, H * W * 3, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W * 3
        value = tl.load(source + at, mask=inside, other=0).to(tl.int32)
        other = value
        if (op == _AUTOCONTRAST) | (op == _EQUALIZE):
            other = tl.load(table + 256 * (at % 3) + value, mask=inside, other=0)
        elif op == _BLUR:
            other = _blur(source, at, inside, value, H, W)
        elif (op == _SMOOTH) | (op == _SHARPNESS):
            other = _smooth(source, at, inside, value, H, W)
        elif op == _BRIGHTNESS:
            other = tl.zeros_like(value)
        elif op == _COLOR:
            other = _gray(source + at // 3 * 3, inside)
        elif op == _CONTRAST:
            other = tl.zeros_like(value) + mean
        elif op == _CUTOUT:
            other = _cutout(at, value, level_64, parameters, H, W)
        elif op == _INVERT:
            other = 255 - value
        elif op == _POSTERIZE:
            other = value & (255 << (7 - (7.999 * level_64).to(tl.int32)))
        elif op == _SOLARIZE:
            other = tl.where(value >= (255.999 * level_64).to(tl.int32), 255 - value, value)
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
    # Offsets are int64: 2 ** 31 bytes hold only 77 672 images of 96 x 96.
    v = tl.program_id(0).to(tl.int64)
    ops += 2 * v
    parameters += 12 * v
    table = tables + v * TABLE
    out = views + v * SIZE
    current = work + v * (2 * SIZE)
    spare = current + SIZE

    second_is_identity = _is_identity(tl.load(ops + 1), parameters + 6)
    if _is_identity(tl.load(ops), parameters) & second_is_identity:
        current = out
    source = images + tl.load(image + v) * SIZE
    mirrored = tl.load(flip + v) != 0
    _weak_view(source, current, tl.load(shift + 2 * v), tl.load(shift + 2 * v + 1), mirrored, H, W, BLOCK)
    for stage in range(2):
        op = tl.load(ops + stage)
        stage_parameters = parameters + 6 * stage
        if not _is_identity(op, stage_parameters):
            last = (stage == 1) | second_is_identity
            to = tl.where(last, out, spare)
            middle = tl.where(last, spare, out)
            # Other threads of the program read what was written, and may overwrite what was read.
            tl.debug_barrier()
            if op == _AFFINE:
                _geometric(current, to, stage_parameters, H, W, BLOCK)
            elif op == _RESCALE:
                _rescale(current, to, middle, table, stage_parameters, H, W, LINES, BLOCK)
            else:
                _photometric(current, to, table, op, stage_parameters, H, W, BLOCK)
            spare = current
            current = to


def launch_config(height: int, width: int) -> dict[str, Any]:
    """Return the compile-time sizes and the number of warps for images of `height` x `width`."""
    small = height * width <= 48 * 48
    return {
        "H": height,
        "W": width,
        # Three curves, or resampling weights for two sides.
        "TABLE": max(3 * 256, 7 * (height + width)),
        "LINES": max(triton.next_power_of_2(max(height, width)), 16),
        "BLOCK": 1024 if small else 2048,
        "num_warps": 4 if small else 8,
        # The kernel mostly waits for loads, so all programs of a step should be resident at once. With 80 registers,
        # six programs for 32 x 32 share a multiprocessor: 792 on an H200, for the 704 views of a step. With fewer
        # registers, the kernel spills.
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
    """Launch the Triton kernel. Like `augment_views`, without checking the arguments."""
    count, (height, width) = image.shape[0], images.shape[1:3]
    config = launch_config(height, width)
    views = images.new_empty((count, height, width, 3))
    work = images.new_empty((count, 2, height, width, 3))
    tables = images.new_empty((count, config["TABLE"]), dtype=torch.int32)
    _augment_kernel[(count,)](
        images,
        image,
        shift,
        flip,
        ops,
        parameters,
        views,
        work,
        tables,
        **config,
        # PIL rounds products before it adds, then truncates. Fused operations would be off by one level here and there.
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


# See kernels/assemble.py. In addition, the reference depends on the values of `ops`, which a compiler does not have.
torch.library.define("remixmatch::augment_views", torch.library.infer_schema(launch_augment_views, mutates_args=()))
torch.library.impl("remixmatch::augment_views", "cuda", launch_augment_views)
torch.library.impl("remixmatch::augment_views", "cpu", augment_views_reference)
torch.library.register_fake("remixmatch::augment_views", _empty_views)
