"""Benches at sizes that prove they run, on one thread: the figures mean nothing."""

import pytest
import torch

from engine.measuring.timing import Ceilings

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
    for bench in ("step.kernels", "step.pipelines", "rivals.baseline"):
        monkeypatch.setattr(f"bench.{bench}.ceilings", lambda device: CEILINGS)
    return CEILINGS
