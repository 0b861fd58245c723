"""View pipeline with a fused kernel. With the images resident on the GPU, only the plan is transferred each step.

One launch (`kernels/augment.py`), on its own stream, applies the weak augmentation and both transformations to all
views. If the images do not fit on the GPU, each batch's images are transferred with its plan. On a CPU the reference
implementation of the kernel runs synchronously.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from kernels.augment import CODES, MAX_SIDE, augment_views
from pipelines import ctaugment, geometric
from pipelines.images import ImageStore
from pipelines.packed_buffer import Layout
from pipelines.plan import OPS_PER_VIEW, ViewPlan
from pipelines.views import Views, plain_views

# The kernel's code of each transformation; non-photometric ones are affine maps.
KERNEL_CODES = np.array([CODES.get(name, CODES["affine"]) for name in ctaugment.NAMES], dtype=np.int32)


# The kernel's arguments after the images: dtype and shape per view.
_FIELDS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "image": (torch.int64, ()),
    "shift": (torch.int32, (2,)),
    "flip": (torch.int32, ()),
    "ops": (torch.int32, (OPS_PER_VIEW,)),
    "parameters": (torch.float32, (OPS_PER_VIEW, 6)),
}


@dataclass(frozen=True)
class _Prepared:
    """Kernel arguments of a batch, and the images that they index unless all images are resident."""

    arguments: torch.Tensor
    images: torch.Tensor | None


class FusedViews(Views):
    """View pipeline that runs the fused kernel, for images of up to MAX_SIDE pixels a side.

    On the GPU, `submit` and `collect` never synchronize with the host. On the CPU, `submit` makes the views itself.

    Args:
        device_id: Index of the GPU.
        resident: Keep all images on the device; if False, `prepare` gathers each batch's images in pinned memory.
    """

    def __init__(
        self,
        images: np.ndarray,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        batch_size: int,
        max_shift: int,
        device: str = "cpu",
        device_id: int = 0,
        prefetch: int = 2,
        resident: bool = True,
    ) -> None:
        super().__init__(images, labeled, unlabeled, batch_size, max_shift, device, prefetch)
        if max(self.height, self.width) > MAX_SIDE:
            raise ValueError(
                f"the fused kernel supports images of up to {MAX_SIDE}x{MAX_SIDE} pixels, got "
                f"{self.height}x{self.width}; use the DALI pipeline"
            )
        self._layout = Layout((name, dtype, (batch_size, *shape)) for name, (dtype, shape) in _FIELDS.items())
        self._made: deque[torch.Tensor] = deque()
        self._ready: deque[torch.cuda.Event] = deque()  # Empty on a CPU.
        self._store = ImageStore(self._images, device, device_id, resident)
        if device == "gpu":
            # Compile the kernel now: compilation is not allowed during CUDA graph capture.
            self._begin(self._prepare(plain_views(batch_size)))
            self._finish()

    def _prepare(self, views: ViewPlan) -> _Prepared:
        """Pack the kernel's arguments into one buffer and gather images that are not resident."""
        buffer = self._layout.allocate(pinned=self.device == "gpu")
        arguments = self._layout.arrays(buffer)
        arguments["image"][:], images = self._store.prepare(self._image_indices(views))
        parameters = geometric.op_parameters(views.ops, views.levels, views.center, self.height, self.width)
        arguments["shift"][:] = views.shift
        arguments["flip"][:] = views.flip
        arguments["ops"][:] = KERNEL_CODES.take(views.ops)
        arguments["parameters"][:] = parameters
        return _Prepared(buffer, images)

    def _begin(self, prepared: _Prepared) -> None:
        with self._store.on_stream():
            arguments = prepared.arguments.to(self._store.device, non_blocking=True)
            images = self._store.on_device(prepared.images)
            self._made.append(augment_views(images, **self._layout.tensors(arguments)))
        if self._store.stream:
            self._ready.append(self._store.stream.record_event())

    def _finish(self) -> torch.Tensor:
        views = self._made.popleft()
        if self._store.stream:
            stream = torch.cuda.current_stream(self._store.device)
            stream.wait_event(self._ready.popleft())
            # The allocator may reuse the memory only after the current stream has finished with it, too.
            views.record_stream(stream)
        return views

    def _release(self) -> None:
        self._store.release()
