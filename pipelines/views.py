"""Views: the rows of a plan, made from images by one DALI pipeline in the background.

A weakly augmented image is a window of the image with its margin, so it is cut out where rows are looked up, as cheap
as the look-up itself; in DALI a slice and a flip of small images would cost more than both strong rounds. The graph,
the same on CPU and GPU, is the strong augmentation, `pipelines/transformations.py`. It is a pure function of images and
plan rows, so the same plan gives the same bytes whatever the number of threads and of batches in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from nvidia.dali import fn, pipeline_def

from pipelines import transformations
from pipelines.plan import OPS_PER_VIEW, ViewPlan

# three bytes that numpy moves as one
_PIXEL = np.dtype("V3")


@pipeline_def(enable_conditionals=True)
def _graph(device: str, repainted: Callable[[list[Any]], list[Any]]) -> Any:
    view = fn.external_source(name="weak", layout="HWC")
    if device == "gpu":
        view = view.gpu()
    inputs = {name: fn.external_source(name=name) for name in transformations.INPUTS}
    return transformations.transform(view, inputs, repainted, device)


def _checked(images: np.ndarray, name: str) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(
            f"{name} images must be (N, H, W, 3) uint8 with N > 0, got {images.shape} {images.dtype}; "
            "repeat the channel of grey images"
        )
    return images


class ViewPipeline:
    """Makes view rows from plans, ahead of the step that needs them.

    The weak augmentation (ReMixMatch, section 4) moves the image by `shift` = (dy, dx), down and to the right
    for positive numbers, and reflects what is missing as `numpy.pad(mode="reflect")` does; then it mirrors
    the image where `flip` is 1. The strong augmentation's transformations (section 3.2.2) follow, left to
    right.

    Both sets are held in host memory with a margin of `max_shift` pixels all around.

    Args:
        labeled: (Nl, H, W, 3) uint8.
        unlabeled: (Nu, H, W, 3) uint8 of the same sides, or None.
        rows: V, rows of every plan.
        max_shift: the largest shift that a plan may hold, in pixels; less than either side.
        device: "cpu" or "gpu", where views are made and left.
        device_id: which GPU.
        threads: CPU threads, of DALI's operators and of the repaintings each.
        prefetch: how many batches may be in flight, at least 1.

    Raises:
        ValueError: images, rows, max_shift, device or prefetch are not as stated.
    """

    def __init__(
        self,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        rows: int,
        max_shift: int,
        device: str = "cpu",
        device_id: int = 0,
        threads: int = 1,
        prefetch: int = 2,
    ) -> None:
        sets = [_checked(labeled, "labeled")]
        if unlabeled is not None:
            sets.append(_checked(unlabeled, "unlabeled"))
            if labeled.shape[1:] != unlabeled.shape[1:]:
                raise ValueError(
                    f"labeled and unlabeled images must have the same sides, got {labeled.shape[1:3]} "
                    f"and {unlabeled.shape[1:3]}"
                )
        self.height, self.width = labeled.shape[1:3]
        if not 0 <= max_shift < min(self.height, self.width):
            largest = min(self.height, self.width) - 1
            raise ValueError(f"max_shift must be from 0 to {largest} for these images, got {max_shift}")
        if device not in ("cpu", "gpu"):
            raise ValueError(f'device must be "cpu" or "gpu", got "{device}"')
        if rows < 1 or prefetch < 1:
            raise ValueError(f"rows and prefetch must be at least 1, got {rows} and {prefetch}")
        self.rows = rows
        self.max_shift = max_shift
        self.device = device
        self.prefetch = prefetch
        self._first_unlabeled = len(labeled)
        edges = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
        padded = np.concatenate([np.pad(images, edges, mode="reflect") for images in sets])
        # (N, 2 max_shift + 1, 2 max_shift + 1, H, W) without a copy: image, top and left of a window
        self._windows = sliding_window_view(padded.view(_PIXEL)[..., 0], (self.height, self.width), axis=(1, 2))
        self._in_flight = 0
        self._repaints: deque[np.ndarray] = deque()
        self._pipeline: Any = _graph(
            device,
            transformations.repainter(self._repaints, device, threads),
            batch_size=rows,
            num_threads=threads,
            device_id=device_id if device == "gpu" else None,
            prefetch_queue_depth=prefetch,
            # its outputs live as long as somebody holds them, and its GPU rounds may follow CPU parameters
            exec_dynamic=True,
        )
        self._fill_queue()

    def _fill_queue(self) -> None:
        """Runs a whole queue of rows that nobody sees, as DALI's first call would; also a warm-up."""
        plain = ViewPlan(
            image=np.zeros(self.rows, dtype=np.int64),
            labeled=np.ones(self.rows, dtype=bool),
            shift=np.zeros((self.rows, 2), dtype=np.int32),
            flip=np.zeros(self.rows, dtype=np.int32),
            ops=np.zeros((self.rows, OPS_PER_VIEW), dtype=np.int32),
            levels=np.zeros((self.rows, OPS_PER_VIEW, 2), dtype=np.float32),
            centre=np.zeros((self.rows, OPS_PER_VIEW, 2), dtype=np.float32),
        )
        for _ in range(self.prefetch):
            self._feed(plain)
        self._pipeline.schedule_run()
        for _ in range(self.prefetch):
            self._pipeline.outputs()

    def _weak(self, views: ViewPlan) -> np.ndarray:
        """Shifted and flipped images: (V, H, W, 3) uint8."""
        image = views.image + np.where(views.labeled, 0, self._first_unlabeled)
        top, left = (self.max_shift - views.shift).T
        rows = self._windows[image, top, left]
        flipped = np.flatnonzero(views.flip)
        rows[flipped] = self._windows[..., ::-1][image[flipped], top[flipped], left[flipped]]
        return rows[..., None].view(np.uint8)

    def _feed(self, views: ViewPlan) -> None:
        feed = self._pipeline.feed_input
        feed("weak", self._weak(views))
        for name, value in transformations.warps(views.ops, views.levels, self.height, self.width).items():
            feed(name, value)
        self._repaints.append(transformations.repaints(views.ops, views.levels, views.centre))

    def submit(self, views: ViewPlan) -> None:
        """Hands over one step's plan and returns at once: DALI's threads make the views.

        Args:
            views: exactly `rows` rows.

        Raises:
            ValueError: another number of rows, or a shift beyond `max_shift`.
            RuntimeError: `prefetch` batches are in flight already, or the pipeline is closed.
        """
        if self._pipeline is None:
            raise RuntimeError("the view pipeline is closed")
        if self._in_flight >= self.prefetch:
            raise RuntimeError(f"{self.prefetch} batches are in flight already: collect one first")
        if len(views.image) != self.rows:
            raise ValueError(f"this pipeline makes {self.rows} rows a batch, the plan has {len(views.image)}")
        largest = np.abs(views.shift).max()
        if largest > self.max_shift:
            raise ValueError(f"shifts go up to {self.max_shift} pixels here, the plan has {largest}")
        self._feed(views)
        self._pipeline.schedule_run()
        self._in_flight += 1

    def collect(self) -> torch.Tensor:
        """Views of the oldest plan handed over, in its row order; waits for them.

        Returns:
            (V, H, W, 3) uint8 on the device. It owns its memory: later batches leave it alone. On the GPU it
            is ready for torch's current stream, without the host having waited.

        Raises:
            RuntimeError: nothing is in flight.
        """
        if not self._in_flight:
            raise RuntimeError("no batch is in flight: submit a plan first")
        stream = torch.cuda.current_stream(self._pipeline.device_id) if self.device == "gpu" else None
        (views,) = self._pipeline.outputs(cuda_stream=stream)
        self._in_flight -= 1
        return torch.from_dlpack(views.as_tensor())

    def close(self) -> None:
        """Waits for batches in flight and lets the pipeline go; may be called twice."""
        while self._in_flight:
            self._pipeline.outputs()
            self._in_flight -= 1
        self._pipeline = None
