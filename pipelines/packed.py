"""Arrays end to end in one buffer of bytes, so that one copy takes all of them to a device."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of each array, by name
_ALIGNMENT = 16  # bytes, so that every array may be read wide, and is aligned alike whatever the sizes of the others


def _sizes(layout: Layout) -> list[int]:
    sizes = [prod(shape) * dtype.itemsize for dtype, shape in layout.values()]
    return [size + -size % _ALIGNMENT for size in sizes]


def allocate(layout: Layout, pinned: bool = False) -> Tensor:
    """A buffer for arrays of that layout: (bytes,) uint8 on the host, uninitialised.

    Args:
        layout: the arrays.
        pinned: in memory from which a GPU copies by itself; torch keeps that until the copy is over.
    """
    return torch.empty(sum(_sizes(layout)), dtype=torch.uint8, pin_memory=pinned)


def unpack(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The arrays in a buffer of that layout, on whatever device, as views of it."""
    pieces = zip(layout.items(), buffer.split(_sizes(layout)), strict=True)
    return {name: piece.view(dtype)[: prod(shape)].view(shape) for (name, (dtype, shape)), piece in pieces}
