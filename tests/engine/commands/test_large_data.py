"""Data sets that do not fit into memory: what a run takes does not grow with them."""

import pytest

from bench.runs.data import NO_IMAGES, train_apart


@pytest.mark.parametrize("views", ["dali", "fused"])
def test_memory_does_not_grow_with_the_images(tmp_path, long, views):
    """40 000 images of 96x96 are 1 055 MiB, of which a few steps see little; 105 000 are 2.7 GiB.

    Freed memory that a run keeps makes its peak differ by some 100 MiB from one run to the next.
    """
    images, steps, most = (105_000, 100, 2048) if long else (40_000, 2, 400)
    none, many = (train_apart(tmp_path, count, steps, views)["peak_memory_mib"] for count in (NO_IMAGES, images))
    assert many - none < most
