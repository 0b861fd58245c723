"""The rivals' DataLoaders: they are endless, and their workers are idle once settled."""

import time

import pytest
import torch

from bench.rivals import loaders

ITEMS = 5


def slow_item(index):
    """Return an item after 20 ms."""
    time.sleep(0.02)
    return torch.tensor([index, 10 * index]), index


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_random_and_endless(workers):
    loader = loaders.EndlessLoader(slow_item, ITEMS, 3, workers)
    seen = set()
    for _ in range(5):  # More than the data set has.
        pair, indices = next(loader)
        assert pair.shape == (3, 2) and torch.equal(pair[:, 1], 10 * indices)
        seen |= set(indices.tolist())
    assert len(seen) > 2 and seen <= set(range(5))
    loader.close()


def test_a_settled_loader_is_idle():
    loader = loaders.EndlessLoader(slow_item, ITEMS, 3, 2)
    assert loader.pending == 4  # Two per worker, 60 ms each.
    loader.settle()
    assert loader.pending == 0
    next(loader)
    assert loader.pending == 1
    loader.settle()
    made = loader._made.value
    time.sleep(0.2)
    assert loader.pending == 0 and loader._made.value == made == 5
    loader.close()


def test_waiting_for_a_stuck_worker_times_out(monkeypatch):
    monkeypatch.setattr(loaders, "_LONGEST_BATCH", 0.01)
    loader = loaders.EndlessLoader(slow_item, ITEMS, 3, 1)
    with pytest.raises(RuntimeError, match="2 batches are pending, but none was finished in 0 s"):
        loader.settle()
    loader.close()
