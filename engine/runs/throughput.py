"""Throughput of a run for its metrics: step time, images per second, peak memory and learning rate.

They depend on the machine, so they have lines of their own in metrics.jsonl. All other lines are equal for equal runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.measuring.process import peak_memory
from engine.runs.progress import THROUGHPUT


class Throughput:
    """Clock of the training loop, which stands still during evaluations, checkpoints and callbacks.

    It never synchronizes with a device. On a CPU, a step ends when its launch returns. On a GPU, it ends at the latest
    when its metrics are read back: the loop waits there for the device, unless the host is slower.

    Args:
        images_per_step: Images that a step trains on, over all ranks.
        lr: The learning rate.
        device: Device of the run.
    """

    def __init__(self, images_per_step: int, lr: float, device: torch.device) -> None:
        self._images, self._lr, self._device = images_per_step, lr, device
        self._ends: deque[float] = deque()  # of launched steps whose metrics have not been read back; CPU only
        self._paused = 0.0
        self.start(0)

    def start(self, step: int) -> None:
        """Start the clock after `step` steps."""
        self._step, self._begin = step, self._now()

    def _now(self) -> float:
        return time.perf_counter() - self._paused

    def launched(self) -> None:
        """Record that a step whose throughput will be asked for has been launched."""
        if self._device.type != "cuda":
            self._ends.append(self._now())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def measure(self, step: int) -> dict[str, float]:
        """Return the values of THROUGHPUT after `step` steps, as means since the previous call or the start."""
        end = self._ends.popleft() if self._ends else self._now()
        seconds = max(end - self._begin, 1e-9) / (step - self._step)
        self._step, self._begin = step, end
        cuda = self._device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self._device) / 2**20 if cuda else peak_memory()
        values = (self._images / seconds, 1e3 * seconds, memory, self._lr)
        return {name: float(f"{value:.6g}") for name, value in zip(THROUGHPUT, values, strict=True)}
