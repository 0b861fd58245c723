"""Fixtures that make benches run quickly, on one thread. The measured numbers are meaningless."""

import pytest
import torch

from engine.measuring.timing import Ceilings

CEILINGS = Ceilings(copy_bytes_per_second=1e10, matmul_flops_per_second=1e12)


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread and restore the setting: convolutions created for fewer threads crash if it grows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def known_ceilings(monkeypatch):
    """Replace the measured ceilings with constants."""
    for bench in ("step.kernels", "step.pipelines", "rivals.baseline"):
        monkeypatch.setattr(f"bench.{bench}.ceilings", lambda device: CEILINGS)
    return CEILINGS
