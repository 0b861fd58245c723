"""`remixmatch bench baseline`: the engine's training step against those of plain PyTorch and other libraries.

Three rivals: `plain` is good everyday PyTorch (`plain.py`); `usb` and `torchssl` are the step as these libraries
write it (`ports.py`), which have K = 2. Beside `plain` the engine trains with the same K, beside the others with
K = 2 and with every larger K that is asked for.

A rival and the engine take turns, sample by sample, in one process; a ratio is the median over the repeats of the ratio
within one. A sample is so many steps with nothing pending before and nothing pending after: at its start every
prefetched batch of a rival's DataLoader, or of the engine's view pipeline, lies ready; its end waits until workers,
planner and view pipeline have replaced what the steps took. So none works while another is timed, and each makes as
many batches as it trains. That is fair to a loader that prefetches: where training is slower than loading, batches are
made behind the steps, and the last one behind the last step; where loading is slower, workers are busy from the start
of the sample to its end. No sample pays for an empty queue. What is not exact: at the end some workers may idle while
another finishes, which is less than one batch a sample, the less the more `--steps`; and a batch that is made is not
waited for while it is sent.

Where time goes: "networks" is the forward and backward passes alone, of as many rows as the step's, "the rest" of a
step on views that lie ready is what is left without them, and "views" is what a step takes longer when it has its views
made. A captured step cannot be cut in two, so that the engine has no "networks" there.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from pipelines.cache import DataSet
from pipelines.datasets import NOISE_32

ENGINE = "engine"
DATA = ("real", "synthetic")


@dataclass(frozen=True)
class Rival:
    """How one trains without the engine.

    Attributes:
        step: makes the step, from (config, data, split, device); it takes a batch of each loader.
        loaders: makes its DataLoaders, from (config, data, split, device, workers).
        k: the only K that it has; None for any.
        joint: whether all rows that are trained have one forward pass, not one for each B rows.
        precision: of autocast on a GPU.
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
    """Return the paper's training step for CIFAR-10's shape on a GPU and a small one on a CPU, with B if given."""
    config = Config(preset="bench", dataset=NOISE_32, labels=250, k=k, steps=2**20)
    if device.type != "cuda":
        config = dataclasses.replace(config, batch=8, blocks=1, width=8)
    return config if batch is None else dataclasses.replace(config, batch=batch)


@dataclass
class BaselineOptions:
    """Times the step as one would write it without this engine, and the engine beside it, in turns."""

    out: Path = records.OUT / "baseline.jsonl"
    """Rows are added to this file."""
    repeats: int = 5
    """Samples of each; the median counts."""
    rivals: tuple[str, ...] = ("plain", "usb")
    """plain: good everyday PyTorch; usb and torchssl: the step as these libraries write it, with K = 2."""
    k: tuple[int, ...] = (1, 8)
    """Strong views of an unlabeled image: of plain and the engine beside it, and of the engine beside the others, which
    also has K = 2 there."""
    steps: int | None = None
    """Steps a sample; by default 20 with a GPU and 8 without."""
    batch: int | None = None
    """B; by default 64 with a GPU and 8 without."""
    data: tuple[str, ...] = DATA
    """real: views made on the way. synthetic: views that lie on the device, for the step alone."""
    workers: int = len(os.sched_getaffinity(0))
    """DataLoader workers; by default one a core. usb and torchssl have one more, for labeled images."""
    parts: bool = True
    """Times the networks' passes alone, too, in turn with the steps."""


class SettledViews:
    """A view pipeline that can be waited for: what has been made is kept until it is collected.

    Args:
        views: the pipeline.
    """

    def __init__(self, views: ViewLoader) -> None:
        self._views = views
        self._pending = 0
        self._made: deque[Tensor] = deque()
        self.prepare, self.close = views.prepare, views.close

    def submit(self, prepared: Any) -> None:
        """Hands over a batch."""
        self._views.submit(prepared)
        self._pending += 1

    def collect(self) -> Tensor:
        """The oldest batch: (V, H, W, 3) uint8."""
        if self._made:
            return self._made.popleft()
        self._pending -= 1
        return self._views.collect()

    def settle(self) -> None:
        """Waits until every batch handed over is made; on a GPU, has the current stream wait."""
        for _ in range(self._pending):
            self._made.append(self._views.collect())
        self._pending = 0


class SettledFeed(Feed):
    """The engine's prefetching loader, which can be waited for."""

    _settled: SettledViews

    def begin(self, step: int, views: ViewLoader | None = None) -> None:
        """See `Feed.begin`."""
        self._settled = SettledViews(views or self.make_views())
        super().begin(step, self._settled)

    def settle(self) -> None:
        """Waits until planner and view pipeline have nothing to do."""
        for plans in self._planning:
            plans.result()
        self._settled.settle()


@dataclass
class Contestant:
    """A rival or the engine at one K, ready to take turns.

    Attributes:
        name: of RIVALS, or ENGINE.
        config: what it trains.
        facts: columns of its records that say how it trains.
        steps: trains one step, on each kind of views of DATA; "networks": its networks' passes alone, unless a step is
            captured whole.
        sources: of its batches.
        figures: columns of a record, from (data, timing, steps of a sample).
    """

    name: str
    config: Config
    facts: dict[str, Any]
    steps: dict[str, Callable[[], Any]]
    sources: Sequence[EndlessLoader | SettledFeed]
    figures: Callable[[str, Timing, int], dict[str, float]]

    def advance(self, kind: str, steps: int) -> None:
        """Train some steps, and return when nothing is pending."""
        for _ in range(steps):
            self.steps[kind]()
        for source in self.sources:
            source.settle()


def make_rival(
    name: str, config: Config, options: BaselineOptions, device: torch.device, closing: ExitStack
) -> Contestant:
    """Make one of RIVALS, whose workers end when `closing` is closed."""
    rival = RIVALS[name]
    setup = setup_run(config)
    config, data, split = setup.config, setup.data, setup.split
    trained = rival.step(config, data, split, device)
    blocks = config.k + 4
    rows = [config.batch * blocks] if rival.joint else [config.batch] * blocks
    guess = [(trained.network, config.batch)]
    steps = {"networks": network_passes(trained.network, guess, rows, data.sides, trained.autocast)}
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
    return Contestant(
        name, config, facts, steps, loaders, lambda data, timing, steps: speed(timing, steps, config.batch * blocks)
    )


def make_engine(config: Config, options: BaselineOptions, closing: ExitStack) -> Contestant:
    """Make the engine: one step, captured on a GPU, with a feed for each kind of views, ended with `closing`."""
    set_up = TimedSteps.begin(config, "synthetic")
    set_up.feed.end()
    config, state, execution, data = set_up.config, set_up.state, set_up.feed.execution, set_up.feed.data
    feeds = {kind: SettledFeed(config, data, set_up.feed.split, execution) for kind in options.data}
    cases = {kind: dataclasses.replace(set_up, feed=feed) for kind, feed in feeds.items()}
    for kind, feed in feeds.items():
        views = SyntheticViews(len(feed.layout.views) * config.view_steps, data.sides, execution.device)
        feed.begin(0, views if kind == "synthetic" else None)
        closing.callback(cases[kind].end)
    steps: dict[str, Callable[[], Any]] = {kind: partial(case.advance, 1) for kind, case in cases.items()}
    if execution.mode == "eager":
        half = execution.precision.itemsize < 4
        autocast = torch.autocast(execution.device.type, execution.precision if half else None, enabled=half)
        probe_and_guess = [(state.ema_model, config.batch), (state.network, config.batch)]
        trained = [set_up.feed.images_per_step]
        steps["networks"] = network_passes(state.network, probe_and_guess, trained, data.sides, autocast)
    facts = {"precision": str(execution.precision).removeprefix("torch."), "mode": execution.mode}
    return Contestant(
        ENGINE, config, facts, steps, list(feeds.values()), lambda data, *timed: step_metrics(cases[data], *timed)
    )


def network_passes(
    network: nn.Module,
    forward: Sequence[tuple[nn.Module, int]],
    trained: Sequence[int],
    sides: tuple[int, int],
    autocast: torch.autocast,
) -> Callable[[], None]:
    """A step's passes through its networks and nothing else, on copies of them and random rows.

    Args:
        network: what is trained: (N, 3, H, W) to class and rotation logits.
        forward: passes without gradient: the network and rows of each.
        trained: rows of each pass that has a backward.
        sides: H and W.
        autocast: as in the step.
    """
    weight = next(network.parameters())
    layout = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format

    def rows(count: int) -> Tensor:
        return torch.randn(count, 3, *sides, device=weight.device).contiguous(memory_format=layout)

    network, *others = copy.deepcopy([network, *(other for other, _ in forward)])  # One copy of each network.
    without = [(other, rows(count)) for other, (_, count) in zip(others, forward, strict=True)]
    inputs = [rows(count) for count in trained]

    def run() -> None:
        with torch.no_grad(), autocast:
            for other, images in without:
                other(images)
        with autocast:
            logits = [part for images in inputs for part in network(images)]
        torch.stack([part.sum() for part in logits]).sum().backward()
        network.zero_grad()

    return run


def main(options: BaselineOptions) -> None:
    """Times every rival and the engine, in turns.

    Raises:
        UserError: a flag that cannot work.
    """
    records.check_choices(options, data=DATA, rivals=RIVALS)
    records.check_numbers(options, k=1, repeats=1, workers=1, steps=1)
    for flag in ("data", "rivals", "k"):
        if not getattr(options, flag):
            raise UserError(f"--{flag} takes one or more values")
    device = bench_device()
    steps = options.steps or (20 if device.type == "cuda" else 8)
    groups = [group for name in options.rivals for group in _groups(name, options.k)]
    configs = {k: step_config(k, device, options.batch) for _, own, beside in groups for k in (own, *beside)}
    for config in configs.values():
        validate(config)
    print(ceilings(device).text())
    set_numerics(deterministic=False)
    with ExitStack() as closing:
        # workers are forked while there are no threads of a view pipeline
        rivals = [
            _warmed_up(partial(make_rival, name, configs[k], options, device, closing), options, device)
            for name, k, _ in groups
        ]
        engines: dict[int, Contestant] = {}
        for rival, (_, _, beside) in zip(rivals, groups, strict=True):
            for k in beside:
                if k not in engines:
                    engines[k] = _warmed_up(partial(make_engine, configs[k], options, closing), options, device)
            for row in _turns(rival, [engines[k] for k in beside], options, steps, device):
                BENCH.write(options.out, "baseline", device, **row)


def _groups(name: str, ks: Sequence[int]) -> list[tuple[str, int, list[int]]]:
    """Who takes turns: a rival, its K, and those of the engine."""
    own = RIVALS[name].k
    if own is None:
        return [(name, k, [k]) for k in ks]
    return [(name, own, [own, *(k for k in ks if k > own)])]


def _warmed_up(make: Callable[[], Contestant], options: BaselineOptions, device: torch.device) -> Contestant:
    """Make a contestant and train a little: compilation, allocation, the first batches of workers."""
    with added_memory(device) as memory:
        contestant = make()
        for data in options.data:
            contestant.advance(data, 2)
    contestant.facts |= memory
    return contestant


def _turns(
    rival: Contestant, engines: Sequence[Contestant], options: BaselineOptions, steps: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Time a rival and the engine beside it, and give a record of each of them and each kind of views."""
    contestants = [rival, *engines]
    kinds = ["networks"] * options.parts + sorted(options.data, reverse=True)
    turns = {
        _name(one, kind): partial(one.advance, kind, steps)
        for kind in kinds
        for one in contestants
        if kind in one.steps
    }
    timings = measure(turns, device, options.repeats, warm_up=1)
    for data in options.data:
        for one in contestants:
            taken = {kind: timings[name] for kind in kinds if (name := _name(one, kind)) in timings}
            row: dict[str, Any] = {"trainer": one.name, "k": one.config.k, "batch": one.config.batch, "data": data}
            row |= {"samples": options.repeats, "steps": steps} | one.facts
            row |= one.figures(data, taken[data], steps) | _parts(taken, data, steps)
            if one is rival:
                row["workers"] = options.workers if data == "real" else 0
                row["floor_ms"] = engines[0].figures(data, taken[data], steps)["floor_ms"]  # of the same K
                row["floor_ratio"] = row["step_ms"] / row["floor_ms"]
            else:
                # Ratios of each repeat, since a machine's speed changes more between repeats than within one.
                theirs = timings[_name(rival, data)].samples
                row |= {"beside": rival.name, **quartiles("engine_ratio", np.divide(theirs, taken[data].samples))}
                images = (one.config.k + 4) / (rival.config.k + 4)
                row["engine_images_ratio"] = images * row["engine_ratio"]
            yield row


def _name(contestant: Contestant, kind: str) -> str:
    return f"{contestant.name} K={contestant.config.k} {kind}"


def _parts(taken: dict[str, Timing], data: str, steps: int) -> dict[str, float]:
    """Milliseconds of a step's parts: medians over the repeats, of the difference where a part is one."""
    ms = {kind: 1e3 * np.array(timing.samples) / steps for kind, timing in taken.items()}
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
            key=("trainer", "beside", "k", "batch", "data", "precision"),
            columns={
                "trainer": "{trainer}",
                "beside": "{beside}",
                "K": "{k}",
                "B": "{batch}",
                "views": "{data}",
                "precision": "{precision}",
                "step, ms": "{step_ms:.2f}",
                "quartiles": "{step_ms_low:.2f} to {step_ms_high:.2f}",
                "networks, ms": "{networks_ms:.2f}",
                "the rest": "{rest_ms:.2f}",
                "views, ms": "{views_ms:.2f}",
                "images/s": "{images_per_second:,.0f}",
                "ratio to bound": "{floor_ratio:.2f}",
                "engine, times": "{engine_ratio:.2f}",
                "their quartiles": "{engine_ratio_low:.2f} to {engine_ratio_high:.2f}",
                "in images/s": "{engine_images_ratio:.2f}",
            },
        ),
    },
)
