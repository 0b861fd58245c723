"""`remixmatch bench variants`: the captured step with each optimization toggled (interleaved), plus a profile.

A variant is the same step with one decision taken otherwise: an option of Inductor, passes on one stream, an input of
eight channels, cuDNN's own choice; or the step of an earlier checkout (`--before FOLDER`). Each is compiled in a
process of its own, some at once, and then all take turns, sample by sample, with nothing else on the device: figures
are medians, and the ratio to the baseline the median over rounds. Then the baseline is profiled: time by kind
of kernel, and gaps in which the device does nothing.
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
from engine.measuring.step_worker import ROOT, StepWorker, take_turns
from engine.measuring.timing import bench_device
from engine.measuring.trace import by_kind
from engine.training.execution import INDUCTOR

WORKER = "engine/measuring/step_worker.py"  # of a checkout
BASELINE, BEFORE = "baseline", "before"


@dataclass(frozen=True)
class Variant:
    """A step with something changed: see `StepWorker`."""

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
    "cuDNN by rule": Variant(execution={"cudnn_benchmark": False}),
    "tuned": Variant(config={"tune": True}),
}


@dataclass
class VariantsOptions:
    """Times the captured step with each decision taken otherwise, in turns."""

    out: Path = records.OUT / "variants.jsonl"
    """Rows are added to this file, those of the profile to replay.jsonl beside it."""
    before: Path | None = None
    """A checkout of an earlier version, whose step takes turns with the others."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which variants; the baseline is always among them."""
    k: int = 8
    """Strong views of an unlabeled image."""
    batch: int = 0
    """B; by default 64 with a GPU, and small without."""
    repeats: int = 15
    """Rounds."""
    steps: int = 20
    """Steps a sample."""
    at_once: int = max(len(os.sched_getaffinity(0)) // 2, 1)
    """Variants that are compiled at the same time; by default half as many as there are cores."""
    profile: int = 3
    """Steps that are profiled; 0 for none."""


def _worker(variant: Variant, config: Mapping[str, Any]) -> StepWorker:
    return StepWorker({**config, **variant.config}, execution=variant.execution, checkout=variant.checkout)


def main(options: VariantsOptions) -> None:
    """Times the variants, profiles the baseline, and adds rows.

    Raises:
        UserError: a flag that cannot work.
    """
    records.check_numbers(options, k=1, repeats=1, steps=1, at_once=1)
    records.check_choices(options, variants=VARIANTS)
    device = bench_device()
    wanted = {BASELINE: VARIANTS[BASELINE]}
    if options.before:
        if not (options.before / WORKER).exists():
            raise UserError(f"--before {options.before} is no checkout that can be timed: there is no {WORKER} in it")
        wanted[BEFORE] = Variant(checkout=options.before.resolve())
    wanted |= {name: VARIANTS[name] for name in options.variants}
    cuda = device.type == "cuda"
    config = dataclasses.asdict(base_config("", cuda)) | {"k": options.k, "mode": "graph" if cuda else "eager"}
    if options.batch:
        config["batch"] = options.batch
    failures = records.Failures()
    with _started(wanted, config, options.at_once, failures) as processes:
        samples = take_turns(processes, options.repeats, options.steps)
        case = {"k": options.k, "batch": options.batch or (64 if device.type == "cuda" else 0)}
        for name, times in samples.items():
            row = quartiles("step_ms", 1e3 * np.array(times)) | {
                "ratio": median(np.divide(times, samples[BASELINE]).tolist()),
                "peak_memory_mib": processes[name].ask("memory"),
            }
            BENCH.write(options.out, "variants", device, **case, variant=name, **row)
        if options.profile:
            events = processes[BASELINE].ask(f"profile {options.profile}")
            for kind, figures in by_kind(events, options.profile).items():
                BENCH.write(options.out.with_name("replay.jsonl"), "replay", device, **case, kind=kind, **figures)
    failures.finish()


@contextmanager
def _started(
    variants: Mapping[str, Variant], config: Mapping[str, Any], at_once: int, failures: records.Failures
) -> Iterator[dict[str, StepWorker]]:
    """Starts variants, some at a time, and gives those that are ready."""
    ready: dict[str, StepWorker] = {}
    with ExitStack() as ending:
        names = list(variants)
        for first in range(0, len(names), at_once):
            group = {name: _worker(variants[name], config) for name in names[first : first + at_once]}
            for process in group.values():
                ending.callback(process.end)
            for name, process in group.items():
                with failures.part(name):
                    process.ready()
                    ready[name] = process
        if BASELINE not in ready:
            raise RuntimeError("the baseline does not run")
        yield ready


BENCH = Bench(
    options=VariantsOptions,
    main=main,
    quick=None,  # Eight processes train, one after another.
    tables={
        "variants": Table(
            key=("k", "batch", "variant"),
            columns={
                "K": "{k}",
                "B": "{batch}",
                "variant": "{variant}",
                "step, ms": "{step_ms:.3f}",
                "quartiles": "{step_ms_low:.3f} to {step_ms_high:.3f}",
                "times as long as it is": "{ratio:.3f}",
                "memory, MiB": "{peak_memory_mib:.0f}",
            },
        ),
        "replay": Table(
            key=("k", "batch", "kind"),
            columns={
                "K": "{k}",
                "B": "{batch}",
                "kind": "{kind}",
                "ms a step": "{ms:.3f}",
                "share": "{share:.1%}",
                "kernels": "{kernels:.0f}",
            },
        ),
    },
)
