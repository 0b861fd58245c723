"""`remixmatch bench convolutions`: each convolution of WRN-28-2, against its roofline bound.

The forward pass, the input gradient and the weight gradient of every shape in the network are timed separately, at the
batch size of a training pass; the first convolution also with its input padded to 8 channels. On a GPU they run in
bf16, channels-last, with the fastest of all cuDNN's plans as in training, or with `--heuristic` the first one. A
process can only do one of them, since torch keeps the plan of a convolution that has run. The bound is the larger of
two times: each tensor's bytes once at copy bandwidth, and the operations at the matrix-product rate, both measured in
the same run. The tensors of the smaller shapes fit into a large GPU's cache.

On a GPU, the Triton kernels of `kernels.norm_act_conv` are timed beside them where they support the shape: passes named
"triton", each with the fastest of its tilings. They also do the work of batch norm and leaky ReLU around a convolution,
here without a residual and, for 3x3 weights, with the gradient of the statistics; their bound counts their own tensors.
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
from engine.training import convolutions
from kernels import convolution
from pipelines.files import first_line

PASSES = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True, order=True)
class Shape:
    """Shape of a convolution: channels, side of its input in pixels, side of its kernel, stride."""

    inputs: int
    outputs: int
    side: int
    taps: int
    stride: int

    def __str__(self) -> str:
        return f"{self.inputs}->{self.outputs} {self.side}x{self.side}, {self.taps}x{self.taps}/{self.stride}"


@dataclass
class ConvolutionsOptions:
    """Time every convolution shape of WRN-28-2 on its own."""

    out: Path = records.OUT / "convolutions.jsonl"
    """File to append the records to."""
    rows: int = 0
    """Batch size; by default 768 with a GPU, the training pass of K = 8 and B = 64, and 8 without."""
    repeats: int = 10
    """Samples per case; the median is reported."""
    heuristic: bool = False
    """On a GPU, time the plans that cuDNN's heuristic ranks first, not the fastest of all."""


def shapes(side: int = 32) -> dict[Shape, int]:
    """Return the convolution shapes of WRN-28-2 for square images of `side` pixels, with the count of each."""
    counts: dict[Shape, int] = {}

    def count_shape(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        shape = Shape(
            module.in_channels, module.out_channels, inputs[0].shape[-1], module.kernel_size[0], module.stride[0]
        )
        counts[shape] = counts.get(shape, 0) + 1

    network = WideResNet(10).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count_shape)
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    return counts


def main(options: ConvolutionsOptions) -> None:
    """Time every shape and pass, and write records.

    Raises:
        UserError: A flag is invalid.
    """
    records.check_numbers(options, repeats=1, rows=0)
    device = bench_device()
    cuda = device.type == "cuda"
    rows = options.rows or (768 if cuda else 8)
    print(ceilings(device).text())
    counts = shapes()
    stem = next(iter(counts))
    for shape, count in [*counts.items(), (Shape(8, stem.outputs, stem.side, stem.taps, stem.stride), 0)]:
        case = {"shape": str(shape), "in_network": count, "rows": rows}
        for fields in _time(shape, rows, device, not options.heuristic, options.repeats):
            BENCH.write(options.out, "convolutions", device, **case, **fields)
        for fields in time_fused(shape, rows, device, options.repeats) if cuda and not options.heuristic else ():
            BENCH.write(options.out, "convolutions", device, **case, **fields)


def time_fused(shape: Shape, rows: int, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the record fields of each kernel of `norm_act_conv` that supports a convolution, with its fastest tiling.

    On a CPU the kernels are their references.
    """
    sizes = convolution.Shape(rows, shape.inputs, shape.side, shape.side, shape.outputs, shape.taps, shape.stride)
    layer = convolutions.Layer(sizes, "train", folds=shape.taps == 3)  # As most of the network's.
    if not convolution.tilings(sizes, "forward"):
        return
    working: dict[str, Callable[[], Any]] = {}
    for name, function in convolutions.functions(layer, torch.bfloat16, device):
        if name.endswith(convolutions.LIBRARY):
            continue
        try:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # For example too little shared memory.
            print(f"{shape}: {name} does not work: {first_line(error)}")
        else:
            working[name] = function
    timings = measure(working, device, repeats, queued=True)
    limit = ceilings(device)
    x, y = (2 * count for count in (rows * shape.inputs * shape.side**2, _outputs(sizes)))
    weights = shape.outputs * shape.inputs * shape.taps**2
    flops = _outputs(sizes) * 2 * weights // shape.outputs
    input_grad = x + (2 if layer.folds else 1) * y + 2 * weights
    read = {"forward": x + 2 * weights, "input_grad": input_grad, "weight_grad": x + y}
    for which, title in zip(convolutions.PASSES, PASSES, strict=True):
        own = {name: timing for name, timing in timings.items() if name.split()[0] == which}
        if not own:
            continue
        name = min(own, key=lambda name: own[name].seconds)
        made = working[name]()
        moved = read[which] + sum(one.nbytes for one in (made if isinstance(made, tuple) else (made,)))
        floor = max(moved / limit.copy_bytes_per_second, flops / limit.matmul_flops_per_second)
        yield {
            "pass": f"triton {title}", "tiling": name.partition(" ")[2], "tilings": len(own),
            **quartiles("microseconds", 1e6 * np.array(own[name].samples)),
            "bytes": moved, "flops": flops, "floor_microseconds": 1e6 * floor, "floor_ratio": own[name].seconds / floor,
        }  # fmt: skip


def _outputs(shape: convolution.Shape) -> int:
    return shape.samples * shape.outputs * (shape.height // shape.stride) * (shape.width // shape.stride)


def _time(shape: Shape, rows: int, device: torch.device, benchmark: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the record fields of each pass of a convolution; cuDNN's plans are all timed first, or none is."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        values = torch.randn(*sizes, generator=generator)
        return values.to(device, dtype, memory_format=torch.channels_last)

    out_side = (shape.side - 1) // shape.stride + 1
    images = random(rows, shape.inputs, shape.side, shape.side)
    weight = random(shape.outputs, shape.inputs, shape.taps, shape.taps)
    gradient = random(rows, shape.outputs, out_side, out_side)
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
    # enabled defaults to False in this context manager. A limit of 0 means all plans.
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, benchmark_limit=0, allow_tf32=False):
        timings = measure(functions, device, repeats, queued=True)
    for name, timing in timings.items():
        yield {
            "pass": name, "benchmark": benchmark, **quartiles("microseconds", 1e6 * np.array(timing.samples)),
            "bytes": moved, "flops": flops, "floor_microseconds": 1e6 * floor, "floor_ratio": timing.seconds / floor,
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
                "count in WRN-28-2": "{in_network}",
                "batch": "{rows}",
                "pass": "{pass}",
                "cudnn.benchmark": "{benchmark}",
                "tiling": "{tiling}",
                "time, us": "{microseconds:.1f}",
                "roofline bound, us": "{floor_microseconds:.1f}",
                "ratio to bound": "{floor_ratio:.2f}",
            },
        ),
    },
)
