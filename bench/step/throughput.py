"""`remixmatch bench throughput`: training steps per second by K, mode and source of views, against the roofline bound.

Cases vary K, the execution mode, the source of views and the number of micro-batches. Their samples are interleaved.
"synthetic" views are precomputed on the device: the difference to real views is the cost of making them.
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.registry import Bench, Record, Table, quartiles
from engine.config.config import Config
from engine.config.presets import preset
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.steps import VIEWS, TimedSteps
from engine.measuring.timing import Timing, bench_device, ceilings
from engine.measuring.timing import measure as measure_times
from engine.models.batch_norm import BatchNorm
from engine.models.wide_resnet import ResidualBlock, WideResNet
from pipelines.data.datasets import NOISE_32

MODES = ("eager", "compile", "graph")
# Memory passes over an activation when batch norm is a separate pass. Forward: one write, a read by the next layer, and
# a read for statistics or the shortcut. Backward: another read, and a write and a read of its gradient.
_PASSES_FORWARD, _PASSES_TRAINED = 3, 6


def step_metrics(case: TimedSteps, timing: Timing, steps: int) -> dict[str, Any]:
    """Return the record fields for samples of `steps` steps: speed and roofline bound."""
    metrics = speed(timing, steps, case.feed.images_per_step)
    if case.feed.execution.device.type == "cuda":  # On a CPU, host and device are the same.
        metrics["host_ms"] = 1e3 * case.host_seconds / case.steps
    return metrics | _roofline(case, timing.seconds / steps)


def speed(timing: Timing, steps: int, images: int) -> dict[str, float]:
    """Return the record fields for the speed of samples of `steps` steps that train `images` images each."""
    rate = steps / timing.seconds
    return {
        "steps_per_second": rate,
        "images_per_second": images * rate,
        **quartiles("step_ms", 1e3 * np.array(timing.samples) / steps),
    }


@contextmanager
def added_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Yield a dict that receives `peak_memory_mib`, the peak of GPU memory allocated within the block, in MiB.

    Memory allocated before the block does not count. On a CPU the dict stays empty: the peak of a process cannot be
    attributed to a single case.
    """
    fields: dict[str, float] = {}
    if device.type != "cuda":
        yield fields
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield fields
    fields["peak_memory_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _roofline(case: TimedSteps, step: float) -> dict[str, float]:
    """Return the roofline bound of a step, from arithmetic and memory traffic at the rates measured in this process."""
    config, execution = case.config, case.feed.execution
    limit = ceilings(execution.device)
    macs, activations = network_cost(config, case.feed.data.sides)
    trained = case.feed.images_per_step
    forward = len(case.feed.layout.source) - len(case.feed.layout.target_index)  # Guess and probes.
    arithmetic = 2 * macs * (3 * trained + forward) / limit.matmul_flops_per_second
    passes = _PASSES_TRAINED * trained + _PASSES_FORWARD * forward
    traffic = execution.precision.itemsize * activations * passes / limit.copy_bytes_per_second
    floor = max(arithmetic, traffic)
    return {
        "floor_arithmetic_ms": 1e3 * arithmetic,
        "floor_memory_ms": 1e3 * traffic,
        "floor_ms": 1e3 * floor,
        "floor_ratio": step / floor,
    }


def network_cost(config: Config, sides: Sequence[int]) -> tuple[int, int]:
    """Return the multiply-accumulates and activation elements of one image's forward pass.

    Activations are the outputs of convolutions, of batch norm with its leaky ReLU, and of residual sums.
    """
    network = WideResNet(2, config.scales, config.blocks, config.width).eval()
    macs = elements = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, elements
        elements += output.numel()
        if isinstance(module, nn.Conv2d):
            macs += output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, BatchNorm, ResidualBlock)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, *sides))
    return macs, elements


def measure(config: Config, steps: int, views: str, repeats: int = 5) -> dict[str, Any]:
    """Return the `step_metrics` of one configuration, measured over at least `steps` steps with one of VIEWS."""
    case = TimedSteps.begin(config, views)
    each = whole_batches(-(-steps // repeats), config)
    try:
        device = case.feed.execution.device
        timing = measure_times({"": lambda: case.advance(each)}, device, repeats, warm_up=2)[""]
        return step_metrics(case, timing, each)
    finally:
        case.end()


def whole_batches(steps: int, config: Config) -> int:
    """Round steps up to a multiple of `view_steps`, so that every sample makes the same number of view batches."""
    return -(-steps // config.view_steps) * config.view_steps


@dataclass
class ThroughputOptions:
    """Time training steps by K, mode and source of views."""

    out: Path = records.OUT / "throughput.jsonl"
    """File to append the records to."""
    repeats: int = 7
    """Samples per case; the median is reported."""
    preset: str = ""
    """Preset to train; by default the paper's step (WRN-28-2, 32x32, B = 64) with a GPU and digits-40 without."""
    k: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Strong views per unlabeled image."""
    modes: tuple[str, ...] = ()
    """eager, compile, graph; by default all modes that the device supports."""
    views: tuple[str, ...] = ()
    """fused, dali (on a CPU), synthetic; by default fused and synthetic with a GPU, dali without."""
    micro_batches: tuple[int, ...] = (1,)
    """Micro-batches per step."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Same as in remixmatch train."""
    optimizer: Literal["torch", "apex"] = "torch"
    """Same as in remixmatch train."""
    deterministic: bool = False
    """Same as in remixmatch train."""
    steps: int | None = None
    """Steps per sample; by default 20 with a GPU and 8 without."""
    soak: int = 0
    """Also train this many steps after the samples and report the growth of memory; 0 to skip."""


class ThroughputCase(NamedTuple):
    """Key of a case; K = 0 stands for all K."""

    k: int
    mode: str
    views: str
    micro_batches: int

    def __str__(self) -> str:
        words = [f"K={self.k}"] * (self.k > 0) + [self.mode, self.views]
        return " ".join(words + [f"micro-batches={self.micro_batches}"] * (self.micro_batches > 1))


def main(options: ThroughputOptions) -> None:
    """Time every case. Samples of all cases are interleaved on a CPU, those of one K on a GPU.

    Raises:
        UserError: A flag is invalid.
    """
    device = bench_device()
    cuda = device.type == "cuda"
    modes = options.modes or (MODES if cuda else MODES[:2])
    views = options.views or (("fused", "synthetic") if cuda else ("dali",))
    records.check_choices(options, modes=MODES, views=VIEWS)
    records.check_numbers(options, k=1, micro_batches=1, repeats=1, steps=1)
    steps = options.steps or (20 if cuda else 8)
    if "graph" in modes and not cuda:
        raise UserError("--modes graph needs a GPU; without one, choose from eager, compile")
    print(ceilings(device).text())
    base = base_config(options.preset, cuda)
    same = ("precision", "optimizer", "deterministic")
    base = dataclasses.replace(base, **{name: getattr(options, name) for name in same})
    groups = [(k,) for k in options.k] if cuda else [options.k]
    for ks in groups:
        names = list(itertools.starmap(ThroughputCase, itertools.product(ks, modes, views, options.micro_batches)))
        _measure_together(options, base, steps, names, device)


def base_config(name: str, cuda: bool) -> Config:
    """Return the base configuration of a bench: a preset, or the device's default if the name is empty."""
    if name or not cuda:
        return preset(name or "digits-40")
    return Config(preset="bench", dataset=NOISE_32, labels=250)


def _measure_together(
    options: ThroughputOptions, base: Config, steps: int, names: list[ThroughputCase], device: torch.device
) -> None:
    cases: dict[ThroughputCase, TimedSteps] = {}
    memory: dict[ThroughputCase, dict[str, float]] = {}
    failures = records.Failures()
    steps = whole_batches(steps, base)
    for name in names:
        with failures.part(str(name)):
            varied = {"k": name.k, "mode": name.mode, "micro_batches": name.micro_batches}
            with added_memory(device) as memory[name]:
                cases[name] = TimedSteps.begin(dataclasses.replace(base, **varied), name.views)  # type: ignore[arg-type]
                cases[name].advance(whole_batches(2, base))
            cases[name].host_seconds, cases[name].steps = 0.0, 0
    functions = {str(name): partial(case.advance, steps) for name, case in cases.items()}
    timings = measure_times(functions, device, options.repeats, warm_up=1) if functions else {}
    step_ms = {}
    for name, case in cases.items():
        fields = {"preset": base.preset, "batch": base.batch, "optimizer": base.optimizer, **name._asdict()}
        fields["precision"] = str(case.feed.execution.precision).removeprefix("torch.")
        if base.deterministic:
            fields["deterministic"] = True
        fields |= step_metrics(case, timings[str(name)], steps) | memory[name]
        if options.soak:
            fields |= _soak(case, options.soak)
            print(f"{name}: memory {fields['memory_growth_mib']:+.1f} MiB over {options.soak} steps")
        step_ms[name] = fields["step_ms"]
        BENCH.write(options.out, "throughput", device, **fields)
    for case in cases.values():
        case.end()
    _print_ratios(step_ms)
    failures.finish()


def _resident(device: torch.device) -> float:
    """Return the memory in use, in MiB."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _soak(case: TimedSteps, steps: int) -> dict[str, Any]:
    """Measure the growth of memory over `steps` steps, after a tenth as many for lazy allocations."""
    case.advance(max(steps // 10, 1))
    before = _resident(case.feed.execution.device)
    case.advance(steps)
    return {"soak_steps": steps, "memory_growth_mib": _resident(case.feed.execution.device) - before}


def _print_ratios(step_ms: Mapping[ThroughputCase, float]) -> None:
    """Print the speedup over eager, the cost of views and of micro-batches, and a linear fit of the time over K."""
    for name, ms in step_ms.items():
        if name.mode != "eager" and (eager := step_ms.get(name._replace(mode="eager"))):
            print(f"{name}: {eager / ms:.2f}x the speed of eager")
        if name.views != "synthetic" and (synthetic := step_ms.get(name._replace(views="synthetic"))):
            print(f"{name}: views cost {100 * (ms / synthetic - 1):+.1f} %")
        if name.micro_batches > 1 and (whole := step_ms.get(name._replace(micro_batches=1))):
            print(f"{name}: {ms / whole:.2f}x the time of a single pass")
    for every_k in dict.fromkeys(name._replace(k=0) for name in step_ms):
        points = [(name.k, ms) for name, ms in step_ms.items() if name._replace(k=0) == every_k]
        if len(points) > 2:
            ks, times = np.array(points).T
            slope, start = np.polyfit(ks, times, 1)
            error = np.abs(slope * ks + start - times) / times
            print(f"{every_k}: {start:.2f} + {slope:.2f} K ms per step, error at most {100 * error.max():.1f} %")


_RIVALS = {"plain": "plain PyTorch", "usb": "USB's step", "torchssl": "TorchSSL's step"}


def _chart(axes: Any, kinds: Mapping[str, Sequence[Record]]) -> None:
    lines: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)  # Points by style and name.
    preset = kinds["throughput"][-1]["preset"]  # Rates of different networks cannot be compared on one axis.
    for record in kinds["throughput"]:
        if record["preset"] == preset:
            name = f"{record['mode']}, {record['views']} views, {record['precision']}, {record['optimizer']}"
            if record.get("micro_batches", 1) > 1:
                name += f", {record['micro_batches']} micro-batches"
            lines["-o", name][record["k"]] = record["images_per_second"]
    for record in kinds.get("baseline", []) if preset == "bench" else []:
        # The oldest records lack "trainer"; they are all of plain PyTorch.
        if rival := _RIVALS.get(record.get("trainer", "plain")):
            label = f"{rival}, {record['data']} views, {record['precision']}"
            lines["--s", label][record["k"]] = record["images_per_second"]
    for (style, name), points in lines.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), style, label=name)
    ks = sorted({k for points in lines.values() for k in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="K", ylabel="trained images/s", ylim=(0, None))
    axes.legend(fontsize="small")


BENCH = Bench(
    options=ThroughputOptions,
    main=main,
    quick="--repeats 1 --k 1 --modes eager --steps 1",
    tables={
        "throughput": Table(
            chart=_chart,
            key=("preset", "k", "batch", "mode", "views", "micro_batches", "precision", "optimizer", "deterministic"),
            columns={
                "preset": "{preset}",
                "K": "{k}",
                "B": "{batch}",
                "mode": "{mode}",
                "views": "{views}",
                "micro-batches": "{micro_batches}",
                "precision": "{precision}",
                "optimizer": "{optimizer}",
                "deterministic": "{deterministic}",
                "step, ms": "{step_ms:.2f}",
                "steps/s": "{steps_per_second:.1f}",
                "images/s": "{images_per_second:,.0f}",
                "host, ms": "{host_ms:.2f}",
                "roofline bound, ms": "{floor_ms:.2f}",
                "ratio to bound": "{floor_ratio:.2f}",
                "memory, MiB": "{peak_memory_mib:.0f}",
            },
        ),
    },
)
