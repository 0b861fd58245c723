"""DALI view pipeline for CPUs: CTAugment's eighteen transformations as one graph that reproduces PIL.

ReMixMatch (ICLR 2020), section 3.2.2; kernels, borders and rounding follow PIL. For small images DALI's cost is per
sample and node, not per pixel, so the graph avoids a branch per transformation and has only three nodes:

    geometric     views whose first transformation is a rotation, shear or translation: conditional execution sends
                  them to one nearest-neighbor `fn.warp_affine` with a matrix per sample
    photometric   one torch function over the whole batch, with the functions of kernels/photometric.py: views whose
                  first, second or both transformations are point operations, filters, cutout or rescale
    geometric     the same for the second transformation

These cover every order of the two kinds. Above 128 pixels a side, DALI 2.4's positions are inexact, so the photometric
node also applies the geometric transformations, in integers. It uses torch because DALI's operators cannot reproduce
PIL: DALI has no histogram, `fn.equalize` is OpenCV's, `fn.filter` has neither PIL's unfiltered border nor its rounding,
and `fn.resize` has no HAMMING and repeats the border where PIL renormalizes the filter's taps.

The weak augmentation is a window of the padded image, cut out while images are gathered, which costs no more than
gathering them. In DALI it would take two more nodes, a slice and a flip.

For images of up to 256 pixels a side the result is identical to PIL's, byte for byte. Only rescale may differ, by one
level in isolated pixels, because its weights are sums of sines. On a GPU the fused kernel (`pipelines/fused.py`)
makes the views: the Python node of this graph would cost about 550 launches and two synchronizations per batch.
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

# Longest side at which DALI's warp samples PIL's pixels. It adds float32 positions along each row (DALI 2.4), which is
# exact for multiples of 2^-17 below 128, and of 2^-16 below 256.
_WARP_SIDE = 128
_thread = threading.local()  # Whether each of DALI's threads is limited yet.


def _one_thread() -> None:
    """Limit torch to one thread in the calling thread, one of DALI's.

    The tensors are small, and an OpenMP team per DALI thread would compete with the training step for cores.
    `torch.set_num_threads` would also limit the training step.
    """
    if not getattr(_thread, "limited", False):
        # torch sets the team size of a new thread on first use, which would override the limit.
        torch.get_num_threads()
        threadpool_limits(1, user_api="openmp")
        _thread.limited = True


@dataclass(frozen=True)
class _Batch:
    """Inputs of the graph for V views.

    Attributes:
        weak: (V, H, W, 3) uint8, weakly augmented images.
        ops: (V, 2) int, indices into `ctaugment.TRANSFORMATIONS`.
        parameters: (V, 2, 6) float32 from `geometric.op_parameters`.
    """

    weak: np.ndarray
    ops: np.ndarray
    parameters: np.ndarray

    @property
    def warped(self) -> bool:
        """Whether DALI applies the geometric transformations; otherwise the photometric node does."""
        return max(self.weak.shape[1:3]) <= _WARP_SIDE


def _apply_photometric(images: list[Any], given: _Batch) -> list[Any]:
    order = np.argsort(given.ops[:, 0], kind="stable")  # Index in the plan of each view of the batch.
    # Concatenating along an existing dimension costs half as much as stacking.
    batch = torch.cat([torch.from_dlpack(images[view]) for view in order.tolist()])
    batch = batch.view(len(images), -1, *batch.shape[1:])
    parameters = torch.from_numpy(given.parameters)
    for stage in range(OPS_PER_VIEW):
        # Process one transformation at a time: its views are contiguous and fit in a core's cache.
        if stage:
            by_op = np.argsort(given.ops[order, stage], kind="stable")
            order, batch = order[by_op], batch.index_select(0, torch.from_numpy(by_op))
        level, second, center = parameters[torch.from_numpy(order), stage, 1:5].split((1, 1, 2), dim=1)
        levels = OpLevels(level[..., None, None], second[:, 0], center)
        first = 0
        for op, count in enumerate(np.bincount(given.ops[:, stage]).tolist()):
            last = first + count
            if count and ctaugment.NAMES[op] in PHOTOMETRIC:
                batch[first:last] = apply(ctaugment.NAMES[op], batch[first:last], levels.rows(first, last))
            elif count and geometric.IS_GEOMETRIC[op] and not given.warped:
                matrices = given.parameters[order[first:last], stage]
                batch[first:last] = torch.from_numpy(geometric.warp(batch[first:last].numpy(), matrices))
            first = last
    capsules: list[Any] = [None] * len(order)
    for view, image in zip(order.tolist(), batch.unbind(), strict=True):
        capsules[view] = torch.utils.dlpack.to_dlpack(image)
    return capsules


def _photometric_node(waiting: deque[_Batch]) -> Callable[[list[Any]], list[Any]]:
    """Return the function of the photometric node, which DALI's threads call once per batch, in order.

    It takes and returns n DLPack capsules of (H, W, 3) uint8.

    Args:
        waiting: Upcoming batches, oldest first. Their parameters bypass DALI, which would make one tensor per sample.
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


def fill_queue(pipeline: Any, feed: Callable[[], None], depth: int) -> None:
    """Run and discard a queue of batches: DALI's first run fills the whole queue. Also a warm-up.

    Args:
        pipeline: A DALI pipeline that has not run.
        feed: Feeds all inputs of one batch.
        depth: The pipeline's `prefetch_queue_depth`.
    """
    for _ in range(depth):
        feed()
    pipeline.schedule_run()
    for _ in range(depth):
        pipeline.outputs()


class DaliViews(Views):
    """View pipeline that runs DALI on the CPU: `submit` returns immediately, and DALI's threads make the views.

    Args:
        threads: Number of DALI's CPU threads.
    """

    def __init__(
        self,
        images: np.ndarray,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        batch_size: int,
        max_shift: int,
        threads: int = 1,
        prefetch: int = 2,
    ) -> None:
        super().__init__(images, labeled, unlabeled, batch_size, max_shift, "cpu", prefetch)
        self._waiting: deque[_Batch] = deque()
        self._pipeline: Any = _graph(
            _photometric_node(self._waiting),
            batch_size=batch_size,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,  # Outputs stay valid as long as they are referenced.
        )
        fill_queue(self._pipeline, lambda: self._feed(self._prepare(plain_views(batch_size))), prefetch)

    def _prepare(self, views: ViewPlan) -> _Batch:
        parameters = geometric.op_parameters(views.ops, views.levels, views.center, self.height, self.width)
        return _Batch(self._weakly_augmented(views), views.ops, parameters)

    def _weakly_augmented(self, views: ViewPlan) -> np.ndarray:
        """Return shifted and flipped images: (V, H, W, 3) uint8."""
        # Pad each image of the batch only once: all its views are windows of the padded image.
        distinct, image = np.unique(self._image_indices(views), return_inverse=True)
        margin = (self.max_shift, self.max_shift)
        padded = np.pad(self._images[distinct], ((0, 0), margin, margin, (0, 0)), mode="reflect")
        # (n, 2 max_shift + 1, 2 max_shift + 1, H, W) without a copy, indexed by image, top and left of a window.
        windows = sliding_window_view(padded.view(geometric.PIXEL)[..., 0], (self.height, self.width), axis=(1, 2))
        top, left = (self.max_shift - views.shift).T
        weak = windows[image, top, left]
        flipped = np.flatnonzero(views.flip)
        weak[flipped] = windows[..., ::-1][image[flipped], top[flipped], left[flipped]]
        return weak[..., None].view(np.uint8)

    def _feed(self, batch: _Batch) -> None:
        feed = self._pipeline.feed_input
        feed("weak", batch.weak)
        for stage in range(OPS_PER_VIEW):
            feed(f"is_geometric{stage}", batch.warped & geometric.IS_GEOMETRIC[batch.ops[:, stage]])
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
