"""`remixmatch bench host`: CPU time of a step on the host, by part and thread.

The planner's thread makes plans and the buffers that views are made from; the main thread keeps CTAugment's policy and
hands the step's numbers to the device. Both run under one interpreter lock, so that a step cannot take less than their
sum. Parts are timed one after another in one thread, by its CPU time: what else the machine does counts little.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.registry import Bench, Table, quartiles
from engine.measuring import records
from engine.method.batch_layout import BatchLayout, rank_plan
from engine.training.step_input import StepInput
from pipelines.ctaugment import CTAugmentPolicy
from pipelines.datasets import noise_32
from pipelines.fused import FusedViews
from pipelines.plan import PlanSpec, make_plan, stack

LABELS, MAX_SHIFT = 250, 4
THREADS = {"planner": ("plan", "rows", "views"), "main": ("policy", "to_device")}
PARTS = sum(THREADS.values(), ())


@dataclass
class HostOptions:
    """Times the host's part of a training step."""

    out: Path = records.OUT / "host.jsonl"
    """Rows are added to this file."""
    repeats: int = 15
    """Samples; the median counts."""
    k: tuple[int, ...] = (1, 2, 8, 16)
    """Strong views of an unlabeled image."""
    batch: tuple[int, ...] = (64, 448)
    """Labeled images a step, all of them on one rank."""
    steps: int = 20
    """Steps a sample."""
    lag: int = 8
    """Steps from a probe to the first plan that knows it."""


def host_steps(k: int, batch: int, lag: int, device: torch.device) -> Iterator[dict[str, float]]:
    """The host's part of one step after another, as a run on one device has it.

    Yields:
        CPU seconds of a step, by the names in PARTS:
        plan: the step's random numbers;
        rows: the network's rows;
        views: the fused kernel's arguments in one buffer;
        policy: CTAugment's weights, from one step's probes to the weights of a plan;
        to_device: the plan in one buffer, and with a GPU the start of its copy.
    """
    data = noise_32()
    labels = data.train_labels[:LABELS]
    spec = PlanSpec(batch, k, LABELS, len(data.train_images), MAX_SHIFT, flip=True)
    rows = BatchLayout.for_rank(spec, bn_groups=1, rank=0, ranks=1, micro_batches=1)
    kind = "gpu" if device.type == "cuda" else "cpu"
    which = np.arange(LABELS), data.unlabeled_indices
    source = FusedViews(data.train_images, *which, len(rows.views), MAX_SHIFT, kind, device.index or 0)
    made = torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=device)  # views, which have nothing to travel
    policy = CTAugmentPolicy(lag)
    omega = np.random.default_rng(0).random((lag, batch), dtype=np.float32)
    weights = policy.weights_for(0)
    try:
        for step in itertools.count():
            times = [time.thread_time()]
            plan = make_plan(spec, 0, step, weights)
            times.append(time.thread_time())
            numbers = rank_plan(rows, plan, labels[plan.labeled])
            times.append(time.thread_time())
            source.prepare(stack([plan.views.select(rows.views)]))
            times.append(time.thread_time())
            policy.observe(step, plan.probe_ops, plan.probe_bins, omega[step % lag])
            weights = policy.weights_for(step + lag)
            times.append(time.thread_time())
            StepInput.pack(made, numbers, device).to(device)
            times.append(time.thread_time())
            yield dict(zip(PARTS, np.diff(times).tolist(), strict=True))
    finally:
        source.close()


def main(options: HostOptions) -> None:
    """Times every case, in turn, sample by sample.

    Raises:
        UserError: a flag that cannot work.
    """
    records.check_numbers(options, repeats=1, k=1, batch=1, steps=1, lag=1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if not cuda:
        print("torch sees no GPU here: buffers are not pinned, and nothing is copied to a device")
    cases = {
        (k, batch): host_steps(k, batch, options.lag, device)
        for batch, k in itertools.product(options.batch, options.k)
    }
    for case in cases.values():
        _sample(case, options.lag)  # until every plan has as many probes waiting as it will have
    samples: dict[tuple[int, int], list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, case in cases.items():
            samples[name].append(_sample(case, options.steps))
    for (k, batch), taken in samples.items():
        row = {f"{part}_us": 1e6 * median(times[part] for times in taken) for part in taken[0]}
        row |= quartiles("total_us", [1e6 * times["total"] for times in taken])
        # The host is measured, whatever GPU it has.
        BENCH.write(options.out, "host", torch.device("cpu"), k=k, batch=batch, lag=options.lag, pinned=cuda, **row)


def _sample(case: Iterator[dict[str, float]], steps: int) -> dict[str, float]:
    """Mean CPU seconds a step over so many steps, by part, by thread and in all."""
    taken = list(itertools.islice(case, steps))
    times = {part: sum(step[part] for step in taken) / steps for part in taken[0]}
    times |= {thread: sum(times[part] for part in parts) for thread, parts in THREADS.items()}
    return times | {"total": times["planner"] + times["main"]}


BENCH = Bench(
    options=HostOptions,
    main=main,
    quick="--repeats 1 --k 1 --batch 8 --steps 1",
    tables={
        "host": Table(
            key=("k", "batch", "lag", "pinned"),
            columns={
                "K": "{k}",
                "B": "{batch}",
                "plan, us": "{plan_us:.0f}",
                "rows": "{rows_us:.0f}",
                "views": "{views_us:.0f}",
                "planner's thread": "{planner_us:.0f}",
                "policy": "{policy_us:.0f}",
                "to_device": "{to_device_us:.0f}",
                "main thread": "{main_us:.0f}",
                "sum, us": "{total_us:.0f}",
                "quartiles": "{total_us_low:.0f} to {total_us_high:.0f}",
                "lag": "{lag}",
                "pinned": "{pinned}",
            },
        ),
    },
)
