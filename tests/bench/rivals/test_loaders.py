"""The rivals' DataLoaders: batches without end, and nobody at work once they are settled."""

import time

import pytest
import torch

from bench.rivals import loaders

ITEMS = 5


def slow_item(number):
    """Takes a worker 20 ms."""
    time.sleep(0.02)
    return torch.tensor([number, 10 * number]), number


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_random_items_without_end(workers):
    loader = loaders.EndlessLoader(slow_item, ITEMS, 3, workers)
    seen = set()
    for _ in range(5):  # more than there are items
        pair, number = next(loader)
        assert pair.shape == (3, 2) and torch.equal(pair[:, 1], 10 * number)
        seen |= set(number.tolist())
    assert len(seen) > 2 and seen <= set(range(5))
    loader.close()


def test_a_settled_loader_has_nothing_pending_and_makes_nothing():
    loader = loaders.EndlessLoader(slow_item, ITEMS, 3, 2)
    assert loader.pending == 4  # two for each worker, of 60 ms each
    loader.settle()
    assert loader.pending == 0
    next(loader)
    assert loader.pending == 1
    loader.settle()
    made = loader._made.value
    time.sleep(0.2)
    assert loader.pending == 0 and loader._made.value == made == 5
    loader.close()


def test_a_worker_that_makes_nothing_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(loaders, "_LONGEST_BATCH", 0.01)
    loader = loaders.EndlessLoader(slow_item, ITEMS, 3, 1)
    with pytest.raises(RuntimeError, match="2 batches are pending, and none has come for 0 s"):
        loader.settle()
    loader.close()
