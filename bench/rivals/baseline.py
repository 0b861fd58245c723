"""`remixmatch bench baseline`: the training step compared with plain PyTorch's and other libraries', rewritten.

There are three rivals: `plain` is good everyday PyTorch (`plain.py`); `usb` and `torchssl` are the steps of these two
libraries (`ports.py`), which fix K = 2. The engine is compared with `plain` at the same K, and with the others at K = 2
and at every larger K requested.

The samples of a rival and the engine are interleaved in one process, and a speedup is the median over the repeats of
the ratio within a repeat. When a sample of N steps starts, every prefetched batch of the rival's DataLoader or of the
engine's view pipeline is ready. It ends when workers, planner and view pipeline have refilled their queues. Each
trainer makes as many batches as it trains. So nothing runs in the background while another is sampled, and no queue
starts empty. If training is slower than loading, loading overlaps with the steps; if loading is slower, the workers are
busy throughout the sample.

Two effects remain. At the end of a sample some workers may idle while another finishes, which costs less than one batch
and less with more `--steps`. The transfer of a finished batch from a worker is not waited for.

"networks" is the time of the forward and backward passes alone, at the step's batch sizes; "other" is the rest of a
step on precomputed views; "views" is the additional time of a step that makes its views. The engine has no "networks"
time on a GPU, where its step is a single CUDA graph.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bench.registry import Bench, Table, quartiles
from bench.rivals import plain, ports
from bench.rivals.loaders import EndlessLoader
from bench.step.throughput import added_memory, speed, step_metrics
from engine.config.checks import validate
from engine.config.config import Config
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.steps import SyntheticViews, TimedSteps
from engine.measuring.timing import Timing, bench_device, ceilings, measure
from engine.runs.setup import setup_run
from engine.training.execution import set_numerics
from engine.training.feed import Feed, ViewLoader
from pipelines.data.cache import DataSet
from pipelines.data.datasets import NOISE_32

ENGINE = "engine"
DATA = ("real", "synthetic")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Rival:
    """A trainer that does not use the engine.

    Attributes:
        step: Makes the step from (config, data, split, device); the step takes a batch of each loader.
        loaders: Makes its DataLoaders from (config, data, split, device, workers).
        k: The only K that it supports; None for any.
        joint: Whether all trained inputs share one forward pass; otherwise there is a pass per B inputs.
        precision: Autocast dtype on a GPU.
    """

    step: Callable[[Config, DataSet, np.ndarray, torch.device], Any]
    loaders: Callable[[Config, DataSet, np.ndarray, torch.device, int], list[EndlessLoader]]
    k: int | None
    joint: bool
    precision: torch.dtype


RIVALS = {
    "plain": Rival(plain.PlainStep, plain.loaders, None, True, torch.bfloat16),
    "usb": Rival(ports.PortStep, ports.loaders, ports.K, False, torch.float16),
    "torchssl": Rival(partial(ports.PortStep, interleaved=True), ports.loaders, ports.K, False, torch.float16),
}


def step_config(k: int, device: torch.device, batch: int | None = None) -> Config:
    """Return the configuration to train: the paper's at CIFAR-10's shape on a GPU, a small one on a CPU."""
    config = Config(preset="bench", dataset=NOISE_32, labels=250, k=k, steps=2**20)
    if device.type != "cuda":
        config = dataclasses.replace(config, batch=8, blocks=1, width=8)
    return config if batch is None else dataclasses.replace(config, batch=batch)


@dataclass
class BaselineOptions:
    """Time the training step of the engine and of other implementations."""

    out: Path = records.OUT / "baseline.jsonl"
    """File to append the records to."""
    repeats: int = 5
    """Samples per trainer; the median is reported."""
    rivals: tuple[str, ...] = ("plain", "usb")
    """plain: good everyday PyTorch; usb, torchssl: the steps of these libraries, with K = 2."""
    k: tuple[int, ...] = (1, 8)
    """Strong views per unlabeled image. usb and torchssl, always at K = 2, are compared with the engine at K >= 2."""
    steps: int | None = None
    """Steps per sample; by default 20 with a GPU and 8 without."""
    batch: int | None = None
    """B; by default 64 with a GPU and 8 without."""
    data: tuple[str, ...] = DATA
    """real: make views while training; synthetic: train on precomputed views on the device."""
    workers: int = len(os.sched_getaffinity(0))
    """DataLoader workers; by default one per core. usb and torchssl have another one for labeled images."""
    parts: bool = True
    """Also time the forward and backward passes alone."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How the engine's step runs; see --mode of 'remixmatch train'."""
    augment: Literal["ctaugment", "randaugment"] = "ctaugment"
    """The engine's strong augmentation; randaugment has no probes, which the rivals do not have either."""
    clock: Literal["wall", "cpu"] = "wall"
    """Clock without a GPU: wall, or cpu, the process's CPU time, which other processes affect less."""


class SettledViews:
    """A view pipeline that can be waited for without collecting its views.

    Args:
        views: The pipeline.
    """

    def __init__(self, views: ViewLoader) -> None:
        self._views = views
        self._pending = 0
        self._made: deque[Tensor] = deque()
        self.prepare, self.close = views.prepare, views.close

    def submit(self, prepared: Any) -> None:
        """Start a batch."""
        self._views.submit(prepared)
        self._pending += 1

    def collect(self) -> Tensor:
        """Return the oldest batch, (V, H, W, 3) uint8."""
        if self._made:
            return self._made.popleft()
        self._pending -= 1
        return self._views.collect()

    def settle(self) -> None:
        """Wait until every submitted batch is done; on a GPU, make the current stream wait."""
        for _ in range(self._pending):
            self._made.append(self._views.collect())
        self._pending = 0


class SettledFeed(Feed):
    """The engine's prefetching loader, extended by a way to wait for its queue."""

    _settled: SettledViews

    def begin(self, step: int, views: ViewLoader | None = None) -> None:
        """See `Feed.begin`."""
        self._settled = SettledViews(views or self.make_views())
        super().begin(step, self._settled)

    def settle(self) -> None:
        """Wait until planner and view pipeline are idle."""
        for plans in self._planning:
            plans.result()
        self._settled.settle()


@dataclass
class TimedTrainer:
    """A rival or the engine at one K, ready to be timed.

    Attributes:
        name: One of RIVALS, or ENGINE.
        config: Configuration to train.
        facts: Constant fields of its records.
        steps: Functions that train one step, by kind of views (DATA); "networks" runs the forward and backward passes
            alone and is missing if the step is a CUDA graph.
        sources: Sources of its batches.
        metrics: Makes the measured fields of a record from (data, timing, steps of a sample).
    """

    name: str
    config: Config
    facts: dict[str, Any]
    steps: dict[str, Callable[[], Any]]
    sources: Sequence[EndlessLoader | SettledFeed]
    metrics: Callable[[str, Timing, int], dict[str, float]]

    def advance(self, kind: str, steps: int) -> None:
        """Train `steps` steps and wait until nothing is pending."""
        for _ in range(steps):
            self.steps[kind]()
        for source in self.sources:
            source.settle()


def make_rival(
    name: str, config: Config, options: BaselineOptions, device: torch.device, closing: ExitStack
) -> TimedTrainer:
    """Make one of RIVALS. Its workers end when `closing` is closed."""
    rival = RIVALS[name]
    setup = setup_run(config)
    config, data, split = setup.config, setup.data, setup.split
    trained = rival.step(config, data, split, device)
    blocks = config.k + 4
    passes = [config.batch * blocks] if rival.joint else [config.batch] * blocks
    guess = [(trained.network, config.batch)]
    steps = {"networks": network_passes(trained.network, guess, passes, data.sides, trained.autocast)}
    loaders: list[EndlessLoader] = []
    if "synthetic" in options.data:
        batch = [[t.to(device) for t in next(loader)] for loader in rival.loaders(config, data, split, device, 0)]
        steps["synthetic"] = partial(trained.step, *batch)
    if "real" in options.data:
        loaders = rival.loaders(config, data, split, device, options.workers)
        steps["real"] = lambda: trained.step(*map(next, loaders))
    for loader in loaders:
        closing.callback(loader.close)
    precision = rival.precision if device.type == "cuda" else torch.float32
    facts = {"precision": str(precision).removeprefix("torch."), "mode": "eager"}
    return TimedTrainer(
        name, config, facts, steps, loaders, lambda data, timing, steps: speed(timing, steps, config.batch * blocks)
    )


def make_engine(config: Config, options: BaselineOptions, closing: ExitStack) -> TimedTrainer:
    """Make the engine: one step, captured on a GPU, with a feed for each kind of views. They end with `closing`."""
    config = dataclasses.replace(config, mode=options.mode, augment=options.augment)
    set_up = TimedSteps.begin(config, "synthetic")
    set_up.feed.end()
    config, state, execution, data = set_up.config, set_up.state, set_up.feed.execution, set_up.feed.data
    feeds = {kind: SettledFeed(config, data, set_up.feed.split, execution) for kind in options.data}
    cases = {kind: dataclasses.replace(set_up, feed=feed) for kind, feed in feeds.items()}
    for kind, feed in feeds.items():
        views = SyntheticViews(feed.layout.view_count * config.view_steps, data.sides, execution.device)
        feed.begin(0, views if kind == "synthetic" else None)
        closing.callback(cases[kind].end)
    steps: dict[str, Callable[[], Any]] = {kind: partial(case.advance, 1) for kind, case in cases.items()}
    if execution.mode == "eager":
        half = execution.precision.itemsize < 4
        autocast = torch.autocast(execution.device.type, execution.precision if half else None, enabled=half)
        forward = [(state.network, config.batch)]  # The pseudo-labels; with CTAugment, there are also probes.
        if config.augment == "ctaugment":
            forward.append((state.ema_model, config.batch))
        trained = [set_up.feed.images_per_step]
        steps["networks"] = network_passes(state.network, forward, trained, data.sides, autocast)
    facts = {"precision": str(execution.precision).removeprefix("torch."), "mode": execution.mode}
    facts["augment"] = config.augment
    return TimedTrainer(
        ENGINE, config, facts, steps, list(feeds.values()), lambda data, *timed: step_metrics(cases[data], *timed)
    )


def network_passes(
    network: nn.Module,
    forward: Sequence[tuple[nn.Module, int]],
    trained: Sequence[int],
    sides: tuple[int, int],
    autocast: torch.autocast,
) -> Callable[[], None]:
    """Return a function that runs only the network passes of a step, on copies of the networks and random inputs.

    Args:
        network: The trained network, from (N, 3, H, W) to class and rotation logits.
        forward: Network and batch size of each pass without gradient.
        trained: Batch size of each pass with a backward pass.
        sides: H and W.
        autocast: Autocast context of the step.
    """
    weight = next(network.parameters())
    layout = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format

    def random(count: int) -> Tensor:
        return torch.randn(count, 3, *sides, device=weight.device).contiguous(memory_format=layout)

    network, *others = copy.deepcopy([network, *(other for other, _ in forward)])  # One copy of each network.
    without_gradient = [(other, random(count)) for other, (_, count) in zip(others, forward, strict=True)]
    inputs = [random(count) for count in trained]

    def run() -> None:
        with torch.no_grad(), autocast:
            for other, images in without_gradient:
                other(images)
        with autocast:
            logits = [part for images in inputs for part in network(images)]
        torch.stack([part.sum() for part in logits]).sum().backward()
        network.zero_grad()

    return run


def main(options: BaselineOptions) -> None:
    """Time every rival and the engine, with their samples interleaved.

    Raises:
        UserError: A flag is invalid.
    """
    records.check_choices(options, data=DATA, rivals=RIVALS)
    records.check_numbers(options, k=1, repeats=1, workers=1, steps=1)
    for flag in ("data", "rivals", "k"):
        if not getattr(options, flag):
            raise UserError(f"--{flag} needs at least one value")
    device = bench_device()
    steps = options.steps or (20 if device.type == "cuda" else 8)
    groups = [group for name in options.rivals for group in _groups(name, options.k)]
    configs = {k: step_config(k, device, options.batch) for _, own, engine_ks in groups for k in (own, *engine_ks)}
    for config in configs.values():
        validate(config)
    print(ceilings(device).text())
    set_numerics(deterministic=False)
    with ExitStack() as closing:
        # Make the rivals first, so that their workers fork before the view pipelines start threads.
        rivals = [
            _warmed_up(partial(make_rival, name, configs[k], options, device, closing), options, device)
            for name, k, _ in groups
        ]
        engines: dict[int, TimedTrainer] = {}
        for rival, (_, _, engine_ks) in zip(rivals, groups, strict=True):
            for k in engine_ks:
                if k not in engines:
                    engines[k] = _warmed_up(partial(make_engine, configs[k], options, closing), options, device)
            for fields in _compare(rival, [engines[k] for k in engine_ks], options, steps, device):
                BENCH.write(options.out, "baseline", device, **fields)


def _groups(name: str, ks: Sequence[int]) -> list[tuple[str, int, list[int]]]:
    """Return the comparisons for a rival: its name, its K, and the values of K of the engine."""
    own = RIVALS[name].k
    if own is None:
        return [(name, k, [k]) for k in ks]
    return [(name, own, [own, *(k for k in ks if k > own)])]


def _warmed_up(make: Callable[[], TimedTrainer], options: BaselineOptions, device: torch.device) -> TimedTrainer:
    """Make a trainer and train a few steps, for compilation, allocation and the first batches of the workers."""
    with added_memory(device) as memory:
        trainer = make()
        for data in options.data:
            trainer.advance(data, 2)
    trainer.facts |= memory
    return trainer


def _compare(
    rival: TimedTrainer, engines: Sequence[TimedTrainer], options: BaselineOptions, steps: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Time a rival and the engine; yield the record fields of each trainer on each kind of views."""
    trainers = [rival, *engines]
    kinds = ["networks"] * options.parts + sorted(options.data, reverse=True)
    functions = {
        _name(trainer, kind): partial(trainer.advance, kind, steps)
        for kind in kinds
        for trainer in trainers
        if kind in trainer.steps
    }
    timings = measure(functions, device, options.repeats, warm_up=1, clock=CLOCKS[options.clock])
    for data in options.data:
        for trainer in trainers:
            own = {kind: timings[name] for kind in kinds if (name := _name(trainer, kind)) in timings}
            fields: dict[str, Any] = {"trainer": trainer.name, "k": trainer.config.k, "batch": trainer.config.batch}
            fields |= {"data": data, "samples": options.repeats, "steps": steps, "clock": options.clock} | trainer.facts
            fields |= trainer.metrics(data, own[data], steps) | _parts(own, data, steps)
            if trainer is rival:
                fields["workers"] = options.workers if data == "real" else 0
                fields["floor_ms"] = engines[0].metrics(data, own[data], steps)["floor_ms"]  # Same K, same bound.
                fields["floor_ratio"] = fields["step_ms"] / fields["floor_ms"]
            else:
                # Take the ratio within each repeat: a machine's speed varies more between repeats than within one.
                ratios = np.divide(timings[_name(rival, data)].samples, own[data].samples)
                fields |= {"beside": rival.name, **quartiles("engine_ratio", ratios)}
                images = (trainer.config.k + 4) / (rival.config.k + 4)
                fields["engine_images_ratio"] = images * fields["engine_ratio"]
            yield fields


def _name(trainer: TimedTrainer, kind: str) -> str:
    return f"{trainer.name} K={trainer.config.k} {kind}"


def _parts(timings: dict[str, Timing], data: str, steps: int) -> dict[str, float]:
    """Return the milliseconds of a step's parts: medians over the repeats, of differences for "other" and "views"."""
    ms = {kind: 1e3 * np.array(timing.samples) / steps for kind, timing in timings.items()}
    parts = {}
    if "networks" in ms:
        parts["networks_ms"] = ms["networks"]
        if "synthetic" in ms:
            parts["rest_ms"] = ms["synthetic"] - ms["networks"]
    if data == "real" and "synthetic" in ms:
        parts["views_ms"] = ms["real"] - ms["synthetic"]
    return {name: float(np.median(samples)) for name, samples in parts.items()}


BENCH = Bench(
    options=BaselineOptions,
    main=main,
    quick="--repeats 1 --k 1 --steps 1 --batch 2 --workers 1",
    tables={
        "baseline": Table(
            key=("trainer", "beside", "k", "batch", "data", "precision", "mode", "augment", "clock"),
            columns={
                "trainer": "{trainer}",
                "compared with": "{beside}",
                "mode": "{mode}",
                "augmentation": "{augment}",
                "clock": "{clock}",
                "K": "{k}",
                "B": "{batch}",
                "views": "{data}",
                "precision": "{precision}",
                "step, ms": "{step_ms:.2f}",
                "quartiles": "{step_ms_low:.2f} to {step_ms_high:.2f}",
                "networks, ms": "{networks_ms:.2f}",
                "other, ms": "{rest_ms:.2f}",
                "views, ms": "{views_ms:.2f}",
                "images/s": "{images_per_second:,.0f}",
                "ratio to bound": "{floor_ratio:.2f}",
                "engine speedup": "{engine_ratio:.2f}",
                "speedup quartiles": "{engine_ratio_low:.2f} to {engine_ratio_high:.2f}",
                "speedup in images/s": "{engine_images_ratio:.2f}",
            },
        ),
    },
)
