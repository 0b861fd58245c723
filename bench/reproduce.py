"""`remixmatch reproduce TABLE`: a table of the paper, from runs over methods or ablations, presets and seeds.

Each run is a cell (see `bench.cells`), so that a table can be interrupted, gone on with, and shared among GPUs,
machines and jobs of Slurm. Cells that say the most come first: one seed of everything before the second of anything.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid

from bench import tables
from bench.cells import STATES, UNHASHED, Cell, Status, Stop, forget_failures, read_json, status, work
from engine import cli
from engine.config import Config, changed_fields, check_data, open_data, resolve, validate
from engine.errors import Stopped, UserError
from engine.methods import ABLATIONS, METHODS, ablate, with_method
from engine.parsing import parse, show_usage
from engine.presets import PRESETS, PUBLISHED, Figure, command, preset
from pipelines.cache import set_data_dir

FULL = "remixmatch"
OUT = Path("runs") / "reproduce"
SAVE_SECONDS = 60  # that running cells get to save their step when a job's time is over
# by --steps-scale
SCALED = ("steps", "ramp_kimg", "eval_every", "log_every", "checkpoint_every", "ema_decay", "bn_momentum")
_NO_SEED = -1  # which no flag can be equal to

BASELINES = ("mixmatch", "fixmatch", "uda", "pseudo-label", "supervised")


@dataclass(frozen=True)
class Table:
    """What a table has.

    Attributes:
        text: what it is, in a line.
        presets: its columns.
        rows: methods, or ablations beside the full method; the full method first.
        seeds: by default.
        kind: what rows are names of.
    """

    text: str
    presets: tuple[str, ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    kind: Literal["method", "ablation"] = "method"


TABLES = {
    "cifar10": Table(
        "CIFAR-10 with 250, 1 000 and 4 000 labels, and baselines",
        ("cifar10-250", "cifar10-1000", "cifar10-4000"),
        (FULL, *BASELINES),
    ),
    "svhn": Table(
        "SVHN with 250, 1 000 and 4 000 labels, and baselines",
        ("svhn-250", "svhn-1000", "svhn-4000"),
        (FULL, *BASELINES),
    ),
    "stl10": Table("STL-10 with 1 000 labels, K = 4 and 1", ("stl10-1000", "stl10-1000-k1"), (FULL,)),
    "few-labels": Table(
        "CIFAR-10 and SVHN with 40 labels", ("cifar10-40", "svhn-40", "svhn-extra-40"), (FULL,)
    ),
    # the authors' scripts take split 3
    "ablation": Table(
        "ReMixMatch less one part at a time, CIFAR-10 with 250 labels",
        ("cifar10-250",),
        (FULL, *ABLATIONS),
        (3,),
        "ablation",
    ),
    "digits": Table(
        "scikit-learn's digits with 40 labels, and baselines", ("digits-40",), (FULL, *BASELINES), (0, 1, 2, 3, 4)
    ),
    "fashion": Table(
        "Fashion-MNIST at 16x16 with 100 labels, and baselines", ("fashion-100-small",), (FULL, *BASELINES)
    ),
}  # fmt: skip

_PAPER = "ReMixMatch (arXiv 1911.09785)"
# test errors in percent, by preset and row
FIGURES: dict[tuple[str, str], Figure] = {
    **{(name, FULL): figure for name, figure in PUBLISHED.items()},
    **{
        (f"{data}-{labels}", "mixmatch"): Figure(error, None, f"{_PAPER}, table 1")
        for data, errors in {"cifar10": (11.08, 7.75, 6.24), "svhn": (3.78, 3.27, 2.89)}.items()
        for labels, error in zip((250, 1000, 4000), errors, strict=True)
    },
}
# one split: the full method is not what it is over five
ABLATION_FIGURES: dict[tuple[str, str], Figure] = {
    ("cifar10-250", name): Figure(error, None, f"{_PAPER}, section 4.3")
    for name, error in {
        FULL: 5.94, "k=1": 7.32, "k=2": 6.74, "k=4": 6.21, "k=16": 5.93, "no-rotation": 6.08, "no-premixup": 6.66,
        "no-alignment": 7.28, "l2": 17.28, "no-strong": 12.51, "no-weak": 29.36,
    }.items()
}  # fmt: skip


@dataclass
class ReproduceOptions:
    """Trains the cells of a table that are not done, and writes table.md and table.json.

    Flags of `remixmatch train` after `--` change every cell, as in: remixmatch reproduce digits -- --width 8"""

    seeds: tuple[int, ...] = ()
    """Seeds, each a label split and initial weights; by default those of the table."""
    methods: tuple[str, ...] = ()
    """Rows: methods, or ablations in the table `ablation`; by default all of the table."""
    preset: tuple[str, ...] = ()
    """Presets, in place of the table's."""
    steps_scale: float = 1.0
    """For a rehearsal: times so many steps, with ramp, evaluations, checkpoints, log, and the steps over which the EMA
    and batch norm average; the title says so."""
    out: Path | None = None
    """Folder of the cells and the table; by default runs/reproduce/TABLE. May be shared by several machines."""
    data_dir: Path | None = None
    """Where prepared data sets lie; by default the variable REMIXMATCH_DATA, or ~/.cache/remixmatch."""
    workers: int = 0
    """Cells at a time, one a GPU; by default as many as there are GPUs, and 1 without any."""
    retry: bool = False
    """Try cells again that failed."""
    plan: bool = False
    """Print the cells in their order with predicted times, and run nothing."""
    status: bool = False
    """Print the state of every cell, and run nothing."""
    tables: bool = False
    """Write table.md and table.json from what is done, and run nothing."""
    rows: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Make the table from rows in these files, written by --collect, instead of folders; run nothing."""
    collect: Path | None = None
    """Add a row to this file for every cell that is done and not in it, and run nothing."""
    submit: Literal["no", "slurm", "local"] = "no"
    """Have submitit start --workers jobs of one worker each: on Slurm, or on this machine to try it out."""
    partition: str = ""
    """Of Slurm."""
    gpus: int = 1
    """GPUs of a job: 1, or 0 for cells on CPUs."""
    cpus: int = 8
    """CPU cores of a job."""
    hours: float = 24.0
    """Time limit of a job, which before it is over saves its step, queues itself again and goes on."""
    slurm: tuple[str, ...] = ()
    """Further parameters of Slurm, as in: --slurm account=abc qos=long"""


@dataclass(frozen=True)
class Entry:
    """A cell and its place in a table.

    Attributes:
        row: method or ablation.
        preset: column.
        seed: of the run.
        base: the configuration that the table has there, before --steps-scale and flags after `--`.
        cell: what is run.
    """

    row: str
    preset: str
    seed: int
    base: Config
    cell: Cell


def main(argv: Sequence[str], stop: Stop | None = None) -> None:
    """Entry point of `remixmatch reproduce`.

    Args:
        argv: the table, its flags, and after `--` those of all cells.
        stop: ends the work from elsewhere.

    Raises:
        UserError: a table, flag or cell that cannot work.
        Stopped: a signal came; what was running is saved.
    """
    if not argv or argv[0] in ("-h", "--help"):
        texts = {name: table.text for name, table in TABLES.items()}
        more = "remixmatch reproduce TABLE --help lists its flags."
        show_usage("reproduce TABLE [flags] [-- flags of train]", texts, more)
        if not argv:
            raise UserError("reproduce needs a table")
        return
    name, *rest = argv
    if name not in TABLES:
        raise UserError(f"reproduce takes one of {', '.join(TABLES)}; got '{name}'")
    here = rest.index("--") if "--" in rest else len(rest)
    own, flags = rest[:here], rest[here + 1 :]
    options: ReproduceOptions = parse(ReproduceOptions, f"reproduce {name}", own)
    check(options)
    set_data_dir(options.data_dir)
    entries = make_entries(TABLES[name], options, flags)
    if needs_data(entries):
        entries = with_data(entries)
    out = options.out or default_out(name, options)
    if options.plan:
        _print_plan(entries)
    elif options.rows:
        _write_tables(name, entries, out, collected(options.rows), options.steps_scale)
    elif options.status:
        show = _Progress(entries, 1, live=False)
        show.print_all([status(out, entry.cell) for entry in entries])
    elif options.collect:
        collect(entries, out, options.collect)
    elif options.tables:
        _write_tables(name, entries, out, look(out, entries), options.steps_scale)
    else:
        entries = with_data(entries)
        if options.submit != "no":
            if options.retry:
                forget_failures(out, [entry.cell for entry in entries])
            _submit(name, argv, options, out)
            return
        failed = train(entries, out, options, stop)
        # looked at anew: another worker may have ended since
        _write_tables(name, entries, out, look(out, entries), options.steps_scale)
        if failed:
            raise UserError(failed)


def check(options: ReproduceOptions) -> None:
    """Raises UserError where a flag cannot work."""
    from math import isfinite

    if not (isfinite(options.steps_scale) and options.steps_scale > 0):
        raise UserError(f"--steps-scale must be more than 0, got {options.steps_scale}")
    least = {"workers": 0, "gpus": 0, "cpus": 1}
    for flag, bound in least.items():
        if getattr(options, flag) < bound:
            raise UserError(f"--{flag} must be at least {bound}, got {getattr(options, flag)}")
    if options.gpus > 1:
        raise UserError(f"--gpus is 1, or 0 for cells on CPUs, since a cell trains on one GPU; got {options.gpus}")
    if not options.hours > 0:
        raise UserError(f"--hours must be more than 0, got {options.hours}")
    for flag in ("seeds", "methods", "preset"):
        given = getattr(options, flag)
        if len(set(given)) < len(given):
            raise UserError(f"--{flag} names one of them twice: {' '.join(map(str, given))}")
    for text in options.slurm:
        if not text.partition("=")[0] or "=" not in text:
            raise UserError(f"--slurm takes NAME=VALUE, got '{text}'")


def default_out(name: str, options: ReproduceOptions) -> Path:
    """Where a table's cells go: `runs/reproduce/TABLE`, with presets and scale where they are not the table's."""
    words = [name, *options.preset]
    if options.steps_scale != 1:
        words.append(f"steps{options.steps_scale:g}")
    return OUT / "-".join(words)


# Cells


def make_entries(table: Table, options: ReproduceOptions, flags: Sequence[str]) -> list[Entry]:
    """The cells of a table, in the order in which they are begun: seed by seed, the full method first.

    Args:
        table: what it has.
        options: which part of it.
        flags: of `remixmatch train`, for every cell.

    Raises:
        UserError: there is no such row; a cell's configuration cannot work; flags make two cells equal.
    """
    allowed = METHODS if table.kind == "method" else {FULL: {}, **ABLATIONS}
    rows = options.methods or table.rows
    for row in rows:
        if row not in allowed:
            raise UserError(f"--methods: there is no {table.kind} '{row}'; there are {', '.join(allowed)}")
    rows = tuple(sorted(rows, key=lambda row: row != FULL))
    entries = []
    for seed in options.seeds or table.seeds:
        for row in rows:
            for name in options.preset or table.presets:
                whole = dataclasses.replace(preset(name), seed=seed)
                base = whole
                if table.kind == "method":
                    base = with_method(whole, row)
                elif row != FULL:
                    base = ablate(whole, row)
                    if base == whole:  # K as the preset has it
                        continue
                unseeded = dataclasses.replace(base, seed=_NO_SEED)
                changed = dataclasses.replace(_with_flags(unseeded, tuple(flags)), seed=seed)
                config = scaled(changed, options.steps_scale)
                label = f"{name}-{row}-seed{seed}"
                try:
                    validate(config)
                except UserError as error:
                    raise UserError(f"{label}: {error}") from None
                entries.append(Entry(row, name, seed, base, Cell(label, config)))
    if not entries:
        raise UserError("no cell is left: every ablation given is how the preset is")
    _check_different(entries)
    return entries


def _check_different(entries: Sequence[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.cell.digest, entry)
        if other is not entry:
            raise UserError(
                f"{other.cell.label} and {entry.cell.label} are one configuration: leave out one of them, or the flag "
                "after -- that makes them equal"
            )


@functools.cache  # it takes as long for each seed
def _with_flags(config: Config, flags: tuple[str, ...]) -> Config:
    """A configuration, without its seed, with flags of `remixmatch train`.

    Raises:
        UserError: a flag that is not one of a cell's settings.
    """
    if not flags:
        return config
    default = cli.TrainOptions.of(config)
    options = parse(cli.TrainOptions, "reproduce TABLE --", list(flags), default=default)
    changed = options.config
    fixed = {"preset", "method", "seed"}
    known = {field.name for field in dataclasses.fields(Config)} - fixed
    for section, before in vars(default).items():
        values = vars(before) if dataclasses.is_dataclass(before) else {}
        for name, value in values.items():
            if name not in known and getattr(vars(options)[section], name) != value:
                raise UserError(f"--{name.replace('_', '-')} after -- is not a setting that all cells can share")
    return changed


def scaled(config: Config, scale: float) -> Config:
    """A configuration with so many times its steps, and with the ramp and all that happens every so many steps.

    There are as many evaluations as before, so that the median is over as many, and the EMA and the running statistics
    of batch norm reach back over the same share of the training: an EMA of 1 000 steps would still be its initial
    weights at the end of a short rehearsal. What a run of fewer steps would want of the learning rate is another
    question, and left alone.
    """
    if scale == 1:
        return config
    whole = {name: max(1, int(getattr(config, name) * scale)) for name in SCALED if name.endswith("every")}
    return dataclasses.replace(
        config,
        steps=max(1, round(config.steps * scale)),
        ramp_kimg=config.ramp_kimg * scale,
        # what is left of a weight after a given share of the steps stays the same
        ema_decay=config.ema_decay ** (1 / scale),
        bn_momentum=1 - (1 - config.bn_momentum) ** (1 / scale),
        **whole,  # type: ignore[arg-type]
    )


def needs_data(entries: Sequence[Entry]) -> bool:
    """Whether the data decide what a cell is."""
    return any(entry.cell.config.network == "auto" or entry.cell.config.max_shift < 0 for entry in entries)


def with_data(entries: Sequence[Entry]) -> list[Entry]:
    """The cells with what depends on their images.

    Raises:
        UserError: a data set is missing, or does not have what a cell asks for.
    """
    found = []
    for entry in entries:
        data = open_data(entry.cell.config.dataset)
        config = resolve(entry.cell.config, data)
        try:
            check_data(config, data)
        except UserError as error:
            raise UserError(f"{entry.cell.label}: {error}") from None
        found.append(dataclasses.replace(entry, cell=dataclasses.replace(entry.cell, config=config)))
    return found


# Running


def devices(entries: Sequence[Entry]) -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none if all cells are for CPUs."""
    if all(entry.cell.config.device == "cpu" for entry in entries):
        return []
    import torch

    count = torch.cuda.device_count()
    if count and "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number in range(count)]


def environments(workers: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Variables of each worker's processes: its GPU, or its share of the cores."""
    workers = workers or len(gpus) or 1
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(workers)]
    if "OMP_NUM_THREADS" in os.environ:
        return [{}] * workers
    return [{"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // workers, 1))}] * workers


def train(entries: Sequence[Entry], out: Path, options: ReproduceOptions, stop: Stop | None = None) -> str:
    """Trains the cells that are not done, and shows how far they are.

    Returns:
        What cannot be gone on with: how many cells failed; "" if none did.

    Raises:
        UserError: the folder cannot be written.
        Stopped: a signal came; what was running is saved.
    """
    from bench import records

    stop = stop or Stop()
    if options.retry:
        forget_failures(out, [entry.cell for entry in entries])
    own = environments(options.workers, devices(entries))
    try:
        with _Progress(entries, len(own)) as show:
            statuses = work(out, [entry.cell for entry in entries], own, records.commit(), stop, show)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out} ({error.strerror or error}); what was saved stays: mend that and "
            "give the same command again"
        ) from error
    if stop.number:
        counts = _counts(statuses)
        raise Stopped(f"{counts}; what was running is saved, the same command goes on with it", stop.number)
    failed = sum(each.state == "failed" for each in statuses)
    return f"{failed} of {len(statuses)} cells failed, for reasons above; --retry tries them again" if failed else ""


class _Job:
    """One worker, as a job of submitit's.

    Args:
        argv: of `main`.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)

    def __call__(self) -> None:
        self._stop = Stop()
        main(self._argv, self._stop)

    def checkpoint(self) -> Any:
        """Called by submitit, in the main thread, when the job's time is nearly over: what it queues again."""
        from submitit.helpers import DelayedSubmission

        self._stop.ask(signal.SIGTERM)
        deadline = time.monotonic() + SAVE_SECONDS
        while self._stop.children and time.monotonic() < deadline:
            time.sleep(0.1)
        return DelayedSubmission(_Job(self._argv))


def _submit(name: str, argv: Sequence[str], options: ReproduceOptions, out: Path) -> None:
    """Starts jobs of one worker each, and says how to watch them."""
    try:
        import submitit
    except ImportError:
        raise UserError("--submit needs submitit: pip install 'remixmatch-engine[slurm]'") from None
    here = argv.index("--") if "--" in argv else len(argv)
    # the last of two equal flags counts; failures were forgotten here, once for all jobs
    own = [*argv[:here], "--submit", "no", "--workers", "1", "--no-retry", "--out", str(out.resolve()), *argv[here:]]
    # a job that runs out of time is queued again, however often that takes
    endless = {f"{options.submit}_max_num_timeout": 10_000}
    executor = submitit.AutoExecutor(folder=out.resolve() / "jobs", cluster=options.submit, **endless)
    slurm: dict[str, Any] = {}
    if options.submit == "slurm":
        slurm = {
            "slurm_signal_delay_s": 2 * SAVE_SECONDS,
            "slurm_additional_parameters": dict(text.split("=", 1) for text in options.slurm),
        }
        if options.partition:
            slurm["slurm_partition"] = options.partition
    executor.update_parameters(
        name=f"remixmatch-{name}",
        timeout_min=max(1, round(options.hours * 60)),
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=options.gpus,
        cpus_per_task=options.cpus,
        **slurm,
    )
    try:
        jobs = executor.submit_array([_Job(own)] * max(options.workers, 1))
    except (OSError, subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"--submit {options.submit}: {' '.join(str(error).split())}") from None
    again = shlex.join(["remixmatch", "reproduce", *argv[:here], "--status", *argv[here:]])
    print(f"{len(jobs)} jobs: {', '.join(job.job_id for job in jobs)}; logs in {out / 'jobs'}; watch: {again}")


# What is shown


class _Progress:
    """The states of all cells: a table that changes on a terminal, a line for each change elsewhere.

    Args:
        entries: all cells.
        workers: of this process, for the time left.
        live: whether states will come again and again.
    """

    def __init__(self, entries: Sequence[Entry], workers: int, live: bool = True) -> None:
        self._entries, self._workers = entries, workers
        self._console = Console(soft_wrap=True)
        self._shown: Sequence[tuple[str, str]] = []
        self._live = Live(console=self._console, auto_refresh=False) if live and self._console.is_terminal else None

    def __enter__(self) -> _Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, statuses: Sequence[Status]) -> None:
        """Takes the states of all cells."""
        if self._live:
            self._live.update(self._grid(statuses), refresh=True)
            return
        states = [(each.state, each.reason) for each in statuses]
        for number, (entry, each) in enumerate(zip(self._entries, statuses, strict=True)):
            known = self._shown[number] if self._shown else ("waiting", "")
            if states[number] != known:
                words = f"{entry.cell.name}: {self._words(entry, each)}"
                print(f"[{_counts(statuses)}] {words}{self._left(statuses)}", flush=True)
        self._shown = states

    def print_all(self, statuses: Sequence[Status]) -> None:
        """Prints the state of every cell."""
        for entry, each in zip(self._entries, statuses, strict=True):
            print(f"{entry.cell.name}: {self._words(entry, each)}")
        print(f"{_counts(statuses)}{self._left(statuses)}")

    def _words(self, entry: Entry, each: Status) -> str:
        steps = entry.cell.config.steps
        if each.state == "done":
            median, last = (100 - each.summary[name] for name in ("median_last_20", "test_accuracy"))
            return f"done, error {median:.2f} % (median of last 20), {last:.2f} % (last)"
        where = f" on {each.host}" if each.host and each.state == "running" else ""
        step = f", step {each.step} of {steps}" if each.step else ""
        return f"{each.state}{where}{step}" + (f": {each.reason}" if each.reason else "")

    def _left(self, statuses: Sequence[Status]) -> str:
        seconds = time_left([entry.cell.config for entry in self._entries], statuses, self._workers)
        return "" if seconds is None or not seconds else f"; about {duration(seconds)} left"

    def _grid(self, statuses: Sequence[Status]) -> Grid:
        grid = Grid(title=f"{_counts(statuses)}{self._left(statuses)}")
        for name in ("cell", "state"):
            grid.add_column(name, overflow="fold")
        # as many as fit: what runs and what failed, then what comes next
        order = sorted(
            range(len(statuses)), key=lambda n: ("running", "failed", "waiting", "done").index(statuses[n].state)
        )
        room = max(self._console.height - 8, 4)
        for number in sorted(order[:room]):
            entry, each = self._entries[number], statuses[number]
            grid.add_row(escape(entry.cell.name), escape(self._words(entry, each)))
        if len(order) > room:
            grid.add_row(f"and {len(order) - room} more", "")
        return grid


def _counts(statuses: Sequence[Status]) -> str:
    found = [each.state for each in statuses]
    return ", ".join(f"{found.count(state)} {state}" for state in STATES if state in found)


def duration(seconds: float) -> str:
    """A time in words, such as 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def trained_rows(config: Config) -> int:
    """Rows that the network is trained on in a step; a term of weight 0 has none."""
    if not config.unlabeled:
        return config.batch
    parts = config.k + (config.anchor == "trained") + (config.w_u1 > 0) + (config.w_rot > 0)
    return config.batch * (1 + config.mu * parts)


def time_left(configs: Sequence[Config], statuses: Sequence[Status], workers: int) -> float | None:
    """Seconds until all cells are done, by those that are: a row trained takes as long as before; None without any.

    Args:
        configs: of the cells.
        statuses: theirs.
        workers: of this process; if more cells run, others are at work too.
    """
    seconds = work_done = left = 0.0
    for config, each in zip(configs, statuses, strict=True):
        rows = trained_rows(config)
        if each.state == "done":
            seconds += each.summary["train_seconds"]
            work_done += config.steps * rows
        elif each.state != "failed":
            left += max(config.steps - each.step, 0) * rows
    if not work_done:
        return None
    at_once = max(workers, sum(each.state == "running" for each in statuses))
    return seconds / work_done * left / at_once


def predicted_hours(config: Config, gpu: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Hours of training on a GPU, as predicted by `remixmatch bench count`, and not measured; evaluations come on top.

    The time of a step is taken as linear in the rows that it trains, as steep as between ReMixMatch's smallest and
    largest K, and from the nearest count of the method itself, where there is one. None where counts are of another
    network or size of image.

    Args:
        config: of a run.
        gpu: "h100" or "h200".
        rows: of the bench.
    """
    small = config.dataset.startswith(("cifar", "svhn")) or config.dataset == "fashion-mnist"  # 32x32
    if config.architecture != "WRN-28-2" or not small:
        return None
    known: dict[str, dict[int, float]] = {}  # milliseconds a step by method and trained rows; a newer row counts
    for row in rows:
        if row.get("bench") == "count" and row["preset"] == "cifar10-250" and f"predicted_ms_{gpu}" in row:
            counted = with_method(PRESETS[row["preset"]], row.get("method", FULL))
            counted = ablate(counted, row["ablate"]) if "ablate" in row else counted
            counted = dataclasses.replace(counted, k=row["k"], batch=row["batch"])
            known.setdefault(counted.method, {})[trained_rows(counted)] = row[f"predicted_ms_{gpu}"]
    full = known.get(FULL, {})
    if len(full) < 2:
        return None
    slope = (full[max(full)] - full[min(full)]) / (max(full) - min(full))
    trained, own = trained_rows(config), known.get(config.method, full)
    nearest = min(own, key=lambda counted: abs(counted - trained))
    milliseconds = own[nearest] + slope * (trained - nearest)
    return max(milliseconds, 0.0) * config.steps / 3.6e6


def _print_plan(entries: Sequence[Entry]) -> None:
    from bench import records

    rows = records.read(records.RESULTS / "count.jsonl")
    total, unknown = 0.0, 0
    for entry in entries:
        config = entry.cell.config
        hours = predicted_hours(config, "h100", rows)
        total += hours or 0.0
        unknown += hours is None
        words = f"{hours:.2f} H100 hours" if hours is not None else "no prediction"
        print(f"{entry.cell.name}: {config.steps:,} steps of {trained_rows(config):,} rows, {words}")
    print(
        f"{len(entries)} cells; {total:.1f} H100 hours, predicted from `remixmatch bench count`, not measured, without "
        f"evaluations" + (f"; no prediction for {unknown} of them" if unknown else "")
    )


# Results


def look(out: Path, entries: Sequence[Entry]) -> dict[str, Status]:
    """What is known of each cell, by its digest."""
    return {entry.cell.digest: status(out, entry.cell) for entry in entries}


def title(name: str, entries: Sequence[Entry], scale: float = 1.0) -> str:
    """What a table shows, and whatever keeps it from being the paper's.

    Args:
        name: of the table.
        entries: its cells.
        scale: of the steps.
    """
    words = [f"{name}: test error in percent"]
    fewer = sorted({(each.cell.config.steps, each.base.steps) for each in entries})
    fewer = [(steps, whole) for steps, whole in fewer if steps != whole]
    if fewer:
        counts = ", ".join(f"{steps:,} steps instead of {whole:,}" for steps, whole in fewer)
        rehearsal = all(steps < whole for steps, whole in fewer)
        words.append(f"{'REHEARSAL with ' if rehearsal else ''}{counts}")
    changed: dict[str, None] = {}
    for each in entries:
        known = UNHASHED | ({"steps"} if scale == 1 else set(SCALED))
        for text in changed_fields(each.base, each.cell.config):
            if text.split()[0] not in known:
                changed[text.split()[0] + " " + text.rpartition(" -> ")[2]] = None
    if changed:
        words.append(f"other settings than the presets': {', '.join(changed)}")
    return "; ".join(words)


def _write_tables(name: str, entries: Sequence[Entry], out: Path, found: Mapping[str, Status], scale: float) -> None:
    """Writes table.md and table.json, and prints the table."""
    lines = make_lines(name, entries, found)
    states = [(entry, found.get(entry.cell.digest, Status("waiting"))) for entry in entries]
    notes = [
        f"Not in the table: {entry.cell.name}, {each.state}" + (f": {each.reason}" if each.reason else "")
        for entry, each in states
        if each.state != "done"
    ]
    done = [each for _, each in states if each.state == "done"]
    if done:
        places = dict.fromkeys(str(each.summary.get("device")) for each in done)
        torches = dict.fromkeys(str(each.summary.get("versions", {}).get("torch")) for each in done)
        commits = dict.fromkeys(each.commit or "unknown" for each in done)
        notes.append(f"Trained on {'; '.join(places)}; torch {', '.join(torches)}; commit {', '.join(commits)}.")
    head = title(name, entries, scale)
    text = tables.markdown(head, lines, FULL, notes)
    content = {
        "table": name,
        "title": head,
        "lines": tables.to_json(lines),
        "cells": [_cell_json(entry, found.get(entry.cell.digest, Status("waiting")), out) for entry in entries],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / "table.md", text)
        _replace(out / "table.json", json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out} ({error.strerror or error})") from error
    print(text, end="")
    print(f"\n{out / 'table.md'}, {out / 'table.json'}")


def _replace(path: Path, text: str) -> None:
    """Replaces a file as a whole, which several workers may do at once."""
    partial = path.with_name(f".{path.name}-{socket.gethostname()}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def make_lines(name: str, entries: Sequence[Entry], found: Mapping[str, Status]) -> list[tables.Line]:
    """The rows of a table, preset by preset, from what is done.

    Args:
        name: of the table.
        entries: its cells.
        found: states by the digest of a cell.
    """
    runs: dict[tuple[str, str], dict[int, tables.Run]] = {}
    wanted: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        place = entry.preset, entry.row
        wanted.setdefault(place, []).append(entry.seed)
        done = runs.setdefault(place, {})
        each = found.get(entry.cell.digest)
        if each and each.state == "done":
            median, last = (100 - each.summary[key] for key in ("median_last_20", "test_accuracy"))
            done[entry.seed] = tables.Run(
                median, last, each.summary["steps"], entry.cell.config.split, _seconds(each.summary)
            )
    ablation = TABLES[name].kind == "ablation"
    figures = ABLATION_FIGURES if ablation else FIGURES
    return [
        tables.line(
            row,
            preset_name,
            sorted(wanted[preset_name, row]),
            runs[preset_name, row],
            runs.get((preset_name, FULL)) if row != FULL else None,
            figures.get((preset_name, row)),
            papers_difference(row, preset(preset_name).k) if ablation else None,
        )
        for preset_name in dict.fromkeys(entry.preset for entry in entries)
        for row in dict.fromkeys(entry.row for entry in entries if entry.preset == preset_name)
    ]


def papers_difference(row: str, k: int) -> float | None:
    """How much an ablation adds to the paper's error, in points; None where the paper does not say.

    Args:
        row: its name.
        k: K of the full method that it is compared with: the paper has other ablations at K = 8 alone.
    """
    errors = {name: figure.error for (_, name), figure in ABLATION_FIGURES.items()}
    errors["k=8"] = errors[FULL]
    beside = f"k={k}" if row.startswith("k=") else FULL
    return errors[row] - errors[beside] if row != FULL and row in errors and beside in errors else None


def _seconds(summary: Mapping[str, Any]) -> float | None:
    """Of training: the CPU's time where it trained; None in rows of earlier versions, which say the clock's alone."""
    return summary.get("cpu_seconds") if summary["device"].startswith("CPU") else summary["train_seconds"]


def _cell_json(entry: Entry, each: Status, out: Path) -> dict[str, Any]:
    split = read_json(out / entry.cell.name / "split.json")
    return {
        "row": entry.row,
        "preset": entry.preset,
        "seed": entry.seed,
        "cell": entry.cell.name,
        "state": each.state,
        "reason": each.reason,
        "host": each.host,
        "commit": each.commit or "unknown",
        "split_sha256": split.get("sha256"),
        "summary": dict(each.summary),
        "config": dataclasses.asdict(entry.cell.config),
    }


def collect(entries: Sequence[Entry], out: Path, path: Path) -> None:
    """Adds a row for every cell that is done and has none.

    Args:
        entries: the cells.
        out: their folder.
        path: of the rows.
    """
    from bench import records

    known = {row.get("cell") for row in records.read(path)}
    count = 0
    for entry in entries:
        each = status(out, entry.cell)
        if each.state != "done" or entry.cell.digest in known:
            continue
        config, when = entry.cell.config, (out / entry.cell.name / "summary.json").stat().st_mtime
        records.append(path, {
            "bench": "reproduce",
            "row": entry.row,
            "preset": entry.preset,
            "seed": entry.seed,
            **{name: each.summary[name] for name in ("steps", "test_accuracy", "median_last_20", "train_seconds")},
            "cpu_seconds": each.summary.get("cpu_seconds"),
            "cell": entry.cell.digest,
            "changes": {
                name: value
                for name, value in dataclasses.asdict(config).items()
                if value != getattr(PRESETS[entry.preset], name)
            },
            "device": each.summary["device"],
            "versions": each.summary["versions"],
            "commit": each.commit or "unknown",
            "command": shlex.join(["remixmatch", *command(config)]),
            "date": datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d"),
        })  # fmt: skip
        count += 1
    print(f"{path}: {count} rows added")


def collected(paths: Sequence[Path]) -> dict[str, Status]:
    """Cells that are done, by their digest, from rows that --collect wrote; a later row counts.

    Raises:
        UserError: a file is missing or has other rows.
    """
    from bench import records

    found = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"--from {path}: there is no such file")
        try:
            for row in records.read(path):
                if row["bench"] == "reproduce":
                    found[row["cell"]] = Status("done", row["steps"], row, commit=row["commit"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--from {path} has rows that --collect has not written ({error!r})") from None
    return found
