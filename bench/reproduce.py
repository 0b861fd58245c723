"""`remixmatch reproduce TABLE`: a table of the paper, from runs over methods or ablations, presets and seeds.

Each run is a cell (see `bench.cells`), so that a table can be interrupted, gone on with, and shared among GPUs, machines
and jobs of Slurm. Cells that say the most come first: one seed of everything before the second of anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table as Grid

from bench import tables
from bench.cells import STATES, Cell, Status, Stop, forget_failures, read_json, status, work
from engine import cli
from engine.config import Config, changed_fields, check_data, open_data, resolve, validate
from engine.errors import Stopped, UserError
from engine.folder import write_text
from engine.methods import ABLATIONS, METHODS, ablate, with_method
from engine.parsing import parse, show_usage
from engine.presets import PRESETS, PUBLISHED, Figure, command, preset
from pipelines.cache import set_data_dir

FULL = "remixmatch"
OUT = Path("runs") / "reproduce"
SCALED = ("steps", "ramp_kimg", "eval_every", "log_every", "checkpoint_every")  # by --steps-scale

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
    "digits": Table("scikit-learn's digits with 40 labels, and baselines", ("digits-40",), (FULL, *BASELINES), (0, 1, 2, 3, 4)),
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
    """For a rehearsal: times so many steps, with ramp, evaluations, checkpoints and log; the title says so."""
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


def main(argv: Sequence[str]) -> None:
    """Entry point of `remixmatch reproduce`.

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
    _check(options)
    set_data_dir(options.data_dir)
    entries = make_entries(TABLES[name], options, flags)
    out = options.out or default_out(name, options)
    if options.plan:
        _print_plan(entries)
    elif options.rows:
        _write_tables(name, entries, out, collected(options.rows), options.steps_scale)
    elif options.status:
        show = _Progress(entries, 1, live=False)
        show.print_all([status(out, entry.cell) for entry in entries])
    elif options.collect:
        _collect(entries, out, options.collect)
    elif options.tables:
        _write_tables(name, entries, out, _look(out, entries), options.steps_scale)
    else:
        entries = _with_data(entries)
        if options.retry:
            forget_failures(out, [entry.cell for entry in entries])
        if options.submit != "no":
            _submit(name, argv, options, out)
        else:
            _run(name, entries, out, options)


def _check(options: ReproduceOptions) -> None:
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
                config = scaled(_with_flags(base, flags), options.steps_scale)
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


def _with_flags(config: Config, flags: Sequence[str]) -> Config:
    """A configuration with flags of `remixmatch train`.

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

    There are as many evaluations as before, so that the median is over as many. Nothing else changes: what a run of
    fewer steps would want of the learning rate or the EMA is another question.
    """
    if scale == 1:
        return config
    whole = {name: max(1, int(getattr(config, name) * scale)) for name in SCALED if name.endswith("every")}
    steps = max(1, round(config.steps * scale))
    return dataclasses.replace(config, steps=steps, ramp_kimg=config.ramp_kimg * scale, **whole)  # type: ignore[arg-type]


def _with_data(entries: Sequence[Entry]) -> list[Entry]:
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
    """GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them; none if cells are for CPUs."""
    if all(entry.cell.config.device == "cpu" for entry in entries):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def environments(workers: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Variables of each worker's processes: its GPU, or its share of the cores."""
    workers = workers or len(gpus) or 1
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(workers)]
    if "OMP_NUM_THREADS" in os.environ:
        return [{}] * workers
    return [{"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // workers, 1))}] * workers


def _run(name: str, entries: Sequence[Entry], out: Path, options: ReproduceOptions, stop: Stop | None = None) -> None:
    from bench import records

    stop = stop or Stop()
    own = environments(options.workers, devices(entries))
    try:
        with _Progress(entries, len(own)) as show:
            statuses = work(out, [entry.cell for entry in entries], own, records.commit(), stop, show)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out} ({error.strerror or error}); what was saved stays: mend that and give "
            "the same command again"
        ) from error
    counts = _counts(statuses)
    if stop.number:
        raise Stopped(f"{counts}; what was running is saved, the same command goes on with it", stop.number)
    found = {entry.cell.digest: each for entry, each in zip(entries, statuses, strict=True)}
    _write_tables(name, entries, out, found, options.steps_scale)
    failed = sum(each.state == "failed" for each in statuses)
    if failed:
        raise UserError(f"{failed} of {len(statuses)} cells failed, for reasons above; --retry tries them again")


class _Job:
    """One worker, as a job of submitit's: called there, and asked to save when its time is nearly over."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)

    def __call__(self) -> None:
        main(self._argv)

    def checkpoint(self) -> Any:
        """Called by submitit on its signal, in the main thread; the children save when this process ends."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _submit(name: str, argv: Sequence[str], options: ReproduceOptions, out: Path) -> None:
    """Starts jobs of one worker each, and says how to watch them."""
    try:
        import submitit
    except ImportError:
        raise UserError("--submit needs submitit: pip install 'remixmatch-engine[slurm]'") from None
    here = argv.index("--") if "--" in argv else len(argv)
    # the last of two equal flags counts
    own = [*argv[:here], "--submit", "no", "--workers", "1", "--no-retry", "--out", str(out.resolve()), *argv[here:]]
    executor = submitit.AutoExecutor(folder=out / "jobs", cluster=options.submit)
    extra: dict[str, Any] = {}
    if options.submit == "slurm":
        if options.partition:
            extra["slurm_partition"] = options.partition
        extra["slurm_additional_parameters"] = dict(text.split("=", 1) for text in options.slurm)
    executor.update_parameters(
        name=f"remixmatch-{name}",
        timeout_min=max(1, round(options.hours * 60)),
        gpus_per_node=options.gpus,
        cpus_per_task=options.cpus,
        tasks_per_node=1,
        nodes=1,
        **extra,
    )
    jobs = executor.map_array(_Job.__call__, [_Job(own)] * max(options.workers, 1))
    again = shlex.join(["remixmatch", "reproduce", *argv[:here], "--status", *argv[here:]])
    print(f"{len(jobs)} jobs submitted ({', '.join(job.job_id for job in jobs)}), their logs in {out / 'jobs'}; watch: {again}")
