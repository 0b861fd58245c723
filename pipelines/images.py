"""Where a view pipeline reads its images: from the device, or from the host batch by batch; and its stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from pipelines.data import cache

_UPLOAD_CHUNK = 4096  # Images per copy, which bounds host memory.


class ImageStore:
    """The images of a view pipeline, either resident on its device or gathered on the host for each batch.

    Args:
        images: (N, H, W, 3) uint8, in memory or memory-mapped.
        device: "cpu" or "gpu", where views are made.
        device_id: Index of the GPU.
        resident: Keep all images on the device.

    Attributes:
        device: The device as torch names it.
        stream: The pipeline's own stream; None on a CPU. Memory that the pipeline reads and writes is allocated on it,
            which orders reuse.
    """

    def __init__(self, images: np.ndarray, device: str, device_id: int, resident: bool) -> None:
        on_gpu = device == "gpu"
        self.device = torch.device("cuda", device_id) if on_gpu else torch.device("cpu")
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._images = images
        self._resident: torch.Tensor | None = None
        if resident and not on_gpu:
            self._resident = torch.from_numpy(images)
        elif resident:
            with self.on_stream():
                self._resident = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
                for first in range(0, len(images), _UPLOAD_CHUNK):
                    part = torch.from_numpy(np.ascontiguousarray(images[first : first + _UPLOAD_CHUNK]))
                    self._resident[first : first + _UPLOAD_CHUNK].copy_(part)
                    cache.unmap(images)

    def on_stream(self) -> AbstractContextManager[None]:
        """Make the pipeline's stream the current one; on a CPU, do nothing."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

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
        gathered = torch.empty(shape, dtype=torch.uint8, pin_memory=self.stream is not None)
        self._images.take(distinct, axis=0, out=gathered.numpy(), mode="clip")
        return positions, gathered

    def on_device(self, gathered: torch.Tensor | None) -> torch.Tensor:
        """Return the images that a batch's positions refer to: (n, H, W, 3) uint8 on the device."""
        if gathered is None:
            assert self._resident is not None, "prepare gathers images unless all are resident"
            return self._resident
        return gathered.to(self.device, non_blocking=True)

    def release(self) -> None:
        """Wait for the pipeline's stream and free the resident images."""
        if self.stream:
            self.stream.synchronize()
        self._resident = None
