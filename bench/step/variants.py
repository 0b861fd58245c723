"""`remixmatch bench variants`: the captured step with each optimization toggled (interleaved), plus a profile.

A variant is the same step with one setting changed (Inductor options, a single stream, 8 input channels, cuDNN's
heuristic or its first ten plans, all convolutions by cuDNN or by Triton), or the step of an earlier checkout
(`--before FOLDER`). Each variant is compiled in its own process, several at a time. Then their samples are interleaved,
with nothing else running on the device. A record has the median time and the median over rounds of the ratio to the
baseline. Finally the baseline is profiled: time by kind of kernel, and gaps in which the device is idle.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.registry import Bench, Table, quartiles
from bench.step.throughput import base_config
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.step_worker import StepWorker, sample_interleaved
from engine.measuring.timing import bench_device
from engine.measuring.trace import by_kind
from engine.training.execution import INDUCTOR
from pipelines.processes import ROOT

WORKER = "engine/measuring/step_worker.py"  # Path in a checkout.
BASELINE, BEFORE = "baseline", "before"


@dataclass(frozen=True)
class Variant:
    """Changes to the baseline step; see `StepWorker`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    execution: Mapping[str, Any] = field(default_factory=dict)
    checkout: Path = ROOT


VARIANTS = {
    BASELINE: Variant(),
    "Inductor's defaults": Variant(execution={"inductor": {}}),
    "read threshold alone": Variant(
        execution={"inductor": {"realize_reads_threshold": INDUCTOR["realize_reads_threshold"]}}
    ),
    "combined kernels alone": Variant(execution={"inductor": {"combo_kernels": True}}),
    "combined kernels, blocks of their own": Variant(
        execution={"inductor": INDUCTOR | {"combo_kernel_per_subkernel_blocks": True}}
    ),
    "one stream": Variant(execution={"concurrent": False}),
    "8 input channels": Variant(config={"stem_channels": 8}),
    "cuDNN by rule": Variant(execution={"cudnn_plans": None}),
    "ten cuDNN plans": Variant(execution={"cudnn_plans": 10}),
    "cuDNN convolutions": Variant(execution={"convolutions": "cudnn"}),
    "Triton convolutions": Variant(execution={"convolutions": "triton"}),
    "tuned": Variant(config={"tune": True}),
}


@dataclass
class VariantsOptions:
    """Time the captured step with each optimization toggled, then profile it."""

    out: Path = records.OUT / "variants.jsonl"
    """File to append the records to; those of the profile go to replay.jsonl in the same folder."""
    before: Path | None = None
    """Checkout of an earlier version to time alongside the variants."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to time; the baseline is always included."""
    k: int = 8
    """Strong views per unlabeled image."""
    batch: int = 0
    """B; by default 64 with a GPU, and that of digits-40 without."""
    repeats: int = 15
    """Samples per variant; the median is reported."""
    steps: int = 20
    """Steps per sample."""
    at_once: int = max(len(os.sched_getaffinity(0)) // 2, 1)
    """Variants to compile at the same time; by default half the number of cores."""
    profile: int = 3
    """Steps to profile; 0 to skip the profile."""


def _worker(variant: Variant, config: Mapping[str, Any]) -> StepWorker:
    return StepWorker({**config, **variant.config}, execution=variant.execution, checkout=variant.checkout)


def main(options: VariantsOptions) -> None:
    """Time the variants, profile the baseline and write records.

    Raises:
        UserError: A flag is invalid.
    """
    records.check_numbers(options, k=1, repeats=1, steps=1, at_once=1)
    records.check_choices(options, variants=VARIANTS)
    device = bench_device()
    variants = {BASELINE: VARIANTS[BASELINE]}
    if options.before:
        if not (options.before / WORKER).exists():
            raise UserError(f"--before {options.before} is not a checkout that can be timed: it has no {WORKER}")
        variants[BEFORE] = Variant(checkout=options.before.resolve())
    variants |= {name: VARIANTS[name] for name in options.variants}
    cuda = device.type == "cuda"
    config = dataclasses.asdict(base_config("", cuda)) | {"k": options.k, "mode": "graph" if cuda else "eager"}
    if options.batch:
        config["batch"] = options.batch
    failures = records.Failures()
    with _started(variants, config, options.at_once, failures) as workers:
        samples = sample_interleaved(workers, options.repeats, options.steps)
        case = {"k": options.k, "batch": options.batch or (64 if device.type == "cuda" else 0)}
        for name, times in samples.items():
            fields = quartiles("step_ms", 1e3 * np.array(times)) | {
                "ratio": median(np.divide(times, samples[BASELINE]).tolist()),
                "peak_memory_mib": workers[name].ask("memory"),
            }
            BENCH.write(options.out, "variants", device, **case, variant=name, **fields)
        if options.profile:
            events = workers[BASELINE].ask(f"profile {options.profile}")
            for kind, metrics in by_kind(events, options.profile).items():
                BENCH.write(options.out.with_name("replay.jsonl"), "replay", device, **case, kind=kind, **metrics)
    failures.finish()


@contextmanager
def _started(
    variants: Mapping[str, Variant], config: Mapping[str, Any], at_once: int, failures: records.Failures
) -> Iterator[dict[str, StepWorker]]:
    """Start the variants, `at_once` at a time, yield those that compiled, and end all of them on exit."""
    ready: dict[str, StepWorker] = {}
    with ExitStack() as closing:
        names = list(variants)
        for first in range(0, len(names), at_once):
            group = {
                name: closing.enter_context(_worker(variants[name], config)) for name in names[first : first + at_once]
            }
            for name, worker in group.items():
                with failures.part(name):
                    worker.ready()
                    ready[name] = worker
        if BASELINE not in ready:
            raise RuntimeError("the baseline variant failed; its error is above")
        yield ready


BENCH = Bench(
    options=VariantsOptions,
    main=main,
    quick=None,  # It compiles twelve variants, each in its own process.
    tables={
        "variants": Table(
            key=("k", "batch", "variant"),
            columns={
                "K": "{k}",
                "B": "{batch}",
                "variant": "{variant}",
                "step, ms": "{step_ms:.3f}",
                "quartiles": "{step_ms_low:.3f} to {step_ms_high:.3f}",
                "relative to baseline": "{ratio:.3f}",
                "memory, MiB": "{peak_memory_mib:.0f}",
            },
        ),
        "replay": Table(
            key=("k", "batch", "kind"),
            columns={
                "K": "{k}",
                "B": "{batch}",
                "kind": "{kind}",
                "ms per step": "{ms:.3f}",
                "share": "{share:.1%}",
                "kernels per step": "{kernels:.0f}",
            },
        ),
    },
)
