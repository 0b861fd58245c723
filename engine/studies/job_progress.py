"""Progress of a table's jobs: status, time left from the finished ones, and predicted GPU hours."""

from __future__ import annotations

import dataclasses
import heapq
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid

from engine.config.config import Config
from engine.config.methods import ablate, with_method
from engine.config.presets import PRESETS
from engine.config.scaling import trained_samples
from engine.runs.headline import evaluations_of, shown_results
from engine.runs.progress import duration
from engine.studies.jobs import STATES, Status
from engine.studies.paper_tables import REMIXMATCH, Entry


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


class Progress:
    """Display of the status of all jobs: a live table on a terminal, otherwise a line per change.

    Args:
        entries: All jobs.
        workers: Number of workers of this process, to estimate the time left.
        live: Whether the display will be updated.
    """

    def __init__(self, entries: Sequence[Entry], workers: int, live: bool = True) -> None:
        self._entries, self._workers = entries, workers
        self._console = Console(soft_wrap=True)
        self._shown: Sequence[tuple[str, str]] = []
        self._statuses: Sequence[Status] = [Status("waiting")] * len(entries)
        live = live and self._console.is_interactive and self._console.file.isatty()
        self._live = Live(console=self._console, auto_refresh=False) if live else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            # The table has only the beginning of their reasons.
            for entry, each in self._pairs(self._statuses):
                if each.state == "failed":
                    print(f"{entry.job.name}: {self._words(entry, each)}")

    def __call__(self, statuses: Sequence[Status]) -> None:
        """Show the status of all jobs."""
        self._statuses = statuses
        if self._live:
            self._live.update(self._grid(statuses), refresh=True)
            return
        states = [(each.state, each.reason) for each in statuses]
        for number, (entry, each) in enumerate(self._pairs(statuses)):
            known = self._shown[number] if self._shown else ("waiting", "")
            if states[number] != known:
                words = f"{entry.job.name}: {self._words(entry, each)}"
                print(f"[{counts(statuses)}] {words}{self._left(statuses)}", flush=True)
        self._shown = states

    def print_all(self, statuses: Sequence[Status]) -> None:
        """Print the status of every job."""
        for entry, each in self._pairs(statuses):
            print(f"{entry.job.name}: {self._words(entry, each)}")
        print(f"{counts(statuses)}{self._left(statuses)}")

    def _pairs(self, statuses: Sequence[Status]) -> list[tuple[Entry, Status]]:
        return list(zip(self._entries, statuses, strict=True))

    def _words(self, entry: Entry, each: Status) -> str:
        steps = entry.job.config.steps
        if each.state == "done":
            middle, last = (100 - each.summary[name] for name in ("median_last_20", "test_accuracy"))
            return f"done, error {shown_results(evaluations_of(each.summary, entry.job.config), last, middle)}"
        where = f" on {each.host}" if each.host and each.state == "running" else ""
        step = f", step {each.step} of {steps}" if each.step else ""
        return f"{each.state}{where}{step}" + (f": {each.reason}" if each.reason else "")

    def _left(self, statuses: Sequence[Status]) -> str:
        seconds = time_left([entry.job.config for entry in self._entries], statuses, self._workers)
        return "" if seconds is None or not seconds else f"; about {duration(seconds)} left"

    def _grid(self, statuses: Sequence[Status]) -> Grid:
        """Return a table with one line per job, also at 80 columns."""
        grid = Grid(title=f"{counts(statuses)}{self._left(statuses)}", box=SIMPLE_HEAD)
        # The reason of a failure is cut first.
        longest = max(len(entry.job.label) for entry in self._entries)
        grid.add_column("job", no_wrap=True, min_width=min(longest, self._console.width // 2))
        grid.add_column("status", no_wrap=True)
        # As many as fit: running and failed jobs first, then the next ones.
        order = sorted(
            range(len(statuses)), key=lambda n: ("running", "failed", "waiting", "done").index(statuses[n].state)
        )
        room = max(self._console.height - 8, 4)
        for number in sorted(order[:room]):
            entry, each = self._entries[number], statuses[number]
            grid.add_row(escape(entry.job.label), escape(_short(entry, each)))
        if len(order) > room:
            grid.add_row(f"and {len(order) - room} more", "")
        return grid


def _short(entry: Entry, each: Status) -> str:
    """Return the status of a job for a narrow column: the error that comes first, or the reason of a failure."""
    if each.state == "done":
        medians = evaluations_of(each.summary, entry.job.config).median_first
        return f"done, error {100 - each.summary['median_last_20' if medians else 'test_accuracy']:.2f} %"
    if each.reason:
        return f"{each.state}: {each.reason}"
    step = f", step {each.step}/{entry.job.config.steps}" if each.step else ""
    elsewhere = each.state == "running" and each.host and each.host != socket.gethostname()
    return f"{each.state}{step}" + (f" on {each.host}" if elsewhere else "")


def counts(statuses: Sequence[Status]) -> str:
    """Return the number of jobs in each state, in words."""
    found = [each.state for each in statuses]
    return ", ".join(f"{found.count(state)} {state}" for state in STATES if state in found)


def time_left(configs: Sequence[Config], statuses: Sequence[Status], workers: int) -> float | None:
    """Estimate the seconds until all jobs are done from the time per sample; None if it is unknown.

    The time per sample is that of the finished jobs, or before any is finished, that of the running jobs' last steps.

    Args:
        configs: Configurations of the jobs.
        statuses: Their status.
        workers: Number of workers of this process. If more jobs are running, other processes are working on them.
    """
    seconds = work_done = left = 0.0
    running_seconds = running_work = 0.0
    for config, each in zip(configs, statuses, strict=True):
        rows = trained_samples(config)
        if each.state == "done":
            seconds += each.summary["train_seconds"]
            work_done += config.steps * rows
        elif each.state != "failed":
            if each.step_ms:
                running_seconds += each.step_ms / 1000
                running_work += rows
            left += max(config.steps - each.step, 0) * rows
    if not work_done:
        seconds, work_done = running_seconds, running_work
    if not work_done:
        return None
    at_once = max(workers, sum(each.state == "running" for each in statuses))
    return seconds / work_done * left / at_once


def predicted_hours(config: Config, gpu: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the training hours on a GPU that `remixmatch bench count` predicts, without evaluations.

    The step time is assumed to be linear in the number of trained samples. The slope is that between ReMixMatch's
    smallest and largest K, and the line passes through the nearest count of the same method, if there is one. Return
    None if the network or image size differs from that of the counts.

    Args:
        config: Configuration of the run.
        gpu: "h100" or "h200".
        rows: Records of the bench.
    """
    small = config.dataset.startswith(("cifar", "svhn")) or config.dataset == "fashion-mnist"  # 32x32
    if config.architecture != "WRN-28-2" or not small:
        return None
    known: dict[str, dict[int, float]] = {}  # Milliseconds per step by method and samples; later records win.
    for row in rows:
        if row.get("bench") != "count" or "convolutions" in row:  # Only the fused step names them.
            continue
        if row["preset"] == "cifar10-250" and f"predicted_ms_{gpu}" in row:
            counted = with_method(PRESETS[row["preset"]], row.get("method", REMIXMATCH))
            counted = ablate(counted, row["ablate"]) if "ablate" in row else counted
            counted = dataclasses.replace(counted, k=row["k"], batch=row["batch"])
            known.setdefault(counted.method, {})[trained_samples(counted)] = row[f"predicted_ms_{gpu}"]
    full = known.get(REMIXMATCH, {})
    if len(full) < 2:
        return None
    slope = (full[max(full)] - full[min(full)]) / (max(full) - min(full))
    trained, own = trained_samples(config), known.get(config.method, full)
    nearest = min(own, key=lambda counted: abs(counted - trained))
    milliseconds = own[nearest] + slope * (trained - nearest)
    return max(milliseconds, 0.0) * config.steps / 3.6e6


WORKERS = (1, 2, 4, 8)  # in the plan, unless their number is given


def wall_hours(hours: Sequence[float], workers: int) -> float:
    """Return the hours until all jobs are done if each of `workers` takes the next job when it is free."""
    free = [0.0] * workers
    for each in hours:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def print_plan(entries: Sequence[Entry], workers: int = 0) -> None:
    """Print the jobs in order, with their predicted times, subtotals, and wall-clock times.

    Args:
        entries: The jobs.
        workers: Number of jobs at a time; 0 for several numbers.
    """
    from engine.measuring import records

    rows = records.read(records.RESULTS / "count.jsonl")
    known: list[float] = []
    subtotals: dict[str, list[float | None]] = {}
    for entry in entries:
        config = entry.job.config
        hours = predicted_hours(config, "h100", rows)
        known += [] if hours is None else [hours]
        for group in (entry.preset, entry.row):
            subtotals.setdefault(group, []).append(hours)
        words = f"{hours:.2f} H100 hours" if hours is not None else "no prediction"
        print(f"{entry.job.name}: {config.steps:,} steps of {trained_samples(config):,} samples, {words}")
    presets = dict.fromkeys(entry.preset for entry in entries)
    for kind, groups in (("preset", presets), ("row", dict.fromkeys(entry.row for entry in entries))):
        for group in groups if len(groups) > 1 else ():
            found = subtotals[group]
            print(f"{kind} {group}: {_jobs(len(found))}, {_total(found)}")
    for number in (workers,) if workers else WORKERS:
        if known:
            print(f"{number} at a time (--workers {number}): {wall_hours(known, number):.1f} hours of wall-clock time")
    unknown = len(entries) - len(known)
    if not known:
        print(f"{_jobs(len(entries))}; no prediction, since `remixmatch bench count` has not counted these presets")
        return
    print(
        f"{_jobs(len(entries))}; {sum(known):.1f} H100 hours without evaluations, predicted from `remixmatch bench "
        "count` and not measured" + (f"; no prediction for {unknown} of them" if unknown else "")
    )


def _total(hours: Sequence[float | None]) -> str:
    """Return the sum of the predicted times in words."""
    known = [each for each in hours if each is not None]
    return f"{sum(known):.1f} H100 hours" if known else "no prediction"
