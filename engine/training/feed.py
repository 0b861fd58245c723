"""The data loader of a run: it prefetches plans and views, and reads the outputs of finished steps.

A thread makes the plans of `view_steps` steps at a time, as soon as CTAugment's policy has all probes that these plans
depend on (see `lag` in `Config`). Their views are made while earlier steps train. Outputs of a step are copied to the
host asynchronously. Draining a step waits for the copy and passes omega to the policy and the metrics to the caller.
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
from engine.errors import UserError, out_of_memory
from engine.imports import gc_paused
from engine.method.batch_layout import BatchLayout, RankPlan, rank_plan
from engine.method.registry import targets_class
from engine.training import ranges
from engine.training.execution import Execution
from engine.training.step import METRICS, StepOutput
from engine.training.step_input import StepInput
from pipelines.ctaugment import CTAugmentPolicy
from pipelines.data.cache import DataSet
from pipelines.fused import FusedViews
from pipelines.plan import GlobalPlan, PlanSpec, ViewPlan, make_plan, stack


class ViewLoader(Protocol):
    """Interface of the view backends; see `pipelines.views.Views`."""

    def prepare(self, views: ViewPlan) -> Any: ...
    def submit(self, prepared: Any) -> None: ...
    def collect(self) -> Tensor: ...
    def close(self) -> None: ...


def plan_spec(config: Config, data: DataSet, split: np.ndarray) -> PlanSpec:
    """Return the specification of a run's plans."""
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
        interpolated_classes=len(data.classes) if config.interpolate_logits else 0,
    )


def rank_layout(config: Config, spec: PlanSpec, rank: int, ranks: int) -> BatchLayout:
    """Return the batch layout of one rank of a run."""
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
        carries_images=targets_class(config.method).uses_images,
        labeled_guess=targets_class(config.method).uses_labeled,
        trained_guess=config.guess_pass == "trained",
    )


@dataclass
class _Pending:
    """A step whose output is being copied to the host."""

    plan: GlobalPlan
    metrics: Tensor  # (len(METRICS),) float32, on the host once `copied` is recorded.
    omega: Tensor  # (B,) float32, likewise.
    copied: torch.cuda.Event | None


@dataclass
class _PlanBatch:
    """The plans of `view_steps` steps, whose views are made as one batch."""

    plans: list[GlobalPlan]
    rank_plans: list[RankPlan]
    views: Any  # Result of `ViewLoader.prepare`.


class Feed:
    """Supplies the inputs of a run's steps in order and collects their outputs.

    Between `begin` and `end`, train a step by `put(execute(next()))`.

    Args:
        config: The validated configuration.
        data: The data set.
        split: (labels,) int64, indices of the training images that keep their label.
        execution: How the steps are executed.
        on_metrics: Called with (step, {name: value}) for the METRICS of every step, in order, when it is drained.

    Attributes:
        spec: The specification of the plans.
        layout: This rank's batch layout.
        policy: CTAugment's policy, updated up to the last step drained.
        waited_seconds: Time that the host has waited for steps to finish.
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
        self._next_unplanned = 0  # The first step without a plan.
        self._planning: deque[Future[_PlanBatch]] = deque()  # Batches whose views have not been requested.
        self._making_views: deque[_PlanBatch] = deque()  # Batches whose views are being made.
        self._ready: deque[tuple[GlobalPlan, RankPlan, Tensor]] = deque()  # Steps whose views are ready.
        self._training: GlobalPlan | None = None  # The plan of the step that `next` returned.
        self._pending: deque[_Pending] = deque()
        self._closing = ExitStack()

    @property
    def images_per_step(self) -> int:
        """The number of training inputs per step over all ranks: the mixup pool, u_1 and the rotated u_1."""
        return len(self.layout.target_index) * collectives.ranks()

    def example(self) -> StepInput:
        """Return an input with the shapes of all steps and black views."""
        plan = make_plan(self.spec, self.config.seed, 0, self.policy.weights)
        shape = (self.layout.view_count, *self.data.train_images.shape[1:])
        blank = torch.zeros(shape, dtype=torch.uint8, device=self.execution.device)
        return StepInput.pack(blank, self._rank_plan(plan), self.execution.device)

    def begin(self, step: int, views: ViewLoader | None = None) -> None:
        """Start making the first plans and views.

        Args:
            step: The first step that `next` returns.
            views: A view loader to use instead of the configured one.
        """
        c, device = self.config, self.execution.device
        self._next_unplanned = step
        self._views = views or self.make_views()
        self._closing.callback(self._views.close)
        # Pinned memory belongs to the current device of the thread.
        own_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._planner = self._closing.enter_context(ThreadPoolExecutor(1, "planner", *own_device))
        # If the lag allows it, prefetch one more batch of plans than of views.
        for _ in range(min(c.prefetch + 1, c.lag // c.view_steps - 1)):
            self._prefetch_plans()
        for _ in range(c.prefetch):
            self._prefetch_views()

    def next(self, stop: bool = False) -> StepInput:
        """Return the input of the next step, and prefetch later plans and views.

        Args:
            stop: Whether this rank was requested to stop; see `StepInput`.
        """
        if not self._ready:
            ranges.enter("wait for views")
            batch = self._making_views.popleft()
            views = self._views.collect().chunk(self.config.view_steps)
            self._ready.extend(zip(batch.plans, batch.rank_plans, views, strict=True))
            # Started before this step trains, so that both run concurrently.
            self._prefetch_plans()
            self._prefetch_views()
        ranges.enter("copy plan")
        self._training, own_plan, step_views = self._ready.popleft()
        return StepInput.pack(step_views, own_plan, self.execution.device, stop)

    def put(self, output: StepOutput) -> None:
        """Start copying the output of the step that `next` returned to the host."""
        assert self._training is not None, "put follows next"
        ranges.enter("metrics")
        metrics, omega = output.metrics, output.omega
        copied = None
        if self.execution.device.type == "cuda":
            metrics, omega = metrics.to("cpu", non_blocking=True), omega.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Pending(self._training, metrics, omega, copied))
        self._training = None
        ranges.leave()

    def drain(self, end: int) -> None:
        """Wait for the outputs of all steps before `end`; pass omega to the policy and metrics to `on_metrics`."""
        while self._pending and self._pending[0].plan.step < end:
            done = self._pending.popleft()
            if done.copied is not None:
                ranges.enter("wait for device")
                begin = time.perf_counter()
                done.copied.synchronize()
                self.waited_seconds += time.perf_counter() - begin
            ranges.enter("drain")
            self._on_metrics(done.plan.step, dict(zip(METRICS, done.metrics.tolist(), strict=True)))
            self.policy.observe(done.plan.step, done.plan.probe_ops, done.plan.probe_bins, done.omega.numpy())
        ranges.leave()

    def end(self) -> None:
        """Wait for pending plans and views, and release the loader."""
        self._closing.close()

    def make_views(self, batch_size: int = 0, device: torch.device | None = None) -> ViewLoader:
        """Make the view loader of the run's backend.

        Args:
            batch_size: Views per batch; by default those of `view_steps` steps.
            device: The device of the views; by default the run's.
        """
        c, device = self.config, device or self.execution.device
        batch_size = batch_size or self.layout.view_count * c.view_steps
        images = (self.data.train_images, self.split, self.data.unlabeled_indices if c.unlabeled else None)
        where = {"device": "gpu" if device.type == "cuda" else "cpu", "device_id": device.index or 0}
        options: dict[str, Any] = {"prefetch": c.prefetch, "resident": self.execution.resident, **where}
        if self.execution.views == "fused":
            return FusedViews(*images, batch_size, c.max_shift, **options)
        with gc_paused():  # The next imports are here since only these backends need DALI.
            if self.execution.views == "dali":
                from pipelines.dali import DaliViews

                return DaliViews(*images, batch_size, c.max_shift, c.view_threads, c.prefetch)
            from pipelines.dali_graph import DaliGraphViews

            try:
                return DaliGraphViews(*images, batch_size, c.max_shift, threads=c.view_threads, **options)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                # DALI ends its messages with a line about the pipeline, and torch with the cause.
                lines = [line for line in str(error).splitlines() if line and not line.startswith("Current pipeline")]
                reason = lines[-1].strip() if lines else type(error).__name__
                advice = "use --views fused" if device.type == "cuda" else "use --views dali"
                raise UserError(f"--views {c.views}: DALI cannot run its graph here ({reason}); {advice}") from error

    def _rank_plan(self, plan: GlobalPlan) -> RankPlan:
        return rank_plan(self.layout, plan, self._labels[plan.labeled])

    def _prefetch_plans(self) -> None:
        """Start planning the next `view_steps` steps, after draining all probes that they depend on."""
        first, end = self._next_unplanned, self._next_unplanned + self.config.view_steps
        if first >= self.config.steps:
            return  # The last batch may extend beyond the end of the run; those plans are not executed.
        self.drain(end - self.config.lag)
        ranges.enter("plan")
        weights = [self.policy.weights_for(step) for step in range(first, end)]
        self._planning.append(self._planner.submit(self._plan, first, weights))
        self._next_unplanned = end

    def _plan(self, first: int, weights: list[np.ndarray]) -> _PlanBatch:
        ranges.enter("plan")
        steps = range(first, first + len(weights))
        plans = [make_plan(self.spec, self.config.seed, *each) for each in zip(steps, weights, strict=True)]
        views = stack([plan.views.select(self.layout.step_views(plan)) for plan in plans])
        rank_plans = [self._rank_plan(plan) for plan in plans]
        ranges.enter("views")
        prepared = self._views.prepare(views)
        ranges.leave()
        return _PlanBatch(plans, rank_plans, prepared)

    def _prefetch_views(self) -> None:
        if self._planning:
            ranges.enter("wait for plan")
            batch = self._planning.popleft().result()
            ranges.enter("views")
            self._views.submit(batch.views)
            self._making_views.append(batch)
