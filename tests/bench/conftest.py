"""Benches at sizes that prove they run: the figures mean nothing."""

import pytest

from bench.timing import Ceilings

CEILINGS = Ceilings(copy_bytes_per_second=1e10, matmul_flops_per_second=1e12)


@pytest.fixture
def known_ceilings(monkeypatch):
    """Ceilings that need no measuring."""
    for bench in ("kernels", "pipelines", "baseline"):
        monkeypatch.setattr(f"bench.{bench}.ceilings", lambda device: CEILINGS)
    return CEILINGS
