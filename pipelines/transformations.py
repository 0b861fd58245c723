"""CTAugment's eighteen transformations as one DALI graph, the same for CPU and GPU; PIL is the oracle.

ReMixMatch (ICLR 2020), section 3.2.2; what each transformation does at level v in [0, 1) is in the table of
the specification, and every kernel, border and rounding is PIL's. One round of the graph gives every image of
a batch one transformation. For small images DALI's cost is per row and node, not per pixel, so rows do not
travel down nineteen branches; conditional execution sends each to one of two:

    repaint   point operations, filters, cutout and rescale: one torch function over all rows of the branch.
    warp      rotate, shear_x, shear_y, translate_x, translate_y and identity: one nearest-neighbour
              `fn.warp_affine`, with a matrix for each row.

Repaint is torch because PIL's results do not follow from DALI's operators: DALI has no histogram,
`fn.equalize` is OpenCV's, `fn.filter` has neither PIL's unfiltered border nor its rounding, `fn.resize` has
no HAMMING and repeats the border where PIL renormalises the kernel. And each operator would need a branch,
with a split and a merge, of its own.

On the CPU the result is PIL's byte for byte on every picture of the tests, up to 96x96 pixels. Single levels
of rescale may differ, whose weights are sums of sines, and on a GPU pixels of a warp whose position is on the
edge between two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert
from threadpoolctl import threadpool_limits

from pipelines import ctaugment

# ---------------------------------------------------------------- warp: from level to matrix, on the host

Warp = Callable[[np.ndarray, int, int], np.ndarray]
WARPS: dict[str, Warp] = {}


def warp(matrix: Warp) -> Warp:
    """Registers a function of (level (n,) float64 in [-1, 1), H, W) to PIL's AFFINE coefficients, (n, 6).

    Output (x, y) comes from input (a x + b y + c, d x + e y + f); outside is black.
    """
    WARPS[matrix.__name__] = matrix
    return matrix


def _rows(level: np.ndarray, *coefficients: float | np.ndarray) -> np.ndarray:
    rows = np.empty((len(level), 6))
    for column, coefficient in enumerate(coefficients):
        rows[:, column] = coefficient
    return rows


def _fixed(rows: np.ndarray) -> np.ndarray:
    """Coefficients as PIL rounds them for maps that turn or shear: steps and the first centre to 2^-16.

    Positions in images of up to 128 pixels are then exact in DALI's single precision too.
    """
    rows = rows.reshape(-1, 2, 3)
    first = rows[:, :, 2] + 0.5 * (rows[:, :, 0] + rows[:, :, 1])
    rows = np.floor(65536 * rows + 0.5) / 65536
    rows[:, :, 2] = np.floor(65536 * first + 0.5) / 65536 - 0.5 * (rows[:, :, 0] + rows[:, :, 1])
    return rows.reshape(-1, 6)


@warp
def rotate(level: np.ndarray, height: int, width: int) -> np.ndarray:
    """Up to 45 degrees about the centre, counterclockwise for positive angles."""
    cos, sin = np.cos(np.deg2rad(45.0 * level)), np.sin(np.deg2rad(45.0 * level))
    x, y = width / 2.0, height / 2.0
    return _fixed(_rows(level, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


@warp
def shear_x(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _fixed(_rows(level, 1.0, 0.3 * level, 0.0, 0.0, 1.0, 0.0))


@warp
def shear_y(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _fixed(_rows(level, 1.0, 0.0, 0.0, 0.3 * level, 1.0, 0.0))


@warp
def translate_x(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _rows(level, 1.0, 0.0, 0.3 * level * width, 0.0, 1.0, 0.0)


@warp
def translate_y(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _rows(level, 1.0, 0.0, 0.0, 0.0, 1.0, 0.3 * level * height)


# ---------------------------------------------------------------- repaint: from image to image, in torch


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


# ---------------------------------------------------------------- a round of the graph

NAMES = ctaugment.NAMES
assert sorted([*WARPS, *REPAINTS, "identity"]) == sorted(NAMES)
_IS_REPAINT = np.array([name in REPAINTS for name in NAMES])


class _Here(threading.local):
    """What each of DALI's threads keeps to itself."""

    def __init__(self) -> None:
        self.limited = False
        self.streams: dict[int, torch.cuda.Stream] = {}


_here = _Here()


def _one_thread() -> None:
    """Keeps torch's operators in the thread that calls them, for DALI's threads only.

    These tensors are small, and a team of threads of its own for every DALI thread would fight the training
    step for its cores. `torch.set_num_threads` would take the training step's threads away with them.
    """
    if not _here.limited:
        # torch sets a new thread's team when first asked, and would undo what came before
        torch.get_num_threads()
        threadpool_limits(1, user_api="openmp")
        _here.limited = True


def apply(op: int, images: torch.Tensor, given: Parameters) -> torch.Tensor:
    """One repainting, by its index in `ctaugment.TRANSFORMATIONS`: (n, H, W, 3) uint8 to the same."""
    use, function = REPAINTS[NAMES[op]]
    result = function(images, given)
    if use == BLENDED:
        return blend(images, result, given.level)
    if use == ENHANCED:
        return blend(result, images, (0.1 + 1.9 * given.level.double()).to(torch.float32))
    return result


def _repainted(images: list[Any], parameters: list[Any]) -> list[Any]:
    # tensors are joined along a dimension they have: to give each a new one first would double the cost
    given = torch.cat([torch.from_dlpack(row) for row in parameters]).view(len(parameters), 6)
    ops = [int(op) for op in given[:, 0].tolist()]
    # by transformation, and by second level, as rescale goes by runs of rows with one filter
    order = sorted(range(len(ops)), key=list(zip(ops, given[:, 2].tolist(), strict=True)).__getitem__)
    batch = torch.cat([torch.from_dlpack(images[row]) for row in order])
    batch = batch.view(len(images), -1, *batch.shape[1:])
    given = given[torch.tensor(order, device=given.device)]
    rows = Parameters(given[:, 1].view(-1, 1, 1, 1), given[:, 2], given[:, 3:5])

    out = torch.empty_like(batch)
    first = 0
    for op in sorted(set(ops)):
        last = first + ops.count(op)
        # one transformation's rows at a time, which a core's cache holds
        out[first:last] = apply(op, batch[first:last], rows.rows(first, last))
        first = last

    capsules: list[Any] = [None] * len(ops)
    for row, image in zip(order, out.unbind(), strict=True):
        capsules[row] = torch.utils.dlpack.to_dlpack(image)
    return capsules


@do_not_convert
@torch.inference_mode()
def repainted(images: list[Any], parameters: list[Any]) -> list[Any]:
    """The batch function of the repaint branch, for DALI's threads.

    Args:
        images: n DLPack capsules of (H, W, 3) uint8, on the CPU.
        parameters: n of (2, 3) float32, on the CPU: operation, level, second level, centre (y, x), nothing.

    Returns:
        n DLPack capsules of (H, W, 3) uint8, in the same order.
    """
    _one_thread()
    return _repainted(images, parameters) if images else []


@do_not_convert
@torch.inference_mode()
def repainted_on_gpu(images: list[Any], parameters: list[Any]) -> list[Any]:
    """`repainted` on the GPU; DALI has waited for the inputs and takes the outputs as ready."""
    if not images:
        return []
    # a stream of this thread's own: the default one belongs to the training step, and may be under capture
    device = torch.cuda.current_device()
    if device not in _here.streams:
        _here.streams[device] = torch.cuda.Stream(device)
    stream = _here.streams[device]
    with torch.cuda.stream(stream):
        capsules = _repainted(images, parameters)
    stream.synchronize()
    return capsules


def round_inputs(
    ops: np.ndarray, levels: np.ndarray, centre: np.ndarray, height: int, width: int
) -> dict[str, np.ndarray]:
    """What one round of the graph is fed, by name.

    Args:
        ops: (V,) int, indices into `ctaugment.TRANSFORMATIONS`.
        levels: (V, 2) float32 in [0, 1).
        centre: (V, 2) float32 in [0, 1).
        height: H, of the images.
        width: W.

    Returns:
        is_repaint: (V,) bool; parameters: (V, 2, 3) float32, for rows of the repaint branch as `repainted`
        has them, for others PIL's AFFINE coefficients. One input for both: each costs a split of the batch.
    """
    is_repaint = _IS_REPAINT[ops]
    parameters = np.zeros((len(ops), 6), dtype=np.float32)
    parameters[:, 0], parameters[:, 1:3], parameters[:, 3:5] = ops, levels, centre
    parameters[~is_repaint] = (1, 0, 0, 0, 1, 0)
    for name, function in WARPS.items():
        (rows,) = np.nonzero(ops == NAMES.index(name))
        if len(rows):
            parameters[rows] = function(2.0 * levels[rows, 0].astype(np.float64) - 1.0, height, width)
    return {"is_repaint": is_repaint, "parameters": parameters.reshape(-1, 2, 3)}


INPUTS = ("is_repaint", "parameters")


def transform(image: Any, inputs: dict[str, Any], device: str) -> Any:
    """One round of the graph.

    Args:
        image: node of (H, W, 3) uint8, on the device.
        inputs: nodes of what `round_inputs` returns, on the CPU.
        device: "cpu" or "gpu".

    Returns:
        Node of (H, W, 3) uint8, on the device.
    """
    parameters = inputs["parameters"]
    if inputs["is_repaint"]:
        if device == "gpu":
            image = fn.dl_tensor_python_function(
                image,
                parameters.gpu(),
                device="gpu",
                function=repainted_on_gpu,
                batch_processing=True,
                output_layouts="HWC",
            )
        else:
            image = fn.dl_tensor_python_function(
                image, parameters, function=repainted, batch_processing=True, output_layouts="HWC"
            )
    else:
        image = fn.warp_affine(image, matrix=parameters, fill_value=0, interp_type=types.INTERP_NN)
    return image
