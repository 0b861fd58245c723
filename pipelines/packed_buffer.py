"""Arrays packed into one byte buffer, so that a single copy moves all of them to a device."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # In bytes. Allows vectorized reads, and keeps alignment independent of the other arrays' sizes.


class Layout:
    """Position of each array in the buffer, computed once for all buffers of the layout.

    Args:
        arrays: Name, dtype and shape of each array.
    """

    def __init__(self, arrays: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self.bytes = 0
        self._arrays, self._tensors = [], []
        for name, dtype, shape in arrays:
            blank = torch.empty(shape, dtype=dtype)
            self._arrays.append((name, shape, blank.numpy().dtype, self.bytes))
            self._tensors.append((name, dtype, shape, blank.stride(), self.bytes // dtype.itemsize))
            size = prod(shape) * dtype.itemsize
            self.bytes += size + -size % _ALIGNMENT

    def allocate(self, pinned: bool = False) -> Tensor:
        """Return an uninitialized buffer: (bytes,) uint8 on the host.

        Args:
            pinned: Allocate page-locked memory for asynchronous copies; torch keeps it alive until a copy has finished.
        """
        return torch.empty(self.bytes, dtype=torch.uint8, pin_memory=pinned)

    def arrays(self, buffer: Tensor) -> dict[str, np.ndarray]:
        """Return the arrays of a host buffer as numpy views; much faster than `tensors`, for writing."""
        content = buffer.numpy()
        return {name: np.ndarray(shape, dtype, content, offset) for name, shape, dtype, offset in self._arrays}

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the arrays of a buffer on any device as tensor views.

        Args:
            buffer: A buffer from `allocate`, or a copy of one.

        Raises:
            ValueError: The buffer has the wrong size.
        """
        if buffer.numel() != self.bytes:
            raise ValueError(f"a buffer of this layout has {self.bytes} bytes, got {buffer.numel()}")
        # One call per array instead of split, view and slice: this runs every step, in the main thread.
        typed = {dtype: buffer.view(dtype) for dtype in {dtype for _, dtype, *_ in self._tensors}}
        return {
            name: typed[dtype].as_strided(shape, stride, offset) for name, dtype, shape, stride, offset in self._tensors
        }
