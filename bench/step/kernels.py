"""`remixmatch bench kernels`: each Triton kernel and its PyTorch reference, against the device's copy bandwidth.

A kernel's roofline bound is the time to read its inputs once and write its outputs once at the device's copy
bandwidth, measured in the same run. The share is bound / time. At a step's size everything lies in the L2 cache of a
large GPU, where a share may pass 100 % and launch latency counts; the large sizes do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.registry import Bench, Table, quartiles
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
from pipelines.datasets import noise
from pipelines.fused import KERNEL_CODES
from pipelines.plan import PlanSpec, make_plan

PROVIDERS = ("triton", "eager", "compiled")


@dataclass(frozen=True)
class Size:
    """A batch of a step: B, K, the images' side and L."""

    batch: int
    k: int
    side: int
    classes: int = 10

    def __str__(self) -> str:
        return f"B={self.batch} K={self.k} {self.side}x{self.side} L={self.classes}"


# by the device's type; "step" is a training step's
Sizes = dict[str, dict[str, Size]]
BATCHES: Sizes = {
    "cuda": {"step": Size(64, 8, 32), "large": Size(1024, 8, 32), "large-96": Size(128, 8, 96)},
    "cpu": {"step": Size(8, 2, 16), "large": Size(32, 8, 32)},
}
GUESSES: Sizes = {
    "cuda": {"step": Size(64, 8, 32), "large": Size(2**18, 8, 32, 100)},
    "cpu": {"step": Size(8, 2, 16), "large": Size(2**12, 8, 32)},
}


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one size.

    Attributes:
        operation: the kernel as the engine calls it.
        twin: its plain PyTorch form.
        arguments: makes the arguments of both, the same ones each time.
        moved: bytes that have to be read or written.
        formula: how `moved` is counted.
        shape: the size in words.
        compiles: whether the twin's way through its code does not depend on values, so that it can be compiled whole.
    """

    operation: Callable[..., torch.Tensor]
    twin: Callable[..., torch.Tensor]
    arguments: Callable[[], Sequence[Any]]
    moved: int
    formula: str
    shape: str
    compiles: bool = True


def guess_case(size: Size, device: torch.device) -> KernelCase:
    """The guess of one step, from logits as the engine hands them over: float32."""

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
        "4 B L (logits) + 4 B L (targets) + 4 L (128 + 2) (p_model_history read, its row written, marginal)",
        f"B={size.batch} L={size.classes}",
    )


def assemble_case(size: Size, device: torch.device) -> KernelCase:
    """The network's whole input of one step, from the numbers of a real plan."""
    spec = PlanSpec(size.batch, size.k, 10 * size.batch, 20 * size.batch, max_shift=4, flip=True)
    plan = make_plan(spec, 0, 0, ctaugment.initial_weights())
    numbers = rank_plan(BatchLayout.for_rank(spec, 1, 0, 1, 1), plan, plan.labeled % size.classes)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, views = len(numbers.source), size.batch * spec.blocks

    def arguments() -> Sequence[Any]:
        stored = noise(views, size.side)
        tensors = [
            torch.from_numpy(a) for a in (stored, numbers.source, numbers.partner, numbers.lam, numbers.rotations)
        ]
        return [t.to(device) for t in (*tensors, *torch.tensor([TwoHeadNetwork.mean, TwoHeadNetwork.std]))] + [dtype]

    image = 3 * size.side**2
    return KernelCase(
        assemble_batch,
        assemble_batch_reference,
        arguments,
        views * image + rows * image * dtype.itemsize + rows * 28 + 24,
        f"3 H W V (each view once) + 3 H W N {dtype.itemsize} (batch) + 28 N (rows, partners, lam, rotations)",
        f"{size}: V={views} N={rows}, {str(dtype).removeprefix('torch.')}",
    )


def augment_case(size: Size, device: torch.device) -> KernelCase:
    """All views of one step, from images that lie on the device, by the numbers of a real plan."""
    images = 10 * size.batch
    spec = PlanSpec(size.batch, size.k, images, images, max_shift=4, flip=True)
    views = make_plan(spec, 0, 0, ctaugment.initial_weights()).views
    rows, image = len(views.image), 3 * size.side**2

    def arguments() -> Sequence[Any]:
        numbers = geometric.op_parameters(views.ops, views.levels, views.center, size.side, size.side)
        arrays = (noise(images, size.side), views.image, views.shift, views.flip, KERNEL_CODES[views.ops], numbers)
        return [torch.from_numpy(array).to(device) for array in arrays]

    return KernelCase(
        augment_views,
        augment_views_reference,
        arguments,
        2 * rows * image + rows * 76,
        "3 H W V (an image read) + 3 H W V (a view written) + 76 V (places, shifts, flips, operations, parameters)",
        f"{size}: V={rows}",
        compiles=False,
    )


# to add a kernel: a function like those above, and its entry here
KERNELS: dict[str, tuple[Callable[[Size, torch.device], KernelCase], Sizes]] = {
    "guess_labels": (guess_case, GUESSES),
    "assemble_batch": (assemble_case, BATCHES),
    "augment_views": (augment_case, BATCHES),
}


@dataclass
class KernelsOptions:
    """Times each kernel and its PyTorch twin."""

    out: Path = records.OUT / "kernels.jsonl"
    """Rows are added to this file."""
    repeats: int = 30
    """Samples of each; the median counts."""
    kernels: tuple[str, ...] = tuple(KERNELS)
    """Kernels to time."""
    providers: tuple[str, ...] = PROVIDERS
    """triton (on a GPU only), eager and compiled: the twin as it is, and under torch.compile."""
    sizes: tuple[str, ...] = ()
    """Of step, large and large-96; by default all that the device has."""


def main(options: KernelsOptions) -> None:
    """Times every case, provider by provider in turn.

    Raises:
        UserError: no such kernel, provider or size.
    """
    device = bench_device()
    records.check_choices(options, kernels=KERNELS, providers=PROVIDERS, sizes=BATCHES[device.type])
    records.check_numbers(options, repeats=1)
    providers = [p for p in options.providers if p != "triton" or device.type == "cuda"]
    if not providers:
        raise UserError("--providers triton: there is no GPU here; add eager or compiled")
    if len(providers) < len(options.providers):
        print("triton: needs a GPU, left out")
    print(ceilings(device).text())
    failures = records.Failures()
    for kernel in options.kernels:
        case_of, sizes = KERNELS[kernel]
        for name, size in sizes[device.type].items():
            if options.sizes and name not in options.sizes:
                continue
            for row in _rows(case_of(size, device), providers, device, options.repeats, failures):
                BENCH.write(options.out, "kernels", device, kernel=kernel, size=name, **row)
    failures.finish()


def _check(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises AssertionError where a result is wrong by more than the order of its sums can explain."""
    if expected.dtype is torch.uint8:  # a resampled pixel may come out as the next grey level
        differing = (got != expected).float().mean().item()
        assert differing <= 0.005, f"{100 * differing:.2f} % of the pixels differ"
    else:
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def _rows(
    case: KernelCase, providers: Sequence[str], device: torch.device, repeats: int, failures: records.Failures
) -> Iterator[dict[str, Any]]:
    bandwidth = ceilings(device).copy_bytes_per_second
    forms = {"triton": case.operation, "eager": case.twin, "compiled": torch.compile(case.twin, dynamic=False)}
    functions = {}
    expected = case.twin(*case.arguments())
    for provider in providers:
        if provider == "compiled" and not case.compiles:
            continue
        form = forms[provider]
        with failures.part(f"{case.operation.__name__} {provider}, {case.shape}"):
            arguments = case.arguments()
            _check(form(*arguments), expected)
            functions[provider] = partial(form, *arguments)
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


def _chart(axes: Any, rows: Mapping[str, Sequence[records.Row]]) -> None:
    cases = list(dict.fromkeys((row["kernel"], row["size"]) for row in rows["kernels"]))
    providers = list(dict.fromkeys(row["provider"] for row in rows["kernels"]))
    width = 0.8 / len(providers)
    for number, provider in enumerate(providers):
        shares = {
            (r["kernel"], r["size"]): 100 * r["share_of_copy"] for r in rows["kernels"] if r["provider"] == provider
        }
        places = [place + (number - (len(providers) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, [shares.get(case, 0.0) for case in cases], width, label=provider)
    axes.set_xticks(range(len(cases)), [f"{kernel}\n{size}" for kernel, size in cases], fontsize="small")
    axes.axhline(100, color="grey", linewidth=0.8)
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
                "share of copy": "{share_of_copy:.1%}",
            },
        ),
    },
)
