"""What a step is given: views on the device, and its plan in one buffer, so that one copy brings it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from engine.method.batch_layout import RankPlan
from pipelines.packed import Layout

_layout = lru_cache(maxsize=4)(Layout)  # that of a run never changes


@dataclass(frozen=True)
class StepInput:
    """A step's data: one rank's views, on the device, and `RankPlan`'s arrays and `stop`, parts of one buffer.

    Attributes:
        views: (V / R, H, W, 3) uint8, in the order of `BatchLayout.views`.
        packed: (bytes,) uint8, the arrays of the plan end to end, so that one copy brings them all: from pinned memory
            of the host, where it is until the step takes it.
        stop: (1,) float32, 1 where this rank has been asked to stop: the step tells all ranks, so that they stop at
            the same one.
    """

    views: Tensor
    packed: Tensor
    source: Tensor
    partner: Tensor
    lam: Tensor
    rotations: Tensor
    target_index: Tensor
    partner_target_index: Tensor
    labels: Tensor
    stop: Tensor

    @classmethod
    def pack(cls, views: Tensor, plan: RankPlan, device: torch.device, stop: bool = False) -> StepInput:
        """A step's plan beside its views, ready for the device, and whether this rank has been asked to stop."""
        arrays = vars(plan) | {"stop": np.array([stop], np.float32)}
        layout = _layout(tuple((name, torch.from_numpy(array).dtype, array.shape) for name, array in arrays.items()))
        buffer = layout.allocate(pinned=device.type == "cuda")
        for name, part in layout.arrays(buffer).items():
            part[:] = arrays[name]
        return cls._of(views.to(device, non_blocking=True), buffer, layout)

    @classmethod
    def _of(cls, views: Tensor, buffer: Tensor, layout: Layout) -> StepInput:
        return cls(views=views, packed=buffer, **layout.tensors(buffer))

    def to(self, device: torch.device) -> StepInput:
        """The same with the numbers, too, on the device; parts of `packed` stay parts of it."""
        if self.packed.device == device:
            return self
        return self._with(self.views, self.packed.to(device, non_blocking=True))

    def clone(self) -> StepInput:
        """The same on the views' device, in memory of its own."""
        packed = torch.empty_like(self.packed, device=self.views.device)
        own = self._with(torch.empty_like(self.views), packed)
        own.copy_(self)
        return own

    def copy_(self, other: StepInput) -> None:
        """Takes another input's values, by one copy of the views and one of all numbers."""
        self.views.copy_(other.views, non_blocking=True)
        self.packed.copy_(other.packed, non_blocking=True)

    def _with(self, views: Tensor, packed: Tensor) -> StepInput:
        numbers = {name: part for name, part in vars(self).items() if name not in ("views", "packed")}
        layout = _layout(tuple((name, part.dtype, tuple(part.shape)) for name, part in numbers.items()))
        return self._of(views, packed, layout)
