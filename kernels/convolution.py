"""Triton kernels of `norm_act_conv`: direct convolutions that read each activation once from memory.

A program computes BLOCK_M consecutive positions of (sample, column) in one row of the images, then in the next row, and
so on. A row of the input is loaded and activated once per program and column offset, and contributes to three rows of
the result, which are kept in registers: `_rows_kernel`. The overlapping loads of the column offsets hit the L1 cache.
Convolutions with a stride of 2 or 1x1 weights reuse less and use `_taps_kernel`, which loads the input once per tap.

Channels are powers of two and at least 16. Offsets are 32-bit integers. Padding is (taps - 1) / 2 zeros after the
activation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOPE = 0.1  # Of the leaky ReLU.

_SLOPE = tl.constexpr(SLOPE)
_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LARGEST = 2**31  # Elements.
_MULTIPROCESSORS = 132  # Of a large GPU; others run the same tilings.
_PROGRAMS = 128  # Of a weight gradient: about one per multiprocessor, since each writes its own sums.


class Shape(NamedTuple):
    """Shape of a convolution: (samples, inputs, height, width) to `outputs` channels with taps x taps weights."""

    samples: int
    inputs: int
    height: int
    width: int
    outputs: int
    taps: int
    stride: int


def tilings(shape: Shape, which: str, capability: int | None = None) -> list[tuple[int, ...]]:
    """Return the tilings to choose from for one kernel, the one to use without measurements first.

    Compiled ahead of time, none of them spills registers.

    Args:
        shape: Shape of the convolution.
        which: "forward", "input_grad" or "weight_grad".
        capability: Compute capability of the GPU, such as 90; None for that of the current one.

    Returns:
        Tilings for the operators of `kernels.norm_act_conv`; empty if the kernel does not support the shape.
        "forward", "input_grad": (BLOCK_M, ROWS, BLOCK_O, BLOCK_C, warps, stages). The first two divide the result into
        tiles of equally many pixels; BLOCK_O and BLOCK_C are numbers of channels of the result and of the input.
        "weight_grad": (SPLITS, BLOCK_M, ROWS, BLOCK_O, BLOCK_C, STACK, warps, stages).
    """
    samples, inputs, height, width, outputs, taps, stride = shape
    largest = samples * height * width * max(inputs, outputs)
    channels_fit = all(count >= 16 and count & (count - 1) == 0 for count in (inputs, outputs))
    if not channels_fit or taps not in (1, 3) or height % stride or width % stride or largest >= _LARGEST:
        return []
    # Matrix instructions of a warp group read an operand from shared memory. Those of a warp need more registers, and
    # warps divide only the rows of a tile, 16 at least.
    capability = _capability() if capability is None else capability
    wide = 90 <= capability < 120
    # Rows and positions that the tiles divide: those of the result, or of y for a gradient with stride 2.
    height, positions = height // stride, samples * (width // stride)
    if which == "weight_grad":
        return _weight_grad_tilings(shape, height, positions, wide, capability)
    parities = 1
    if which == "input_grad":
        if taps == 1 and stride == 2:
            return []  # Three quarters of the gradient are zeros.
        inputs, outputs, parities = outputs, inputs, stride**2
    if outputs <= 32 and inputs <= 32:
        choices = [(64, outputs, inputs, 4, 1), (64, outputs, inputs, 4, 2)]
        choices += [(128, 32, 32, 8, 1)] if outputs == inputs == 32 else []
    elif not wide:
        # With stride 2 and 128 positions, the kernel that corrects the gradient of y spills.
        small = which == "input_grad" and stride == 2
        choices = [(64 if small else 128, min(outputs, 32), min(inputs, 32), 4 if small else 8, 1)]
    elif inputs <= 64 and which == "input_grad":
        choices = [(128, min(outputs, 64), inputs, 8, 1), (64, min(outputs, 32), inputs, 4, 1)]
        if stride == 2:
            choices.reverse()  # With fewer registers, twice as many warps run at the same time.
    elif inputs <= 64:
        block_o = min(outputs, 64)
        choices = [(64, block_o, inputs, 8, 1)]
        if stride == 1 or capability < 100:  # It spills on later ones.
            choices += [(64, block_o, inputs, 8, 2)]
        # With 64 positions, the warps of a chain of sums compute some of them twice.
        choices.insert(0 if stride == 1 else 1, (128, block_o, inputs, 8, 1))
    else:
        choices = [(128, min(outputs, 64), 64 if inputs <= 128 else 32, 8, 1)]
    found: list[tuple[int, ...]] = []
    for block_m, block_o, block_c, warps, stages in choices:
        if positions % block_m == 0:
            rows = _rows(height, positions // block_m * (outputs // block_o) * parities, warps)
            found.append((block_m, rows, block_o, block_c, warps, stages))
    return found


def _weight_grad_tilings(
    shape: Shape, height: int, positions: int, wide: bool, capability: int
) -> list[tuple[int, ...]]:
    """Return tilings for the weight gradient.

    Each program writes its own sums. Small blocks of channels need fewer splits to occupy the GPU, so that fewer sums
    are written, but the activations are read more often, mostly from L2.
    """
    narrow, broad = 16, min(shape.inputs, 32 if wide else 16)
    block_o = min(shape.outputs, 64 if wide else 32)
    if shape.taps == 1:
        choices = [(64, broad, 1, 2, 1), (64, broad, 1, 2, 2)]
    elif shape.stride == 1 and block_o <= 32:
        choices = [(64, narrow, 4, 4, 1), (64, narrow, 4, 4, 2)]
        choices += [(128, broad, 4, 8, 1), (128, broad, 4, 8, 2)] if shape.inputs > 16 else []
    elif not wide:
        choices = [(64, narrow, 1, 2, 1)]
    else:
        choices = [(64, narrow, 1, 8, 1)] if capability < 100 else []  # It spills on later ones.
        choices += [(64, broad, 1, 8, 1), (64, broad, 1, 8, 2)]
    found: list[tuple[int, ...]] = []
    for block_m, block_c, stack, warps, stages in dict.fromkeys(choices):
        if positions % block_m == 0:
            blocks = shape.outputs // block_o * (shape.inputs // block_c)
            columns = positions // block_m
            # The most rows that leave a tile for every program.
            rows = max(
                rows
                for rows in range(1, height + 1)
                if height % rows == 0 and (rows == 1 or columns * blocks * (height // rows) >= 4 * _PROGRAMS)
            )
            splits = min(columns * (height // rows), max(_PROGRAMS // blocks, 1))
            found.append((splits, block_m, rows, block_o, block_c, stack, warps, stages))
    # Twice the programs hide more latency, and write twice the sums.
    return [*found[:1], *((2 * splits, *others) for splits, *others in found[:1]), *found[1:]]


def _capability() -> int:
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _rows(height: int, parallel: int, warps: int) -> int:
    """Return the rows of a tile, a divisor of the height, with which a large GPU takes the fewest steps.

    A program also loads the rows above and below its tile, so large tiles do less work in total. But the last wave, the
    programs that the GPU runs at once, should be full.

    Args:
        height: Rows of the result.
        parallel: Number of programs per row of tiles.
        warps: Warps of a program. Registers limit a multiprocessor to about 12.
    """
    at_once = _MULTIPROCESSORS * max(12 // warps, 1)
    divisors = [rows for rows in range(height, 0, -1) if height % rows == 0]
    return min(divisors, key=lambda rows: -(-parallel * (height // rows) // at_once) * (rows + 2))


@triton.jit
def _scale_and_shift(mean, rstd, gamma, beta, channels):
    """Return batch norm as scale and shift: (1, BLOCK) each."""
    scale = tl.load(gamma + channels) * tl.load(rstd + channels)
    return scale[None, :], (tl.load(beta + channels) - tl.load(mean + channels) * scale)[None, :]


@triton.jit
def _parameters(
    weight,
    mean,
    rstd,
    gamma,
    beta,
    c,
    o,
    TAPS: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Return pointers to the weights of the first of TAPS taps, (BLOCK_C, BLOCK_O), and batch norm's scale and shift.

    Batch norm is that of the input in a forward pass, and that of the result in a backward pass.
    """
    if BACKWARD:
        weights = weight + c[:, None] * (TAPS * C_OUT) + o[None, :]
        scale, shift = _scale_and_shift(mean, rstd, gamma, beta, o)
    else:
        weights = weight + o[None, :] * (TAPS * C_IN) + c[:, None]
        scale, shift = _scale_and_shift(mean, rstd, gamma, beta, c)
    return weights, scale, shift


@triton.jit
def _load(at, inside, scale, shift, ACTIVATE: tl.constexpr, DOT: tl.constexpr):
    """Load an operand of a dot product, activated: zero outside of the image."""
    value = tl.load(at, mask=inside, other=0.0)
    if ACTIVATE:
        # Two products instead of a selection, which would be done on unpacked 16-bit values.
        one = inside.to(tl.float32)
        normalized = value.to(tl.float32) * scale + shift
        value = tl.maximum(normalized * one, normalized * (one * _SLOPE)).to(at.dtype.element_ty)
    return value.to(DOT)


@triton.jit
def _correction(factor, offset, channels):
    """Return the coefficients of y and of one in the gradient of y through its moments: (1, BLOCK) each."""
    return tl.load(factor + channels)[None, :], tl.load(offset + channels)[None, :]


@triton.jit
def _load_corrected(grad, y, total, at, inside, factor, offset, stored, STORE: tl.constexpr, DOT: tl.constexpr):
    """Load a gradient of y and add the one through its moments: zero outside of the image. Store the sum if `stored`.

    A product with `inside` instead of a selection; see `_load`.
    """
    direct = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) * factor + direct + offset * inside.to(tl.float32)
    value = value.to(total.dtype.element_ty)
    if STORE and stored:
        tl.store(total + at, value, mask=inside)
    return value.to(DOT)


@triton.jit
def _weight(kept, at, tap: tl.constexpr, TAP: tl.constexpr, KEPT: tl.constexpr, DOT: tl.constexpr):
    """Return the weights of a tap, which are kept on chip if they fit."""
    if KEPT:
        return kept[tap]
    else:
        return tl.load(at + tap * TAP).to(DOT)


@triton.jit
def _store(acc, at, result, added, layer_input, mean, scale, shift, o, BACKWARD: tl.constexpr):
    """Store a row of the result, with `added` if it is not None, and return the two values per element that are summed.

    Forward they are y and its square. Backward they are the gradient g before the leaky ReLU and g * (x - mean), and
    the result is the gradient of x, with the mean and the standard deviation held fixed.
    """
    if BACKWARD:
        x = tl.load(layer_input + at).to(tl.float32)
        first = tl.where(x * scale + shift > 0, acc, acc * _SLOPE)
        second = first * (x - tl.load(mean + o)[None, :])
        value = first * scale
        if added is not None:
            value += tl.load(added + at).to(tl.float32)
    else:
        first = acc
        if added is not None:
            first += tl.load(added + at).to(tl.float32)
        second = first * first
        value = first
    tl.store(result + at, value.to(result.dtype.element_ty))
    return first, second


@triton.jit
def _store_sums(
    partial, tiles, tile, o, first, second, C_OUT: tl.constexpr, COUNT: tl.constexpr, BACKWARD: tl.constexpr
):
    """Store the two sums of a tile, forward as mean and sum of squared deviations."""
    if not BACKWARD:
        mean = first / COUNT
        second -= first * mean
        first = mean
    tl.store(partial + o * tiles + tile, first)
    tl.store(partial + (C_OUT + o) * tiles + tile, second)


@triton.jit
def _rows_kernel(
    x,  # (N, H, W, C_IN): the input, or the gradient of y
    mean,  # batch norm's parameters: forward of x, (C_IN,); backward of the result, (C_OUT,)
    rstd,
    gamma,
    beta,
    weight,  # (outputs, 3, 3, inputs) of the forward convolution
    added,  # (N, H, W, C_OUT), added to the result, or None
    layer_input,  # (N, H, W, C_OUT), only backward
    y,  # (N, H, W, C_IN) if the gradient of y is still to be corrected, only backward, or None
    factor,  # (C_IN,), see `_correction`
    offset,  # (C_IN,)
    total,  # (N, H, W, C_IN): the corrected gradient of y
    result,  # (N, H, W, C_OUT)
    partial,  # (2, C_OUT, T)
    tiles,  # T
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    BACKWARD: tl.constexpr,
    SUMS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LATE_SUMS: tl.constexpr,
):
    # A 3x3 convolution with stride 1. Row r of the input contributes to rows r - 1, r and r + 1 of the result; `above`,
    # `level` and `below` are their sums so far. Backward is the same with mirrored weights.
    tile = tl.program_id(0)
    m = tile // (H // ROWS) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_row = tile % (H // ROWS) * ROWS
    column = m % W
    pixel = (m // W * (H * W) + column)[:, None]
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    source = pixel * C_IN + c[None, :]
    inputs = x + source
    at = pixel * C_OUT + o[None, :]
    has_left, anywhere, has_right = (column > 0)[:, None], (column >= 0)[:, None], (column < W - 1)[:, None]
    weights, scale, shift = _parameters(weight, mean, rstd, gamma, beta, c, o, 9, C_IN, C_OUT, BACKWARD)
    if BACKWARD:
        weights += 8 * C_OUT  # The last tap first.
    TAP: tl.constexpr = -C_OUT if BACKWARD else C_IN  # Between the weights of two taps.
    CHUNK: tl.constexpr = BLOCK_C * (9 * C_OUT if BACKWARD else 1)  # Between those of two blocks of channels.
    if y is not None and BLOCK_C == C_IN:
        y_factor, y_offset = _correction(factor, offset, c)
    kept = ()
    if BLOCK_C == C_IN:
        for tap in tl.static_range(9):
            kept += (tl.load(weights + tap * TAP).to(DOT),)  # They stay in shared memory.

    above = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    level = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    first = tl.zeros([BLOCK_M, BLOCK_O] if LATE_SUMS else [BLOCK_O], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_O] if LATE_SUMS else [BLOCK_O], tl.float32)
    own = tl.program_id(1) == 0  # One program stores the corrected gradient.
    for r in range(tl.maximum(first_row - 1, 0), first_row + ROWS + 1):
        below = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
        in_image = r < H
        left, center, right = has_left & in_image, anywhere & in_image, has_right & in_image
        for block in range(C_IN // BLOCK_C):
            if BLOCK_C < C_IN and not BACKWARD:
                scale, shift = _scale_and_shift(mean, rstd, gamma, beta, block * BLOCK_C + c)
            if y is not None and BLOCK_C < C_IN:
                y_factor, y_offset = _correction(factor, offset, block * BLOCK_C + c)
            for kx in tl.static_range(3):
                inside = left if kx == 0 else (center if kx == 1 else right)
                distance = r * (W * C_IN) + (kx - 1) * C_IN + block * BLOCK_C
                if y is not None:
                    stored = own & (r >= first_row) & (r < first_row + ROWS)
                    read = source + distance
                    value = _load_corrected(x, y, total, read, inside, y_factor, y_offset, stored, kx == 1, DOT)
                else:
                    value = _load(inputs + distance, inside, scale, shift, not BACKWARD, DOT)
                at_block = weights + block * CHUNK
                above = tl.dot(value, _weight(kept, at_block, 6 + kx, TAP, BLOCK_C == C_IN, DOT), above)
                level = tl.dot(value, _weight(kept, at_block, 3 + kx, TAP, BLOCK_C == C_IN, DOT), level)
                below = tl.dot(value, _weight(kept, at_block, kx, TAP, BLOCK_C == C_IN, DOT), below)
        if r > first_row:
            to = at + (r - 1) * (W * C_OUT)
            sums = _store(above, to, result, added, layer_input, mean, scale, shift, o, BACKWARD)
            if SUMS:
                first += sums[0] if LATE_SUMS else tl.sum(sums[0], 0)
                second += sums[1] if LATE_SUMS else tl.sum(sums[1], 0)
        above = level
        level = below
    if SUMS:
        if LATE_SUMS:
            first = tl.sum(first, 0)
            second = tl.sum(second, 0)
        _store_sums(partial, tiles, tile, o, first, second, C_OUT, BLOCK_M * ROWS, BACKWARD)


@triton.jit
def _taps_kernel(
    x,  # (N, IN_H, IN_W, C_IN): the input, or the gradient of y
    mean,  # batch norm's parameters: forward of x, (C_IN,); backward of the result, (C_OUT,)
    rstd,
    gamma,
    beta,
    weight,  # (outputs, TAPS, TAPS, inputs) of the forward convolution
    added,  # (N, OUT_H, OUT_W, C_OUT), added to the result, or None
    layer_input,  # (N, OUT_H, OUT_W, C_OUT), only backward
    y,  # (N, IN_H, IN_W, C_IN) if the gradient of y is still to be corrected, only backward, or None
    factor,  # (C_IN,), see `_correction`
    offset,  # (C_IN,)
    total,  # (N, IN_H, IN_W, C_IN): the corrected gradient of y
    result,  # (N, OUT_H, OUT_W, C_OUT)
    partial,  # (2, C_OUT, T)
    tiles,  # T
    IN_H: tl.constexpr,
    IN_W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    BACKWARD: tl.constexpr,
    SUMS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Any convolution, tap by tap. Backward with stride 2, a pixel's taps depend on the parity of its row and column:
    # the third axis of the grid is that parity.
    H: tl.constexpr = IN_H if BACKWARD else IN_H // STRIDE  # Of the tiles: the smaller side.
    W: tl.constexpr = IN_W if BACKWARD else IN_W // STRIDE
    OUT: tl.constexpr = STRIDE if BACKWARD else 1  # Distance of a tile's pixels in the result, and in the input.
    IN: tl.constexpr = 1 if BACKWARD else STRIDE
    tile = tl.program_id(0)
    m = tile // (H // ROWS) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_row = tile % (H // ROWS) * ROWS
    column = m % W
    sample = m // W
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    row_parity = tl.program_id(2) // OUT
    column_parity = tl.program_id(2) % OUT
    at = ((sample * (H * OUT) + row_parity) * (W * OUT) + column * OUT + column_parity)[:, None] * C_OUT + o[None, :]
    weights, scale, shift = _parameters(weight, mean, rstd, gamma, beta, c, o, TAPS * TAPS, C_IN, C_OUT, BACKWARD)
    TAP: tl.constexpr = C_OUT if BACKWARD else C_IN  # Between the weights of two taps.
    CHUNK: tl.constexpr = BLOCK_C * (TAPS * TAPS * C_OUT if BACKWARD else 1)  # Between those of two blocks of channels.
    # Tap t of an axis has weight first + t * STEP and reads the input at offset + t * DIRECTION.
    SPARSE: tl.constexpr = BACKWARD and TAPS == 3 and STRIDE == 2
    STEP: tl.constexpr = 2 if SPARSE else 1
    DIRECTION: tl.constexpr = -1 if BACKWARD else 1
    if SPARSE:
        row_taps, row_first, row_offset = 1 + row_parity, 1 - row_parity, row_parity
        column_taps, column_first, column_offset = 1 + column_parity, 1 - column_parity, column_parity
    else:
        row_taps, row_first, row_offset = TAPS, 0, TAPS // 2 if BACKWARD else -(TAPS // 2)
        column_taps, column_first, column_offset = row_taps, row_first, row_offset
    # The programs of even rows and columns read each pixel once; of these, one stores the corrected gradient.
    own = (tl.program_id(1) == 0) & (tl.program_id(2) == 0)

    first = tl.zeros([BLOCK_O], tl.float32)
    second = tl.zeros([BLOCK_O], tl.float32)
    for row in range(first_row, first_row + ROWS):
        acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
        for ty in range(row_taps):
            in_row = tl.zeros_like(column) + (row * IN + row_offset + ty * DIRECTION)
            for tx in range(column_taps):
                in_column = column * IN + column_offset + tx * DIRECTION
                inside = ((in_column >= 0) & (in_column < IN_W) & (in_row >= 0) & (in_row < IN_H))[:, None]
                source = ((sample * IN_H + in_row) * IN_W + in_column)[:, None] * C_IN + c[None, :]
                tap = (row_first + ty * STEP) * TAPS + column_first + tx * STEP
                for block in range(C_IN // BLOCK_C):
                    if BLOCK_C < C_IN and not BACKWARD:
                        scale, shift = _scale_and_shift(mean, rstd, gamma, beta, block * BLOCK_C + c)
                    if y is not None:
                        y_factor, y_offset = _correction(factor, offset, block * BLOCK_C + c)
                        read = source + block * BLOCK_C
                        value = _load_corrected(x, y, total, read, inside, y_factor, y_offset, own, True, DOT)
                    else:
                        value = _load(x + source + block * BLOCK_C, inside, scale, shift, not BACKWARD, DOT)
                    acc = tl.dot(value, tl.load(weights + tap * TAP + block * CHUNK).to(DOT), acc)
        to = at + row * (OUT * W * OUT * C_OUT)
        sums = _store(acc, to, result, added, layer_input, mean, scale, shift, o, BACKWARD)
        if SUMS:
            first += tl.sum(sums[0], 0)
            second += tl.sum(sums[1], 0)
    if SUMS:
        tile = tile * (OUT * OUT) + tl.program_id(2)
        _store_sums(partial, tiles, tile, o, first, second, C_OUT, BLOCK_M * ROWS, BACKWARD)


@triton.jit
def _weight_grad_rows_kernel(
    grad,  # (N, H, W, C_OUT)
    x,  # (N, H, W, C_IN)
    mean,  # (C_IN,)
    rstd,  # (C_IN,)
    gamma,  # (C_IN,)
    beta,  # (C_IN,)
    partial,  # (SPLITS, C_OUT, 3, 3, C_IN)
    tiles,  # Number of tiles that are divided among the splits.
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    DOT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STACK: tl.constexpr,
):
    # A 3x3 convolution with stride 1. Row r of the input meets rows r + 1, r and r - 1 of the gradient. With STACK = 4
    # these are stacked along the channels (the fourth is empty), so that the matrix instructions have enough rows.
    GROUPS: tl.constexpr = 1 if STACK == 4 else 3
    split = tl.program_id(0)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    stacked = tl.arange(0, STACK * BLOCK_O)
    ky = stacked // BLOCK_O
    o = tl.program_id(1) * BLOCK_O + stacked % BLOCK_O
    scale, shift = _scale_and_shift(mean, rstd, gamma, beta, c)
    sums = ()
    for _ in tl.static_range(3 * GROUPS):
        sums += (tl.zeros([STACK * BLOCK_O, BLOCK_C], tl.float32),)
    for tile in range(split, tiles, SPLITS):
        m = tile // (H // ROWS) * BLOCK_M + tl.arange(0, BLOCK_M)
        first_row = tile % (H // ROWS) * ROWS
        column = m % W
        pixel = (m // W * (H * W) + column)[:, None]
        inputs = x + pixel * C_IN + c[None, :]
        grads = grad + pixel * C_OUT + (o - ky * (W * C_OUT))[None, :]
        left, anywhere, right = (column > 0)[:, None], (column >= 0)[:, None], (column < W - 1)[:, None]
        for r in range(tl.maximum(first_row - 1, 0), tl.minimum(first_row + ROWS + 1, H)):
            transposed = ()
            for group in tl.static_range(GROUPS):
                h = (r + 1 - group - ky)[None, :]
                in_tile = (h >= first_row) & (h < first_row + ROWS) & (ky < 3)[None, :]
                value = tl.load(grads + (r + 1 - group) * (W * C_OUT), mask=anywhere & in_tile, other=0.0)
                transposed += (tl.trans(value.to(DOT)),)
            updated = ()
            for kx in tl.static_range(3):
                inside = left if kx == 0 else (anywhere if kx == 1 else right)
                value = _load(inputs + (r * W + kx - 1) * C_IN, inside, scale, shift, True, DOT)
                for group in tl.static_range(GROUPS):
                    updated += (tl.dot(transposed[group], value, sums[kx * GROUPS + group]),)
            sums = updated
    for kx in tl.static_range(3):
        for group in tl.static_range(GROUPS):
            row = (split * C_OUT + o) * 9 + (group + ky) * 3 + kx
            tl.store(partial + row[:, None] * C_IN + c[None, :], sums[kx * GROUPS + group], mask=(ky < 3)[:, None])


@triton.jit
def _weight_grad_taps_kernel(
    grad,  # (N, H, W, C_OUT)
    x,  # (N, H * STRIDE, W * STRIDE, C_IN)
    mean,  # (C_IN,)
    rstd,  # (C_IN,)
    gamma,  # (C_IN,)
    beta,  # (C_IN,)
    partial,  # (SPLITS, C_OUT, TAPS, TAPS, C_IN)
    tiles,  # Number of tiles that are divided among the splits.
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DOT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Any convolution: a row of the gradient meets the input of every tap.
    PAD: tl.constexpr = TAPS // 2
    split = tl.program_id(0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale, shift = _scale_and_shift(mean, rstd, gamma, beta, c)
    sums = ()
    for _ in tl.static_range(TAPS * TAPS):
        sums += (tl.zeros([BLOCK_O, BLOCK_C], tl.float32),)
    for tile in range(split, tiles, SPLITS):
        m = tile // (H // ROWS) * BLOCK_M + tl.arange(0, BLOCK_M)
        first_row = tile % (H // ROWS) * ROWS
        column = m % W
        sample = m // W
        grads = grad + (sample * (H * W) + column)[:, None] * C_OUT + o[None, :]
        for row in range(first_row, first_row + ROWS):
            transposed = tl.trans(tl.load(grads + row * (W * C_OUT)).to(DOT))
            updated = ()
            for tap in tl.static_range(TAPS * TAPS):
                in_row = tl.zeros_like(column) + (row * STRIDE + tap // TAPS - PAD)
                in_column = column * STRIDE + tap % TAPS - PAD
                inside = ((in_column >= 0) & (in_column < W * STRIDE) & (in_row >= 0) & (in_row < H * STRIDE))[:, None]
                pixel = (sample * (H * STRIDE) + in_row) * (W * STRIDE) + in_column
                value = _load(x + pixel[:, None] * C_IN + c[None, :], inside, scale, shift, True, DOT)
                updated += (tl.dot(transposed, value, sums[tap]),)
            sums = updated
    for tap in tl.static_range(TAPS * TAPS):
        row = (split * C_OUT + o) * (TAPS * TAPS) + tap
        tl.store(partial + row[:, None] * C_IN + c[None, :], sums[tap])


def _tiles(shape: Sequence[int], tiling: Sequence[int]) -> int:
    """Return the number of tiles of a (N, C, H, W) result: BLOCK_M pixels of a row times ROWS rows each."""
    samples, _, height, width = shape
    return samples * width // tiling[0] * (height // tiling[1]) if len(tiling) else 1


def empty_partial(like: Tensor, tiles: int, channels: int) -> Tensor:
    """Return memory for two numbers of each tile and channel: (T, 2, C), with tiles innermost.

    torch.compile sums over the innermost dimension with a single kernel, and over others with two or more.
    """
    return like.new_empty(2, channels, tiles).permute(2, 0, 1)


def empty_result(
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
    """Return memory for the results of `norm_act_conv`; also its fake implementation."""
    shape = (x.shape[0], weight.shape[0], x.shape[2] // stride, x.shape[3] // stride)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, empty_partial(mean, _tiles(shape, tiling) if statistics else 0, weight.shape[0])


def empty_input_grad(
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
    """Return memory for the results of `norm_act_conv_input_grad`; also its fake implementation."""
    total = grad.new_empty(0) if y is None else torch.empty_like(grad)
    return torch.empty_like(x), empty_partial(mean, _tiles(x.shape, tiling), x.shape[1]), total


def empty_weight_grad(
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
    """Return memory for the results of `norm_act_conv_weight_grad`; also its fake implementation."""
    memory = mean.new_empty(tiling[0], grad.shape[1], taps, taps, x.shape[1])
    return memory.permute(0, 1, 4, 2, 3)


def launch_forward(
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
    """Launch the kernel of `norm_act_conv`."""
    _check_layout(x, weight, residual)
    y, partial = empty_result(x, mean, rstd, gamma, beta, weight, residual, stride, statistics, tiling)
    _launch(x, (mean, rstd, gamma, beta), weight, residual, None, (None,) * 4, y, partial, stride, tiling)
    return y, partial


def launch_input_grad(
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
    """Launch the kernel of `norm_act_conv_input_grad`."""
    _check_layout(grad, x, weight, skip_grad, y)
    norm = mean, rstd, gamma, beta
    x_grad, partial, total = empty_input_grad(grad, x, *norm, weight, stride, tiling, skip_grad, y)
    correction = (y, factor, offset, None if y is None else total)
    _launch(grad, norm, weight, skip_grad, x, correction, x_grad, partial, stride, tiling)
    return x_grad, partial, total


def _launch(
    x: Tensor,
    norm: tuple[Tensor, ...],
    weight: Tensor,
    added: Tensor | None,
    layer_input: Tensor | None,
    correction: tuple[Tensor | None, ...],
    result: Tensor,
    partial: Tensor,
    stride: int,
    tiling: Sequence[int],
) -> None:
    """Launch the kernel of a result, with the sums of its tiles if `partial` is not empty."""
    backward = layer_input is not None
    block_m, rows, block_o, block_c, warps, stages = tiling
    _, channels, height, width = result.shape
    tiles, parities = _tiles(result.shape, tiling), stride**2 if backward else 1
    sizes: dict[str, Any] = {
        "C_IN": x.shape[1], "C_OUT": channels, "BACKWARD": backward, "SUMS": len(partial) > 0,
        "DOT": _dot_type(x), "BLOCK_M": block_m, "ROWS": rows, "BLOCK_O": block_o, "BLOCK_C": block_c,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip
    taps = weight.shape[2]
    arguments = (x, *norm, weight, added, layer_input, *correction, result, partial, tiles)
    grid = (tiles // parities, channels // block_o)
    if taps == 3 and stride == 1:
        # Up to 32 registers of a thread hold sums; more would be spilled.
        late = block_m * block_o <= 16 * 32 * warps
        _rows_kernel[grid](*arguments, H=height, W=width, LATE_SUMS=late, **sizes)
    else:
        _taps_kernel[(*grid, parities)](*arguments, IN_H=x.shape[2], IN_W=x.shape[3], TAPS=taps, STRIDE=stride, **sizes)


def launch_weight_grad(
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
    """Launch the kernel of `norm_act_conv_weight_grad`."""
    _check_layout(grad, x)
    splits, block_m, rows, block_o, block_c, stack, warps, stages = tiling
    samples, outputs, height, width = grad.shape
    inputs = x.shape[1]
    partial = empty_weight_grad(grad, x, mean, rstd, gamma, beta, taps, stride, tiling)
    sizes: dict[str, Any] = {
        "H": height, "W": width, "C_IN": inputs, "C_OUT": outputs, "DOT": _dot_type(x), "SPLITS": splits,
        "BLOCK_M": block_m, "ROWS": rows, "BLOCK_O": block_o, "BLOCK_C": block_c,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip
    grid = (splits, outputs // block_o, inputs // block_c)
    arguments = (grad, x, mean, rstd, gamma, beta, partial, samples * width // block_m * (height // rows))
    if taps == 3 and stride == 1:
        _weight_grad_rows_kernel[grid](*arguments, STACK=stack, **sizes)
    else:
        _weight_grad_taps_kernel[grid](*arguments, TAPS=taps, STRIDE=stride, **sizes)
    return partial


def _check_layout(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"expected torch.channels_last, got strides {tensor.stride()} for {tuple(tensor.shape)}")


def _dot_type(x: Tensor) -> tl.dtype:
    """Return the dtype of a dot product's operands; Triton's interpreter is wrong for bfloat16."""
    return tl.float32 if triton.knobs.runtime.interpret else _DOT[x.dtype]
