"""The training loop: plans made ahead, views made in the background, steps, and what is written on the way."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine import checkpoint, distribution
from engine.capture import CapturedStep
from engine.config import Config
from engine.errors import Stopped, UserError
from engine.evaluation import evaluate, median_of_last
from engine.guard import StopRequest, Watchdog
from engine.progress import MetricsLog, ProgressLine
from engine.rows import StepPlan, arrange, step_plan
from engine.step import METRICS, Step, StepInput, StepOutput, TrainState, make_state
from kernels.augment import MAX_SIDE
from pipelines.ctaugment import CTAugmentPolicy
from pipelines.datasets import DataSet
from pipelines.fused import FusedViews
from pipelines.plan import Plan, PlanSpec, ViewPlan, make_plan, stack

CHECKPOINTS = "checkpoints"


def pick_device(config: Config) -> torch.device:
    """The device of a run.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; `remixmatch doctor` says what is missing")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_precision(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the network's input: autocast's, or without autocast the parameters' own, float32 or float64."""
    name = config.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def pick_mode(config: Config, device: torch.device) -> str:
    """How steps are executed: "eager", "compile" or "graph".

    Raises:
        UserError: the device or the machine cannot do what was asked for.
    """
    if config.mode == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if config.mode == "graph" and device.type != "cuda":
        raise UserError("--mode graph captures a CUDA graph and needs a GPU; take --mode eager or compile")
    if config.mode == "compile" and device.type == "cpu":
        names = [os.environ.get("CXX", "g++"), "c++", "clang++"]
        if not any(map(shutil.which, names)):
            raise UserError("--mode compile needs a C++ compiler on a CPU; install g++, or take --mode eager")
    return config.mode


def pick_views(config: Config, device: torch.device, sides: tuple[int, int]) -> str:
    """Who makes views of images of those sides: "dali" or "fused".

    Raises:
        UserError: the fused kernel was asked for and the images are too large for it.
    """
    if config.views == "auto":
        return "fused" if device.type == "cuda" and max(sides) <= MAX_SIDE else "dali"
    if config.views == "fused" and max(sides) > MAX_SIDE:
        raise UserError(
            f"--views fused takes images of up to {MAX_SIDE}x{MAX_SIDE} pixels, these have "
            f"{sides[0]}x{sides[1]}; take --views dali"
        )
    return config.views


class ViewSource(Protocol):
    """What makes views from plans, ahead of their step: see `pipelines.views.Views`."""

    def prepare(self, views: ViewPlan) -> Any: ...
    def submit(self, prepared: Any) -> None: ...
    def collect(self) -> Tensor: ...
    def close(self) -> None: ...


def plan_spec(config: Config, data: DataSet, split: np.ndarray) -> PlanSpec:
    """What a run's plans are drawn for."""
    return PlanSpec(
        batch=config.batch,
        k=config.k,
        labeled_images=len(split),
        unlabeled_images=len(data.train_images) if config.unlabeled else 0,
        max_shift=config.max_shift,
        flip=config.flip,
        augment=config.augment != "none",
        mixup_alpha=config.mixup_alpha,
    )


@dataclass
class _InFlight:
    """A step whose outcome is on its way to the host."""

    plan: Plan
    metrics: Tensor  # (9,) float32, on the host once `arrived`
    matches: Tensor  # (B,) float32, likewise
    arrived: torch.cuda.Event | None


@dataclass
class _Planned:
    """Plans of `view_steps` steps, whose views are one batch."""

    plans: list[Plan]
    numbers: list[StepPlan]
    views: Any  # what their source of views has prepared


class Trainer:
    """One run, from its first or its resumed step to its last.

    Args:
        config: validated.
        data: the data set that it names.
        split: (labels,) int64, the training images that keep their label.
        folder: the run's; `checkpoints/` in it is read and written.
        progress: where words to the user go.
        prepare_folder: makes anew what the folder should hold beside checkpoints and metrics, if it has gone.
        timeout: seconds after which a rank that waits for another one ends.
        check_ranks: steps between comparisons of all ranks' states, bit for bit; 0 for none.
    """

    def __init__(
        self,
        config: Config,
        data: DataSet,
        split: np.ndarray,
        folder: Path,
        progress: ProgressLine,
        prepare_folder: Callable[[], None] = lambda: None,
        timeout: float = math.inf,
        check_ranks: int = 0,
    ) -> None:
        self.config, self.data, self.folder, self.progress = config, data, folder, progress
        self.device = pick_device(config)
        self.precision = pick_precision(config, self.device)
        self.mode = pick_mode(config, self.device)
        self.backend = pick_views(config, self.device, data.train_images.shape[1:3])
        self.labels = data.train_labels[split]
        self.spec = plan_spec(config, data, split)
        ranks = distribution.ranks()
        self.micro_batches = config.micro_batches_of(ranks)
        groups = config.bn_groups if config.bn == "split" else self.micro_batches
        self.rows = arrange(self.spec, groups, distribution.rank(), ranks, self.micro_batches)
        self.state: TrainState = make_state(config, len(data.classes), self.device)
        self.policy = CTAugmentPolicy(config.lag, learn=config.augment == "ctaugment")
        self.known_by = asdict(config)
        del self.known_by["steps"]  # a run may be given more of them
        self.saver = checkpoint.Saver(folder / CHECKPOINTS, config.keep, progress.warn, prepare_folder, self.known_by)
        self.timeout, self.check_ranks = timeout, check_ranks
        self.accuracies: list[float] = []
        self.train_seconds = 0.0
        self.waited_seconds = 0.0  # of the host, for steps to end
        self.step = 0
        self.split = split
        self._in_flight: deque[_InFlight] = deque()
        self._planning: deque[Future[_Planned]] = deque()  # batches of plans whose views have not been asked for
        self._ready: deque[_Planned] = deque()  # batches of plans whose views are being made
        self._planned = 0  # the first step without a plan
        self._made: deque[tuple[Plan, StepPlan, Tensor]] = deque()  # steps whose views are there
        self._closing = ExitStack()
        self._log: MetricsLog | None = None
        self._shown: dict[str, float] = {}
        self._stop = StopRequest()
        self._stop_at: int | None = None  # the step before which all ranks stop

    def resume(self) -> bool:
        """Takes up the newest good checkpoint, which rank 0 reads for all; says whether there was one."""
        found = distribution.on_first(
            lambda: checkpoint.load_newest(self.folder / CHECKPOINTS, self.progress.warn, self.known_by)
        )
        if found is None:
            return False
        content = found.content
        before = content.get("micro_batches", self.micro_batches)
        if self.config.bn == "joint" and before != self.micro_batches:
            self.progress.warn(
                f"ranks were {before} and are {self.micro_batches} now: with --bn joint each normalises its own rows, "
                "so the run goes on with other statistics (not with --bn split, --bn sync, or enough --micro-batches)"
            )
        self.state.load_state_dict(content["state"])
        self.policy.load_state_dict(_map_leaves(content["policy"], torch.Tensor, lambda t: t.numpy()))
        self.accuracies = list(content["accuracies"])
        self.train_seconds = content["train_seconds"]
        self.step = found.step
        return True

    def save(self, last: bool = False) -> None:
        """Writes a checkpoint of the present step, on rank 0; what cannot be written is told, and tried again later.

        Args:
            last: nothing goes on after this one.

        Raises:
            UserError: the parameters are not finite; the last one cannot be written. Earlier ones are untouched.
        """
        self._settle(self.step)
        if self._log:
            self._log.catch_up()  # no row may be missing before the step that a run is resumed from
        if not all(bool(p.isfinite().all()) for p in self.state.network.parameters()):
            raise self._diverged(self.step - 1, "the update left parameters that are not finite")
        content = {
            "state": self.state.state_dict(),
            "policy": _map_leaves(self.policy.state_dict(), np.ndarray, torch.from_numpy),
            "accuracies": self.accuracies,
            "train_seconds": self.train_seconds,
            "micro_batches": self.micro_batches,
        }
        if last:
            distribution.on_first(lambda: self.saver.save_last(self.step, content))
        elif distribution.rank() == 0:
            self.saver.save(self.step, content)

    def _diverged(self, step: int, what: str) -> UserError:
        return UserError(f"training diverged at step {step}: {what}; {self.saver.last_good()}")

    def run(self) -> None:
        """Trains up to the configuration's last step, with evaluations, metrics and checkpoints on the way.

        Raises:
            UserError: the loss is not finite, or something cannot be written; what was saved stays.
            Stopped: SIGTERM, SIGINT or SIGHUP came, to some rank; the step reached is saved.
        """
        self._log = MetricsLog(self.folder, self.step, self.progress.warn) if distribution.rank() == 0 else None
        begin = time.monotonic() - self.train_seconds
        several = distribution.ranks() > 1
        guard = Watchdog(self.timeout, distribution.rank(), self._stop) if several else nullcontext()
        try:
            with self._stop.listening(), guard as watchdog:
                self.begin()
                while self.step < self.config.steps and not self._stopping():
                    if watchdog:
                        watchdog.alive(f"step {self.step}")
                    self.advance()
                    self.train_seconds = time.monotonic() - begin
                    self._after_step()
                if self.step < self.config.steps:
                    self.save(last=True)
                    number = self._stop.number or signal.SIGTERM  # of another rank's signal one knows no more than that
                    name = signal.Signals(number).name
                    raise Stopped(f"{name}: step {self.step} is saved in {self.folder}; go on with --resume", number)
        finally:
            self.end()
            if self._log:
                self._log.close()

    def _stopping(self) -> bool:
        """Whether this step is the one before which all ranks stop.

        A wish travels with the metrics of a step and is known everywhere once that step has been settled, which is
        certain `lag` steps later.
        """
        if distribution.ranks() == 1:
            return self._stop.number != 0
        return self._stop_at is not None and self.step >= self._stop_at

    def begin(self, views: ViewSource | None = None) -> None:
        """Makes everything ready for `advance`: the step, captured where that is the mode, and the first views.

        Args:
            views: makes views instead of what the configuration names.
        """
        c = self.config
        self._planned = self.step
        make = partial(Step, c, self.state, self.rows, self.precision, compiled=self.mode != "eager")
        self._execute: Callable[[StepInput], StepOutput]
        if self.mode == "graph":
            plan = make_plan(self.spec, c.seed, self.step, self.policy.weights_for(self.step))
            shape = (len(self.rows.views), *self.data.train_images.shape[1:])
            blank = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            self._execute = CapturedStep(make, StepInput.to_device(blank, self._numbers(plan), self.device))
        else:
            self._execute = make()
        # NCCL does not let go of a group whose collectives a graph still holds
        self._closing.callback(delattr, self, "_execute")
        self._views = views or self._make_views()
        self._closing.callback(self._views.close)
        # pinned memory belongs to a thread's present device
        own_device = (torch.cuda.set_device, (self.device,)) if self.device.type == "cuda" else (None, ())
        self._planner = self._closing.enter_context(ThreadPoolExecutor(1, "planner", *own_device))
        # one batch of plans more than of views is under way, in the background, where the lag allows that
        for _ in range(min(c.prefetch + 1, c.lag // c.view_steps - 1)):
            self._plan_ahead()
        for _ in range(c.prefetch):
            self._submit_views()

    def advance(self) -> None:
        """Trains one step. Returns when it is on its way; later views and plans are on theirs."""
        if not self._made:
            batch = self._ready.popleft()
            views = self._views.collect().chunk(self.config.view_steps)
            self._made.extend(zip(batch.plans, batch.numbers, views, strict=True))
            # later views are begun before this step trains, so that both go on at once
            self._plan_ahead()
            self._submit_views()
        plan, numbers, made = self._made.popleft()
        data = StepInput.to_device(made, numbers, self.device, stop=self._stop.number != 0)
        self._send_to_host(plan, self._execute(data))
        self.step += 1

    def end(self) -> None:
        """Waits for what is under way and lets go of it."""
        self._closing.close()

    def _make_views(self) -> ViewSource:
        c = self.config
        sets = (self.data.train_images[self.split], self.data.train_images if c.unlabeled else None)
        rows = len(self.rows.views) * c.view_steps
        device, device_id = "gpu" if self.device.type == "cuda" else "cpu", self.device.index or 0
        if self.backend == "fused":
            return FusedViews(*sets, rows, c.max_shift, device, device_id, prefetch=c.prefetch)
        from pipelines.dali import DaliViews  # needs DALI, which nothing else in here does

        return DaliViews(*sets, rows, c.max_shift, device, device_id, c.view_threads, c.prefetch)

    def _numbers(self, plan: Plan) -> StepPlan:
        return step_plan(self.rows, plan, self.labels[plan.labeled])

    def _plan_ahead(self) -> None:
        """Has the next `view_steps` steps planned, once every probe that they may know is in."""
        first, end = self._planned, self._planned + self.config.view_steps
        if first >= self.config.steps:
            return  # the last batch may reach past the run's end: those plans are never executed
        self._settle(end - self.config.lag)
        weights = [self.policy.weights_for(step) for step in range(first, end)]
        self._planning.append(self._planner.submit(self._plan, first, weights))
        self._planned = end

    def _plan(self, first: int, weights: list[np.ndarray]) -> _Planned:
        steps = range(first, first + len(weights))
        plans = [make_plan(self.spec, self.config.seed, *each) for each in zip(steps, weights, strict=True)]
        views = stack([plan.views.rows(self.rows.views) for plan in plans])
        return _Planned(plans, [self._numbers(plan) for plan in plans], self._views.prepare(views))

    def _submit_views(self) -> None:
        if self._planning:
            batch = self._planning.popleft().result()
            self._views.submit(batch.views)
            self._ready.append(batch)

    def _send_to_host(self, plan: Plan, output: StepOutput) -> None:
        metrics, matches = output.metrics, output.matches
        arrived = None
        if self.device.type == "cuda":
            metrics, matches = metrics.to("cpu", non_blocking=True), matches.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._in_flight.append(_InFlight(plan, metrics, matches, arrived))

    def _settle(self, end: int) -> None:
        """Takes in the outcome of every step before `end`: probes go to the policy, metrics to the log."""
        while self._in_flight and self._in_flight[0].plan.step < end:
            done = self._in_flight.popleft()
            if done.arrived is not None:
                begin = time.perf_counter()
                done.arrived.synchronize()
                self.waited_seconds += time.perf_counter() - begin
            values = dict(zip(METRICS, done.metrics.tolist(), strict=True))
            number = done.plan.step
            if values.pop("stop") and self._stop_at is None:
                self._stop_at = number + self.config.lag
            if not all(map(math.isfinite, values.values())):
                terms = ", ".join(f"{name} {values[name]:.4g}" for name in METRICS[:5])
                raise self._diverged(number, f"the loss is not finite ({terms})")
            self.policy.observe(number, done.plan.probe_ops, done.plan.probe_bins, done.matches.numpy())
            if (number + 1) % self.config.log_every == 0:
                if self._log:
                    self._log.add(number + 1, **values)
                losses = {name: values[name] for name in METRICS[:5]}
                self.progress.update(number + 1, self._shown | losses)

    def _after_step(self) -> None:
        c, last = self.config, self.step == self.config.steps
        if last or self.step % c.eval_every == 0:
            self._settle(self.step)
            accuracy, loss = evaluate(self.state.average, self.data.test_images, self.data.test_labels, self.device)
            self.accuracies.append(accuracy)
            self._shown = {"test %": accuracy}
            if self._log:
                self._log.add(self.step, test_accuracy=accuracy, test_loss=loss)
        if self.check_ranks and self.step % self.check_ranks == 0:
            self._compare_ranks()
        if last or self.step % c.checkpoint_every == 0 or self.saver.due:
            self.save(last)

    def _compare_ranks(self) -> None:
        """Raises UserError where a bit of a rank's state is not as on rank 0."""
        self._settle(self.step)
        first, *others = distribution.everyones(digests(self.state.state_dict() | {"policy": self.policy.state_dict()}))
        for rank, other in enumerate(others, 1):
            differing = [name for name in first if first[name] != other.get(name)]
            if differing:
                more = f" and {len(differing) - 1} more" if differing[1:] else ""
                raise UserError(
                    f"ranks differ after step {self.step - 1}: rank {rank} has another {differing[0]}{more} than rank 0"
                )

    @property
    def images_per_step(self) -> int:
        """Rows of the training pass over all ranks: the mixup pool, u_1, and u_1 turned."""
        return self.spec.batch * (self.spec.pool_blocks + (2 if self.config.unlabeled else 0))

    def summary(self) -> dict[str, Any]:
        """Results so far, for summary.json: accuracies in percent, times in seconds."""
        return {
            "steps": self.step,
            "test_accuracy": self.accuracies[-1],
            "median_last_20": median_of_last(self.accuracies),
            "train_seconds": self.train_seconds,
            "images_per_second": self.step * self.images_per_step / self.train_seconds,
        }


def digests(tree: Any, name: str = "") -> dict[str, str]:
    """Hashes of the leaves of nested dictionaries and lists, under names like `network.stem.weight`."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: digest for key, value in items for path, digest in digests(value, f"{name}.{key}").items()}
    if isinstance(tree, (Tensor, np.ndarray)):
        content = np.ascontiguousarray(torch.as_tensor(tree).cpu().numpy()).tobytes()
    else:
        content = repr(tree).encode()
    return {name.removeprefix("."): hashlib.blake2b(content, digest_size=16).hexdigest()}


def _map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Applies a function to the leaves of one type in nested dictionaries and lists."""
    if isinstance(tree, dict):
        return {key: _map_leaves(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_leaves(value, kind, function) for value in tree]
    return function(tree) if isinstance(tree, kind) else tree
