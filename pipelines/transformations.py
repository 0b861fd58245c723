"""CTAugment's eighteen transformations as one DALI graph, the same for CPU and GPU; PIL is the oracle.

ReMixMatch (ICLR 2020), section 3.2.2; what each transformation does at level v in [0, 1) is in the table of
the specification, and every kernel, border and rounding is PIL's. For small images DALI's cost is per row and
node, not per pixel, so rows do not travel down nineteen branches, twice. They pass three nodes, in this order:

    warp      rotate, shear_x, shear_y, translate_x or translate_y, where that is the first transformation: one
              nearest-neighbour `fn.warp_affine`, with a matrix for each row, under conditional execution.
    repaint   point operations, filters, cutout and rescale, whether first, second or both: one torch function over
              all rows, by the functions of kernels/repaint.py.
    warp      the same, where it is the second transformation.

Repaint is torch because PIL's results do not follow from DALI's operators: DALI has no histogram,
`fn.equalize` is OpenCV's, `fn.filter` has neither PIL's unfiltered border nor its rounding, `fn.resize` has
no HAMMING and repeats the border where PIL renormalises the kernel. And each operator would need branches,
each with a split and a merge, of its own. Rows with nothing to repaint pass the node as they are: that is cheaper
than to part them from the others.

On the CPU the result is PIL's byte for byte on every picture of the tests, up to 96x96 pixels. Single levels
of rescale may differ, whose weights are sums of sines, and on a GPU pixels of a warp whose position is on the
edge between two.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert
from threadpoolctl import threadpool_limits

from kernels.repaint import REPAINTS, Parameters, apply
from pipelines import ctaugment
from pipelines.plan import OPS_PER_VIEW

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


# ---------------------------------------------------------------- the graph

NAMES = ctaugment.NAMES
assert sorted([*WARPS, *REPAINTS, "identity"]) == sorted(NAMES)
_IS_WARP = np.array([name in WARPS for name in NAMES])


class _Here(threading.local):
    """What each thread that makes views keeps to itself."""

    def __init__(self) -> None:
        self.limited = False
        self.streams: dict[int, torch.cuda.Stream] = {}


_here = _Here()


def _one_thread() -> None:
    """Keeps torch's operators in the thread that calls them, for the threads that make views only.

    These tensors are small, and a team of threads of its own for every one of them would fight the training
    step for its cores. `torch.set_num_threads` would take the training step's threads away with them.
    """
    if not _here.limited:
        # torch sets a new thread's team when first asked, and would undo what came before
        torch.get_num_threads()
        threadpool_limits(1, user_api="openmp")
        _here.limited = True


@torch.inference_mode()
def _repaint(batch: torch.Tensor, given: Parameters, run: tuple[int, int, int]) -> None:
    op, first, last = run
    batch[first:last] = apply(NAMES[op], batch[first:last], given.rows(first, last))


def _repainted(images: list[Any], parameters: np.ndarray, each: Callable[..., Iterable[None]]) -> list[Any]:
    ops = parameters[:, :, 0].astype(np.int64)
    order = np.argsort(ops[:, 0], kind="stable")  # which row of the plan each row of the batch is
    # tensors are joined along a dimension they have: to give each a new one first would double the cost
    batch = torch.cat([torch.from_dlpack(images[row]) for row in order.tolist()])
    batch = batch.view(len(images), -1, *batch.shape[1:])
    given = torch.from_numpy(parameters).to(batch.device)
    for turn in range(OPS_PER_VIEW):
        # one transformation's rows side by side, and at a time, which a core's cache holds
        if turn:
            by_op = np.argsort(ops[order, turn], kind="stable")
            order, batch = order[by_op], batch.index_select(0, torch.from_numpy(by_op).to(batch.device))
        level, second, centre = given[torch.from_numpy(order).to(batch.device), turn, 1:].split((1, 1, 2), dim=1)
        last = np.cumsum(np.bincount(ops[:, turn], minlength=len(NAMES))).tolist()
        runs = [(op, first, end) for op, (first, end) in enumerate(pairwise([0, *last])) if end > first]
        repaint = partial(_repaint, batch, Parameters(level[..., None, None], second[:, 0], centre))
        for _ in each(repaint, [run for run in runs if NAMES[run[0]] in REPAINTS]):
            pass
    capsules: list[Any] = [None] * len(order)
    for row, image in zip(order.tolist(), batch.unbind(), strict=True):
        capsules[row] = torch.utils.dlpack.to_dlpack(image)
    return capsules


def repainter(waiting: deque[np.ndarray], device: str, threads: int) -> Callable[[list[Any]], list[Any]]:
    """The batch function of the repaint node, for DALI's threads.

    It takes and returns n DLPack capsules of (H, W, 3) uint8, on the device, a batch a call and batches in order.

    Args:
        waiting: parameters of the batches to come, oldest first: (n, 2, 5) float32, for each turn operation, level,
            second level, centre (y, x). What is no repainting is passed over. They do not come by way of DALI,
            which would make a tensor of each row.
        device: "cpu" or "gpu". DALI has waited for inputs on the GPU, and takes outputs as ready.
        threads: how many share a batch's transformations on the CPU; DALI calls from one.
    """
    each: Callable[..., Iterable[None]] = map
    if device == "cpu" and threads > 1:
        each = ThreadPoolExecutor(threads, "repaint", initializer=_one_thread).map

    @do_not_convert
    @torch.inference_mode()
    def repainted(images: list[Any]) -> list[Any]:
        _one_thread()
        return _repainted(images, waiting.popleft(), each)

    @do_not_convert
    @torch.inference_mode()
    def repainted_on_gpu(images: list[Any]) -> list[Any]:
        # a stream of this thread's own: the default one belongs to the training step, and may be under capture
        device = torch.cuda.current_device()
        if device not in _here.streams:
            _here.streams[device] = torch.cuda.Stream(device)
        stream = _here.streams[device]
        with torch.cuda.stream(stream):
            capsules = _repainted(images, waiting.popleft(), each)
        stream.synchronize()
        return capsules

    return repainted if device == "cpu" else repainted_on_gpu


def repaints(ops: np.ndarray, levels: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """What `repainter` waits for: ops (V, 2), levels (V, 2, 2) and centre (V, 2, 2) in one, (V, 2, 5) float32."""
    return np.concatenate([ops[..., None].astype(np.float32), levels, centre], axis=2)


def warps(ops: np.ndarray, levels: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    """What the graph is fed, by name; V views, two turns each.

    Args:
        ops: (V, 2) int, indices into `ctaugment.TRANSFORMATIONS`.
        levels: (V, 2, 2) float32 in [0, 1).
        height: H, of the images.
        width: W.

    Returns:
        is_warp0, is_warp1: (V,) bool; matrix0, matrix1: (V, 2, 3) float32, PIL's AFFINE coefficients where the turn
        is a warp.
    """
    matrix = np.zeros((*ops.shape, 6), dtype=np.float32)
    for name, function in WARPS.items():
        rows = ops == NAMES.index(name)
        matrix[rows] = function(2.0 * levels[rows, 0].astype(np.float64) - 1.0, height, width)
    fed: dict[str, np.ndarray] = {}
    for turn in range(OPS_PER_VIEW):
        fed[f"is_warp{turn}"] = _IS_WARP[ops[:, turn]]
        fed[f"matrix{turn}"] = np.ascontiguousarray(matrix[:, turn]).reshape(-1, 2, 3)
    return fed


INPUTS = ("is_warp0", "matrix0", "is_warp1", "matrix1")


def transform(image: Any, inputs: dict[str, Any], repainted: Callable[[list[Any]], list[Any]], device: str) -> Any:
    """The strong augmentation's part of the graph.

    Args:
        image: node of (H, W, 3) uint8, on the device.
        inputs: nodes of what `warps` returns, on the CPU.
        repainted: a `repainter` for the device.
        device: "cpu" or "gpu".

    Returns:
        Node of (H, W, 3) uint8, on the device.
    """
    if inputs["is_warp0"]:
        image = fn.warp_affine(image, matrix=inputs["matrix0"], fill_value=0, interp_type=types.INTERP_NN)
    image = fn.dl_tensor_python_function(
        image, device=device, function=repainted, batch_processing=True, output_layouts="HWC"
    )
    if inputs["is_warp1"]:
        image = fn.warp_affine(image, matrix=inputs["matrix1"], fill_value=0, interp_type=types.INTERP_NN)
    return image
