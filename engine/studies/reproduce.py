"""`remixmatch reproduce TABLE`: a table of the paper, from runs over methods or ablations, presets and seeds.

Each run is a job (see `engine.studies.jobs`), so that a table can be interrupted, gone on with, and shared among GPUs,
machines and jobs of Slurm.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from engine.commands.parsing import parse, usage_is_all
from engine.errors import Stopped, UserError, cannot_write, unknown
from engine.studies.job_progress import Progress, counts, print_plan
from engine.studies.jobs import Stop, forget_failures, status, work
from engine.studies.paper_tables import TABLES, Entry, make_entries, needs_data, with_data
from engine.studies.table_results import collect, collected, read_statuses, write_tables
from pipelines.cache import set_data_dir

OUT = Path("runs") / "reproduce"
SAVE_SECONDS = 60  # that running jobs get to save their step when a job's time is over


@dataclass(frozen=True)
class JobOptions:
    """How jobs are trained."""

    steps_scale: float = 1.0
    """For a rehearsal: times so many steps, with ramp, evaluations, checkpoints, log, and the steps over which the EMA
    and batch norm average; the title says so."""
    data_dir: Path | None = None
    """Where prepared data sets lie; by default the variable REMIXMATCH_DATA, or ~/.cache/remixmatch."""
    workers: int = 0
    """Cells at a time, one a GPU; by default as many as there are GPUs, and 1 without any."""
    retry: bool = False
    """Try jobs again that failed."""

    def check(self) -> None:
        """Raise UserError where a flag cannot work."""
        if not (isfinite(self.steps_scale) and self.steps_scale > 0):
            raise UserError(f"--steps-scale must be more than 0, got {self.steps_scale}")
        if self.workers < 0:
            raise UserError(f"--workers must be at least 0, got {self.workers}")

    def scaled(self, name: str) -> str:
        """The name of a folder of jobs, which says how they are scaled."""
        return name if self.steps_scale == 1 else f"{name}-steps{self.steps_scale:g}"


@dataclass
class ReproduceOptions:
    """Trains the jobs of a table that are not done, and writes table.md and table.json.

    Flags of `remixmatch train` after `--` change every job, as in: remixmatch reproduce digits -- --width 8"""

    seeds: tuple[int, ...] = ()
    """Seeds, each a label split and initial weights; by default those of the table."""
    methods: tuple[str, ...] = ()
    """Rows: methods, or ablations in the table `ablation`; by default all of the table."""
    preset: tuple[str, ...] = ()
    """Presets, in place of the table's."""
    out: Path | None = None
    """Folder of the jobs and the table; by default runs/reproduce/TABLE. May be shared by several machines."""
    plan: bool = False
    """Print the jobs in their order with predicted times, and run nothing."""
    status: bool = False
    """Print the state of every job, and run nothing."""
    tables: bool = False
    """Write table.md and table.json from what is done, and run nothing."""
    rows: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Make the table from rows in these files, written by --collect, instead of folders; run nothing."""
    collect: Path | None = None
    """Add a row to this file for every job that is done and not in it, and run nothing."""
    submit: Literal["no", "slurm", "local"] = "no"
    """Have submitit start --workers jobs of one worker each: on Slurm, or on this machine to try it out."""
    partition: str = ""
    """Of Slurm."""
    gpus: int = 1
    """GPUs of a job: 1, or 0 for jobs on CPUs."""
    cpus: int = 8
    """CPU cores of a job."""
    hours: float = 24.0
    """Time limit of a job, which before it is over saves its step, queues itself again and goes on."""
    slurm: tuple[str, ...] = ()
    """Further parameters of Slurm, as in: --slurm account=abc qos=long"""
    training: JobOptions = field(default_factory=JobOptions)


def main(argv: Sequence[str], stop: Stop | None = None) -> None:
    """Entry point of `remixmatch reproduce`.

    Args:
        argv: the table, its flags, and after `--` those of all jobs.
        stop: ends the work from elsewhere.

    Raises:
        UserError: a table, flag or job that cannot work.
        Stopped: a signal came; what was running is saved.
    """
    texts = {name: table.text for name, table in TABLES.items()}
    more = "remixmatch reproduce TABLE --help lists its flags."
    if usage_is_all(argv, "table", "reproduce TABLE [flags] [-- flags of train]", texts, more):
        return
    name, *rest = argv
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    here = rest.index("--") if "--" in rest else len(rest)
    own, flags = rest[:here], rest[here + 1 :]
    options: ReproduceOptions = parse(ReproduceOptions, f"reproduce {name}", own)
    check(options)
    set_data_dir(options.training.data_dir)
    scale = options.training.steps_scale
    entries = make_entries(TABLES[name], flags, options.seeds, options.methods, options.preset, scale)
    if needs_data(entries):
        entries = with_data(entries)
    out = options.out or default_out(name, options)
    if options.plan:
        print_plan(entries)
    elif options.rows:
        write_tables(name, entries, out, collected(options.rows), scale)
    elif options.status:
        show = Progress(entries, 1, live=False)
        show.print_all([status(out, entry.job) for entry in entries])
    elif options.collect:
        collect(entries, out, options.collect)
    elif options.tables:
        write_tables(name, entries, out, read_statuses(out, entries), scale)
    else:
        entries = with_data(entries)
        if options.submit != "no":
            if options.training.retry:
                forget_failures(out, [entry.job for entry in entries])
            _submit(name, argv, entries, options, out)
            return
        failed = train(entries, out, options.training, stop)
        # looked at anew: another worker may have ended since
        write_tables(name, entries, out, read_statuses(out, entries), scale)
        if failed:
            raise UserError(failed)


def check(options: ReproduceOptions) -> None:
    """Raises UserError where a flag cannot work."""
    options.training.check()
    for flag, bound in {"gpus": 0, "cpus": 1}.items():
        if getattr(options, flag) < bound:
            raise UserError(f"--{flag} must be at least {bound}, got {getattr(options, flag)}")
    if options.gpus > 1:
        raise UserError(f"--gpus is 1, or 0 for jobs on CPUs, since a job trains on one GPU; got {options.gpus}")
    if not options.hours > 0:
        raise UserError(f"--hours must be more than 0, got {options.hours}")
    for flag in ("seeds", "methods", "preset"):
        check_different(flag, getattr(options, flag))
    for text in options.slurm:
        if not text.partition("=")[0] or "=" not in text:
            raise UserError(f"--slurm takes NAME=VALUE, got '{text}'")


def check_different(flag: str, given: Sequence[object]) -> None:
    """Raise UserError where a flag names something twice."""
    if len(set(given)) < len(given):
        raise UserError(f"--{flag} names one of them twice: {' '.join(map(str, given))}")


def default_out(name: str, options: ReproduceOptions) -> Path:
    """Where a table's jobs go: `runs/reproduce/TABLE`, with presets and scale where they are not the table's."""
    return OUT / options.training.scaled("-".join([name, *options.preset]))


# Running


def devices(entries: Sequence[Entry]) -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none if all jobs are for CPUs."""
    if all(entry.job.config.device == "cpu" for entry in entries):
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
        return [{} for _ in range(workers)]
    threads = str(max(len(os.sched_getaffinity(0)) // workers, 1))
    return [{"OMP_NUM_THREADS": threads} for _ in range(workers)]


def train(entries: Sequence[Entry], out: Path, options: JobOptions, stop: Stop | None = None) -> str:
    """Trains the jobs that are not done, and shows how far they are.

    Returns:
        What cannot be gone on with: how many jobs failed; "" if none did.

    Raises:
        UserError: the folder cannot be written.
        Stopped: a signal came; what was running is saved.
    """
    from engine.measuring import records

    stop = stop or Stop()
    if options.retry:
        forget_failures(out, [entry.job for entry in entries])
    own = environments(options.workers, devices(entries))
    try:
        with Progress(entries, len(own)) as show:
            statuses = work(out, [entry.job for entry in entries], own, records.commit(), stop, show)
    except OSError as error:
        advice = "what was saved stays: mend that and give the same command again"
        raise cannot_write(out, error, advice) from error
    if stop.number:
        raise Stopped(f"{counts(statuses)}; what was running is saved, the same command goes on with it", stop.number)
    failed = sum(each.state == "failed" for each in statuses)
    return f"{failed} of {len(statuses)} jobs failed, for reasons above; --retry tries them again" if failed else ""


class _Job:
    """One worker, as a job of submitit's.

    Args:
        argv: of `main`.
        environment: variables that it has beside those of its machine.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._argv, self._environment = list(argv), dict(environment)

    def __call__(self) -> None:
        os.environ.update(self._environment)
        self._stop = Stop()
        main(self._argv, self._stop)

    def checkpoint(self) -> Any:
        """Called by submitit, in the main thread, when the job's time is nearly over: what it queues again."""
        from submitit.helpers import DelayedSubmission

        self._stop.ask(signal.SIGTERM)
        deadline = time.monotonic() + SAVE_SECONDS
        while self._stop.children and time.monotonic() < deadline:
            time.sleep(0.1)
        return DelayedSubmission(_Job(self._argv, self._environment))


def _submit(name: str, argv: Sequence[str], entries: Sequence[Entry], options: ReproduceOptions, out: Path) -> None:
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
    # what Slurm gives each of its jobs, jobs of one machine share as workers do; submitit would give all the first GPU
    local = options.submit == "local"
    own_gpus = devices(entries) if local and options.gpus else []
    workers = options.training.workers
    variables = environments(workers, own_gpus) if local else [{} for _ in range(max(workers, 1))]
    try:
        jobs = executor.submit_array([_Job(own, each) for each in variables])
    except (OSError, subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"--submit {options.submit}: {' '.join(str(error).split())}") from None
    again = shlex.join(["remixmatch", "reproduce", *argv[:here], "--status", *argv[here:]])
    print(f"{len(jobs)} jobs: {', '.join(job.job_id for job in jobs)}; logs in {out / 'jobs'}; watch: {again}")
