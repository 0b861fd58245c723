"""A rank of a group that `remixmatch bench scaling` has launched.

`python -m bench.ranks.scaling_worker FOLDER` under torchrun.

FOLDER/job is a pickled `Job`, the cases to time; rank 0 pickles what `work` returns to FOLDER/result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import sys
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


def work(job: Job) -> dict[str, Any]:
    """Times a job on this rank, in step with the others.

    Returns:
        steps: samples of seconds a step, by case; reduces: of seconds of an all-reduce, by size; facts: see
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
            # A captured step runs as soon as it is made, before its network could be reached.
            wrap = functools.partial(_wrap, wrapped, spec.reduced)
            with patch.object(engine.training.step, "DistributedDataParallel", wrap):
                cases[spec] = TimedSteps.begin(dataclasses.replace(job.config, batch=spec.batch), job.views)
            cases[spec].advance(max(job.steps, 2))  # with the first two go compilation and the choice of buckets
        buffers = {size: torch.zeros(size // 4, device=device) for size in job.sizes}
        for buffer in buffers.values():
            dist.all_reduce(buffer)
        steps: dict[CaseSpec, list[float]] = {spec: [] for spec in job.cases}
        reduces: dict[int, list[float]] = {size: [] for size in job.sizes}
        for _ in range(job.repeats):
            for spec, samples in steps.items():
                collectives.barrier()
                advance = functools.partial(_advance, cases[spec], spec, job.steps)
                samples.append(sample(advance, device, 1) / job.steps)
            for size, samples in reduces.items():
                collectives.barrier()
                samples.append(sample(functools.partial(dist.all_reduce, buffers[size]), device, _REDUCES))
        feed = cases[job.cases[0]].feed
        return {
            "steps": steps,
            "reduces": reduces,
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


def _wrap(wrapped: list[DistributedDataParallel], reduced: bool, *args: Any, **kwargs: Any) -> DistributedDataParallel:
    """Wrap a network and remember it; if not `reduced`, each rank keeps its own gradients."""
    wrapped.append(DistributedDataParallel(*args, **kwargs))
    if not reduced:
        wrapped[-1].register_comm_hook(None, noop_hook)
    return wrapped[-1]


def main(folder: Path) -> None:
    """Reads the job, works, and writes what rank 0 has measured."""
    try:
        result = work(pickle.loads((folder / "job").read_bytes()))
        if collectives.rank() == 0:
            (folder / "result").write_bytes(pickle.dumps(result))
    finally:
        collectives.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
