"""Views by one kernel: the images stay on the device, and a step's plan is all that travels to it.

The weak augmentation and both transformations of every row are one launch (`kernels/augment.py`), on a stream of its
own beside the training step's. On a CPU the kernel's twin does the same at once.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from kernels.augment import CODES, MAX_SIDE, augment_views
from pipelines import ctaugment, geometric, packed
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


class FusedViews(Views):
    """`Views` by one kernel, for images of up to 96x96 pixels; on the CPU `submit` makes them itself.

    Both sets are held on the device. On the GPU neither `submit` nor `collect` waits for it.

    Args:
        device_id: which GPU.
    """

    def __init__(
        self,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        rows: int,
        max_shift: int,
        device: str = "cpu",
        device_id: int = 0,
        prefetch: int = 2,
    ) -> None:
        super().__init__(labeled, unlabeled, rows, max_shift, device, prefetch)
        if max(self.height, self.width) > MAX_SIDE:
            raise ValueError(
                f"the fused kernel takes images of up to {MAX_SIDE}x{MAX_SIDE} pixels, got {self.height}x{self.width}; "
                "use the DALI pipeline"
            )
        self._layout = packed.Layout((name, dtype, (rows, *shape)) for name, (dtype, shape) in _FIELDS.items())
        images = torch.from_numpy(np.concatenate(self._sets))
        self._made: deque[torch.Tensor] = deque()
        if device == "cpu":
            self._images = images
            return
        self._gpu = torch.device("cuda", device_id)
        self._stream = torch.cuda.Stream(self._gpu)
        self._ready: deque[torch.cuda.Event] = deque()
        # all memory that the kernel reads and writes is the stream's own, so that its order is the stream's
        with torch.cuda.stream(self._stream):
            self._images = images.to(self._gpu)
        # compiles the kernel, which must not happen while a CUDA graph is captured
        self._begin(self._prepare(plain_views(rows)))
        self._finish()

    def _prepare(self, views: ViewPlan) -> torch.Tensor:
        """The kernel's arguments in one buffer of bytes."""
        buffer = self._layout.allocate(pinned=self.device == "gpu")
        into = self._layout.arrays(buffer)
        into["image"][:] = self._places(views)
        into["shift"][:] = views.shift
        into["flip"][:] = views.flip
        into["ops"][:] = KERNEL_CODES.take(views.ops)
        into["parameters"][:] = geometric.parameters(views.ops, views.levels, views.centre, self.height, self.width)
        return buffer

    def _begin(self, prepared: torch.Tensor) -> None:
        if self.device == "cpu":
            self._made.append(augment_views(self._images, **self._layout.tensors(prepared)))
            return
        with torch.cuda.stream(self._stream):
            there = prepared.to(self._gpu, non_blocking=True)
            self._made.append(augment_views(self._images, **self._layout.tensors(there)))
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
        del self._images
