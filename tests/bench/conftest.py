"""Benches at sizes that prove they run, on one thread: the figures mean nothing."""

import pytest
import torch

from bench.timing import Ceilings
from pipelines import datasets

CEILINGS = Ceilings(copy_bytes_per_second=1e10, matmul_flops_per_second=1e12)


@pytest.fixture(autouse=True)
def one_thread():
    """A bench may set the number of threads; convolutions crash that are already there for fewer of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def known_ceilings(monkeypatch):
    """Ceilings that need no measuring."""
    for bench in ("kernels", "pipelines", "baseline"):
        monkeypatch.setattr(f"bench.{bench}.ceilings", lambda device: CEILINGS)
    return CEILINGS


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, and none of the user's data."""
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    datasets.prepared.cache_clear()
    yield
    datasets.prepared.cache_clear()
