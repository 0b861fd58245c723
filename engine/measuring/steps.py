"""Training steps that nobody evaluates or saves, ready to be timed: what benches and ablations measure."""

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

VIEWS = ("fused", "dali", "synthetic")


class SyntheticViews:
    """Views that cost nothing: the same rows for every plan, on the device."""

    def __init__(self, rows: int, sides: Sequence[int], device: torch.device) -> None:
        chance = torch.Generator().manual_seed(0)
        self._views = torch.randint(0, 256, (rows, *sides, 3), dtype=torch.uint8, generator=chance).to(device)

    def prepare(self, views: ViewPlan) -> None:
        """Looks at nothing."""

    def submit(self, prepared: None) -> None:
        """Makes nothing."""

    def collect(self) -> Tensor:
        """(V, H, W, 3) uint8."""
        return self._views

    def close(self) -> None:
        """Does nothing."""


@dataclass
class TimedSteps:
    """One configuration, ready to train."""

    config: Config
    feed: Feed
    state: TrainState
    execute: Callable[[StepInput], StepOutput] | None
    host_seconds: float = 0.0
    steps: int = 0

    @classmethod
    def begin(cls, config: Config, views: str, execution: Mapping[str, Any] | None = None) -> TimedSteps:
        """Sets up steps that nobody evaluates or saves.

        Args:
            config: its `views` is replaced by what `views` names.
            views: one of VIEWS.
            execution: fields of `Execution` that are otherwise than the configuration has them.
        """
        # every case compiles the one forward function: more often than torch expects, which would then silently stop
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        config = dataclasses.replace(config, steps=2**40, views="auto" if views == "synthetic" else views)  # type: ignore[arg-type]
        setup = setup_run(config)
        config, data, split = setup.config, setup.data, setup.split
        chosen = dataclasses.replace(Execution.pick(config, data.train_images.shape), **(execution or {}))
        set_numerics(config.deterministic, chosen.cudnn_benchmark)
        keep_freed_memory(chosen.device)
        feed = Feed(config, data, split, chosen)
        state = make_state(config, len(data.classes), chosen.device, data.sides)
        execute = make_step(config, state, feed.layout, chosen, feed.example)
        rows = len(feed.layout.views) * config.view_steps
        feed.begin(0, SyntheticViews(rows, data.sides, chosen.device) if views == "synthetic" else None)
        return cls(config, feed, state, execute)

    def advance(self, steps: int) -> None:
        """Trains, and adds up the host's time without what it waited for the device."""
        assert self.execute is not None
        begin, waited = time.perf_counter(), self.feed.waited_seconds
        for _ in range(steps):
            self.feed.put(self.execute(self.feed.next()))
        self.host_seconds += time.perf_counter() - begin - (self.feed.waited_seconds - waited)
        self.steps += steps

    def end(self) -> None:
        """Waits for what is being made and releases it; see `Trainer.end`."""
        self.feed.end()
        self.execute = None
