"""Arrays in one buffer: each as it was, aligned, wherever the buffer goes."""

import pytest
import torch

from pipelines.packed import allocate, unpack

LAYOUT = {
    "flags": (torch.uint8, (5,)),
    "none": (torch.int64, (0, 3)),
    "numbers": (torch.float32, (3, 1, 2)),
    "one": (torch.int64, ()),
}


def test_parts_share_the_buffer_and_do_not_touch():
    buffer = allocate(LAYOUT)
    for value, part in enumerate(unpack(buffer, LAYOUT).values(), 1):
        part.fill_(value)
    copied = unpack(buffer.clone(), LAYOUT)
    assert list(copied) == list(LAYOUT)
    for value, (name, part) in enumerate(copied.items(), 1):
        dtype, shape = LAYOUT[name]
        assert part.dtype == dtype and part.shape == shape and (part == value).all()


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_parts_are_aligned_for_any_number_of_rows(rows):
    layout = {name: (dtype, (rows, *shape)) for name, (dtype, shape) in LAYOUT.items()}
    buffer = allocate(layout)
    assert all((part.data_ptr() - buffer.data_ptr()) % 16 == 0 for part in unpack(buffer, layout).values())


def test_a_buffer_of_another_layout_is_refused():
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        unpack(allocate(LAYOUT)[:-16], LAYOUT)
