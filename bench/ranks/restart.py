"""`remixmatch bench restart`: time from SIGKILL of a rank to the next step of its group, by phase.

The bench starts a real run with --gpus and --max-restarts, repeatedly kills one of its ranks, and times how long the
group takes to train its next step. It observes the run from outside: processes in /proc, and metrics.jsonl, which
rank 0 replaces after it has loaded the checkpoint and extends after every step.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.registry import Bench, Table
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.timing import bench_device
from engine.runs.progress import read_metrics
from pipelines.processes import python_environment

_IMPORTS = "import engine.commands.main, engine.run, pipelines.dali"
_LIMIT_SECONDS = 300.0  # Timeout of every wait.


@dataclass
class RestartOptions:
    """Kill ranks of a run and time how long it takes to recover."""

    out: Path = records.OUT / "restart.jsonl"
    """File to append the record to."""
    repeats: int = 5
    """Number of kills; the median is reported."""
    ranks: int = 2
    """Number of ranks."""
    preset: str = "digits-40"
    """Preset to train."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the choice of ranks and of the times to kill them."""


def main(options: RestartOptions) -> None:
    """Start the run, kill its ranks, and write a record.

    Raises:
        UserError: A flag is invalid, or the system has no /proc.
        RuntimeError: The run ended, or a wait timed out.
    """
    records.check_numbers(options, repeats=1, ranks=1)
    if not Path("/proc/self/environ").exists():
        raise UserError("bench restart needs /proc to find the ranks, which this system does not have")
    device = bench_device()
    imports = median(_import_seconds(options.ranks) for _ in range(options.repeats))
    rng = random.Random(options.seed)
    kills = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        flags = ["--gpus", options.ranks, "--max-restarts", options.repeats, "--steps", 10**6, "--log-every", 1]
        flags += ["--checkpoint-every", options.checkpoint_every, "--out", folder, "--quiet"]
        command = [sys.executable, "-m", "engine", "train", options.preset, *map(str, flags)]
        launcher = subprocess.Popen(command, env=python_environment(), process_group=0)  # Ended below, not by Ctrl-C.
        try:
            for number in range(1, options.repeats + 1):
                kills.append(_kill(launcher, folder / "metrics.jsonl", options, rng))
                print(f"kill {number} of {options.repeats}: {BENCH.tables['restart'].text(kills[-1])}", flush=True)
        finally:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait()
    fields: dict[str, Any] = {"preset": options.preset, "ranks": options.ranks, "repeats": options.repeats}
    fields |= {name: median(kill[name] for kill in kills) for name in kills[0]}
    fields |= {"most_restart_seconds": max(kill["restart_seconds"] for kill in kills), "import_seconds": imports}
    BENCH.write(options.out, "restart", device, **fields)


def _kill(launcher: subprocess.Popen, metrics: Path, options: RestartOptions, rng: random.Random) -> dict[str, float]:
    """Kill one rank after the group has trained for a while, and time the phases of the recovery."""

    def wait_for(event: str, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + _LIMIT_SECONDS
        while not happened():
            if launcher.poll() is not None:
                raise RuntimeError(f"the run ended with exit code {launcher.returncode} while waiting for {event}")
            if time.monotonic() > end:
                raise RuntimeError(f"timed out after {_LIMIT_SECONDS:.0f} s waiting for {event}")
            time.sleep(0.02)

    def last_step() -> int:
        return max((int(line["step"]) for line in read_metrics(metrics)), default=0)

    def inode() -> int:
        return metrics.stat().st_ino if metrics.exists() else 0

    first = last_step()
    wait_for("training steps", lambda: last_step() >= first + options.checkpoint_every + rng.randrange(10))
    before, old_inode = last_step(), inode()
    old = ranks_of(launcher.pid)
    begin = time.monotonic()
    os.kill(rng.choice(sorted(old)), signal.SIGKILL)
    wait_for("new ranks", lambda: len(ranks_of(launcher.pid) - old) == options.ranks)
    regrouped = time.monotonic()
    wait_for("a new metrics.jsonl", lambda: inode() != old_inode)
    loaded, resumed = time.monotonic(), last_step()
    wait_for("a training step", lambda: last_step() > resumed)
    end = time.monotonic()
    return {
        "restart_seconds": end - begin,
        "regroup_seconds": regrouped - begin,
        "load_seconds": loaded - regrouped,
        "first_step_seconds": end - loaded,
        "lost_steps": before - resumed,
    }


def ranks_of(launcher: int) -> set[int]:
    """Return the process IDs of the running ranks started by the torchrun process with ID `launcher`."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii")
    ranks = set()
    for pid in map(int, children.split()):
        try:
            if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                ranks.add(pid)
        except OSError:  # The process has just ended.
            continue
    return ranks


def _import_seconds(processes: int) -> float:
    """Time the imports of a rank in `processes` processes at once."""
    environment = python_environment() | {"OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    started = [
        subprocess.Popen([sys.executable, "-c", _IMPORTS], env=environment, process_group=0) for _ in range(processes)
    ]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        raise RuntimeError("the engine cannot be imported")
    return time.monotonic() - begin


BENCH = Bench(
    options=RestartOptions,
    main=main,
    quick=None,  # A single kill takes 20 s: two ranks start twice.
    tables={
        "restart": Table(
            key=("preset", "ranks"),
            columns={
                "preset": "{preset}",
                "ranks": "{ranks}",
                "kills": "{repeats}",
                "kill to next step, s": "{restart_seconds:.1f}",
                "longest, s": "{most_restart_seconds:.1f}",
                "to new processes, s": "{regroup_seconds:.1f}",
                "imports and checkpoint, s": "{load_seconds:.1f}",
                "first step, s": "{first_step_seconds:.1f}",
                "steps lost": "{lost_steps:.0f}",
                "imports alone, s": "{import_seconds:.1f}",
            },
        ),
    },
)
