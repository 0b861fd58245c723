"""Where a view pipeline reads its images: from the device, or from the host batch by batch."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.data import cache

_UPLOAD_CHUNK = 4096  # Images per copy, which bounds host memory.


class ImageStore:
    """The images of a view pipeline, either resident on its device or gathered on the host for each batch.

    Args:
        images: (N, H, W, 3) uint8, in memory or memory-mapped.
        device: Device where views are made. On a GPU, copies are asynchronous on the current stream.
        resident: Keep all images on the device.
    """

    def __init__(self, images: np.ndarray, device: torch.device, resident: bool) -> None:
        self._images, self._device = images, device
        self._resident: torch.Tensor | None = None
        if resident and device.type == "cpu":
            self._resident = torch.from_numpy(images)
        elif resident:
            self._resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
            for first in range(0, len(images), _UPLOAD_CHUNK):
                part = torch.from_numpy(np.ascontiguousarray(images[first : first + _UPLOAD_CHUNK]))
                self._resident[first : first + _UPLOAD_CHUNK].copy_(part)
                cache.unmap(images)

    def prepare(self, indices: np.ndarray) -> tuple[np.ndarray, torch.Tensor | None]:
        """Gather a batch's images on the host unless all are resident; a background thread may call it.

        Args:
            indices: (V,) int64, indices of the images.

        Returns:
            The position of each view's image in what `on_device` returns: (V,) int64. And the images to pass to it:
            each distinct one once, pinned for a GPU, or None if all are resident.
        """
        if self._resident is not None:
            return indices, None
        distinct, positions = np.unique(indices, return_inverse=True)
        shape = (len(distinct), *self._images.shape[1:])
        gathered = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._images.take(distinct, axis=0, out=gathered.numpy(), mode="clip")
        return positions, gathered

    def on_device(self, gathered: torch.Tensor | None) -> torch.Tensor:
        """Return the images that a batch's positions refer to: (n, H, W, 3) uint8 on the device."""
        if gathered is None:
            assert self._resident is not None, "prepare gathers images unless all are resident"
            return self._resident
        return gathered.to(self._device, non_blocking=True)

    def release(self) -> None:
        """Free the resident images."""
        self._resident = None
