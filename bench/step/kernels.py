"""`remixmatch bench kernels`: each Triton kernel and its PyTorch reference, against the device's copy bandwidth.

A kernel's roofline bound is the time to read its inputs once and write its outputs once at the device's copy
bandwidth, measured in the same run. The share of copy bandwidth is bound / time. At the size of a step all data fit
into a large GPU's L2 cache: the share can exceed 100 %, and launch latency matters. The large sizes do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.registry import Bench, Record, Table, quartiles
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.timing import bench_device, ceilings, measure
from engine.method.batch_layout import BatchLayout, rank_plan
from engine.method.targets import P_MODEL_STEPS
from engine.models.wide_resnet import TwoHeadNetwork
from kernels.assemble import assemble_batch, assemble_batch_reference
from kernels.augment import augment_views, augment_views_reference
from kernels.guess import guess_labels, guess_labels_reference
from pipelines import ctaugment, geometric
from pipelines.data.datasets import noise
from pipelines.fused import KERNEL_CODES
from pipelines.plan import PlanSpec, make_plan

PROVIDERS = ("triton", "eager", "compiled")


@dataclass(frozen=True)
class Size:
    """Batch of a step: B, K, the images' side in pixels, and L."""

    batch: int
    k: int
    side: int
    classes: int = 10

    def __str__(self) -> str:
        return f"B={self.batch} K={self.k} {self.side}x{self.side} L={self.classes}"


Sizes = dict[str, dict[str, Size]]  # By device type and name; "step" is the size of a training step.
BATCH_SIZES: Sizes = {
    "cuda": {"step": Size(64, 8, 32), "large": Size(1024, 8, 32), "large-96": Size(128, 8, 96)},
    "cpu": {"step": Size(8, 2, 16), "large": Size(32, 8, 32)},
}
GUESS_SIZES: Sizes = {
    "cuda": {"step": Size(64, 8, 32), "large": Size(2**18, 8, 32, 100)},
    "cpu": {"step": Size(8, 2, 16), "large": Size(2**12, 8, 32)},
}


@dataclass(frozen=True)
class KernelCase:
    """A kernel at one size.

    Attributes:
        operation: The kernel as the engine calls it.
        reference: Its implementation in plain PyTorch.
        arguments: Makes the arguments of both; every call returns equal ones.
        moved: Bytes that must be read or written.
        formula: How `moved` is counted.
        shape: Description of the size.
        compiles: Whether the reference has no data-dependent control flow, so that it compiles as one graph.
    """

    operation: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    arguments: Callable[[], Sequence[Any]]
    moved: int
    formula: str
    shape: str
    compiles: bool = True


def guess_case(size: Size, device: torch.device) -> KernelCase:
    """Return the pseudo-labels of one step, from float32 logits as in the engine."""

    def arguments() -> Sequence[Any]:
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(size.batch, size.classes, generator=generator)
        p_model_history = torch.full((P_MODEL_STEPS, size.classes), 1 / size.classes)
        marginal = torch.full((size.classes,), 1 / size.classes)
        return [t.to(device) for t in (logits, p_model_history, torch.tensor(3), marginal)] + [0.5]

    batch_bytes = 4 * size.batch * size.classes
    return KernelCase(
        guess_labels,
        guess_labels_reference,
        arguments,
        2 * batch_bytes + 4 * size.classes * (P_MODEL_STEPS + 2),
        "4 B L (logits) + 4 B L (targets) + 4 L (128 + 2) (p_model_history read, one entry written, marginal)",
        f"B={size.batch} L={size.classes}",
    )


def assemble_case(size: Size, device: torch.device) -> KernelCase:
    """Return the network input of one step, from a real plan."""
    spec = PlanSpec(size.batch, size.k, 10 * size.batch, 20 * size.batch, max_shift=4, flip=True)
    plan = make_plan(spec, 0, 0, ctaugment.initial_weights())
    own = rank_plan(BatchLayout.for_rank(spec, 1, 0, 1, 1), plan, plan.labeled % size.classes)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    inputs, views = len(own.source), size.batch * spec.blocks

    def arguments() -> Sequence[Any]:
        arrays = noise(views, size.side), own.source, own.partner, own.lam, own.rotations
        tensors = [torch.from_numpy(array) for array in arrays]
        return [t.to(device) for t in (*tensors, *torch.tensor([TwoHeadNetwork.mean, TwoHeadNetwork.std]))] + [dtype]

    image = 3 * size.side**2
    return KernelCase(
        assemble_batch,
        assemble_batch_reference,
        arguments,
        views * image + inputs * image * dtype.itemsize + inputs * 28 + 24,
        f"3 H W V (each view once) + 3 H W N {dtype.itemsize} (batch) + 28 N (source, partner, lam, rotations)",
        f"{size}: V={views} N={inputs}, {str(dtype).removeprefix('torch.')}",
    )


def augment_case(size: Size, device: torch.device) -> KernelCase:
    """Return all views of one step, from images on the device and a real plan."""
    images = 10 * size.batch
    spec = PlanSpec(size.batch, size.k, images, images, max_shift=4, flip=True)
    views = make_plan(spec, 0, 0, ctaugment.initial_weights()).views
    count, image = len(views.image), 3 * size.side**2

    def arguments() -> Sequence[Any]:
        parameters = geometric.op_parameters(views.ops, views.levels, views.center, size.side, size.side)
        arrays = (noise(images, size.side), views.image, views.shift, views.flip, KERNEL_CODES[views.ops], parameters)
        return [torch.from_numpy(array).to(device) for array in arrays]

    return KernelCase(
        augment_views,
        augment_views_reference,
        arguments,
        2 * count * image + count * 76,
        "3 H W V (images read) + 3 H W V (views written) + 76 V (indices, shifts, flips, operations, parameters)",
        f"{size}: V={count}",
        compiles=False,
    )


# To add a kernel, write a function like those above and register it here.
KERNELS: dict[str, tuple[Callable[[Size, torch.device], KernelCase], Sizes]] = {
    "guess_labels": (guess_case, GUESS_SIZES),
    "assemble_batch": (assemble_case, BATCH_SIZES),
    "augment_views": (augment_case, BATCH_SIZES),
}


@dataclass
class KernelsOptions:
    """Time each kernel and its PyTorch reference."""

    out: Path = records.OUT / "kernels.jsonl"
    """File to append the records to."""
    repeats: int = 30
    """Samples per case; the median is reported."""
    kernels: tuple[str, ...] = tuple(KERNELS)
    """Kernels to time."""
    providers: tuple[str, ...] = PROVIDERS
    """triton: the kernel, on a GPU only; eager, compiled: the PyTorch reference without and with torch.compile."""
    sizes: tuple[str, ...] = ()
    """step, large, large-96 (on a GPU only); by default all sizes for the device."""


def main(options: KernelsOptions) -> None:
    """Time every case, with the samples of its providers interleaved.

    Raises:
        UserError: A kernel, provider or size is unknown, or none of the providers runs on this device.
    """
    device = bench_device()
    records.check_choices(options, kernels=KERNELS, providers=PROVIDERS, sizes=BATCH_SIZES[device.type])
    records.check_numbers(options, repeats=1)
    providers = [p for p in options.providers if p != "triton" or device.type == "cuda"]
    if not providers:
        raise UserError("--providers triton needs a GPU; without one, choose from eager, compiled")
    if len(providers) < len(options.providers):
        print("triton: skipped, needs a GPU")
    print(ceilings(device).text())
    failures = records.Failures()
    for kernel in options.kernels:
        make_case, sizes = KERNELS[kernel]
        for name, size in sizes[device.type].items():
            if options.sizes and name not in options.sizes:
                continue
            for fields in _time(make_case(size, device), providers, device, options.repeats, failures):
                BENCH.write(options.out, "kernels", device, kernel=kernel, size=name, **fields)
    failures.finish()


def _check(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise AssertionError if a result differs from the reference by more than rounding."""
    if expected.dtype is torch.uint8:  # Rounding can move a resampled pixel by one gray level.
        differing = (got != expected).float().mean().item()
        assert differing <= 0.005, f"{100 * differing:.2f} % of the pixels differ"
    else:
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def _time(
    case: KernelCase, providers: Sequence[str], device: torch.device, repeats: int, failures: records.Failures
) -> Iterator[dict[str, Any]]:
    """Check a case's result from each provider, then yield the record fields of those that passed."""
    bandwidth = ceilings(device).copy_bytes_per_second
    implementations = {
        "triton": case.operation,
        "eager": case.reference,
        "compiled": torch.compile(case.reference, dynamic=False),
    }
    functions = {}
    expected = case.reference(*case.arguments())
    for provider in providers:
        if provider == "compiled" and not case.compiles:
            continue
        implementation = implementations[provider]
        with failures.part(f"{case.operation.__name__} {provider}, {case.shape}"):
            arguments = case.arguments()
            _check(implementation(*arguments), expected)
            functions[provider] = partial(implementation, *arguments)
    del expected
    times = measure(functions, device, repeats, queued=True)
    floor = case.moved / bandwidth
    for provider, t in times.items():
        yield {
            "provider": provider,
            "shape": case.shape,
            "bytes": case.moved,
            "bytes_formula": case.formula,
            **quartiles("microseconds", 1e6 * np.array(t.samples)),
            "host_microseconds": t.host * 1e6,
            "gigabytes_per_second": case.moved / t.seconds / 1e9,
            "copy_gigabytes_per_second": bandwidth / 1e9,
            "floor_microseconds": floor * 1e6,
            "share_of_copy": floor / t.seconds,
        }


def _chart(axes: Any, kinds: Mapping[str, Sequence[Record]]) -> None:
    newest = kinds["kernels"]
    cases = list(dict.fromkeys((record["kernel"], record["size"]) for record in newest))
    providers = list(dict.fromkeys(record["provider"] for record in newest))
    width = 0.8 / len(providers)
    for number, provider in enumerate(providers):
        shares = {(r["kernel"], r["size"]): 100 * r["share_of_copy"] for r in newest if r["provider"] == provider}
        positions = [x + (number - (len(providers) - 1) / 2) * width for x in range(len(cases))]
        axes.bar(positions, [shares.get(case, 0.0) for case in cases], width, label=provider)
    axes.set_xticks(range(len(cases)), [f"{kernel}\n{size}" for kernel, size in cases], fontsize="small")
    axes.axhline(100, color="gray", linewidth=0.8)
    axes.set_ylabel("share of copy bandwidth, %")
    axes.legend(fontsize="small")


BENCH = Bench(
    options=KernelsOptions,
    main=main,
    quick="--repeats 1 --providers eager --sizes step",
    tables={
        "kernels": Table(
            chart=_chart,
            key=("kernel", "size", "provider"),
            columns={
                "kernel": "{kernel}",
                "size": "{size}",
                "shape": "{shape}",
                "provider": "{provider}",
                "time, us": "{microseconds:.2f}",
                "quartiles": "{microseconds_low:.2f} to {microseconds_high:.2f}",
                "host, us": "{host_microseconds:.1f}",
                "bytes": "{bytes:,}",
                "GB/s": "{gigabytes_per_second:.3g}",
                "share of copy bandwidth": "{share_of_copy:.1%}",
            },
        ),
    },
)
