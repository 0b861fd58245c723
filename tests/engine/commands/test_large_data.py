"""Memory use of runs on data sets that do not fit into memory."""

import pytest

from bench.runs.data import NO_IMAGES, train_apart


@pytest.mark.parametrize("views", ["dali", "fused"])
def test_memory_does_not_grow_with_the_images(tmp_path, long, views):
    """40 000 images of 96x96 are 1 055 MiB, of which a few steps read little; 105 000 are 2.7 GiB.

    Peak memory differs by some 100 MiB between runs, because the allocator keeps freed memory.
    """
    images, steps, most = (105_000, 100, 2048) if long else (40_000, 2, 400)
    none, many = (train_apart(tmp_path, count, steps, views)["peak_memory_mib"] for count in (NO_IMAGES, images))
    assert many - none < most
