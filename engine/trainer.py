"""The training loop: plans made ahead, views made in the background, steps, and what is written on the way."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine import checkpoint, distribution
from engine.config import Config
from engine.errors import UserError
from engine.evaluation import evaluate, median_of_last
from engine.progress import MetricsLog, ProgressLine
from engine.rows import arrange, step_plan
from engine.step import METRICS, Step, StepInput, StepOutput, TrainState, make_state
from pipelines.ctaugment import CTAugmentPolicy
from pipelines.datasets import DataSet
from pipelines.plan import Plan, PlanSpec, make_plan, stack

if TYPE_CHECKING:
    from pipelines.views import ViewPipeline

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
    """Autocast's dtype; float32 means none."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


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
    metrics: Tensor  # (8,) float32, on the host once `arrived`
    matches: Tensor  # (B,) float32, likewise
    arrived: torch.cuda.Event | None


class Trainer:
    """One run, from its first or its resumed step to its last.

    Args:
        config: validated.
        data: the data set that it names.
        split: (labels,) int64, the training images that keep their label.
        folder: the run's; `checkpoints/` in it is read and written.
        progress: where words to the user go.
    """

    def __init__(self, config: Config, data: DataSet, split: np.ndarray, folder: Path, progress: ProgressLine) -> None:
        self.config, self.data, self.folder, self.progress = config, data, folder, progress
        self.device = pick_device(config)
        self.precision = pick_precision(config, self.device)
        self.labels = data.train_labels[split]
        self.spec = plan_spec(config, data, split)
        ranks = distribution.ranks()
        groups = config.bn_groups if config.bn == "split" else ranks
        self.rows = arrange(self.spec, groups, distribution.rank(), ranks)
        self.state: TrainState = make_state(config, len(data.classes), ranks, self.device)
        self.policy = CTAugmentPolicy(config.lag, learn=config.augment == "ctaugment")
        self.accuracies: list[float] = []
        self.train_seconds = 0.0
        self.step = 0
        self.split = split
        self._in_flight: deque[_InFlight] = deque()
        self._plans: deque[Plan] = deque()
        self._planned = 0  # the first step without a plan
        self._log: MetricsLog | None = None
        self._shown: dict[str, float] = {}

    def resume(self) -> bool:
        """Takes up the newest good checkpoint; says whether there was one."""
        found = checkpoint.load_newest(self.folder / CHECKPOINTS, self.progress.say)
        if found is None:
            return False
        content = found.content
        self.state.load_state_dict(content["state"])
        self.policy.load_state_dict(_map_leaves(content["policy"], torch.Tensor, lambda t: t.numpy()))
        self.accuracies = list(content["accuracies"])
        self.train_seconds = content["train_seconds"]
        self.step = found.step
        return True

    def save(self) -> None:
        """Writes a checkpoint of the present step, on rank 0.

        Raises:
            UserError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        self._settle(self.step)
        if distribution.rank():
            return
        if not all(bool(p.isfinite().all()) for p in self.state.network.parameters()):
            raise self._diverged(self.step - 1, "the update left parameters that are not finite")
        content = {
            "state": self.state.state_dict(),
            "policy": _map_leaves(self.policy.state_dict(), np.ndarray, torch.from_numpy),
            "accuracies": self.accuracies,
            "train_seconds": self.train_seconds,
        }
        try:
            checkpoint.save(self.folder / CHECKPOINTS, self.step, content, self.config.keep)
        except OSError as error:
            raise UserError(
                f"the checkpoint of step {self.step} could not be written ({error.strerror or error}); "
                f"{self._last_good()}; make room and go on with --resume"
            ) from error

    def _last_good(self) -> str:
        kept = checkpoint.list_checkpoints(self.folder / CHECKPOINTS)
        return f"the last good one is {kept[-1]}" if kept else "there is none before it"

    def _diverged(self, step: int, what: str) -> UserError:
        return UserError(f"training diverged at step {step}: {what}; {self._last_good()}")

    def run(self) -> None:
        """Trains up to the configuration's last step, with evaluations, metrics and checkpoints on the way.

        Raises:
            UserError: the loss is not finite, or something cannot be written; what was saved stays.
        """
        from pipelines.views import ViewPipeline  # needs DALI, which nothing else in here does

        c = self.config
        self._log = MetricsLog(self.folder, self.step) if distribution.rank() == 0 else None
        views = ViewPipeline(
            self.data.train_images[self.split],
            self.data.train_images if c.unlabeled else None,
            rows=len(self.rows.views) * c.view_steps,
            max_shift=c.max_shift,
            device="gpu" if self.device.type == "cuda" else "cpu",
            device_id=self.device.index or 0,
            threads=c.view_threads,
            prefetch=c.prefetch,
        )
        step = Step(c, self.state, self.rows, self.precision)
        begin = time.monotonic() - self.train_seconds
        self._planned = self.step
        made: deque[Tensor] = deque()
        try:
            for _ in range(c.prefetch):
                self._plan_ahead(views)
            while self.step < c.steps:
                if not made:
                    made.extend(views.collect().chunk(c.view_steps))
                    # later views are begun before this step trains, so that both go on at once
                    self._plan_ahead(views)
                plan = self._plans.popleft()
                numbers = step_plan(self.rows, plan, self.labels[plan.labeled])
                self._send_to_host(plan, step(StepInput.to_device(made.popleft(), numbers, self.device)))
                self.step += 1
                self.train_seconds = time.monotonic() - begin
                self._after_step()
        finally:
            views.close()
            if self._log:
                self._log.close()

    def _plan_ahead(self, views: ViewPipeline) -> None:
        """Plans the next `view_steps` steps and has their views made, unless the run ends before them."""
        c = self.config
        if self._planned >= c.steps:
            return
        end = self._planned + c.view_steps  # past the run's last step, maybe: those plans are never executed
        self._settle(end - c.lag)
        plans = [
            make_plan(self.spec, c.seed, number, self.policy.weights_for(number))
            for number in range(self._planned, end)
        ]
        views.submit(stack([plan.views.rows(self.rows.views) for plan in plans]))
        self._plans.extend(plans)
        self._planned = end

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
                done.arrived.synchronize()
            values = dict(zip(METRICS, done.metrics.tolist(), strict=True))
            number = done.plan.step
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
        if last or self.step % c.checkpoint_every == 0:
            self.save()

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


def _map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Applies a function to the leaves of one type in nested dictionaries and lists."""
    if isinstance(tree, dict):
        return {key: _map_leaves(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_leaves(value, kind, function) for value in tree]
    return function(tree) if isinstance(tree, kind) else tree
