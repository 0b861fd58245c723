"""`remixmatch bench throughput`: training steps per second by K, mode and source of views, against the roofline bound.

Rows are by K, by how a step is executed, by where its views come from and by micro-batches. "synthetic" views lie ready
on the device: what a run loses by making real ones is the difference. Cases take turns, sample by sample.
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

from bench.registry import Bench, Table, quartiles
from engine.config.config import Config
from engine.config.presets import preset
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.steps import VIEWS, TimedSteps
from engine.measuring.timing import Timing, bench_device, ceilings
from engine.measuring.timing import measure as measure_times
from engine.models.batch_norm import BatchNorm
from engine.models.wide_resnet import ResidualBlock, WideResNet
from pipelines.datasets import NOISE_32

MODES = ("eager", "compile", "graph")
# how often an activation is moved where batch norm is a pass of its own. Forward it is written, and read by its
# successor and for statistics or the shortcut; backward it is read again, and its gradient written and read
_PASSES_FORWARD, _PASSES_TRAINED = 3, 6


def figures(case: TimedSteps, timing: Timing, steps: int) -> dict[str, Any]:
    """Return the figures of samples of `steps` steps, with the roofline bound."""
    row = speed(timing, steps, case.feed.images_per_step)
    if case.feed.execution.device.type == "cuda":  # on a CPU, host and device are one
        row["host_ms"] = 1e3 * case.host_seconds / case.steps
    return row | _roofline(case, timing.seconds / steps)


def speed(timing: Timing, steps: int, images: int) -> dict[str, float]:
    """Return how fast samples of `steps` steps were, each of which trains so many images."""
    rate = steps / timing.seconds
    return {
        "steps_per_second": rate,
        "images_per_second": images * rate,
        **quartiles("step_ms", 1e3 * np.array(timing.samples) / steps),
    }


@contextmanager
def added_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Give a column of a record: the most that a GPU allocates in here beyond what it had before, in MiB.

    On a CPU there is none: a process has one peak, which says nothing about one of several cases.
    """
    column: dict[str, float] = {}
    if device.type != "cuda":
        yield column
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield column
    column["peak_memory_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _roofline(case: TimedSteps, step: float) -> dict[str, float]:
    """The roofline bound of a step: by arithmetic and by memory traffic, at the rates measured in this process."""
    config, execution = case.config, case.feed.execution
    limit = ceilings(execution.device)
    macs, activations = network_cost(config, case.feed.data.sides)
    trained = case.feed.images_per_step
    forward = len(case.feed.layout.source) - len(case.feed.layout.target_index)  # guesses and probes
    arithmetic = 2 * macs * (3 * trained + forward) / limit.matmul_flops_per_second
    rows = _PASSES_TRAINED * trained + _PASSES_FORWARD * forward
    traffic = execution.precision.itemsize * activations * rows / limit.copy_bytes_per_second
    floor = max(arithmetic, traffic)
    return {
        "floor_arithmetic_ms": 1e3 * arithmetic,
        "floor_memory_ms": 1e3 * traffic,
        "floor_ms": 1e3 * floor,
        "floor_ratio": step / floor,
    }


def network_cost(config: Config, sides: Sequence[int]) -> tuple[int, int]:
    """Multiplications and activation elements of one image's way through the network, forward.

    Activations are outputs of convolutions, of batch norm with its leaky ReLU, and of residual sums.
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
    """Return the `figures` of one configuration, over at least so many steps, with one of VIEWS."""
    case = TimedSteps.begin(config, views)
    each = whole_batches(-(-steps // repeats), config)
    try:
        device = case.feed.execution.device
        timing = measure_times({"": lambda: case.advance(each)}, device, repeats, warm_up=2)[""]
        return figures(case, timing, each)
    finally:
        case.end()


def whole_batches(steps: int, config: Config) -> int:
    """Steps rounded up to whole batches of views, so that every sample makes as many."""
    return -(-steps // config.view_steps) * config.view_steps


@dataclass
class ThroughputOptions:
    """Times training steps by K, mode and source of views."""

    out: Path = records.OUT / "throughput.jsonl"
    """Rows are added to this file."""
    repeats: int = 7
    """Samples; the median counts."""
    preset: str = ""
    """What is trained; by default the paper's step (WRN-28-2, 32x32, B = 64) with a GPU and digits-40 without."""
    k: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Strong views of an unlabeled image."""
    modes: tuple[str, ...] = ()
    """eager, compile, graph; by default all that the device can."""
    views: tuple[str, ...] = ()
    """fused, dali (on a CPU), synthetic; by default fused and synthetic with a GPU, and DALI's without."""
    micro_batches: tuple[int, ...] = (1,)
    """Parts in which a step's rows are trained one after another."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As in a run."""
    optimizer: Literal["torch", "apex"] = "torch"
    """As in a run."""
    deterministic: bool = False
    """As in a run."""
    steps: int | None = None
    """Steps a sample; by default 20 with a GPU and 8 without."""
    soak: int = 0
    """Steps trained after the samples, over which the growth of memory is measured; 0 for none."""


class ThroughputCase(NamedTuple):
    """What distinguishes a case from the others; K is 0 where all of them are meant."""

    k: int
    mode: str
    views: str
    micro_batches: int

    def __str__(self) -> str:
        words = [f"K={self.k}"] * (self.k > 0) + [self.mode, self.views]
        return " ".join(words + [f"in {self.micro_batches} parts"] * (self.micro_batches > 1))


def main(options: ThroughputOptions) -> None:
    """Times every case; on a CPU all of them in turn, on a GPU those of one K.

    Raises:
        UserError: a flag that cannot work.
    """
    device = bench_device()
    cuda = device.type == "cuda"
    modes = options.modes or (MODES if cuda else MODES[:2])
    views = options.views or (("fused", "synthetic") if cuda else ("dali",))
    records.check_choices(options, modes=MODES, views=VIEWS)
    records.check_numbers(options, k=1, micro_batches=1, repeats=1, steps=1)
    steps = options.steps or (20 if cuda else 8)
    if "graph" in modes and not cuda:
        raise UserError("--modes graph needs a GPU; without one there are eager and compile")
    print(ceilings(device).text())
    base = base_config(options.preset, cuda)
    same = ("precision", "optimizer", "deterministic")
    base = dataclasses.replace(base, **{name: getattr(options, name) for name in same})
    groups = [(k,) for k in options.k] if cuda else [options.k]
    for ks in groups:
        names = list(itertools.starmap(ThroughputCase, itertools.product(ks, modes, views, options.micro_batches)))
        _measure_together(options, base, steps, names, device)


def base_config(name: str, cuda: bool) -> Config:
    """The configuration that a bench of that preset varies."""
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
        row = {"preset": base.preset, "batch": base.batch, "optimizer": base.optimizer, **name._asdict()}
        row["precision"] = str(case.feed.execution.precision).removeprefix("torch.")
        if base.deterministic:
            row["deterministic"] = True
        row |= figures(case, timings[str(name)], steps) | memory[name]
        if options.soak:
            row |= _soak(case, options.soak)
            print(f"{name}: memory {row['memory_growth_mib']:+.1f} MiB over {options.soak} steps")
        step_ms[name] = row["step_ms"]
        BENCH.write(options.out, "throughput", device, **row)
    for case in cases.values():
        case.end()
    _print_ratios(step_ms)
    failures.finish()


def _resident(device: torch.device) -> float:
    """MiB in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _soak(case: TimedSteps, steps: int) -> dict[str, Any]:
    """Memory's growth over so many steps, after a tenth of them for whatever is lazily made."""
    case.advance(max(steps // 10, 1))
    before = _resident(case.feed.execution.device)
    case.advance(steps)
    return {"soak_steps": steps, "memory_growth_mib": _resident(case.feed.execution.device) - before}


def _print_ratios(step_ms: Mapping[ThroughputCase, float]) -> None:
    """What is measured here: modes against eager, views against synthetic ones, and the cost of K."""
    for name, ms in step_ms.items():
        if name.mode != "eager" and (eager := step_ms.get(name._replace(mode="eager"))):
            print(f"{name}: {eager / ms:.2f} times as fast as eager")
        if name.views != "synthetic" and (synthetic := step_ms.get(name._replace(views="synthetic"))):
            print(f"{name}: views cost {100 * (ms / synthetic - 1):+.1f} %")
        if name.micro_batches > 1 and (whole := step_ms.get(name._replace(micro_batches=1))):
            print(f"{name}: {ms / whole:.2f} times as long as in one pass")
    for every_k in dict.fromkeys(name._replace(k=0) for name in step_ms):
        points = [(name.k, ms) for name, ms in step_ms.items() if name._replace(k=0) == every_k]
        if len(points) > 2:
            ks, times = np.array(points).T
            slope, start = np.polyfit(ks, times, 1)
            off = np.abs(slope * ks + start - times) / times
            print(f"{every_k}: {start:.2f} + {slope:.2f} K ms a step, off by at most {100 * off.max():.1f} %")


_RIVALS = {"plain": "plain PyTorch", "usb": "USB's step", "torchssl": "TorchSSL's step"}  # of `bench baseline`


def _chart(axes: Any, rows: Mapping[str, Sequence[records.Row]]) -> None:
    lines: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)  # points by style and name
    preset = rows["throughput"][-1]["preset"]  # Rates of different networks cannot be compared on one axis.
    for row in rows["throughput"]:
        if row["preset"] == preset:
            name = f"{row['mode']}, {row['views']} views, {row['precision']}, {row['optimizer']}"
            if row.get("micro_batches", 1) > 1:
                name += f", {row['micro_batches']} micro-batches"
            lines["-o", name][row["k"]] = row["images_per_second"]
    for row in rows.get("baseline", []) if preset == "bench" else []:
        if rival := _RIVALS.get(
            row.get("trainer", "plain")
        ):  # The oldest records are of plain and have no such column.
            lines["--s", f"{rival}, {row['data']} views, {row['precision']}"][row["k"]] = row["images_per_second"]
    for (style, name), points in lines.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), style, label=name)
    ks = sorted({k for points in lines.values() for k in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="K", ylabel="trained rows a second", ylim=(0, None))
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
