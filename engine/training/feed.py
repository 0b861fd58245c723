"""The prefetching loader of a run: plans and views are made ahead of their step, outputs are read back behind it.

Plans are made in a thread, `view_steps` steps at a time, once the policy has every probe that they may know (the lag of
`Config`); their views are made while earlier steps train. A step's output is copied to the host asynchronously, and
drained when somebody needs it: omega goes to CTAugment's policy, metrics to the caller.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.config.config import Config
from engine.distributed import collectives
from engine.imports import gc_paused
from engine.method.batch_layout import BatchLayout, RankPlan, rank_plan
from engine.training import ranges
from engine.training.execution import Execution
from engine.training.step import METRICS, StepOutput
from engine.training.step_input import StepInput
from pipelines.cache import DataSet
from pipelines.ctaugment import CTAugmentPolicy
from pipelines.fused import FusedViews
from pipelines.plan import GlobalPlan, PlanSpec, ViewPlan, make_plan, stack


class ViewLoader(Protocol):
    """Makes views from plans, ahead of their step: see `pipelines.views.Views`."""

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
        unlabeled_images=len(data.unlabeled_indices) if config.unlabeled else 0,
        max_shift=config.max_shift,
        flip=config.flip,
        augment=config.augment != "none",
        mixup_alpha=config.mixup_alpha,
        mu=config.mu,
        anchor=config.anchor,
        anchor_augment=config.anchor_augment,
        labeled_augment=config.labeled_augment,
        probes=config.augment == "ctaugment",
        ctaugment=config.ctaugment,
        side=min(data.sides),
    )


def rank_layout(config: Config, spec: PlanSpec, rank: int, ranks: int) -> BatchLayout:
    """The rows of a rank of a run."""
    micro_batches = config.micro_batches_of(ranks)
    return BatchLayout.for_rank(
        spec,
        config.bn_groups if config.bn == "split" else micro_batches,
        rank,
        ranks,
        micro_batches,
        unmixed=config.w_u1 > 0,
        rotated=config.w_rot > 0,
        mean_guess=config.guess == "mean",
    )


@dataclass
class _Pending:
    """A step whose output is being copied to the host."""

    plan: GlobalPlan
    metrics: Tensor  # (len(METRICS),) float32, on the host once `arrived`
    omega: Tensor  # (B,) float32, likewise
    arrived: torch.cuda.Event | None


@dataclass
class _Planned:
    """Plans of `view_steps` steps, whose views are one batch."""

    plans: list[GlobalPlan]
    numbers: list[RankPlan]
    views: Any  # what their loader has prepared


class Feed:
    """The inputs of a run's steps, in order, and their outputs.

    A step is `put(execute(next()))`, between `begin` and `end`.

    Args:
        config: validated.
        data: the data set that it names.
        split: (labels,) int64, the training images that keep their label.
        execution: how the steps are executed.
        on_metrics: called with (step, {name: value of METRICS}) for every step, in order, when it is drained.

    Attributes:
        spec: what plans are drawn for.
        layout: this rank's rows.
        policy: CTAugment's, up to the last step drained.
        waited_seconds: of the host, for steps to end.
    """

    def __init__(
        self,
        config: Config,
        data: DataSet,
        split: np.ndarray,
        execution: Execution,
        on_metrics: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    ) -> None:
        self.config, self.data, self.split, self.execution = config, data, split, execution
        self.spec = plan_spec(config, data, split)
        self.layout = rank_layout(config, self.spec, collectives.rank(), collectives.ranks())
        self.policy = CTAugmentPolicy(config.lag, learn=config.augment == "ctaugment")
        self.waited_seconds = 0.0
        self._on_metrics = on_metrics
        self._labels = data.train_labels[split]
        self._planned = 0  # the first step without a plan
        self._planning: deque[Future[_Planned]] = deque()  # batches of plans whose views have not been asked for
        self._ready: deque[_Planned] = deque()  # batches of plans whose views are being made
        self._made: deque[tuple[GlobalPlan, RankPlan, Tensor]] = deque()  # steps whose views are there
        self._training: GlobalPlan | None = None  # of the step that `next` gave
        self._pending: deque[_Pending] = deque()
        self._closing = ExitStack()

    @property
    def images_per_step(self) -> int:
        """Rows of the training pass over all ranks: the mixup pool, u_1, and rotated u_1."""
        return len(self.layout.target_index) * collectives.ranks()

    def example(self) -> StepInput:
        """An input of the shapes of all steps, its views black."""
        plan = make_plan(self.spec, self.config.seed, 0, self.policy.weights)
        shape = (len(self.layout.views), *self.data.train_images.shape[1:])
        blank = torch.zeros(shape, dtype=torch.uint8, device=self.execution.device)
        return StepInput.pack(blank, self._numbers(plan), self.execution.device)

    def begin(self, step: int, views: ViewLoader | None = None) -> None:
        """Has the first plans and views made.

        Args:
            step: the first that `next` gives.
            views: makes views instead of what the configuration names.
        """
        c, device = self.config, self.execution.device
        self._planned = step
        self._views = views or self.make_views()
        self._closing.callback(self._views.close)
        # pinned memory belongs to a thread's present device
        own_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._planner = self._closing.enter_context(ThreadPoolExecutor(1, "planner", *own_device))
        # one batch of plans more than of views is prefetched, where the lag allows that
        for _ in range(min(c.prefetch + 1, c.lag // c.view_steps - 1)):
            self._prefetch_plans()
        for _ in range(c.prefetch):
            self._prefetch_views()

    def next(self, stop: bool = False) -> StepInput:
        """The next step's input, on the device. Later views and plans are prefetched meanwhile.

        Args:
            stop: this rank has been asked to stop, see `StepInput`.
        """
        if not self._made:
            ranges.enter("wait for views")
            batch = self._ready.popleft()
            views = self._views.collect().chunk(self.config.view_steps)
            self._made.extend(zip(batch.plans, batch.numbers, views, strict=True))
            # later views are begun before this step trains, so that both go on at once
            self._prefetch_plans()
            self._prefetch_views()
        ranges.enter("copy plan")
        self._training, numbers, made = self._made.popleft()
        return StepInput.pack(made, numbers, self.execution.device, stop)

    def put(self, output: StepOutput) -> None:
        """Starts copying the output of the step that `next` gave to the host."""
        assert self._training is not None, "put follows next"
        ranges.enter("metrics")
        metrics, omega = output.metrics, output.omega
        arrived = None
        if self.execution.device.type == "cuda":
            metrics, omega = metrics.to("cpu", non_blocking=True), omega.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(self._training, metrics, omega, arrived))
        self._training = None
        ranges.leave()

    def drain(self, end: int) -> None:
        """Waits for the output of every step before `end`: omega goes to the policy, metrics to `on_metrics`."""
        while self._pending and self._pending[0].plan.step < end:
            done = self._pending.popleft()
            if done.arrived is not None:
                ranges.enter("wait for device")
                begin = time.perf_counter()
                done.arrived.synchronize()
                self.waited_seconds += time.perf_counter() - begin
            ranges.enter("drain")
            self._on_metrics(done.plan.step, dict(zip(METRICS, done.metrics.tolist(), strict=True)))
            self.policy.observe(done.plan.step, done.plan.probe_ops, done.plan.probe_bins, done.omega.numpy())
        ranges.leave()

    def end(self) -> None:
        """Waits for what is being made and releases it."""
        self._closing.close()

    def make_views(self, rows: int = 0, device: torch.device | None = None) -> ViewLoader:
        """What makes the run's views, by the run's backend.

        Args:
            rows: of a batch; by default those of `view_steps` steps.
            device: where; by default the run's.
        """
        c, device = self.config, device or self.execution.device
        rows = rows or len(self.layout.views) * c.view_steps
        images = (self.data.train_images, self.split, self.data.unlabeled_indices if c.unlabeled else None)
        if self.execution.views == "fused":
            kind, device_id = "gpu" if device.type == "cuda" else "cpu", device.index or 0
            return FusedViews(*images, rows, c.max_shift, kind, device_id, c.prefetch, self.execution.resident)
        with gc_paused():
            from pipelines.dali import DaliViews  # needs DALI, which nothing else in here does

            return DaliViews(*images, rows, c.max_shift, c.view_threads, c.prefetch)

    def _numbers(self, plan: GlobalPlan) -> RankPlan:
        return rank_plan(self.layout, plan, self._labels[plan.labeled])

    def _prefetch_plans(self) -> None:
        """Has the next `view_steps` steps planned, once the policy has every probe that they may know."""
        first, end = self._planned, self._planned + self.config.view_steps
        if first >= self.config.steps:
            return  # the last batch may reach past the run's end: those plans are never executed
        self.drain(end - self.config.lag)
        ranges.enter("plan")
        weights = [self.policy.weights_for(step) for step in range(first, end)]
        self._planning.append(self._planner.submit(self._plan, first, weights))
        self._planned = end

    def _plan(self, first: int, weights: list[np.ndarray]) -> _Planned:
        ranges.enter("plan")
        steps = range(first, first + len(weights))
        plans = [make_plan(self.spec, self.config.seed, *each) for each in zip(steps, weights, strict=True)]
        views = stack([plan.views.select(self.layout.views) for plan in plans])
        numbers = [self._numbers(plan) for plan in plans]
        ranges.enter("views")
        prepared = self._views.prepare(views)
        ranges.leave()
        return _Planned(plans, numbers, prepared)

    def _prefetch_views(self) -> None:
        if self._planning:
            ranges.enter("wait for plan")
            batch = self._planning.popleft().result()
            ranges.enter("views")
            self._views.submit(batch.views)
            self._ready.append(batch)
