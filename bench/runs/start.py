"""`remixmatch bench start`: from the command to the first trained step, by part.

A real `remixmatch train` in its own process (`start_worker.py`), which reports when each part ends and exits after its
first step. `--help`, which loads only the options, is timed as well.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.registry import Bench, Table
from bench.runs.start_worker import PARTS
from engine.measuring import records
from engine.measuring.process import output
from engine.measuring.timing import bench_device


@dataclass
class StartOptions:
    """Time the start of a run."""

    out: Path = records.OUT / "start.jsonl"
    """File to append records to."""
    repeats: int = 5
    """Number of starts; the median is reported."""
    preset: str = "digits-40"
    """Preset to train."""
    flags: str = ""
    """More flags of `remixmatch train` as one word, such as --flags="--cudnn-plans 10"."""


def main(options: StartOptions) -> None:
    """Start the run repeatedly, and write a record.

    Raises:
        UserError: A flag is invalid.
        RuntimeError: A start failed.
    """
    records.check_numbers(options, repeats=1)
    device = bench_device()
    flags = shlex.split(options.flags)
    starts = [start(options.preset, *flags) for _ in range(options.repeats)]
    row = {f"{name}_seconds": median(each[name] for each in starts) for name in (*PARTS, "start", "cpu", "help")}
    case = {"preset": options.preset} | ({"flags": options.flags} if flags else {})
    BENCH.write(options.out, "start", device, **case, repeats=options.repeats, **row)


def start(preset: str, *flags: str) -> dict[str, float]:
    """Start a run once, with further flags of `remixmatch train`.

    Returns:
        Seconds of each of PARTS; "start", their sum; "cpu", the CPU time of the process; "help", the time of `--help`.
    """
    with TemporaryDirectory() as folder:
        begin = time.time()
        command = ["train", preset, *flags, "--out", f"{folder}/run", "--quiet"]
        cpu, *ends = map(float, output("bench.runs.start_worker", *command).split())
    parts = [end - start for start, end in zip([begin, *ends], ends, strict=False)]
    asked = time.time()
    output("engine", "train", preset, "--help")
    times = {"start": ends[-1] - begin, "cpu": cpu, "help": time.time() - asked}
    return dict(zip(PARTS, parts, strict=True)) | times


BENCH = Bench(
    options=StartOptions,
    main=main,
    quick="--repeats 1",
    tables={
        "start": Table(
            key=("preset", "flags"),
            columns={
                "preset": "{preset}",
                "flags": "{flags}",
                "command to first step, s": "{start_seconds:.2f}",
                "interpreter": "{python_seconds:.2f}",
                "options, data, folder": "{options_seconds:.2f}",
                "imports": "{imports_seconds:.2f}",
                "network, optimizer": "{trainer_seconds:.2f}",
                "view pipeline": "{views_seconds:.2f}",
                "first step": "{step_seconds:.2f}",
                "CPU time": "{cpu_seconds:.2f}",
                "--help": "{help_seconds:.2f}",
            },
        ),
    },
)
