"""Views by DALI on CPUs: CTAugment's eighteen transformations as one graph; PIL is the oracle.

ReMixMatch (ICLR 2020), section 3.2.2; every kernel, border and rounding is PIL's. For small images DALI's cost is per
row and node, not per pixel: so rows do not go through nineteen branches for each of their two transformations. The
graph has three nodes:

    geometric     where the first transformation is a rotation, a shear or a translation: conditional execution sends
                  these rows to one nearest-neighbour `fn.warp_affine`, with a matrix for each row
    photometric   one torch function over all rows, by the functions of kernels/photometric.py: for rows whose first,
                  second or both transformations are point operations, filters, cutout or rescale
    geometric     as before, where the second transformation is one

These are all orders of the two kinds. The photometric node is torch because PIL's results do not follow from DALI's
operators: DALI has no histogram, `fn.equalize` is OpenCV's, `fn.filter` has neither PIL's unfiltered border nor its
rounding, `fn.resize` has no HAMMING and repeats the border where PIL renormalises the filter's taps.

A weakly augmented image is a window of the image with a margin, so it is cut out where rows are looked up, as cheap as
the look-up itself; in DALI a slice and a flip of small images would cost more than both transformations.

The result is PIL's byte for byte on every picture of the tests, up to 96x96 pixels. Single levels of rescale may
differ, whose weights are sums of sines. On a GPU the fused kernel (`pipelines/fused.py`) makes views: there this
graph's Python node would cost some 550 launches and two synchronisations a batch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert
from threadpoolctl import threadpool_limits

from kernels.photometric import PHOTOMETRIC, OpLevels, apply
from pipelines import ctaugment, geometric
from pipelines.plan import OPS_PER_VIEW, ViewPlan
from pipelines.views import Views, plain_views

# three bytes that numpy moves as one
_PIXEL = np.dtype("V3")


_thread = threading.local()  # of each of DALI's threads: whether it is limited


def _one_thread() -> None:
    """Keeps torch's operators in the thread that calls them, for DALI's threads only.

    These tensors are small, and a team of threads of its own for every DALI thread would fight the training
    step for its cores. `torch.set_num_threads` would take the training step's threads away with them.
    """
    if not getattr(_thread, "limited", False):
        # torch sets a new thread's team when first asked, and would undo what came before
        torch.get_num_threads()
        threadpool_limits(1, user_api="openmp")
        _thread.limited = True


@dataclass(frozen=True)
class _Batch:
    """What the graph is given for V rows, but for the pixels.

    Attributes:
        weak: (V, H, W, 3) uint8, shifted and flipped.
        ops: (V, 2) int, indices into `ctaugment.TRANSFORMATIONS`.
        parameters: (V, 2, 6) float32, see `geometric.op_parameters`.
    """

    weak: np.ndarray
    ops: np.ndarray
    parameters: np.ndarray


def _apply_photometric(images: list[Any], given: _Batch) -> list[Any]:
    order = np.argsort(given.ops[:, 0], kind="stable")  # row of the plan that each row of the batch is
    # tensors are joined along a dimension they have: to give each a new one first would double the cost
    batch = torch.cat([torch.from_dlpack(images[row]) for row in order.tolist()])
    batch = batch.view(len(images), -1, *batch.shape[1:])
    numbers = torch.from_numpy(given.parameters)
    for stage in range(OPS_PER_VIEW):
        # one transformation's rows side by side, and at a time, which a core's cache holds
        if stage:
            by_op = np.argsort(given.ops[order, stage], kind="stable")
            order, batch = order[by_op], batch.index_select(0, torch.from_numpy(by_op))
        of_rows = numbers[torch.from_numpy(order), stage, 1:5]
        level, second, center = of_rows.split((1, 1, 2), dim=1)
        rows = OpLevels(level[..., None, None], second[:, 0], center)
        first = 0
        for op, count in enumerate(np.bincount(given.ops[:, stage]).tolist()):
            last = first + count
            if count and ctaugment.NAMES[op] in PHOTOMETRIC:
                batch[first:last] = apply(ctaugment.NAMES[op], batch[first:last], rows.rows(first, last))
            first = last
    capsules: list[Any] = [None] * len(order)
    for row, image in zip(order.tolist(), batch.unbind(), strict=True):
        capsules[row] = torch.utils.dlpack.to_dlpack(image)
    return capsules


def _photometric_node(waiting: deque[_Batch]) -> Callable[[list[Any]], list[Any]]:
    """The function of the photometric node, for DALI's threads.

    It takes and returns n DLPack capsules of (H, W, 3) uint8, a batch a call and batches in order.

    Args:
        waiting: the batches to come, oldest first. Parameters do not come by way of DALI, which would make a tensor
            of each row.
    """

    @do_not_convert
    @torch.inference_mode()
    def photometric(images: list[Any]) -> list[Any]:
        _one_thread()
        return _apply_photometric(images, waiting.popleft())

    return photometric


@pipeline_def(enable_conditionals=True)
def _graph(photometric: Callable[[list[Any]], list[Any]]) -> Any:
    view = fn.external_source(name="weak", layout="HWC")
    is_geometric = [fn.external_source(name=f"is_geometric{stage}") for stage in range(OPS_PER_VIEW)]
    matrix = [fn.external_source(name=f"matrix{stage}") for stage in range(OPS_PER_VIEW)]
    if is_geometric[0]:
        view = fn.warp_affine(view, matrix=matrix[0], fill_value=0, interp_type=types.INTERP_NN)
    view = fn.dl_tensor_python_function(view, function=photometric, batch_processing=True, output_layouts="HWC")
    if is_geometric[1]:
        view = fn.warp_affine(view, matrix=matrix[1], fill_value=0, interp_type=types.INTERP_NN)
    return view


class DaliViews(Views):
    """`Views` by DALI on the CPU: `submit` returns at once, and DALI's threads make the views.

    Args:
        threads: DALI's CPU threads.
    """

    def __init__(
        self,
        images: np.ndarray,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        rows: int,
        max_shift: int,
        threads: int = 1,
        prefetch: int = 2,
    ) -> None:
        super().__init__(images, labeled, unlabeled, rows, max_shift, "cpu", prefetch)
        self._waiting: deque[_Batch] = deque()
        self._pipeline: Any = _graph(
            _photometric_node(self._waiting),
            batch_size=rows,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,  # its outputs live as long as somebody holds them
        )
        self._fill_queue()

    def _fill_queue(self) -> None:
        """Runs a whole queue of rows that nobody sees, as DALI's first call would; also a warm-up."""
        for _ in range(self.prefetch):
            self._feed(self._prepare(plain_views(self.rows)))
        self._pipeline.schedule_run()
        for _ in range(self.prefetch):
            self._pipeline.outputs()

    def _prepare(self, views: ViewPlan) -> _Batch:
        numbers = geometric.op_parameters(views.ops, views.levels, views.center, self.height, self.width)
        return _Batch(self._cut_out(views), views.ops, numbers)

    def _cut_out(self, views: ViewPlan) -> np.ndarray:
        """Shifted and flipped images: (V, H, W, 3) uint8."""
        # each image of the batch once, with its margin: all views of one are windows of it
        distinct, image = np.unique(self._places(views), return_inverse=True)
        margin = (self.max_shift, self.max_shift)
        padded = np.pad(self._images[distinct], ((0, 0), margin, margin, (0, 0)), mode="reflect")
        # (n, 2 max_shift + 1, 2 max_shift + 1, H, W) without a copy: image, top and left of a window
        windows = sliding_window_view(padded.view(_PIXEL)[..., 0], (self.height, self.width), axis=(1, 2))
        top, left = (self.max_shift - views.shift).T
        rows = windows[image, top, left]
        flipped = np.flatnonzero(views.flip)
        rows[flipped] = windows[..., ::-1][image[flipped], top[flipped], left[flipped]]
        return rows[..., None].view(np.uint8)

    def _feed(self, batch: _Batch) -> None:
        feed = self._pipeline.feed_input
        feed("weak", batch.weak)
        for stage in range(OPS_PER_VIEW):
            feed(f"is_geometric{stage}", geometric.IS_GEOMETRIC[batch.ops[:, stage]])
            feed(f"matrix{stage}", np.ascontiguousarray(batch.parameters[:, stage]).reshape(-1, 2, 3))
        self._waiting.append(batch)

    def _begin(self, prepared: _Batch) -> None:
        self._feed(prepared)
        self._pipeline.schedule_run()

    def _finish(self) -> torch.Tensor:
        (views,) = self._pipeline.outputs()
        return torch.from_dlpack(views.as_tensor())

    def _release(self) -> None:
        self._pipeline = None
