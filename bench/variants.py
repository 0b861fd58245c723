"""`remixmatch bench variants`: what each decision about the compiled step brings, and where one step's time goes.

A variant is the same step with one decision taken otherwise: an option of Inductor, passes on one stream, an input of
eight channels, cuDNN's own choice; or the step of an earlier checkout (`--before FOLDER`). Each is compiled in a
process of its own, some at once, and then all take turns, sample by sample, with nothing else on the device: figures
are medians, and the ratio to the step as it is the median over rounds. Then the step as it is is profiled: time by kind
of kernel, and gaps in which the device does nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import records
from bench.process import search_path
from bench.timing import bench_device, in_turns
from bench.trace import by_kind
from engine.errors import UserError
from engine.execution import INDUCTOR

ROOT = Path(__file__).parents[1]
AS_IT_IS, BEFORE = "as it is", "before"


@dataclass(frozen=True)
class Variant:
    """A step with something changed: see `bench.variant_process`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    inductor: Mapping[str, Any] | None = None
    streams: bool = True
    benchmark: bool = True
    checkout: Path = ROOT


VARIANTS = {
    AS_IT_IS: Variant(),
    "Inductor's defaults": Variant(inductor={}),
    "read threshold alone": Variant(inductor={"realize_reads_threshold": INDUCTOR["realize_reads_threshold"]}),
    "combined kernels alone": Variant(inductor={"combo_kernels": True}),
    "combined kernels, blocks of their own": Variant(inductor=INDUCTOR | {"combo_kernel_per_subkernel_blocks": True}),
    "one stream": Variant(streams=False),
    "8 input channels": Variant(config={"stem_channels": 8}),
    "cuDNN by rule": Variant(benchmark=False),
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
    """Which; the step as it is always."""
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


class Process:
    """A step in a process of its own, which waits for its turn.

    Args:
        request: see `bench.variant_process`.
        checkout: whose step it is.
    """

    def __init__(self, request: Mapping[str, Any], checkout: Path = ROOT) -> None:
        # by its path and without the script's folder, so that another checkout's packages are found
        command = [sys.executable, "-P", str(ROOT / "bench" / "variant_process.py"), json.dumps(request)]
        self._process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": search_path(checkout)}, cwd=checkout, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ready(self) -> None:
        """Returns when the variant can be timed.

        Raises:
            RuntimeError: it cannot be compiled or run.
        """
        for line in self._process.stdout or ():
            if line.strip() == "ready":
                return
        raise RuntimeError(f"the variant ended with exit code {self._process.wait()}")

    def ask(self, what: str) -> Any:
        """The answer to one line: see `bench.variant_process`."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the variant ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """Ends the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _process(variant: Variant, config: Mapping[str, Any]) -> Process:
    request = {
        "config": {**config, **variant.config}, "streams": variant.streams, "benchmark": variant.benchmark,
        "inductor": None if variant.inductor is None else dict(variant.inductor),
    }  # fmt: skip
    return Process(request, variant.checkout)


def main(options: VariantsOptions) -> None:
    """Times the variants, profiles the step as it is, and adds rows.

    Raises:
        UserError: a flag that cannot work.
    """
    for flag in ("k", "repeats", "steps", "at_once"):
        records.check_least(f"--{flag.replace('_', '-')}", getattr(options, flag), 1)
    records.check_choice("--variants", options.variants, VARIANTS)
    device = bench_device()
    wanted = {AS_IT_IS: VARIANTS[AS_IT_IS]}
    if options.before:
        if not (options.before / "engine" / "step.py").exists():
            raise UserError(f"--before {options.before} is no checkout: there is no engine/step.py in it")
        wanted[BEFORE] = Variant(checkout=options.before.resolve())
    wanted |= {name: VARIANTS[name] for name in options.variants}
    config: dict[str, Any] = {"k": options.k} | ({"batch": options.batch} if options.batch else {})
    failures = records.Failures()
    with _started(wanted, config, options.at_once, failures) as processes:
        samples = take_turns(processes, options.repeats, options.steps)
        case = {"k": options.k, "batch": options.batch or (64 if device.type == "cuda" else 0)}
        for name, times in samples.items():
            row = _row(times, samples[AS_IT_IS], processes[name].ask("memory"))
            records.append(options.out, records.record("variants", device, **case, variant=name, **row))
            print(
                f"{name}: {row['step_ms']:.3f} ms a step ({row['step_ms_low']:.3f} to {row['step_ms_high']:.3f}), "
                f"{row['ratio']:.3f} times as long as the step as it is"
            )
        if options.profile and AS_IT_IS in processes:
            events = processes[AS_IT_IS].ask(f"profile {options.profile}")
            for kind, figures in by_kind(events, options.profile).items():
                row = records.record("replay", device, **case, kind=kind, **figures)
                records.append(options.out.with_name("replay.jsonl"), row)
                shown = f"{figures['ms']:.3f} ms of a step, {figures['share']:.1%}, {figures['kernels']:.0f} kernels"
                print(f"{kind}: {shown}")
    failures.finish()


@contextmanager
def _started(
    variants: Mapping[str, Variant], config: Mapping[str, Any], at_once: int, failures: records.Failures
) -> Iterator[dict[str, Process]]:
    """Starts variants, some at a time, and gives those that are ready."""
    processes: dict[str, Process] = {}
    try:
        names = list(variants)
        for first in range(0, len(names), at_once):
            group = {name: _process(variants[name], config) for name in names[first : first + at_once]}
            processes |= group
            for name, process in group.items():
                try:
                    process.ready()
                except RuntimeError as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    failures.names.append(name)
                    processes.pop(name).end()
        if AS_IT_IS not in processes:
            raise RuntimeError("the step as it is does not run")
        yield processes
    finally:
        for process in processes.values():
            process.end()


def take_turns(processes: Mapping[str, Any], repeats: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each variant, one sample a round; every second round goes backwards."""
    rounds = in_turns({name: partial(one.ask, f"sample {steps}") for name, one in processes.items()}, repeats)
    return {name: [taken[name] for taken in rounds] for name in processes}


def _row(times: Sequence[float], as_it_is: Sequence[float], memory: float) -> dict[str, float]:
    middle, low, high = (1e3 * value for value in np.percentile(times, (50, 25, 75)).tolist())
    ratio = median(one / other for one, other in zip(times, as_it_is, strict=True))
    return {
        "step_ms": middle, "step_ms_low": low, "step_ms_high": high, "ratio": ratio, "peak_memory_mib": memory
    }  # fmt: skip
