"""DataLoaders of the rivals of `bench baseline`: batches without end, and a way to wait until no worker is at work."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

_LONGEST_BATCH = 60.0  # seconds, after which a worker has died or hangs


class _RandomBatches(Sampler[list[int]]):
    """Batches of item numbers, drawn with replacement.

    Attributes:
        asked: batches drawn so far. A DataLoader draws one when it hands it to a worker.
    """

    def __init__(self, items: int, batch: int) -> None:
        self.items, self.batch = items, batch
        self.asked = 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            self.asked += 1
            yield torch.randint(self.items, (self.batch,)).tolist()


class _CountedCollate:
    """Makes a batch of items as a DataLoader does by default.

    Attributes:
        made: batches made so far, by all workers.
    """

    def __init__(self) -> None:
        self.made = multiprocessing.Value("q", 0)

    def __call__(self, items: list[Any]) -> Any:
        batch = default_collate(items)
        with self.made.get_lock():
            self.made.value += 1
        return batch


class EndlessLoader:
    """Random batches of a data set, which worker processes make ahead: two for each worker, as is the default.

    Args:
        items: one image an item.
        batch: items a batch.
        workers: processes; without any, `next` makes the batch.
        pinned: whether batches lie in pinned memory.
    """

    def __init__(self, items: Dataset, batch: int, workers: int, pinned: bool = False) -> None:
        self._drawn = _RandomBatches(len(items), batch)  # type: ignore[arg-type]
        self._collate = _CountedCollate()
        self._batches: Iterator[Any] = iter(
            DataLoader(
                items,
                batch_sampler=self._drawn,
                num_workers=workers,
                collate_fn=self._collate,
                pin_memory=pinned,
            )
        )

    @property
    def pending(self) -> int:
        """Batches that workers have been asked for and have not made yet."""
        return self._drawn.asked - self._collate.made.value

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
