"""Triton kernels of `norm_act_conv`: direct convolutions that keep their halo on chip."""

from typing import NamedTuple

from torch import Tensor


class Shape(NamedTuple):
    """Shape of a convolution: (samples, inputs, height, width) to `outputs` channels with taps x taps weights."""

    samples: int
    inputs: int
    height: int
    width: int
    outputs: int
    taps: int
    stride: int


def tilings(shape: Shape, which: str) -> list[tuple[int, ...]]:
    """Return the tilings to choose from for one kernel, the one to use without measurements first.

    Args:
        shape: Shape of the convolution.
        which: "forward", "input_grad" or "weight_grad".

    Returns:
        Tilings for the operators of `kernels.norm_act_conv`; empty if the kernel does not support the shape.
        A tiling of "forward" or "input_grad" starts with two numbers that divide its result into tiles of equally many
        pixels: BLOCK_M consecutive positions of (sample, column), times ROWS rows. Of "weight_grad", it starts with the
        number of splits.
    """
    channels = shape.inputs, shape.outputs
    if any(count < 16 or count & (count - 1) for count in channels) or shape.height % (2 * shape.stride):
        return []
    stride = 1 if which == "input_grad" else shape.stride
    columns, height = shape.samples * shape.width // stride, shape.height // stride
    if which == "weight_grad":
        return [(64,)]
    rows = next(rows for rows in (8, 6, 4, 3, 2, 1) if height % rows == 0)
    return [(block, rows) for block in (128, 64) if columns % block == 0]


def launch_forward(*arguments) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def launch_input_grad(*arguments) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def launch_weight_grad(*arguments) -> Tensor:
    raise NotImplementedError
