"""A rank of a group that `remixmatch bench scaling` has launched.

`python -m bench.ranks.scaling_worker FOLDER` under torchrun.

FOLDER/job.json says what to time; rank 0 writes FOLDER/result.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

import engine.training.step
from engine.config.config import Config
from engine.distributed import collectives
from engine.measuring.steps import TimedSteps
from engine.measuring.timing import sample
from engine.training.execution import pick_device

_REDUCES = 20  # all-reduces a sample: short ones need many, and every rank has to run as many as the others


@dataclass(frozen=True)
class CaseSpec:
    """A step to be timed.

    Attributes:
        batch: B over all ranks; of each rank where they are not grouped.
        grouped: ranks train one network, in DistributedDataParallel. Without, each trains one of its own, beside the
            others: that tells how they get in one another's way.
        reduced: whether gradients are averaged. Without, ranks train apart: that tells what averaging costs.
    """

    batch: int
    grouped: bool = True
    reduced: bool = True


@dataclass(frozen=True)
class Job:
    """What a group of ranks has to time.

    Attributes:
        config: what is trained, but for its batch.
        views: one of engine.measuring.steps.VIEWS.
        cases: in turn, sample by sample.
        sizes: bytes of bare all-reduces, which take turns with the cases.
        steps: a sample, whole batches of views.
        repeats: samples.
    """

    config: Config
    views: str
    cases: tuple[CaseSpec, ...]
    sizes: tuple[int, ...]
    steps: int
    repeats: int

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` was called on."""
        given = json.loads(text)
        config = given["config"] | {"class_distribution": tuple(given["config"]["class_distribution"])}
        cases = tuple(CaseSpec(**case) for case in given["cases"])
        return cls(**given | {"config": Config(**config), "cases": cases, "sizes": tuple(given["sizes"])})


def work(job: Job) -> dict[str, Any]:
    """Times a job on this rank, in step with the others.

    Returns:
        steps: seconds a step, a list a case; reduces: seconds of an all-reduce, a list a size; facts: see
        `bench.ranks.scaling.Group`.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = pick_device(job.config)
    cases: dict[CaseSpec, TimedSteps] = {}
    wrapped: list[DistributedDataParallel] = []
    try:
        # a network is wrapped where there is a group: what goes without is made before there is one
        for spec in sorted(job.cases, key=lambda spec: spec.grouped):
            if spec.grouped and not collectives.grouped():
                collectives.start(device, timeout=600.0, alone=True)
            with _wrapping(wrapped, spec.reduced):
                cases[spec] = TimedSteps.begin(dataclasses.replace(job.config, batch=spec.batch), job.views)
            cases[spec].advance(max(job.steps, 2))  # with the first two go compilation and the choice of buckets
        turns: list[tuple[Callable[[], Any], int]] = []
        turns += [(functools.partial(_advance, cases[spec], spec, job.steps), 1) for spec in job.cases]
        for size in job.sizes:
            numbers = torch.zeros(size // 4, device=device)
            turns.append((functools.partial(dist.all_reduce, numbers), _REDUCES))
            dist.all_reduce(numbers)
        samples: list[list[float]] = [[] for _ in turns]
        for _ in range(job.repeats):
            for (function, calls), taken in zip(turns, samples, strict=True):
                collectives.barrier()
                taken.append(sample(function, device, calls))
        feed = cases[job.cases[0]].feed
        return {
            "steps": [[seconds / job.steps for seconds in taken] for taken in samples[: len(job.cases)]],
            "reduces": samples[len(job.cases) :],
            "facts": {
                "mode": feed.execution.mode,
                "precision": str(feed.execution.precision).removeprefix("torch."),
                "rows_per_image": feed.images_per_step // job.cases[0].batch,
                "backend": dist.get_backend(),
                "gradient_buckets": wrapped[0]._get_ddp_logging_data().get("num_buckets_reduced"),
            },
        }
    finally:
        for case in cases.values():
            case.end()


def _advance(case: TimedSteps, spec: CaseSpec, steps: int) -> None:
    """Trains; a case that was begun before there was a group knows nothing of it."""
    with contextlib.nullcontext() if spec.grouped else patch.object(collectives, "ranks", lambda: 1):
        case.advance(steps)


@contextlib.contextmanager
def _wrapping(wrapped: list[DistributedDataParallel], reduced: bool) -> Iterator[None]:
    """Remembers the networks that steps wrap in here; if not `reduced`, each rank keeps its own gradients."""

    def wrap(*args: Any, **kwargs: Any) -> DistributedDataParallel:
        wrapped.append(DistributedDataParallel(*args, **kwargs))
        if not reduced:
            wrapped[-1].register_comm_hook(None, noop_hook)
        return wrapped[-1]

    # a captured step runs as soon as it is made, before anybody could reach its network
    with patch.object(engine.training.step, "DistributedDataParallel", wrap):
        yield


def main(folder: Path) -> None:
    """Reads the job, works, and writes what rank 0 has measured."""
    try:
        result = work(Job.from_json((folder / "job.json").read_text(encoding="utf-8")))
        if collectives.rank() == 0:
            (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    finally:
        collectives.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
