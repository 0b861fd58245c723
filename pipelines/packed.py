"""Arrays end to end in one buffer of bytes, so that one copy takes all of them to a device."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, so that every array may be read wide, and is aligned alike whatever the sizes of the others


class Layout:
    """Where each array lies in a buffer; computed once for all buffers of that layout.

    Args:
        arrays: name, dtype and shape of each.
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
        """A buffer: (bytes,) uint8 on the host, uninitialised.

        Args:
            pinned: in memory from which a GPU copies by itself; torch keeps that until the copy is over.
        """
        return torch.empty(self.bytes, dtype=torch.uint8, pin_memory=pinned)

    def arrays(self, buffer: Tensor) -> dict[str, np.ndarray]:
        """The arrays in a buffer on the host, as views of it: for writing, in a fraction of the time of `tensors`."""
        content = buffer.numpy()
        return {name: np.ndarray(shape, dtype, content, offset) for name, shape, dtype, offset in self._arrays}

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """The arrays in a buffer, on whatever device, as views of it.

        Args:
            buffer: whole, as `allocate` gives it, or a copy.

        Raises:
            ValueError: the buffer is of another size.
        """
        if buffer.numel() != self.bytes:
            raise ValueError(f"a buffer of this layout has {self.bytes} bytes, got {buffer.numel()}")
        # one call an array, where split, view and slice would be three: this is done every step, in the main thread
        typed = {dtype: buffer.view(dtype) for dtype in {dtype for _, dtype, *_ in self._tensors}}
        return {
            name: typed[dtype].as_strided(shape, stride, offset) for name, dtype, shape, stride, offset in self._tensors
        }
