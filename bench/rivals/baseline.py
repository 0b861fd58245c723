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
from abc import ABC, abstractmethod
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

from bench.registry import Bench, Table
from bench.rivals import plain, ports
from bench.rivals.loaders import EndlessLoader
from bench.step.throughput import added_memory, figures, speed
from engine.config.checks import validate
from engine.config.config import Config
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.steps import SyntheticViews, TimedSteps
from engine.measuring.timing import Timing, bench_device, ceilings, measure
from engine.runs.setup import setup_run
from engine.training.cuda_graph import make_step
from engine.training.execution import Execution, set_numerics
from engine.training.feed import Feed, ViewLoader
from engine.training.state import make_state
from pipelines.cache import DataSet
from pipelines.datasets import NOISE_32
from pipelines.plan import ViewPlan

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


def step_config(k: int, device: torch.device) -> Config:
    """The paper's training step for CIFAR-10's shape on a GPU; a small one on a CPU."""
    small = {} if device.type == "cuda" else {"batch": 8, "blocks": 1, "width": 8}
    return Config(preset="bench", dataset=NOISE_32, labels=250, k=k, steps=2**20, **small)  # type: ignore[arg-type]


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

    def prepare(self, views: ViewPlan) -> Any:
        """The pipeline's."""
        return self._views.prepare(views)

    def submit(self, prepared: Any) -> None:
        """Hands over a batch."""
        self._views.submit(prepared)
        self._pending += 1

    def collect(self) -> Tensor:
        """The oldest batch: (V, H, W, 3) uint8."""
        if not self._made:
            self._make_one()
        return self._made.popleft()

    def settle(self) -> None:
        """Waits until every batch handed over is made; on a GPU, has the current stream wait."""
        while self._pending:
            self._make_one()

    def close(self) -> None:
        """Releases the pipeline."""
        self._views.close()

    def _make_one(self) -> None:
        self._made.append(self._views.collect())
        self._pending -= 1


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


class Trainer(ABC):
    """A rival or the engine at one K, ready to take turns.

    Attributes:
        name: of RIVALS, or ENGINE.
        config: what it trains.
        passes: its networks' passes alone; None for a step that is captured whole.
        facts: columns of its rows that say how it trains.
    """

    name: str
    config: Config
    passes: Callable[[], None] | None
    facts: dict[str, Any]

    @abstractmethod
    def advance(self, data: str, steps: int) -> None:
        """Trains so many steps on views of DATA, and returns when nothing is pending."""

    @abstractmethod
    def figures(self, data: str, timing: Timing, steps: int) -> dict[str, float]:
        """Columns of a row, from samples of so many steps."""

    @abstractmethod
    def close(self) -> None:
        """Ends threads and processes."""

    def turn(self, kind: str, steps: int) -> Callable[[], None] | None:
        """A sample of so many steps: of DATA, or of "networks"; None where it has no such thing."""
        if kind != "networks":
            return partial(self.advance, kind, steps)
        return None if self.passes is None else partial(_repeat, self.passes, steps)


class RivalTrainer(Trainer):
    """See `Trainer`.

    Args:
        name: of RIVALS.
        config: what it trains.
        options: which views, and how many workers.
        device: where.
    """

    def __init__(self, name: str, config: Config, options: BaselineOptions, device: torch.device) -> None:
        rival = RIVALS[name]
        setup = setup_run(config)
        config, data, split = setup.config, setup.data, setup.split
        self.name, self.config = name, config
        self._step = rival.step(config, data, split, device)
        loaders = partial(rival.loaders, config, data, split, device)
        self._loaders: list[EndlessLoader] = []
        self._batches: dict[str, Iterator[Any]] = {}
        if "synthetic" in options.data:
            batch = [[t.to(device) for t in next(loader)] for loader in loaders(0)]
            self._batches["synthetic"] = iter(lambda: batch, None)
        if "real" in options.data:
            self._loaders = loaders(options.workers)
            self._batches["real"] = zip(*self._loaders, strict=True)
        blocks = config.k + 4
        trained = [config.batch * blocks] if rival.joint else [config.batch] * blocks
        guess = [(None, config.batch)]
        self.passes = network_passes(self._step.network, guess, trained, data.sides, self._step.autocast)
        precision = rival.precision if device.type == "cuda" else torch.float32
        self.facts = {"precision": str(precision).removeprefix("torch."), "mode": "eager"}

    def advance(self, data: str, steps: int) -> None:
        """See `Trainer`."""
        for _ in range(steps):
            self._step.step(*next(self._batches[data]))
        for loader in self._loaders:
            loader.settle()

    def figures(self, data: str, timing: Timing, steps: int) -> dict[str, float]:
        """See `Trainer`."""
        return speed(timing, steps, self.config.batch * (self.config.k + 4))

    def close(self) -> None:
        """See `Trainer`."""
        for loader in self._loaders:
            loader.close()


class EngineTrainer(Trainer):
    """See `Trainer`. One step, captured on a GPU, with a feed for each kind of views.

    Args:
        config: what it trains.
        options: which views.
    """

    def __init__(self, config: Config, options: BaselineOptions) -> None:
        # every K compiles the one forward function: more often than torch expects, which would then silently stop
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        setup = setup_run(config)
        config, data, split = setup.config, setup.data, setup.split
        execution = Execution.pick(config, data.train_images.shape)
        state = make_state(config, len(data.classes), execution.device, data.sides)
        self.name, self.config = ENGINE, config
        self._feeds = {kind: SettledFeed(config, data, split, execution) for kind in options.data}
        feed = self._feeds[options.data[0]]
        execute = make_step(config, state, feed.rows, execution, feed.example)
        self._cases = {kind: TimedSteps(config, feed, state, execute) for kind, feed in self._feeds.items()}
        for kind, feed in self._feeds.items():
            views = SyntheticViews(len(feed.rows.views), data.sides, execution.device)
            feed.begin(0, views if kind == "synthetic" else None)
        self.passes = None
        if execution.mode == "eager":
            half = execution.precision.itemsize < 4
            autocast = torch.autocast(execution.device.type, execution.precision if half else None, enabled=half)
            probe_and_guess = [(state.ema_model, config.batch), (None, config.batch)]
            trained = [feed.images_per_step]
            self.passes = network_passes(state.network, probe_and_guess, trained, data.sides, autocast)
        self.facts = {"precision": str(execution.precision).removeprefix("torch."), "mode": execution.mode}

    def advance(self, data: str, steps: int) -> None:
        """See `Trainer`."""
        self._cases[data].advance(steps)
        self._feeds[data].settle()

    def figures(self, data: str, timing: Timing, steps: int) -> dict[str, float]:
        """See `Trainer`; and the roofline bound."""
        return figures(self._cases[data], timing, steps)

    def close(self) -> None:
        """See `Trainer`."""
        for case in self._cases.values():
            case.end()


def network_passes(
    network: nn.Module,
    forward: Sequence[tuple[nn.Module | None, int]],
    trained: Sequence[int],
    sides: tuple[int, int],
    autocast: torch.autocast,
) -> Callable[[], None]:
    """A step's passes through its networks and nothing else, on copies of them and random rows.

    Args:
        network: what is trained: (N, 3, H, W) to class and rotation logits.
        forward: passes without gradient: the network, None for the trained one, and rows.
        trained: rows of each pass that has a backward.
        sides: H and W.
        autocast: as in the step.
    """
    weight = next(network.parameters())
    layout = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    network = copy.deepcopy(network)

    def rows(count: int) -> Tensor:
        return torch.randn(count, 3, *sides, device=weight.device).contiguous(memory_format=layout)

    without = [(copy.deepcopy(other) if other else network, rows(count)) for other, count in forward]
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
    configs = {k: _config(k, options, device) for name, k, beside in groups for k in (k, *beside)}
    print(ceilings(device).text())
    set_numerics(deterministic=False)
    with ExitStack() as closing:

        def ready(make: Callable[[], Trainer]) -> Trainer:
            trainer = _warmed_up(make, options, device)
            closing.callback(trainer.close)
            return trainer

        # workers are forked while there are no threads of a view pipeline
        rivals = [ready(partial(RivalTrainer, name, configs[k], options, device)) for name, k, _ in groups]
        engines: dict[int, Trainer] = {}
        for rival, (_, _, beside) in zip(rivals, groups, strict=True):
            for k in beside:
                if k not in engines:
                    engines[k] = ready(partial(EngineTrainer, configs[k], options))
            for row in _turns(rival, [engines[k] for k in beside], options, steps, device):
                records.append(options.out, records.record("baseline", device, **row))
                print(_line(row), flush=True)


def _groups(name: str, ks: Sequence[int]) -> list[tuple[str, int, list[int]]]:
    """Who takes turns: a rival, its K, and those of the engine."""
    own = RIVALS[name].k
    if own is None:
        return [(name, k, [k]) for k in ks]
    return [(name, own, [own, *(k for k in ks if k > own)])]


def _config(k: int, options: BaselineOptions, device: torch.device) -> Config:
    config = step_config(k, device)
    if options.batch is not None:
        config = dataclasses.replace(config, batch=options.batch)
    validate(config)
    return config


def _warmed_up(make: Callable[[], Trainer], options: BaselineOptions, device: torch.device) -> Trainer:
    """Makes a trainer and trains a little: compilation, allocation, the first batches of workers."""
    with added_memory(device) as memory:
        trainer = make()
        for data in options.data:
            trainer.advance(data, 2)
    trainer.facts |= memory
    return trainer


def _turns(
    rival: Trainer, engines: Sequence[Trainer], options: BaselineOptions, steps: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Times a rival and the engine beside it, and gives a row for each of them and each kind of views."""
    trainers = [rival, *engines]
    kinds = sorted(options.data, reverse=True)
    if options.parts:
        kinds = ["networks", *kinds]
    turns = {_name(trainer, kind): trainer.turn(kind, steps) for kind in kinds for trainer in trainers}
    functions = {name: function for name, function in turns.items() if function is not None}
    timings = measure(functions, device, options.repeats, warm_up=1)
    for data in options.data:
        for trainer in trainers:
            taken = {kind: timings[name] for kind in kinds if (name := _name(trainer, kind)) in timings}
            row: dict[str, Any] = {"trainer": trainer.name, "k": trainer.config.k, "batch": trainer.config.batch}
            row |= {"data": data, "samples": options.repeats, "steps": steps} | trainer.facts
            row |= trainer.figures(data, taken[data], steps) | _parts(taken, data, steps)
            if trainer is rival:
                row["workers"] = options.workers if data == "real" else 0
                row["floor_ms"] = engines[0].figures(data, taken[data], steps)["floor_ms"]  # of the same K
                row["floor_ratio"] = row["step_ms"] / row["floor_ms"]
            else:
                row["beside"] = rival.name
                row |= _ratios(trainer, taken[data], rival, timings[_name(rival, data)])
            yield row


def _repeat(function: Callable[[], None], times: int) -> None:
    for _ in range(times):
        function()


def _name(trainer: Trainer, kind: str) -> str:
    return f"{trainer.name} K={trainer.config.k} {kind}"


def _ratios(engine: Trainer, own: Timing, rival: Trainer, theirs: Timing) -> dict[str, float]:
    """How many times a rival's steps, and trained images, the engine does in the same time, and quartiles over the
    repeats: each by itself, since a machine's speed changes more between repeats than within one."""
    ratio, low, high = np.percentile(np.divide(theirs.samples, own.samples), (50, 25, 75)).tolist()
    images = (engine.config.k + 4) / (rival.config.k + 4)
    return {
        "engine_ratio": ratio,
        "engine_ratio_low": low,
        "engine_ratio_high": high,
        "engine_images_ratio": images * ratio,
    }


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


def _line(row: dict[str, Any]) -> str:
    """A row for the reader."""
    parts = {"networks": "networks_ms", "the rest": "rest_ms", "views": "views_ms"}
    split = ", ".join(f"{name} {row[key]:.2f}" for name, key in parts.items() if key in row)
    text = (
        f"{row['trainer']:8} K={row['k']} {row['data']:9} {row['step_ms']:.2f} ms a step [{row['step_ms_low']:.2f}, "
        f"{row['step_ms_high']:.2f}]{f' ({split})' if split else ''}, {row['images_per_second']:.0f} images/s"
    )
    if "beside" in row:
        text += f"; {row['engine_ratio']:.2f} [{row['engine_ratio_low']:.2f}, {row['engine_ratio_high']:.2f}] times "
        text += f"the steps/s of {row['beside']}, {row['engine_images_ratio']:.2f} times its images/s"
    return text


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
