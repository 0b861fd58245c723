"""CTAugment's eighteen transformations as one DALI graph, the same for CPU and GPU; PIL is the oracle.

ReMixMatch (ICLR 2020), section 3.2.2; what each transformation does at level v in [0, 1) is in the table of
the specification, and every kernel, border and rounding is PIL's. One round of the graph gives every image of
a batch one transformation. For small images DALI's cost is per row and node, not per pixel, so rows do not
travel down nineteen branches; conditional execution sends each to one of two:

    repaint   point operations, filters, cutout and rescale: one torch function over all rows of the branch, by the
              functions of kernels/repaint.py.
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
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert
from threadpoolctl import threadpool_limits

from kernels.repaint import REPAINTS, Parameters, apply
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
        out[first:last] = apply(NAMES[op], batch[first:last], rows.rows(first, last))
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
