"""`remixmatch bench restart`: from SIGKILL of a rank to the next step of its group, by part.

One real run, started as a user starts it with --gpus and --max-restarts. Again and again one of its ranks is killed,
and the clock runs until the group has trained its next step. It is read off from outside: processes in /proc, and the
log of metrics, which is opened anew when a rank 0 has its checkpoint and gets a row for every step.
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

_IMPORTS = "import engine.commands.main, engine.run, pipelines.dali"
_LIMIT_SECONDS = 300.0  # for anything that is waited for


@dataclass
class RestartOptions:
    """Kills ranks of a run and times how it comes back."""

    out: Path = records.OUT / "restart.jsonl"
    """Rows are added to this file."""
    repeats: int = 5
    """Kills; the median counts."""
    ranks: int = 2
    """Ranks of the run."""
    preset: str = "digits-40"
    """What is trained."""
    checkpoint_every: int = 25
    """Steps between its checkpoints."""
    seed: int = 0
    """Of the ranks and moments of the kills."""


def main(options: RestartOptions) -> None:
    """Starts the run, kills, waits, and writes a row.

    Raises:
        UserError: a flag that cannot work, or a system without /proc.
        RuntimeError: the run ended or did not come back.
    """
    records.check_numbers(options, repeats=1, ranks=1)
    if not Path("/proc/self/environ").exists():
        raise UserError("bench restart finds the ranks in /proc, which this system does not have")
    device = bench_device()
    imports = median(_import_seconds(options.ranks) for _ in range(options.repeats))
    chance = random.Random(options.seed)
    kills = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        flags = ["--gpus", options.ranks, "--max-restarts", options.repeats, "--steps", 10**6, "--log-every", 1]
        flags += ["--checkpoint-every", options.checkpoint_every, "--out", folder, "--quiet"]
        launcher = subprocess.Popen([sys.executable, "-m", "engine", "train", options.preset, *map(str, flags)])
        try:
            for number in range(1, options.repeats + 1):
                kills.append(_kill(launcher, folder / "metrics.jsonl", options, chance))
                print(f"kill {number} of {options.repeats}: {BENCH.tables['restart'].text(kills[-1])}", flush=True)
        finally:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait()
    row: dict[str, Any] = {"preset": options.preset, "ranks": options.ranks, "repeats": options.repeats}
    row |= {name: median(kill[name] for kill in kills) for name in kills[0]}
    row |= {"most_restart_seconds": max(kill["restart_seconds"] for kill in kills), "import_seconds": imports}
    BENCH.write(options.out, "restart", device, **row)


def _kill(
    launcher: subprocess.Popen, metrics: Path, options: RestartOptions, chance: random.Random
) -> dict[str, float]:
    """Kills one rank once the group has trained for a while, and times what follows."""

    def until(what: str, arrived: Callable[[], Any]) -> Any:
        end = time.monotonic() + _LIMIT_SECONDS
        while not (found := arrived()):
            if launcher.poll() is not None:
                raise RuntimeError(f"the run ended with exit code {launcher.returncode} while waiting for {what}")
            if time.monotonic() > end:
                raise RuntimeError(f"{what} did not come within {_LIMIT_SECONDS:.0f} s")
            time.sleep(0.02)
        return found

    def last_step() -> int:
        return max((int(row["step"]) for row in read_metrics(metrics)), default=0)

    def opened() -> int:
        return metrics.stat().st_ino if metrics.exists() else 0

    first = last_step()
    until("training", lambda: last_step() >= first + options.checkpoint_every + chance.randrange(10))
    before, file = last_step(), opened()
    old = ranks_of(launcher.pid)
    begin = time.monotonic()
    os.kill(chance.choice(sorted(old)), signal.SIGKILL)
    until("new ranks", lambda: len(ranks_of(launcher.pid) - old) == options.ranks)
    regrouped = time.monotonic()
    until("the log's opening", lambda: opened() != file)
    loaded, resumed = time.monotonic(), last_step()
    until("a step", lambda: last_step() > resumed)
    end = time.monotonic()
    return {
        "restart_seconds": end - begin,
        "regroup_seconds": regrouped - begin,
        "load_seconds": loaded - regrouped,
        "first_step_seconds": end - loaded,
        "lost_steps": before - resumed,
    }


def ranks_of(launcher: int) -> set[int]:
    """Process numbers of the ranks that torchrun, a process of that number, has started and that have not ended."""
    listed = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii")
    ranks = set()
    for number in map(int, listed.split()):
        try:
            if b"\0RANK=" in Path(f"/proc/{number}/environ").read_bytes():
                ranks.add(number)
        except OSError:  # it has just ended
            continue
    return ranks


def _import_seconds(processes: int) -> float:
    """Time in which so many processes at once have imported what a rank imports."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    started = [subprocess.Popen([sys.executable, "-c", _IMPORTS], env=environment) for _ in range(processes)]
    if any([process.wait() for process in started]):
        raise RuntimeError("the engine cannot be imported")
    return time.monotonic() - begin


BENCH = Bench(
    options=RestartOptions,
    main=main,
    quick=None,  # It starts two ranks, kills one and starts both again: 20 s for a single kill.
    tables={
        "restart": Table(
            key=("preset", "ranks"),
            columns={
                "preset": "{preset}",
                "ranks": "{ranks}",
                "kills": "{repeats}",
                "kill to next step, s": "{restart_seconds:.1f}",
                "longest, s": "{most_restart_seconds:.1f}",
                "new processes, s": "{regroup_seconds:.1f}",
                "imports to checkpoint, s": "{load_seconds:.1f}",
                "first step, s": "{first_step_seconds:.1f}",
                "steps lost": "{lost_steps:.0f}",
                "imports alone, s": "{import_seconds:.1f}",
            },
        ),
    },
)
