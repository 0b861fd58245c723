"""Base class of the view pipelines, which make the augmented images of a plan ahead of the step that uses them.

`pipelines/dali.py`, `dali_graph.py` and `fused.py` implement it. Views are a pure function of the images and the plan:
the same plan gives the same bytes for any number of threads and pending batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from pipelines import ctaugment
from pipelines.data import cache
from pipelines.plan import OPS_PER_VIEW, ViewPlan

# Memory-mapped sets larger than _MAPPED_BYTES are unmapped every _MAPPED_IMAGES images. Otherwise each image could keep
# a huge page of 2 MiB mapped, and the resident memory of the process would appear to grow with the set.
_MAPPED_BYTES, _MAPPED_IMAGES = 2**30, 128

MAX_GRAPH_SIDE = 2048  # Of the DALI graph: an image's sum of gray levels must fit in 32 bits.


def plain_views(count: int) -> ViewPlan:
    """Return a plan of `count` copies of the first labeled image without augmentation, for warm-up."""
    return ViewPlan(
        image=np.zeros(count, dtype=np.int64),
        labeled=np.ones(count, dtype=bool),
        shift=np.zeros((count, 2), dtype=np.int32),
        flip=np.zeros(count, dtype=np.int32),
        ops=np.full((count, OPS_PER_VIEW), ctaugment.IDENTITY, dtype=np.int32),
        levels=np.zeros((count, OPS_PER_VIEW, 2), dtype=np.float32),
        center=np.zeros((count, OPS_PER_VIEW, 2), dtype=np.float32),
    )


class Views(ABC):
    """Queue of batches of views, made from plans.

    The weak augmentation (ReMixMatch, section 4) translates the image by `shift` = (dy, dx), down and to the right if
    positive, with padding as in `numpy.pad(mode="reflect")`, then mirrors it if `flip` is 1. The two transformations of
    the strong augmentation (section 3.2.2) follow in order.

    Args:
        images: (N, H, W, 3) uint8, in memory or memory-mapped; never copied as a whole on the host.
        labeled: (Nl,) int64, the labeled set as indices into `images`.
        unlabeled: (Nu,) int64, the unlabeled set as indices into `images`; None without unlabeled data.
        batch_size: V, views per batch.
        max_shift: Largest shift that a plan may contain, in pixels; smaller than either side.
        device: "cpu" or "gpu", where views are made.
        prefetch: Maximum number of pending batches, at least 1.

    Raises:
        ValueError: An argument is invalid.
    """

    def __init__(
        self,
        images: np.ndarray,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        batch_size: int,
        max_shift: int,
        device: str,
        prefetch: int,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
            raise ValueError(
                f"images must be (N, H, W, 3) uint8 with N > 0, got {images.shape} {images.dtype}; "
                "convert grayscale images to RGB"
            )
        self._indices = labeled if unlabeled is None else np.concatenate([labeled, unlabeled])
        self._labeled = len(labeled)
        if not len(self._indices) or self._indices.min() < 0 or self._indices.max() >= len(images):
            raise ValueError(f"labeled and unlabeled must be indices from 0 to {len(images) - 1}")
        self._images = np.asarray(images)  # Avoids np.memmap's overhead at every index.
        self.height, self.width = images.shape[1:3]
        if not 0 <= max_shift < min(self.height, self.width):
            largest = min(self.height, self.width) - 1
            raise ValueError(f"max_shift must be from 0 to {largest} for these images, got {max_shift}")
        if device not in ("cpu", "gpu"):
            raise ValueError(f'device must be "cpu" or "gpu", got "{device}"')
        if batch_size < 1 or prefetch < 1:
            raise ValueError(f"batch_size and prefetch must be at least 1, got {batch_size} and {prefetch}")
        self.batch_size = batch_size
        self.max_shift = max_shift
        self.device = device
        self.prefetch = prefetch
        self._pending = 0
        self._closed = False
        self._images_read = 0

    @abstractmethod
    def _prepare(self, views: ViewPlan) -> Any:
        """Do the host's part of a batch; may be called from another thread."""

    @abstractmethod
    def _begin(self, prepared: Any) -> None:
        """Start making a batch."""

    @abstractmethod
    def _finish(self) -> torch.Tensor:
        """Return the oldest batch started."""

    @abstractmethod
    def _release(self) -> None:
        """Release all resources; no batch is pending."""

    def _image_indices(self, views: ViewPlan) -> np.ndarray:
        """Return the index of each view's image: (V,) int64."""
        return self._indices.take(views.image + np.where(views.labeled, 0, self._labeled))

    def prepare(self, views: ViewPlan) -> Any:
        """Do the host's part of a batch: a large part of a step's host time, which a thread can do ahead.

        Args:
            views: Plan of exactly `batch_size` views.

        Returns:
            The argument of `submit`, to be used once.

        Raises:
            ValueError: The number of views is not `batch_size`, or a shift exceeds `max_shift`.
        """
        if len(views.image) != self.batch_size:
            raise ValueError(f"expected a plan of {self.batch_size} views, got {len(views.image)}")
        largest = np.abs(views.shift).max()
        if largest > self.max_shift:
            raise ValueError(f"shifts must be at most max_shift = {self.max_shift} pixels, got {largest}")
        prepared = self._prepare(views)
        self._images_read += self.batch_size
        if self._images_read >= _MAPPED_IMAGES and self._images.nbytes > _MAPPED_BYTES:
            cache.unmap(self._images)
            self._images_read = 0
        return prepared

    def submit(self, prepared: Any) -> None:
        """Submit a batch from `prepare`.

        Raises:
            RuntimeError: `prefetch` batches are already pending, or the pipeline is closed.
        """
        if self._closed:
            raise RuntimeError("the view pipeline is closed")
        if self._pending >= self.prefetch:
            raise RuntimeError(f"{self.prefetch} batches are already pending; collect one first")
        self._begin(prepared)
        self._pending += 1

    def collect(self) -> torch.Tensor:
        """Return the views of the oldest pending batch, in the order of its plan.

        Returns:
            (V, H, W, 3) uint8 on the device. It owns its memory: later batches do not overwrite it. On the GPU it is
            ready for use on the current stream, without a host synchronization.

        Raises:
            RuntimeError: No batch is pending.
        """
        if not self._pending:
            raise RuntimeError("no batch is pending; submit one first")
        views = self._finish()
        self._pending -= 1
        return views

    def close(self) -> None:
        """Wait for pending batches and release the pipeline; may be called more than once."""
        while self._pending:
            self.collect()
        if not self._closed:
            self._closed = True
            self._release()
