"""The input of a training step: views on the device, and the plan in one buffer that is copied at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from engine.method.batch_layout import RankPlan
from pipelines.packed_buffer import Layout

_layout = lru_cache(maxsize=4)(Layout)  # Constant during a run.


@dataclass(frozen=True)
class StepInput:
    """The input of one rank's step: its views, and the arrays of `RankPlan` and `stop` as views of one buffer.

    Attributes:
        views: (`BatchLayout.view_count`, H, W, 3) uint8 on the device, in the order of `BatchLayout.step_views`.
        packed: (bytes,) uint8, the buffer that holds all arrays below. It stays in the host's memory, pinned if the
            device is a GPU, until the step copies it.
        source: See `RankPlan`, as for the following arrays.
        partner: (N,) int64.
        lam: (N,) float32.
        rotations: (N,) int64.
        target_index: (n M / R,) int64.
        partner_target_index: (n M / R,) int64.
        images: (U,) int64; empty unless the targets use the positions of the images.
        labels: (B,) int64.
        interpolation: (n_x M / R, L) float32.
        stop: (1,) float32, 1 if this rank was requested to stop. The step averages it over the ranks, so that all of
            them stop after the same step.
    """

    views: Tensor
    packed: Tensor
    source: Tensor
    partner: Tensor
    lam: Tensor
    rotations: Tensor
    target_index: Tensor
    partner_target_index: Tensor
    images: Tensor
    labels: Tensor
    interpolation: Tensor
    stop: Tensor

    @classmethod
    def pack(cls, views: Tensor, plan: RankPlan, device: torch.device, stop: bool = False) -> StepInput:
        """Pack a plan and the stop request into a buffer on the host, and copy the views to the device."""
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
        """Return the input with the packed buffer on the device; its arrays remain views of the buffer."""
        if self.packed.device == device:
            return self
        return self._with(self.views, self.packed.to(device, non_blocking=True))

    def clone(self) -> StepInput:
        """Return a copy on the device of the views."""
        packed = torch.empty_like(self.packed, device=self.views.device)
        own = self._with(torch.empty_like(self.views), packed)
        own.copy_(self)
        return own

    def copy_(self, other: StepInput) -> None:
        """Copy another input into this one: one copy of the views, one of the packed buffer."""
        self.views.copy_(other.views, non_blocking=True)
        self.packed.copy_(other.packed, non_blocking=True)

    def _with(self, views: Tensor, packed: Tensor) -> StepInput:
        arrays = {name: part for name, part in vars(self).items() if name not in ("views", "packed")}
        layout = _layout(tuple((name, part.dtype, tuple(part.shape)) for name, part in arrays.items()))
        return self._of(views, packed, layout)
