"""Views: the rows of a plan, made from images ahead of the step that needs them.

Who makes them, and on which device, is up to the classes of `pipelines/dali.py` and `pipelines/fused.py`; what both
have in common is here. Views are a pure function of images and plan rows, so the same plan gives the same bytes
whatever the number of threads and of pending batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from pipelines import cache, ctaugment
from pipelines.plan import OPS_PER_VIEW, ViewPlan

# of larger sets no more than some hundred images stay mapped, each of which can be a huge page of 2 MiB: otherwise the
# process's memory would seem to grow with the set
_MAPPED_BYTES, _MAPPED_ROWS = 2**30, 128


def plain_views(rows: int) -> ViewPlan:
    """A plan whose rows are the first labeled image as it is; a warm-up's."""
    return ViewPlan(
        image=np.zeros(rows, dtype=np.int64),
        labeled=np.ones(rows, dtype=bool),
        shift=np.zeros((rows, 2), dtype=np.int32),
        flip=np.zeros(rows, dtype=np.int32),
        ops=np.full((rows, OPS_PER_VIEW), ctaugment.IDENTITY, dtype=np.int32),
        levels=np.zeros((rows, OPS_PER_VIEW, 2), dtype=np.float32),
        center=np.zeros((rows, OPS_PER_VIEW, 2), dtype=np.float32),
    )


class Views(ABC):
    """Makes view rows from plans: a queue of batches.

    The weak augmentation (ReMixMatch, section 4) moves the image by `shift` = (dy, dx), down and to the right
    for positive numbers, and reflects what is missing as `numpy.pad(mode="reflect")` does; then it mirrors
    the image where `flip` is 1. The strong augmentation's transformations (section 3.2.2) follow, left to
    right.

    Args:
        images: (N, H, W, 3) uint8, in memory or memory-mapped: never copied as a whole on the host.
        labeled: (Nl,) int64, rows of the images that a plan's labeled rows number.
        unlabeled: (Nu,) int64, those that its unlabeled rows number; None without any.
        rows: V, rows of every plan.
        max_shift: the largest shift that a plan may hold, in pixels; less than either side.
        device: "cpu" or "gpu", where views are made and left.
        prefetch: how many batches may be pending, at least 1.

    Raises:
        ValueError: images, rows, max_shift, device or prefetch are not as stated.
    """

    def __init__(
        self,
        images: np.ndarray,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        rows: int,
        max_shift: int,
        device: str,
        prefetch: int,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
            raise ValueError(
                f"images must be (N, H, W, 3) uint8 with N > 0, got {images.shape} {images.dtype}; "
                "repeat the channel of grey images"
            )
        self._numbers = labeled if unlabeled is None else np.concatenate([labeled, unlabeled])
        self._labeled = len(labeled)
        if not len(self._numbers) or self._numbers.min() < 0 or self._numbers.max() >= len(images):
            raise ValueError(f"labeled and unlabeled must number the {len(images)} images")
        self._images = np.asarray(images)  # a view of a memory map without its overhead at every index
        self.height, self.width = images.shape[1:3]
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
        self._pending = 0
        self._closed = False
        self._rows_read = 0

    @abstractmethod
    def _prepare(self, views: ViewPlan) -> Any:
        """The host's part of a batch; may be called in a thread of its own."""

    @abstractmethod
    def _begin(self, prepared: Any) -> None:
        """Has a batch made."""

    @abstractmethod
    def _finish(self) -> torch.Tensor:
        """Returns the oldest batch begun."""

    @abstractmethod
    def _release(self) -> None:
        """Releases what views are made with and from; nothing is pending."""

    def _places(self, views: ViewPlan) -> np.ndarray:
        """The image of each row: (V,) int64."""
        return self._numbers.take(views.image + np.where(views.labeled, 0, self._labeled))

    def prepare(self, views: ViewPlan) -> Any:
        """Does what a batch needs of the host, which is a good part of a step's host time: a thread may do it ahead.

        Args:
            views: exactly `rows` rows.

        Returns:
            What `submit` takes, once.

        Raises:
            ValueError: another number of rows, or a shift beyond `max_shift`.
        """
        if len(views.image) != self.rows:
            raise ValueError(f"this pipeline makes {self.rows} rows a batch, the plan has {len(views.image)}")
        largest = np.abs(views.shift).max()
        if largest > self.max_shift:
            raise ValueError(f"shifts go up to {self.max_shift} pixels here, the plan has {largest}")
        prepared = self._prepare(views)
        self._rows_read += self.rows
        if self._rows_read >= _MAPPED_ROWS and self._images.nbytes > _MAPPED_BYTES:
            cache.unmap(self._images)
            self._rows_read = 0
        return prepared

    def submit(self, prepared: Any) -> None:
        """Hands over a batch: what `prepare` made of its plan.

        Raises:
            RuntimeError: `prefetch` batches are pending already, or the pipeline is closed.
        """
        if self._closed:
            raise RuntimeError("the view pipeline is closed")
        if self._pending >= self.prefetch:
            raise RuntimeError(f"{self.prefetch} batches are pending already: collect one first")
        self._begin(prepared)
        self._pending += 1

    def collect(self) -> torch.Tensor:
        """Views of the oldest batch handed over, in its plan's row order.

        Returns:
            (V, H, W, 3) uint8 on the device. It owns its memory: later batches leave it alone. On the GPU it
            is ready for torch's current stream, without the host having waited.

        Raises:
            RuntimeError: nothing is pending.
        """
        if not self._pending:
            raise RuntimeError("no batch is pending: submit a plan first")
        views = self._finish()
        self._pending -= 1
        return views

    def close(self) -> None:
        """Waits for pending batches and releases the pipeline; may be called twice."""
        while self._pending:
            self.collect()
        if not self._closed:
            self._closed = True
            self._release()
