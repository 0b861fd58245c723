"""Views by one kernel: the images stay on the device, and a step's plan is all that travels to it.

The weak augmentation and both transformations of every row are one launch (`kernels/augment.py`), on a stream of its
own beside the training step's. On a CPU the kernel's twin does the same at once.
"""

from __future__ import annotations

from collections import deque
from math import prod

import numpy as np
import torch

from kernels.augment import CODES, MAX_SIDE, augment_views
from pipelines import ctaugment
from pipelines.plan import OPS_PER_VIEW, ViewPlan
from pipelines.views import Views, plain_views

# the kernel's number of each transformation; those that are no repainting are affine maps
_CODE = np.array([CODES.get(name, CODES["warp"]) for name in ctaugment.NAMES], dtype=np.int32)


# the kernel's arguments after the images: dtype, and shape of a row
_FIELDS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "image": (torch.int64, ()),
    "shift": (torch.int32, (2,)),
    "flip": (torch.int32, ()),
    "ops": (torch.int32, (OPS_PER_VIEW,)),
    "parameters": (torch.float32, (OPS_PER_VIEW, 6)),
}


def _sizes(rows: int) -> list[int]:
    """Bytes of each field, in multiples of 16: alike aligned for any number of rows, one kernel serves them all."""
    sizes = [rows * prod(shape) * dtype.itemsize for dtype, shape in _FIELDS.values()]
    return [size + -size % 16 for size in sizes]


def _fields(buffer: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    """The kernel's arguments as they lie one after another in one buffer of bytes."""
    parts = zip(_FIELDS.items(), buffer.split(_sizes(rows)), strict=True)
    return {name: part.view(dtype)[: rows * prod(shape)].view(rows, *shape) for (name, (dtype, shape)), part in parts}


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
        images = torch.from_numpy(np.concatenate(self._sets))
        self._made: deque[torch.Tensor] = deque()
        on_gpu = device == "gpu"
        # one more than may be in flight: the oldest was copied long before its turn to be written again
        self._host = deque(
            torch.empty(sum(_sizes(rows)), dtype=torch.uint8, pin_memory=on_gpu) for _ in range(prefetch + 1)
        )
        if not on_gpu:
            self._images = images
            return
        self._gpu = torch.device("cuda", device_id)
        self._stream = torch.cuda.Stream(self._gpu)
        self._copied = deque(torch.cuda.Event() for _ in self._host)
        self._ready: deque[torch.cuda.Event] = deque()
        # all memory that the kernel reads and writes is the stream's own, so that its order is the stream's
        with torch.cuda.stream(self._stream):
            self._images = images.to(self._gpu)
        # compiles the kernel, which must not happen while a CUDA graph is captured
        self._begin(plain_views(rows))
        self._finish()

    def _pack(self, views: ViewPlan, buffer: torch.Tensor) -> None:
        into = {name: field.numpy() for name, field in _fields(buffer, self.rows).items()}
        into["image"][:] = self._places(views)
        into["shift"][:] = views.shift
        into["flip"][:] = views.flip
        into["ops"][:] = _CODE[views.ops]
        for turn in range(OPS_PER_VIEW):
            into["parameters"][:, turn] = self._round_inputs(views, turn)["parameters"].reshape(-1, 6)

    def _begin(self, views: ViewPlan) -> None:
        host = self._host[0]
        if self.device == "cpu":
            self._pack(views, host)
            self._made.append(augment_views(self._images, **_fields(host, self.rows)))
            return
        copied = self._copied[0]
        copied.synchronize()  # the copy that read this buffer last, `prefetch` + 1 batches ago
        self._pack(views, host)
        with torch.cuda.stream(self._stream):
            there = host.to(self._gpu, non_blocking=True)
            copied.record(self._stream)
            self._made.append(augment_views(self._images, **_fields(there, self.rows)))
            ready = torch.cuda.Event()
            ready.record(self._stream)
        self._ready.append(ready)
        self._host.rotate(-1)
        self._copied.rotate(-1)

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
            self._copied.clear()
        self._host.clear()
        del self._images
