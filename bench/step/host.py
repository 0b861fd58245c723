"""`remixmatch bench host`: CPU time of a step on the host, by part and thread.

The planner thread makes plans, index tensors and the arguments of the view kernel; the main thread updates CTAugment's
policy and copies the step's input to the device. Both share the GIL, so a step takes at least their sum. The parts are
timed one after another in a single thread by its CPU time, so other load on the machine has little effect.
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
from pipelines.data.datasets import noise_32
from pipelines.fused import FusedViews
from pipelines.plan import PlanSpec, make_plan, stack

LABELS, MAX_SHIFT = 250, 4
THREADS = {"planner": ("plan", "rows", "views"), "main": ("policy", "to_device")}
PARTS = sum(THREADS.values(), ())


@dataclass
class HostOptions:
    """Time the host's work for a training step."""

    out: Path = records.OUT / "host.jsonl"
    """File to append the records to."""
    repeats: int = 15
    """Samples per case; the median is reported."""
    k: tuple[int, ...] = (1, 2, 8, 16)
    """Strong views per unlabeled image."""
    batch: tuple[int, ...] = (64, 448)
    """Labeled images per step, on a single rank."""
    steps: int = 20
    """Steps per sample."""
    lag: int = 8
    """Steps between a probe and the first plan that uses its result."""


def host_steps(k: int, batch: int, lag: int, device: torch.device) -> Iterator[dict[str, float]]:
    """Run the host's work for consecutive steps on a single rank.

    Yields:
        CPU seconds of a step, by the names in PARTS:
        plan: drawing the step's random numbers;
        rows: computing the rank's index tensors;
        views: packing the fused kernel's arguments into one buffer;
        policy: updating CTAugment's weights from the probes, and reading the weights for a later plan;
        to_device: packing the step's input into one buffer and, with a GPU, starting its copy.
    """
    data = noise_32()
    labels = data.train_labels[:LABELS]
    spec = PlanSpec(batch, k, LABELS, len(data.train_images), MAX_SHIFT, flip=True)
    layout = BatchLayout.for_rank(spec, bn_groups=1, rank=0, ranks=1, micro_batches=1)
    kind = "gpu" if device.type == "cuda" else "cpu"
    indices = np.arange(LABELS), data.unlabeled_indices
    source = FusedViews(data.train_images, *indices, layout.view_count, MAX_SHIFT, kind, device.index or 0)
    views = torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=device)  # Placeholder: views are already on the device.
    policy = CTAugmentPolicy(lag)
    omega = np.random.default_rng(0).random((lag, batch), dtype=np.float32)
    weights = policy.weights_for(0)
    try:
        for step in itertools.count():
            times = [time.thread_time()]
            plan = make_plan(spec, 0, step, weights)
            times.append(time.thread_time())
            own = rank_plan(layout, plan, labels[plan.labeled])
            times.append(time.thread_time())
            source.prepare(stack([plan.views.select(layout.step_views(plan))]))
            times.append(time.thread_time())
            policy.observe(step, plan.probe_ops, plan.probe_bins, omega[step % lag])
            weights = policy.weights_for(step + lag)
            times.append(time.thread_time())
            StepInput.pack(views, own, device).to(device)
            times.append(time.thread_time())
            yield dict(zip(PARTS, np.diff(times).tolist(), strict=True))
    finally:
        source.close()


def main(options: HostOptions) -> None:
    """Time every case, with their samples interleaved.

    Raises:
        UserError: A flag is invalid.
    """
    records.check_numbers(options, repeats=1, k=1, batch=1, steps=1, lag=1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if not cuda:
        print("no GPU: buffers are not pinned, and nothing is copied to a device")
    cases = {
        (k, batch): host_steps(k, batch, options.lag, device)
        for batch, k in itertools.product(options.batch, options.k)
    }
    for case in cases.values():
        _sample(case, options.lag)  # Warm up until the queue of pending probes is full.
    samples: dict[tuple[int, int], list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, case in cases.items():
            samples[name].append(_sample(case, options.steps))
    for (k, batch), taken in samples.items():
        fields = {f"{part}_us": 1e6 * median(times[part] for times in taken) for part in taken[0]}
        fields |= quartiles("total_us", [1e6 * times["total"] for times in taken])
        # The device of the record is the CPU even if there is a GPU: only the host is measured.
        BENCH.write(options.out, "host", torch.device("cpu"), k=k, batch=batch, lag=options.lag, pinned=cuda, **fields)


def _sample(case: Iterator[dict[str, float]], steps: int) -> dict[str, float]:
    """Return the mean CPU seconds per step over `steps` steps, by part, by thread and in total."""
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
                "index tensors, us": "{rows_us:.0f}",
                "views, us": "{views_us:.0f}",
                "planner thread, us": "{planner_us:.0f}",
                "policy, us": "{policy_us:.0f}",
                "to_device, us": "{to_device_us:.0f}",
                "main thread, us": "{main_us:.0f}",
                "total, us": "{total_us:.0f}",
                "quartiles": "{total_us_low:.0f} to {total_us_high:.0f}",
                "lag": "{lag}",
                "pinned": "{pinned}",
            },
        ),
    },
)
