"""`remixmatch profile PRESET`: show where the time of a training step goes, by named range.

Train some steps as `remixmatch train` does between two evaluations, first without and then with torch.profiler;
`engine.training.ranges` marks the ranges. Each rank writes a trace for https://ui.perfetto.dev and, on a GPU, a memory
snapshot for https://pytorch.org/memory_viz. Rank 0 writes profile.json and prints its tables.

A captured step is profiled as a CUDA graph. Its kernels are attributed to ranges with the help of the same step
executed launch by launch afterwards: by kernel name, or by order if a name occurs in several ranges.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

import torch

from engine import run
from engine.commands.main import run_with_exit_codes
from engine.commands.options import TrainOptions, check_gpu_count, check_ranks, parse_train
from engine.commands.output import show_warnings_only
from engine.commands.parsing import show_usage_if_asked
from engine.config import presets
from engine.config.config import Config
from engine.distributed import collectives, launch
from engine.errors import Stopped, UserError, cannot_write
from engine.measuring import records
from engine.measuring.counts import KINDS, counted
from engine.measuring.timing import ceilings, interleave
from engine.measuring.trace import DEVICE, STEPS, Ranges, analyze, attribute, learn, read, record
from engine.runs.folder import RUNS
from engine.runs.progress import ProgressLine, duration
from engine.runs.setup import RunSetup, setup_run
from engine.training import ranges
from engine.training.cuda_graph import CapturedStep
from engine.training.execution import Execution, pick_device
from engine.training.trainer import Trainer
from pipelines.data.cache import set_data_dir
from pipelines.files import atomic_write, write_text

log = logging.getLogger(__name__)

DEFAULT_STEPS = 40
MOST_STEPS = 1000  # Each step has thousands of events.
TRACE, MEMORY, RESULT = "rank{}.trace.json.gz", "rank{}.memory.pickle", "profile.json"
_MARKS = 20_000  # Marks per sample of their cost.
_HISTORY = 100_000  # Maximum number of allocations in a memory snapshot.
STEPS_HELP = {"steps": "Number of profiled steps, rounded up to whole batches of views."}


@dataclass(frozen=True)
class ProfileFolder:
    """Output folder. The files of a normal run are not written."""

    out: Path | None = None
    """The profile's folder; by default runs/profile-PRESET, with a number appended if it exists."""
    resume: bool = False
    """Not supported: a profile cannot be resumed."""
    quiet: bool = False
    """Print only the tables and warnings."""


@dataclass(frozen=True)
class ProfilingOptions:
    """Recording options."""

    warm_up: int = 16
    """Number of steps before timing starts, rounded up to whole batches of views."""
    nvtx: bool = False
    """Mark the ranges for NVIDIA's nsys instead of recording with torch.profiler; only nsys writes a report."""


def parse_profile(argv: Sequence[str]) -> TrainOptions:
    """Parse the preset and the flags of `remixmatch profile`."""
    return parse_train(
        argv,
        dataclasses.replace(presets.preset(argv[0]), steps=DEFAULT_STEPS),
        "profile",
        "Profile the training step of a preset, optionally overridden by flags.",
        STEPS_HELP,
        {"folder": ProfileFolder(), "profiling": ProfilingOptions()},
    )


def main(argv: Sequence[str]) -> None:
    """Run `remixmatch profile`.

    Raises:
        UserError: The preset or a flag is invalid, or a file cannot be written.
        Stopped: SIGINT was received; nothing is written.
    """
    argv = list(argv)
    words = {"PRESET": "see `remixmatch train --help` for the list"}
    more = "remixmatch profile PRESET --help lists all flags."
    if show_usage_if_asked(argv, "preset", "profile PRESET [flags]", words, more):
        return
    options = parse_profile(argv)
    if options.folder.quiet:
        show_warnings_only()
    _check(options)
    set_data_dir(options.source.data_dir)
    launch.die_with_parent()

    def set_up() -> RunSetup:
        ranks = launch.world_size_from_env(options.ranks.gpus)
        return setup_run(options.config, ranks=ranks, class_prior=options.source.class_prior)

    setup = None if launch.is_torchrun_worker() else set_up()
    device = pick_device(setup.config if setup else options.config)
    nvtx = options.others["profiling"].nvtx
    if nvtx and device.type != "cuda":
        raise UserError("--nvtx requires a GPU; on a CPU the trace of torch.profiler has all ranges")
    try:
        if setup and options.ranks.gpus > 1:
            check_gpu_count(setup.config, options.ranks)
            # Pass the folder, or each rank would choose its own. A later flag overrides an earlier one.
            arguments = [*argv, "--out", str(_folder(options))]
            launch.launch(arguments, options.ranks.gpus, 0, "engine.studies.profile")
            return
        with collectives.group(device, options.ranks.timeout):
            setup = setup or run.share(set_up)
            warm_up = options.others["profiling"].warm_up
            if nvtx:
                _mark_for_nsys(setup, warm_up)
            else:
                _profile(setup, warm_up, collectives.run_on_rank_0(lambda: _folder(options)), argv)
    except (KeyboardInterrupt, Stopped) as error:
        raise Stopped("interrupted; no profile was written", getattr(error, "number", signal.SIGINT)) from None


def _check(options: TrainOptions) -> None:
    check_ranks(options.ranks)
    for flag, given in (
        ("--resume", options.folder.resume),
        ("--max-restarts", options.ranks.max_restarts),
        ("--check-ranks", options.ranks.check_ranks),
    ):
        if given:
            raise UserError(f"{flag} is not supported by profile")
    records.check_minimum("--steps", options.config.steps, 1)
    records.check_minimum("--warm-up", options.others["profiling"].warm_up, 1)
    if options.config.steps > MOST_STEPS:
        raise UserError(f"--steps must be at most {MOST_STEPS} for profile, got {options.config.steps}")


def _folder(options: TrainOptions) -> Path:
    """Return the profile's folder.

    Raises:
        UserError: The folder already contains a profile, or is a file.
    """
    config, given = options.config, options.folder.out
    if given is None:
        another = config.method != presets.preset(config.preset).method
        name = f"profile-{config.preset}{f'-{config.method}' if another else ''}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(RUNS / each for each in names if not (RUNS / each).exists())
    if (given / RESULT).exists():
        raise UserError(f"{given} already contains a profile; use a different --out")
    if given.exists() and not given.is_dir():
        raise UserError(f"{given} is a file; --out expects a folder")
    return given


@contextmanager
def _training(setup: RunSetup, warm_up: int, memory_file: BinaryIO | None = None) -> Iterator[Trainer]:
    """Start training without a run's output files, and warm up.

    Args:
        setup: Setup of the run.
        warm_up: Number of warm-up steps.
        memory_file: File for a snapshot of the GPU memory after the warm-up, with stack traces; None without a GPU.
    """
    _, steps = _whole_batches(setup.config, warm_up)
    log.info(f"profiling {setup.config.preset}: {warm_up} steps to warm up, then {steps} without and with the profiler")
    config = dataclasses.replace(setup.config, steps=2**40)  # Never run out of plans.
    progress = ProgressLine(config.steps, quiet=True)
    if memory_file:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=_HISTORY)
    trainer = Trainer(dataclasses.replace(setup, config=config), progress)
    progress.start(0, trainer.feed.images_per_step)
    try:
        trainer.begin()
        begin = time.perf_counter()
        _advance(trainer, warm_up)
        left = 2 * steps * (time.perf_counter() - begin) / warm_up
        log.info(f"about {duration(left)} left, and the profiler's own time")
        if memory_file:
            torch.cuda.memory._dump_snapshot(memory_file.name)
            torch.cuda.memory._record_memory_history(enabled=None)
        yield trainer
    finally:
        trainer.end()


def _advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.advance()


def _whole_batches(config: Config, warm_up: int) -> tuple[int, int]:
    """Round the steps of warm-up and profile up to whole batches of views: a batch's first step pays for all of it."""
    whole_warm_up, steps = (-(-number // config.view_steps) * config.view_steps for number in (warm_up, config.steps))
    return whole_warm_up, steps


def _mark_for_nsys(setup: RunSetup, warm_up: int) -> None:
    warm_up, steps = _whole_batches(setup.config, warm_up)
    opened = Ranges(torch.cuda.nvtx.range)
    with _training(setup, warm_up) as trainer:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        with torch.cuda.nvtx.range(STEPS), ranges.listening(opened):
            _advance(trainer, steps)
            torch.cuda.synchronize()
            ranges.leave()
            opened.finish()
        torch.cuda.profiler.stop()
    print(f"{steps} steps with NVTX ranges between cudaProfilerStart and cudaProfilerStop")


def _profile(setup: RunSetup, warm_up: int, out: Path, argv: list[str]) -> None:
    folder = out / "profile"
    rank = collectives.rank()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            trace_file = files.enter_context(atomic_write(folder / TRACE.format(rank)))
            memory_file = None
            if pick_device(setup.config).type == "cuda":
                memory_file = files.enter_context(atomic_write(folder / MEMORY.format(rank)))
            found = _measure(setup, warm_up, trace_file, memory_file)
            every = collectives.all_gather_object(found["step_ms"])
        collectives.all_gather_object(None)  # Rank 0 writes its file last: it marks the profile as complete.
        if rank == 0:
            found |= {"ranks": len(every), "ranks_step_ms": every}
            row = records.record("profile", found.pop("torch_device"), **found)
            write_text(out / RESULT, json.dumps(row, indent=1) + "\n")
            print(text(row))
            print(f"wrote {out / RESULT}, {folder}/rank*.trace.json.gz for https://ui.perfetto.dev", end="")
            print(
                ", rank*.memory.pickle for https://pytorch.org/memory_viz" if MEMORY.format(0) in _names(folder) else ""
            )
            if row["on_gpu"]:
                print(f"to record one rank with nsys: {nsys_command(argv, folder)}")
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        with suppress(OSError):  # Remove the folders if they are empty.
            folder.rmdir()
            out.rmdir()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def nsys_command(argv: Sequence[str], folder: Path) -> str:
    """Return a shell command that records the same steps with NVIDIA's nsys."""
    nsys = [
        *("nsys", "profile", "--trace=cuda,nvtx,osrt", "--cuda-graph-trace=node", "--capture-range=cudaProfilerApi"),
        *("--capture-range-end=stop", f"--output={folder / 'nsys'}"),
    ]
    # A later flag overrides an earlier one.
    return shlex.join([*nsys, "remixmatch", "profile", *argv, "--gpus", "1", "--nvtx"])


def _measure(setup: RunSetup, warm_up: int, trace_file: BinaryIO, memory_file: BinaryIO | None) -> dict[str, Any]:
    """Profile the steps, and write the trace and the memory snapshot.

    Returns:
        The values of profile.json for this rank, plus "torch_device".
    """
    config = setup.config
    warm_up, steps = _whole_batches(config, warm_up)
    device = pick_device(config)
    learned: list[tuple[str, str]] = []
    with _training(setup, warm_up, memory_file) as trainer:
        execution, images = trainer.execution, (trainer.data.sides[0], len(trainer.data.classes))
        _wait(device)
        begin = time.perf_counter()
        _advance(trainer, steps)
        _wait(device)
        plain = (time.perf_counter() - begin) / steps
        threads = _view_threads()
        trace, marks = record(lambda: _advance(trainer, steps), device)
        view_threads_ms = 1e3 * (_view_threads() - threads) / steps
        if isinstance(trainer.execute, CapturedStep):
            # This needs memory in addition to the graph's. If it runs out, no kernels are attributed.
            with suppress(torch.OutOfMemoryError):
                trainer.execute.launch_by_launch()  # Trigger lazy initialization.
                learned = learn(read(record(trainer.execute.launch_by_launch, device)[0]))
    events = read(trace)
    for event, part in attribute(events, learned)[0]:
        trace["traceEvents"][event.place].setdefault("args", {})["range"] = part
    with gzip.open(trace_file, "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump(trace, file)
    mark = _mark_seconds()
    found = analyze(events, steps, learned, view_threads_ms)
    _add_counts(found["ranges"], _counted(config, execution, images), device)
    return {
        "preset": config.preset, "method": config.method, "k": config.k, "batch": config.batch,
        "mode": execution.mode, "precision": str(execution.precision).removeprefix("torch."),
        "views": execution.views, "steps": steps, "unprofiled_step_ms": 1e3 * plain,
        "marks": marks / steps, "mark_ns": 1e9 * mark, "marks_share": mark * marks / steps / plain,
        "kernels_reported": any(event.kind == DEVICE for event in events), "on_gpu": device.type == "cuda",
        **found, "torch_device": device,
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _view_threads() -> float:
    """Return the CPU seconds of DALI's threads so far, which torch.profiler does not see; 0 if unknown."""
    total = 0
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # The thread may have ended.
            if (thread / "comm").read_text().startswith("[DALI]"):
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


def _mark_seconds() -> float:
    """Return the seconds that a mark takes without a listener, minus those of an empty loop."""

    def called(function: Callable[[str], None]) -> float:
        begin = time.perf_counter()
        for _ in range(_MARKS):
            function("forward")
        return (time.perf_counter() - begin) / _MARKS

    def looped() -> float:
        begin = time.perf_counter()
        for _ in range(_MARKS):
            pass
        return (time.perf_counter() - begin) / _MARKS

    rounds = interleave({"mark": lambda: called(ranges.enter), "loop": looped}, 5)
    return median(each["mark"] - each["loop"] for each in rounds)


def _counted(config: Config, execution: Execution, images: tuple[int, int]) -> Mapping[str, Mapping[str, Any]]:
    """Return what `bench count` counted for each range of the same step; empty if it was not counted."""
    if execution.mode == "eager" or config.micro_batches_of(collectives.ranks()) > 1:
        return {}
    if execution.convolutions == "measured":  # No count has this device's choice.
        return {}
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    row = counted(config, names.get(execution.precision, ""), images)
    return row["parts"] if row else {}


def _add_counts(
    found: dict[str, dict[str, Any]], counts: Mapping[str, Mapping[str, Any]], device: torch.device
) -> None:
    """Add the counted bytes, and the roofline bound at the rates measured on this device."""
    for name in found.keys() & counts.keys():
        part, limit = counts[name], ceilings(device)
        bound = max(part["least_bytes"] / limit.copy_bytes_per_second, part["flops"] / limit.matmul_flops_per_second)
        found[name] |= {
            "counted_launches": sum(part[kind] for kind in KINDS), "bytes": part["bytes"],
            "bound_ms": 1e3 * bound,
        }  # fmt: skip


def text(row: Mapping[str, Any]) -> str:
    """Format the tables of a profile."""
    gpu, counted = row["kernels_reported"], any("bytes" in part for part in row["ranges"].values())
    ranks = "1 rank" if row["ranks"] == 1 else f"{row['ranks']} ranks"
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "ms": lambda part: f"{part['ms']:.3f}",
        "share, %": lambda part: f"{100 * part['share']:.1f}",
        "threads, ms": lambda part: f"{part['threads_ms']:.3f}",
        "launches" if row["on_gpu"] else "operators": lambda part: f"{part['launches']:.1f}",
    }
    if gpu:
        columns["device, ms"] = lambda part: f"{part['device_ms']:.3f}"
    if counted:
        columns["GB"] = lambda part: f"{part['bytes'] / 1e9:.3f}" if "bytes" in part else ""
        columns["bound, ms"] = lambda part: f"{part['bound_ms']:.3f}" if "bytes" in part else ""
    lines_of_ranges = [[name, *(cell(part) for cell in columns.values())] for name, part in row["ranges"].items()]
    lines = [
        f"{row['preset']}, {row['method']}, K = {row['k']}, B = {row['batch']}, {row['mode']}, {row['precision']}, "
        f"{row['views']} views, {ranks}, {row['device']}",
        f"{row['step_ms']:.2f} ms per step over {row['steps']} steps with the profiler, "
        f"{row['unprofiled_step_ms']:.2f} ms without",
        "",
        *_table(["range", *columns], lines_of_ranges),
        "ms and share: thread of the training loop; threads: plans, pseudo-labels, probes"
        + ("; GB and bound (roofline): `bench count`" if counted else ""),
        f"{100 * row['named_share']:.1f} % of the loop's time is in named ranges; without a listener, a mark costs "
        f"{row['mark_ns']:.0f} ns, and the {row['marks']:.0f} marks of a step {100 * row['marks_share']:.4f} % of it",
        *_device_words(row),
        "",
        *_slowest_table("kernel" if gpu else "operator (self time)", "calls", row["operators"]),
    ]
    if "kinds" in row:
        kinds = [{"name": name, **one} for name, one in row["kinds"].items()]
        lines += ["", *_slowest_table("kind of kernel", "kernels", kinds)]
    lines.append("")
    if "gaps" in row:
        gaps = row["gaps"]
        lines.append(
            f"the device is idle for {gaps['ms']:.3f} ms per step ({100 * gaps['share']:.1f} %), while the host is in"
        )
        lines += _table(
            ["range", "ms", "gaps", "longest, ms"],
            [
                [name, f"{one['ms']:.3f}", f"{one['gaps']:.1f}", f"{one['longest_ms']:.3f}"]
                for name, one in gaps["ranges"].items()
            ],
        )
    elif not row["on_gpu"]:
        lines.append("no gaps are reported on a CPU")
    lines += [
        f"{name}: {one['worked_ms']:.3f} ms of work per step, {one['hidden_ms']:.3f} ms of it hidden; "
        f"{one['waited_ms']:.3f} ms of waiting"
        for name, one in row["hidden"].items()
    ]
    return "\n".join(lines)


def _slowest_table(name: str, number: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [[one["name"][:60], f"{one['ms']:.3f}", f"{100 * one['share']:.1f}", f"{one[number]:.1f}"] for one in rows]
    return _table([name, "ms", "share, %", number], cells)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, with the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()
        for cells in (heads, *rows)
    ]


def _device_words(row: Mapping[str, Any]) -> list[str]:
    """Say how kernels were attributed to ranges, or that the device reports none."""
    captured = row["mode"] == "graph"
    if row["on_gpu"] and not row["kernels_reported"]:
        counted = "captured operators, from the same step executed launch by launch" if captured else "operators"
        return [f"this device reports no kernels, so there are no kernel times or gaps; launches are {counted}"]
    if not captured:
        return []
    how = row["attribution"]
    return [
        f"kernels of the captured step attributed to ranges: {how['name']} by name, {how['order']} by order among "
        f"kernels of one name, {how['not at all']} not at all; reference: the same step executed launch by launch"
    ]


if __name__ == "__main__":
    sys.argv.insert(1, "profile")  # Record the command as the installed engine would.
    run_with_exit_codes(main, sys.argv[2:])
