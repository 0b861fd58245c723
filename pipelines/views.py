"""Views: the rows of a plan, made from images by one DALI pipeline in the background.

The graph is the same on CPU and GPU: a weak augmentation, then `OPS_PER_VIEW` rounds of transformations. It
is a pure function of images and plan rows, so the same plan gives the same bytes whatever the number of
threads and of batches in flight. `Views` is what it has in common with the kernel of `pipelines/fused.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from pipelines import ctaugment, transformations
from pipelines.plan import OPS_PER_VIEW, ViewPlan

_INPUTS = (("padded", "HWC"), ("start", ""), ("flip", ""))


@pipeline_def(enable_conditionals=True)
def _graph(height: int, width: int, device: str) -> Any:
    padded, start, flip = (fn.external_source(name=name, layout=layout) for name, layout in _INPUTS)
    if device == "gpu":
        padded = padded.gpu()
    # the weak augmentation: images come with a reflected margin, so a shifted image is a window of that
    view = fn.slice(padded, start=start, shape=(height, width), axes=(0, 1))
    view = fn.flip(view, horizontal=flip)
    for turn in range(OPS_PER_VIEW):
        inputs = {name: fn.external_source(name=f"{name}{turn}") for name in transformations.INPUTS}
        view = transformations.transform(view, inputs, device)
    return view


def plain_views(rows: int) -> ViewPlan:
    """A plan whose rows are the first labeled image as it is; a warm-up's."""
    return ViewPlan(
        image=np.zeros(rows, dtype=np.int64),
        labeled=np.ones(rows, dtype=bool),
        shift=np.zeros((rows, 2), dtype=np.int32),
        flip=np.zeros(rows, dtype=np.int32),
        ops=np.full((rows, OPS_PER_VIEW), ctaugment.IDENTITY, dtype=np.int32),
        levels=np.zeros((rows, OPS_PER_VIEW, 2), dtype=np.float32),
        centre=np.zeros((rows, OPS_PER_VIEW, 2), dtype=np.float32),
    )


def _checked(images: np.ndarray, name: str) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(
            f"{name} images must be (N, H, W, 3) uint8 with N > 0, got {images.shape} {images.dtype}; "
            "repeat the channel of grey images"
        )
    return images


class Views(ABC):
    """Makes view rows from plans, ahead of the step that needs them: a queue of batches.

    The weak augmentation (ReMixMatch, section 4) moves the image by `shift` = (dy, dx), down and to the right
    for positive numbers, and reflects what is missing as `numpy.pad(mode="reflect")` does; then it mirrors
    the image where `flip` is 1. The strong augmentation's transformations (section 3.2.2) follow, left to
    right.

    Args:
        labeled: (Nl, H, W, 3) uint8.
        unlabeled: (Nu, H, W, 3) uint8 of the same sides, or None.
        rows: V, rows of every plan.
        max_shift: the largest shift that a plan may hold, in pixels; less than either side.
        device: "cpu" or "gpu", where views are made and left.
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
        device: str,
        prefetch: int,
    ) -> None:
        self._sets = [_checked(labeled, "labeled")]
        if unlabeled is not None:
            self._sets.append(_checked(unlabeled, "unlabeled"))
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
        self._in_flight = 0
        self._closed = False

    @abstractmethod
    def _begin(self, views: ViewPlan) -> None:
        """Has the views of a plan made."""

    @abstractmethod
    def _finish(self) -> torch.Tensor:
        """Returns the oldest batch begun."""

    @abstractmethod
    def _release(self) -> None:
        """Lets go of what views are made with and from; nothing is in flight."""

    def _places(self, views: ViewPlan) -> np.ndarray:
        """Rows of the two sets one after the other: (V,) int64."""
        return views.image + np.where(views.labeled, 0, len(self._sets[0]))

    def _round_inputs(self, views: ViewPlan, turn: int) -> dict[str, np.ndarray]:
        return transformations.round_inputs(
            views.ops[:, turn], views.levels[:, turn], views.centre[:, turn], self.height, self.width
        )

    def submit(self, views: ViewPlan) -> None:
        """Hands over one step's plan.

        Args:
            views: exactly `rows` rows.

        Raises:
            ValueError: another number of rows, or a shift beyond `max_shift`.
            RuntimeError: `prefetch` batches are in flight already, or the pipeline is closed.
        """
        if self._closed:
            raise RuntimeError("the view pipeline is closed")
        if self._in_flight >= self.prefetch:
            raise RuntimeError(f"{self.prefetch} batches are in flight already: collect one first")
        if len(views.image) != self.rows:
            raise ValueError(f"this pipeline makes {self.rows} rows a batch, the plan has {len(views.image)}")
        largest = np.abs(views.shift).max()
        if largest > self.max_shift:
            raise ValueError(f"shifts go up to {self.max_shift} pixels here, the plan has {largest}")
        self._begin(views)
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
        views = self._finish()
        self._in_flight -= 1
        return views

    def close(self) -> None:
        """Waits for batches in flight and lets the pipeline go; may be called twice."""
        while self._in_flight:
            self.collect()
        if not self._closed:
            self._closed = True
            self._release()


class ViewPipeline(Views):
    """`Views` by DALI: `submit` returns at once, and DALI's threads make the views.

    Both sets are held in host memory with a margin of `max_shift` pixels all around.

    Args:
        device_id: which GPU.
        threads: DALI's CPU threads.
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
        super().__init__(labeled, unlabeled, rows, max_shift, device, prefetch)
        edges = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
        self._padded = np.concatenate([np.pad(images, edges, mode="reflect") for images in self._sets])
        self._pipeline: Any = _graph(
            self.height,
            self.width,
            device,
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
        plain = plain_views(self.rows)
        for _ in range(self.prefetch):
            self._feed(plain)
        self._pipeline.schedule_run()
        for _ in range(self.prefetch):
            self._pipeline.outputs()

    def _feed(self, views: ViewPlan) -> None:
        feed = self._pipeline.feed_input
        feed("padded", self._padded[self._places(views)])
        feed("start", np.ascontiguousarray(self.max_shift - views.shift, dtype=np.int32))
        feed("flip", np.ascontiguousarray(views.flip, dtype=np.int32))
        for turn in range(OPS_PER_VIEW):
            for name, value in self._round_inputs(views, turn).items():
                feed(f"{name}{turn}", value)

    def _begin(self, views: ViewPlan) -> None:
        self._feed(views)
        self._pipeline.schedule_run()

    def _finish(self) -> torch.Tensor:
        stream = torch.cuda.current_stream(self._pipeline.device_id) if self.device == "gpu" else None
        (views,) = self._pipeline.outputs(cuda_stream=stream)
        return torch.from_dlpack(views.as_tensor())

    def _release(self) -> None:
        self._pipeline = None
