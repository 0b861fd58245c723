"""`remixmatch bench convolutions`: every convolution of WRN-28-2 alone, against its roofline bound.

Forward, gradient of the input and gradient of the weight are timed apart, for each shape that the network has, with
the rows of a training pass; the first convolution also with five channels of zeros more. On a GPU in bf16 and
channels-last, with cuDNN's measured choice and with its choice by rule. The bound is the longer of each tensor's bytes,
once, at the copy bandwidth, and of the operations at the matrix product's rate, both measured in the same run; the
tensors of the smaller shapes fit into a large GPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.registry import Bench, Table, quartiles
from engine.measuring import records
from engine.measuring.timing import bench_device, ceilings, measure
from engine.models.wide_resnet import WideResNet

PASSES = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True, order=True)
class Shape:
    """A convolution: channels, side of its input in pixels, side of its filters, stride."""

    inputs: int
    outputs: int
    side: int
    taps: int
    stride: int

    def __str__(self) -> str:
        return f"{self.inputs}->{self.outputs} {self.side}x{self.side}, {self.taps}x{self.taps}/{self.stride}"


@dataclass
class ConvolutionsOptions:
    """Times every convolution shape of WRN-28-2 alone."""

    out: Path = records.OUT / "convolutions.jsonl"
    """Rows are added to this file."""
    rows: int = 0
    """Rows of a pass; by default 768 with a GPU, the training pass of K = 8 and B = 64, and 8 without."""
    repeats: int = 10
    """Samples; the median counts."""
    by_rule: bool = True
    """On a GPU, cuDNN's choice by rule beside its measured one."""


def shapes(side: int = 32) -> dict[Shape, int]:
    """The shapes of WRN-28-2's convolutions for images of a side, and how often each is there."""
    found: dict[Shape, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        shape = Shape(
            module.in_channels, module.out_channels, inputs[0].shape[-1], module.kernel_size[0], module.stride[0]
        )
        found[shape] = found.get(shape, 0) + 1

    network = WideResNet(10).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    return found


def main(options: ConvolutionsOptions) -> None:
    """Times every shape and pass, and adds rows.

    Raises:
        UserError: a flag that cannot work.
    """
    records.check_numbers(options, repeats=1, rows=0)
    device = bench_device()
    cuda = device.type == "cuda"
    rows = options.rows or (768 if cuda else 8)
    print(ceilings(device).text())
    counted = shapes()
    stem = next(iter(counted))
    choices = [True, False] if cuda and options.by_rule else [True]
    for shape, times in [*counted.items(), (Shape(8, stem.outputs, stem.side, stem.taps, stem.stride), 0)]:
        for row in _time(shape, rows, device, choices, options.repeats):
            case = {"shape": str(shape), "in_network": times, "rows": rows}
            BENCH.write(options.out, "convolutions", device, **case, **row)


def _time(shape: Shape, rows: int, device: torch.device, choices: list[bool], repeats: int) -> Iterator[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def made(*sizes: int) -> Tensor:
        drawn = torch.randn(*sizes, generator=generator)
        return drawn.to(device, dtype, memory_format=torch.channels_last)

    out_side = (shape.side - 1) // shape.stride + 1
    images = made(rows, shape.inputs, shape.side, shape.side)
    weight = made(shape.outputs, shape.inputs, shape.taps, shape.taps)
    gradient = made(rows, shape.outputs, out_side, out_side)
    padding, stride = [shape.taps // 2] * 2, [shape.stride] * 2
    backward = torch.ops.aten.convolution_backward
    fixed = (None, stride, padding, [1, 1], False, [0, 0], 1)

    functions: dict[str, Callable[[], Any]] = {
        "forward": lambda: torch.conv2d(images, weight, None, stride, padding),
        "input gradient": lambda: backward(gradient, images, weight, *fixed, [True, False, False]),
        "weight gradient": lambda: backward(gradient, images, weight, *fixed, [False, True, False]),
    }
    limit = ceilings(device)
    moved = images.nbytes + weight.nbytes + gradient.nbytes
    flops = 2 * gradient.numel() * weight[0].numel()
    floor = max(moved / limit.copy_bytes_per_second, flops / limit.matmul_flops_per_second)
    for benchmark in choices:
        # by default these flags would switch cuDNN off
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
            timings = measure(functions, device, repeats, queued=True)
        for name, timing in timings.items():
            yield {
                "pass": name, "benchmark": benchmark, **quartiles("microseconds", 1e6 * np.array(timing.samples)),
                "bytes": moved, "flops": flops, "floor_microseconds": 1e6 * floor,
                "floor_ratio": timing.seconds / floor,
            }  # fmt: skip


BENCH = Bench(
    options=ConvolutionsOptions,
    main=main,
    quick="--rows 1 --repeats 1",
    tables={
        "convolutions": Table(
            key=("shape", "rows", "pass", "benchmark"),
            columns={
                "shape": "{shape}",
                "in the network": "{in_network}",
                "rows": "{rows}",
                "pass": "{pass}",
                "measured choice": "{benchmark}",
                "time, us": "{microseconds:.1f}",
                "roofline bound, us": "{floor_microseconds:.1f}",
                "ratio to bound": "{floor_ratio:.2f}",
            },
        ),
    },
)
