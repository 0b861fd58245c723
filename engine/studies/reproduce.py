"""`remixmatch reproduce TABLE`: reproduce a table of the paper over methods or ablations, presets and seeds.

Each training run is a job (see `engine.studies.jobs`), so that a table can be interrupted, resumed, and shared among
GPUs, machines and Slurm jobs.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from engine.commands.parsing import DataDir, parse, show_usage_if_asked
from engine.config.checks import check_seed
from engine.config.scaling import check_scale
from engine.config.values import CORES
from engine.errors import Stopped, UserError, cannot_write, unknown
from engine.studies.job_progress import Progress, counts, print_plan
from engine.studies.jobs import Stop, forget_failures, status, work
from engine.studies.paper_tables import TABLES, Entry, make_entries, needs_data, with_data
from engine.studies.table_results import collect, collected, read_statuses, write_tables
from pipelines.data.cache import set_data_dir
from pipelines.processes import python_environment

OUT = Path("runs") / "reproduce"
SAVE_SECONDS = 60  # Time for running jobs to save their step before a Slurm job's time limit.


@dataclass(frozen=True)
class JobOptions:
    """How jobs are trained."""

    steps_scale: float = 1.0
    """Scale steps, ramp, intervals, and the windows of EMA and batch norm, also those after --; shown in the title."""
    data_dir: DataDir = None
    workers: int = 0
    """Number of jobs at a time, one per GPU; by default the number of GPUs, or 1 without a GPU."""
    retry: bool = False
    """Retry failed jobs."""

    def check(self) -> None:
        """Raise UserError if a flag is invalid."""
        check_scale(self.steps_scale)
        if self.workers < 0:
            raise UserError(f"--workers must be at least 0, got {self.workers}")

    def scaled(self, name: str) -> str:
        """Return the name of a folder of jobs, with the scale appended."""
        return name if self.steps_scale == 1 else f"{name}-steps{self.steps_scale:g}"


@dataclass
class ReproduceOptions:
    """Train the unfinished jobs of a table, and write table.md and table.json.

    Flags of `remixmatch train` after `--` apply to every job, as in: remixmatch reproduce digits -- --batch 8
    """

    seeds: tuple[int, ...] = ()
    """Seeds, each with its own label split and initial weights; by default those of the table."""
    methods: tuple[str, ...] = ()
    """Methods, or ablations for the table `ablation`; by default all of the table."""
    preset: tuple[str, ...] = ()
    """Presets to use instead of the table's."""
    out: Path | None = None
    """Folder of the jobs and the table; by default runs/reproduce/TABLE. Several machines may share it."""
    plan: bool = False
    """Print the jobs in order with predicted times, subtotals and wall-clock times, and run nothing."""
    status: bool = False
    """Print the status of every job, and run nothing."""
    tables: bool = False
    """Write table.md and table.json from the finished jobs, and run nothing."""
    rows: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Make the table from records in these files, written by --collect, instead of folders; run nothing."""
    collect: Path | None = None
    """Append a record to this file for every finished job that it lacks, and run nothing."""
    submit: Literal["no", "slurm", "local"] = "no"
    """Submit --workers jobs of one worker each through submitit: to Slurm, or to this machine to try it out."""
    partition: str = ""
    """Slurm partition."""
    gpus: int = 1
    """GPUs per submitted job: 1, or 0 to train on CPUs."""
    cpus: int = 8
    """CPU cores per submitted job."""
    hours: float = 24.0
    """Time limit of a submitted job. Before it is reached, the job saves its step and requeues itself."""
    slurm: tuple[str, ...] = ()
    """Additional Slurm parameters, for example: --slurm account=abc qos=long"""
    training: JobOptions = field(default_factory=JobOptions)


def main(argv: Sequence[str], stop: Stop | None = None) -> None:
    """Run `remixmatch reproduce`.

    Args:
        argv: The table, its flags, and after `--` flags for all jobs.
        stop: Stop request from elsewhere.

    Raises:
        UserError: A table, flag or job is invalid, or jobs failed.
        Stopped: A signal was received; running jobs are saved.
    """
    texts = {name: table.text for name, table in TABLES.items()}
    more = "remixmatch reproduce TABLE --help lists all flags."
    if show_usage_if_asked(argv, "table", "reproduce TABLE [flags] [-- flags of train]", texts, more):
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
        print_plan(entries, options.training.workers)
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
        # Read again, because another worker may have finished a job since.
        write_tables(name, entries, out, read_statuses(out, entries), scale)
        if failed:
            raise UserError(failed)


def check(options: ReproduceOptions) -> None:
    """Raise UserError if a flag is invalid."""
    options.training.check()
    for flag, bound in {"gpus": 0, "cpus": 1}.items():
        if getattr(options, flag) < bound:
            raise UserError(f"--{flag} must be at least {bound}, got {getattr(options, flag)}")
    if options.gpus > 1:
        raise UserError(f"--gpus must be 1, or 0 to train on CPUs: a job uses at most one GPU; got {options.gpus}")
    if not options.hours > 0:
        raise UserError(f"--hours must be more than 0, got {options.hours}")
    for flag in ("seeds", "methods", "preset"):
        check_different(flag, getattr(options, flag))
    check_seeds(options.seeds)
    for text in options.slurm:
        if not text.partition("=")[0] or "=" not in text:
            raise UserError(f"--slurm expects NAME=VALUE, got '{text}'")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise UserError if a seed is not allowed."""
    for seed in seeds:
        check_seed(seed, "--seeds")


def check_different(flag: str, given: Sequence[object]) -> None:
    """Raise UserError if a flag has the same value twice."""
    if len(set(given)) < len(given):
        raise UserError(f"--{flag} has a duplicate value: {' '.join(map(str, given))}")


def default_out(name: str, options: ReproduceOptions) -> Path:
    """Return the default folder of a table's jobs: `runs/reproduce/TABLE`, with changed presets and scale appended."""
    return OUT / options.training.scaled("-".join([name, *options.preset]))


# Run jobs


def devices(entries: Sequence[Entry]) -> list[str]:
    """Return the visible GPUs by their names in CUDA_VISIBLE_DEVICES; none if all jobs run on CPUs."""
    if all(entry.job.config.device == "cpu" for entry in entries):
        return []
    import torch

    count = torch.cuda.device_count()
    if count and "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number in range(count)]


def environments(workers: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Return each worker's environment variables: its GPU, or its share of the cores."""
    workers = workers or len(gpus) or 1
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(workers)]
    share = str(max(len(os.sched_getaffinity(0)) // workers, 1))
    own = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": share}
    if workers > 1:
        own[CORES] = share
    return [own for _ in range(workers)]


def train(entries: Sequence[Entry], out: Path, options: JobOptions, stop: Stop | None = None) -> str:
    """Train the unfinished jobs, and show their progress.

    Returns:
        An error message with the number of failed jobs; "" if none failed.

    Raises:
        UserError: The folder is not writable.
        Stopped: A signal was received; running jobs are saved.
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
        advice = "saved files are intact; fix the problem and repeat the command"
        raise cannot_write(out, error, advice) from error
    if stop.number:
        raise Stopped(f"{counts(statuses)}; running jobs are saved, repeat the command to resume them", stop.number)
    failed = sum(each.state == "failed" for each in statuses)
    return f"{failed} of {len(statuses)} jobs failed (reasons above); use --retry to run them again" if failed else ""


class _Job:
    """A worker as a submitit job.

    Args:
        argv: Arguments of `main`.
        environment: Additional environment variables.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._argv, self._environment = list(argv), dict(environment)

    def __call__(self) -> None:
        os.environ.update(self._environment)
        self._stop = Stop()
        main(self._argv, self._stop)

    def checkpoint(self) -> Any:
        """Save running jobs and return what to requeue; submitit calls this shortly before the time limit."""
        from submitit.helpers import DelayedSubmission

        self._stop.ask(signal.SIGTERM)
        deadline = time.monotonic() + SAVE_SECONDS
        while self._stop.children and time.monotonic() < deadline:
            time.sleep(0.1)
        return DelayedSubmission(_Job(self._argv, self._environment))


def _submit(name: str, argv: Sequence[str], entries: Sequence[Entry], options: ReproduceOptions, out: Path) -> None:
    """Submit jobs of one worker each, and print how to watch them."""
    try:
        import submitit
    except ImportError:
        raise UserError("--submit requires submitit: pip install 'remixmatch-engine[slurm]'") from None
    here = argv.index("--") if "--" in argv else len(argv)
    # A later flag overrides an earlier one. Failures were cleared above, once for all jobs.
    own = [*argv[:here], "--submit", "no", "--workers", "1", "--no-retry", "--out", str(out.resolve()), *argv[here:]]
    # A job that reaches its time limit is requeued as often as needed.
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
    # Slurm assigns GPUs to its jobs. Local jobs share them like workers: submitit would give each the first GPU.
    local = options.submit == "local"
    own_gpus = devices(entries) if local and options.gpus else []
    workers = options.training.workers
    variables = environments(workers, own_gpus) if local else [{} for _ in range(max(workers, 1))]
    os.environ.update(python_environment())  # submitit hands it on to the jobs.
    try:
        jobs = executor.submit_array([_Job(own, each) for each in variables])
    except (OSError, subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"--submit {options.submit}: {' '.join(str(error).split())}") from None
    again = shlex.join(["remixmatch", "reproduce", *argv[:here], "--status", *argv[here:]])
    print(f"{len(jobs)} jobs: {', '.join(job.job_id for job in jobs)}; logs: {out / 'jobs'}; watch them with: {again}")
