"""DataLoaders of the rivals of `bench baseline`: batches without end, and a way to wait until no worker is at work."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

_LONGEST_BATCH = 60.0  # seconds, after which a worker has died or hangs


def _make_batch(make_item: Callable[[int], Any], made: Any, numbers: list[int]) -> Any:
    """Make items and their batch, as a DataLoader does by default, and count it."""
    batch = default_collate([make_item(number) for number in numbers])
    with made.get_lock():
        made.value += 1
    return batch


class EndlessLoader:
    """Random batches of a data set, which worker processes make ahead: two for each worker, as is the default.

    Args:
        make_item: makes an item of the data set from its number.
        items: in the data set.
        batch: items a batch.
        workers: processes; without any, `next` makes the batch.
        pinned: whether batches lie in pinned memory.
    """

    def __init__(
        self, make_item: Callable[[int], Any], items: int, batch: int, workers: int, pinned: bool = False
    ) -> None:
        self._drawn = 0  # batches handed to workers
        self._made = multiprocessing.Value("q", 0)  # batches made by all workers
        self._batches: Iterator[Any] = iter(
            DataLoader(
                range(items),  # type: ignore[arg-type]
                batch_sampler=self._draw(items, batch),  # type: ignore[arg-type]
                num_workers=workers,
                collate_fn=partial(_make_batch, make_item, self._made),
                pin_memory=pinned,
            )
        )

    def _draw(self, items: int, batch: int) -> Iterator[list[int]]:
        while True:
            self._drawn += 1
            yield torch.randint(items, (batch,)).tolist()

    @property
    def pending(self) -> int:
        """Batches that workers have been asked for and have not made yet."""
        return self._drawn - self._made.value

    def __iter__(self) -> EndlessLoader:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def settle(self) -> None:
        """Waits until nothing is pending: the workers then sleep until the next batch is taken.

        Raises:
            RuntimeError: no batch has come for a minute.
        """
        pending, since = self.pending, time.monotonic()
        while pending:
            time.sleep(1e-4)
            if self.pending < pending:
                pending, since = self.pending, time.monotonic()
            elif time.monotonic() - since > _LONGEST_BATCH:
                raise RuntimeError(f"{pending} batches are pending, and none has come for {_LONGEST_BATCH:.0f} s")

    def close(self) -> None:
        """Ends the workers."""
        self._batches = iter(())
