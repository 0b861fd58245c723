"""Worker of `remixmatch bench scaling`, run under torchrun as `python -m bench.ranks.scaling_worker FOLDER`.

FOLDER/job is a pickled `Job`. Rank 0 pickles the result of `work` to FOLDER/result.
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

_REDUCES = 20  # All-reduces per sample. The number is fixed because all ranks must run the same number.


@dataclass(frozen=True)
class CaseSpec:
    """A step to time.

    Attributes:
        batch: Global B if grouped, otherwise B of each rank.
        grouped: Whether the ranks train one network with DistributedDataParallel. If not, each rank trains its own
            network at the same time, which measures contention.
        reduced: Whether gradients are all-reduced. If not, the difference is the cost of the all-reduce.
    """

    batch: int
    grouped: bool = True
    reduced: bool = True


@dataclass(frozen=True)
class Job:
    """Measurements for a group of ranks.

    Attributes:
        config: Configuration to train; its batch is replaced by that of each case.
        views: One of engine.measuring.steps.VIEWS.
        cases: Steps to time, with samples interleaved.
        sizes: Bytes of plain all-reduces, interleaved with the cases.
        steps: Steps per sample, a multiple of `view_steps`.
        repeats: Samples per case.
    """

    config: Config
    views: str
    cases: tuple[CaseSpec, ...]
    sizes: tuple[int, ...]
    steps: int
    repeats: int


def work(job: Job) -> dict[str, Any]:
    """Run a job on this rank, synchronized with the others.

    Returns:
        "steps": samples of seconds per step, by case; "reduces": samples of seconds per all-reduce, by size; "facts":
        see `bench.ranks.scaling.Group`.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = pick_device(job.config)
    cases: dict[CaseSpec, TimedSteps] = {}
    wrapped: list[DistributedDataParallel] = []
    try:
        # Networks are wrapped if there is a process group, so make the cases without a group first.
        for spec in sorted(job.cases, key=lambda spec: spec.grouped):
            if spec.grouped and not collectives.grouped():
                collectives.start(device, timeout=600.0, alone=True)
            # Patch the wrapper, since a captured step runs when it is made, before a hook could be registered.
            wrap = functools.partial(_wrap, wrapped, spec.reduced)
            with patch.object(engine.training.step, "DistributedDataParallel", wrap):
                cases[spec] = TimedSteps.begin(dataclasses.replace(job.config, batch=spec.batch), job.views)
            cases[spec].advance(max(job.steps, 2))  # The first two steps include compilation and rebuilding of buckets.
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
    """Train `steps` steps; a case without a group runs as on a single rank."""
    with contextlib.nullcontext() if spec.grouped else patch.object(collectives, "ranks", lambda: 1):
        case.advance(steps)


def _wrap(wrapped: list[DistributedDataParallel], reduced: bool, *args: Any, **kwargs: Any) -> DistributedDataParallel:
    """Wrap a network and append it to `wrapped`; if not `reduced`, each rank keeps its own gradients."""
    wrapped.append(DistributedDataParallel(*args, **kwargs))
    if not reduced:
        wrapped[-1].register_comm_hook(None, noop_hook)
    return wrapped[-1]


def main(folder: Path) -> None:
    """Run the job in a folder and write the result of rank 0."""
    try:
        result = work(pickle.loads((folder / "job").read_bytes()))
        if collectives.rank() == 0:
            (folder / "result").write_bytes(pickle.dumps(result))
    finally:
        collectives.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
