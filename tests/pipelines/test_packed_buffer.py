"""Arrays packed into one buffer: contents, alignment and size."""

import numpy as np
import pytest
import torch

from pipelines.packed_buffer import Layout

ARRAYS = {
    "flags": (torch.uint8, (5,)),
    "none": (torch.int64, (0, 3)),
    "numbers": (torch.float32, (3, 1, 2)),
    "one": (torch.int64, ()),
}


def layout(batch=()):
    return Layout((name, dtype, (*batch, *shape)) for name, (dtype, shape) in ARRAYS.items())


def test_arrays_are_disjoint_views_of_the_buffer():
    made = layout()
    buffer = made.allocate()
    for value, part in enumerate(made.tensors(buffer).values(), 1):
        part.fill_(value)
    copied = made.tensors(buffer.clone())
    assert list(copied) == list(ARRAYS)
    for value, (name, part) in enumerate(copied.items(), 1):
        dtype, shape = ARRAYS[name]
        assert part.dtype == dtype and part.shape == shape and part.is_contiguous() and (part == value).all()


def test_arrays_and_tensors_agree():
    made = layout((2,))
    buffer = made.allocate()
    written = {}
    for seed, (name, part) in enumerate(made.arrays(buffer).items()):
        part[...] = written[name] = np.random.default_rng(seed).integers(200, size=part.shape).astype(part.dtype)
    tensors = made.tensors(buffer.clone())
    assert list(written) == list(tensors) == list(ARRAYS)
    for name, part in tensors.items():
        assert torch.from_numpy(written[name]).dtype == part.dtype
        np.testing.assert_array_equal(part.numpy(), written[name])


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_arrays_are_aligned_for_any_batch_size(batch):
    made = layout((batch,))
    buffer = made.allocate()
    assert all((part.data_ptr() - buffer.data_ptr()) % 16 == 0 for part in made.tensors(buffer).values())


def test_a_buffer_of_the_wrong_size_raises():
    for wrong in (layout().allocate()[:-16], torch.cat([layout().allocate()] * 2)):
        with pytest.raises(ValueError, match=f"has {layout().bytes} bytes, got {len(wrong)}"):
            layout().tensors(wrong)
