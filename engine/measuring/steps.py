"""Training steps for timing, without evaluation and checkpoints, as used by benches and ablations."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config.config import Config
from engine.runs.setup import setup_run
from engine.training.cuda_graph import make_step
from engine.training.execution import Execution, keep_freed_memory, set_numerics
from engine.training.feed import Feed
from engine.training.state import TrainState, make_state
from engine.training.step import StepOutput
from engine.training.step_input import StepInput
from pipelines.plan import ViewPlan

VIEWS = ("fused", "dali", "dali-graph", "synthetic")


class SyntheticViews:
    """Views at no cost: the same views on the device for every plan."""

    def __init__(self, count: int, sides: Sequence[int], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._views = torch.randint(0, 256, (count, *sides, 3), dtype=torch.uint8, generator=generator).to(device)

    def prepare(self, views: ViewPlan) -> None:
        """Do nothing."""

    def submit(self, prepared: None) -> None:
        """Do nothing."""

    def collect(self) -> Tensor:
        """Return the views, (V, H, W, 3) uint8."""
        return self._views

    def close(self) -> None:
        """Do nothing."""


@dataclass
class TimedSteps:
    """Training steps of one configuration."""

    config: Config
    feed: Feed
    state: TrainState
    execute: Callable[[StepInput], StepOutput] | None
    host_seconds: float = 0.0
    steps: int = 0

    @classmethod
    def begin(cls, config: Config, views: str, execution: Mapping[str, Any] | None = None) -> TimedSteps:
        """Set up the steps of a configuration.

        Args:
            config: The configuration. Its `views` and `steps` are ignored.
            views: Source of the views, one of VIEWS.
            execution: Fields of `Execution` to override.
        """
        # All cases compile the same forward function. Beyond its default limit, torch would silently stop compiling.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        config = dataclasses.replace(config, steps=2**40, views="auto" if views == "synthetic" else views)  # type: ignore[arg-type]
        setup = setup_run(config)
        config, data, split = setup.config, setup.data, setup.split
        chosen = dataclasses.replace(Execution.pick(config, data.train_images.shape), **(execution or {}))
        set_numerics(config.deterministic, chosen.cudnn_plans)
        keep_freed_memory(chosen.device)
        feed = Feed(config, data, split, chosen)
        state = make_state(config, len(data.classes), chosen.device, data.sides, feed.spec.unlabeled_images)
        execute = make_step(config, state, feed.layout, chosen, feed.example)
        count = feed.layout.view_count * config.view_steps
        feed.begin(0, SyntheticViews(count, data.sides, chosen.device) if views == "synthetic" else None)
        return cls(config, feed, state, execute)

    def advance(self, steps: int) -> None:
        """Train `steps` steps and add up the host's time, without the time it waited for the device."""
        assert self.execute is not None
        begin, waited = time.perf_counter(), self.feed.waited_seconds
        for _ in range(steps):
            self.feed.put(self.execute(self.feed.next()))
        self.host_seconds += time.perf_counter() - begin - (self.feed.waited_seconds - waited)
        self.steps += steps

    def end(self) -> None:
        """Wait for pending work and release resources. See `Trainer.end`."""
        self.feed.end()
        self.execute = None
