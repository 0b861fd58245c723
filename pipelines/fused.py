"""Views by one kernel: with the images resident on the device, a step's plan is all that travels to it.

The weak augmentation and both transformations of every row are one launch (`kernels/augment.py`), on a stream of its
own beside the training step's. Where the images do not fit on the device, those of a batch travel with its plan. On a
CPU the kernel's twin does the same at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from kernels.augment import CODES, MAX_SIDE, augment_views
from pipelines import cache, ctaugment, geometric, packed
from pipelines.plan import OPS_PER_VIEW, ViewPlan
from pipelines.views import Views, plain_views

# the kernel's number of each transformation; those that are not photometric are affine maps
KERNEL_CODES = np.array([CODES.get(name, CODES["affine"]) for name in ctaugment.NAMES], dtype=np.int32)


# the kernel's arguments after the images: dtype, and shape of a row
_FIELDS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "image": (torch.int64, ()),
    "shift": (torch.int32, (2,)),
    "flip": (torch.int32, ()),
    "ops": (torch.int32, (OPS_PER_VIEW,)),
    "parameters": (torch.float32, (OPS_PER_VIEW, 6)),
}


_UPLOADED = 4096  # images a copy


@dataclass(frozen=True)
class _Prepared:
    """A batch's arguments of the kernel, and its images, which those number, where they do not lie on the device."""

    arguments: torch.Tensor
    images: torch.Tensor | None


class FusedViews(Views):
    """`Views` by one kernel, for images of up to MAX_SIDE pixels a side; on the CPU `submit` makes them itself.

    On the GPU neither `submit` nor `collect` waits for it.

    Args:
        device_id: which GPU.
        resident: whether the images lie on the device, or a batch's are gathered into pinned memory by `prepare`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        rows: int,
        max_shift: int,
        device: str = "cpu",
        device_id: int = 0,
        prefetch: int = 2,
        resident: bool = True,
    ) -> None:
        super().__init__(images, labeled, unlabeled, rows, max_shift, device, prefetch)
        if max(self.height, self.width) > MAX_SIDE:
            raise ValueError(
                f"the fused kernel takes images of up to {MAX_SIDE}x{MAX_SIDE} pixels, got {self.height}x{self.width}; "
                "use the DALI pipeline"
            )
        self._layout = packed.Layout((name, dtype, (rows, *shape)) for name, (dtype, shape) in _FIELDS.items())
        self._made: deque[torch.Tensor] = deque()
        self._resident: torch.Tensor | None = None
        if device == "cpu":
            self._resident = torch.from_numpy(self._images) if resident else None  # where they are
            return
        self._gpu = torch.device("cuda", device_id)
        self._stream = torch.cuda.Stream(self._gpu)
        self._ready: deque[torch.cuda.Event] = deque()
        # all memory that the kernel reads and writes is the stream's own, so that its order is the stream's
        with torch.cuda.stream(self._stream):
            if resident:
                self._resident = torch.empty(self._images.shape, dtype=torch.uint8, device=self._gpu)
                for first in range(0, len(images), _UPLOADED):  # bounds the host's memory
                    part = torch.from_numpy(np.ascontiguousarray(self._images[first : first + _UPLOADED]))
                    self._resident[first : first + _UPLOADED].copy_(part)
                    cache.unmap(self._images)
        # compiles the kernel, which must not happen while a CUDA graph is captured
        self._begin(self._prepare(plain_views(rows)))
        self._finish()

    def _prepare(self, views: ViewPlan) -> _Prepared:
        """The kernel's arguments in one buffer of bytes, and images that are not on the device."""
        pinned = self.device == "gpu"
        buffer = self._layout.allocate(pinned)
        into = self._layout.arrays(buffer)
        images = None
        if self._resident is not None:
            into["image"][:] = self._places(views)
        else:
            # each image of the batch once, however many views of it there are
            distinct, into["image"][:] = np.unique(self._places(views), return_inverse=True)
            images = torch.empty((len(distinct), *self._images.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
            self._images.take(distinct, axis=0, out=images.numpy(), mode="clip")
        into["shift"][:] = views.shift
        into["flip"][:] = views.flip
        into["ops"][:] = KERNEL_CODES.take(views.ops)
        into["parameters"][:] = geometric.op_parameters(views.ops, views.levels, views.center, self.height, self.width)
        return _Prepared(buffer, images)

    def _begin(self, prepared: _Prepared) -> None:
        images = prepared.images if self._resident is None else self._resident
        assert images is not None
        if self.device == "cpu":
            self._made.append(augment_views(images, **self._layout.tensors(prepared.arguments)))
            return
        with torch.cuda.stream(self._stream):
            there = prepared.arguments.to(self._gpu, non_blocking=True)
            images = images.to(self._gpu, non_blocking=True)
            self._made.append(augment_views(images, **self._layout.tensors(there)))
            ready = torch.cuda.Event()
            ready.record(self._stream)
        self._ready.append(ready)

    def _finish(self) -> torch.Tensor:
        views = self._made.popleft()
        if self.device == "gpu":
            stream = torch.cuda.current_stream(self._gpu)
            stream.wait_event(self._ready.popleft())
            # its memory may go to a later batch only when this stream, too, is done with it
            views.record_stream(stream)
        return views

    def _release(self) -> None:
        if self.device == "gpu":
            self._stream.synchronize()
        self._resident = None
