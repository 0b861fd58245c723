"""Endless DataLoaders for the rivals of `bench baseline`, with a way to wait until their workers are idle."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

_LONGEST_BATCH = 60.0  # Seconds without a batch after which the workers are assumed dead.


def _make_batch(make_item: Callable[[int], Any], made: Any, indices: list[int]) -> Any:
    """Make a batch with the default collate function, and count it."""
    batch = default_collate([make_item(index) for index in indices])
    with made.get_lock():
        made.value += 1
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Leave SIGINT to the main process, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class EndlessLoader:
    """Endless random batches of a data set, prefetched by worker processes at DataLoader's default of two per worker.

    Args:
        make_item: Makes an item of the data set from its index.
        items: Size of the data set.
        batch: Items per batch.
        workers: Number of worker processes; with 0, `next` makes the batch.
        pinned: Whether batches are in pinned memory.
    """

    def __init__(
        self, make_item: Callable[[int], Any], items: int, batch: int, workers: int, pinned: bool = False
    ) -> None:
        self._drawn = 0  # Batches requested from the workers.
        self._made = multiprocessing.Value("q", 0)  # Batches made by all workers.
        self._batches: Iterator[Any] = iter(
            DataLoader(
                range(items),  # type: ignore[arg-type]
                batch_sampler=self._draw(items, batch),  # type: ignore[arg-type]
                num_workers=workers,
                collate_fn=partial(_make_batch, make_item, self._made),
                pin_memory=pinned,
                worker_init_fn=_ignore_interrupts,
            )
        )

    def _draw(self, items: int, batch: int) -> Iterator[list[int]]:
        while True:
            self._drawn += 1
            yield torch.randint(items, (batch,)).tolist()

    @property
    def pending(self) -> int:
        """Number of batches that are requested but not finished."""
        return self._drawn - self._made.value

    def __iter__(self) -> EndlessLoader:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def settle(self) -> None:
        """Wait until nothing is pending. The workers then sleep until the next batch is taken.

        Raises:
            RuntimeError: No batch was finished for a minute.
        """
        pending, since = self.pending, time.monotonic()
        while pending:
            time.sleep(1e-4)
            if self.pending < pending:
                pending, since = self.pending, time.monotonic()
            elif time.monotonic() - since > _LONGEST_BATCH:
                raise RuntimeError(f"{pending} batches are pending, but none was finished in {_LONGEST_BATCH:.0f} s")

    def close(self) -> None:
        """Stop the workers."""
        self._batches = iter(())
