"""`remixmatch profile PRESET`: where the time of a training step goes, by named range.

Some steps are trained as `remixmatch train` trains them between two evaluations, first without and then under
torch.profiler; `engine.training.ranges` marks the ranges. Each rank writes a trace for https://ui.perfetto.dev, with a
GPU also a snapshot of its memory for https://pytorch.org/memory_viz. Rank 0 writes profile.json and prints its tables.

A captured step is profiled as the graph that it is. To which range its kernels belong is learned from the same step
executed launch by launch afterwards: by their names, and by order where one name is in several ranges.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
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
from engine.commands.options import TrainOptions, check_places, check_ranks, parse_train
from engine.commands.parsing import usage_is_all
from engine.config import presets
from engine.config.config import Config
from engine.distributed import collectives, launch
from engine.errors import Stopped, UserError, cannot_write
from engine.measuring import records
from engine.measuring.counts import KINDS, counted
from engine.measuring.timing import ceilings, interleave
from engine.measuring.trace import DEVICE, STEPS, Ranges, analyze, attribute, learn, read, record
from engine.runs.folder import RUNS
from engine.runs.progress import ProgressLine
from engine.runs.setup import RunSetup, setup_run
from engine.training import ranges
from engine.training.cuda_graph import CapturedStep
from engine.training.execution import Execution, pick_device
from engine.training.trainer import Trainer
from pipelines.cache import set_data_dir
from pipelines.files import atomic_write, write_text

DEFAULT_STEPS = 40
MOST_STEPS = 1000  # of a step's thousands of events each
TRACE, MEMORY, RESULT = "rank{}.trace.json.gz", "rank{}.memory.pickle", "profile.json"
_MARKS = 20_000  # a sample of what a mark costs
_HISTORY = 100_000  # allocations that a snapshot of the memory remembers
STEPS_HELP = {"steps": "Steps that are profiled, in whole batches of views."}


@dataclass(frozen=True)
class ProfileFolder:
    """Where the profile goes. What a run writes on the way is not written."""

    out: Path | None = None
    """The profile's folder; by default runs/profile-PRESET, numbered on if that exists."""
    resume: bool = False
    """Not supported: a profile saves nothing that could be resumed."""
    quiet: bool = False
    """Print nothing but the tables and warnings."""


@dataclass(frozen=True)
class ProfilingOptions:
    """What is recorded."""

    warm_up: int = 16
    """Steps before the first that is timed, in whole batches of views."""
    nvtx: bool = False
    """Mark the ranges for NVIDIA's nsys, which records them instead of torch.profiler: as in the command that is
    printed without this flag. Nothing is written then but nsys's own report."""


def parse_profile(argv: Sequence[str]) -> TrainOptions:
    """Parse the preset and the flags of `remixmatch profile`."""
    return parse_train(
        argv,
        dataclasses.replace(presets.preset(argv[0]), steps=DEFAULT_STEPS),
        "profile",
        "Profiles the training step of a preset, or of what the flags make of it.",
        STEPS_HELP,
        {"folder": ProfileFolder(), "profiling": ProfilingOptions()},
    )


def main(argv: Sequence[str]) -> None:
    """Profiles what the flags say; see the module.

    Raises:
        UserError: a mistake in preset or flags; something cannot be written.
        Stopped: SIGINT came; nothing is written.
    """
    argv = list(argv)
    words = {"PRESET": "as `remixmatch train --help` lists them"}
    more = "remixmatch profile PRESET --help lists every flag."
    if usage_is_all(argv, "preset", "profile PRESET [flags]", words, more):
        return
    options = parse_profile(argv)
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
        raise UserError("--nvtx is for GPUs: without one the trace of torch.profiler has all ranges")
    try:
        if setup and options.ranks.gpus > 1:
            check_places(setup.config, options.ranks)
            # with the folder, which each rank would otherwise choose anew; the last of two equal flags counts
            arguments = [*argv, "--out", str(_folder(options))]
            launch.launch(arguments, options.ranks.gpus, 0, "engine.studies.profile")
            return
        collectives.start(device, options.ranks.timeout)
        setup = setup or run.share(set_up)
        warm_up = options.others["profiling"].warm_up
        if nvtx:
            _mark_for_nsys(setup, warm_up)
        else:
            _profile(setup, warm_up, collectives.run_on_rank_0(lambda: _folder(options)), argv)
    except RuntimeError as error:
        if lost := collectives.lost(error):
            raise lost from error
        raise
    except (KeyboardInterrupt, Stopped) as error:
        raise Stopped("interrupted: no profile is written", getattr(error, "number", signal.SIGINT)) from None
    collectives.stop()


def _check(options: TrainOptions) -> None:
    check_ranks(options.ranks)
    for flag, given in (
        ("--resume", options.folder.resume),
        ("--max-restarts", options.ranks.max_restarts),
        ("--check-ranks", options.ranks.check_ranks),
    ):
        if given:
            raise UserError(f"{flag} is of remixmatch train: a profile saves nothing that could be gone on with")
    records.check_least("--steps", options.config.steps, 1)
    records.check_least("--warm-up", options.others["profiling"].warm_up, 1)
    if options.config.steps > MOST_STEPS:
        raise UserError(f"--steps is how many are profiled, at most {MOST_STEPS}; got {options.config.steps}")


def _folder(options: TrainOptions) -> Path:
    """Where the profile goes.

    Raises:
        UserError: there is one already, or the folder is a file.
    """
    config, given = options.config, options.folder.out
    if given is None:
        another = config.method != presets.preset(config.preset).method
        name = f"profile-{config.preset}{f'-{config.method}' if another else ''}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(RUNS / each for each in names if not (RUNS / each).exists())
    if (given / RESULT).exists():
        raise UserError(f"{given} holds a profile already; choose another --out")
    if given.exists() and not given.is_dir():
        raise UserError(f"{given} is a file; --out takes a folder")
    return given


@contextmanager
def _training(setup: RunSetup, warm_up: int, memory_file: BinaryIO | None = None) -> Iterator[Trainer]:
    """Training as of a run's first steps, without what it writes, and warmed up.

    Args:
        setup: of what is trained.
        warm_up: steps.
        memory_file: with a GPU, what was allocated up to then is written to it, with who did.
    """
    config = dataclasses.replace(setup.config, steps=2**40)  # plans never end
    progress = ProgressLine(config.steps, quiet=True)
    if memory_file:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=_HISTORY)
    trainer = Trainer(dataclasses.replace(setup, config=config), progress)
    progress.start(0, trainer.feed.images_per_step)
    try:
        trainer.begin()
        _advance(trainer, warm_up)
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
    """Steps of the warm-up and of the profile, rounded up: each batch of views is some steps' and costs the first."""
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
        collectives.all_gather_object(None)  # rank 0's file is last, and says that all are there
        if rank == 0:
            found |= {"ranks": len(every), "ranks_step_ms": every}
            row = records.record("profile", found.pop("torch_device"), **found)
            write_text(out / RESULT, json.dumps(row, indent=1) + "\n")
            print(text(row))
            print(f"written: {out / RESULT}, {folder}/rank*.trace.json.gz for https://ui.perfetto.dev", end="")
            print(
                ", rank*.memory.pickle for https://pytorch.org/memory_viz" if MEMORY.format(0) in _names(folder) else ""
            )
            if row["on_gpu"]:
                print(f"ranges for nsys, of one rank: {nsys_command(argv, folder)}")
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        with suppress(OSError):  # nothing came of it
            folder.rmdir()
            out.rmdir()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def nsys_command(argv: Sequence[str], folder: Path) -> str:
    """The command that records the same steps by NVIDIA's nsys, for a shell."""
    nsys = [
        *("nsys", "profile", "--trace=cuda,nvtx,osrt", "--cuda-graph-trace=node", "--capture-range=cudaProfilerApi"),
        *("--capture-range-end=stop", f"--output={folder / 'nsys'}"),
    ]
    # the last of two equal flags counts
    return shlex.join([*nsys, "remixmatch", "profile", *argv, "--gpus", "1", "--nvtx"])


def _measure(setup: RunSetup, warm_up: int, trace_file: BinaryIO, memory_file: BinaryIO | None) -> dict[str, Any]:
    """Profiles, and writes the trace and the memory's snapshot.

    Returns:
        The values of profile.json, for this rank; with "torch_device".
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
            with suppress(torch.OutOfMemoryError):  # beside the graph's own memory; nothing is attributed then
                trainer.execute.launch_by_launch()  # what is lazily made is there then
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
    """CPU seconds so far of DALI's own threads, which torch.profiler knows nothing of; 0 where Linux does not say."""
    total = 0
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it may end meanwhile
            if (thread / "comm").read_text().startswith("[DALI]"):
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


def _mark_seconds() -> float:
    """What a mark takes where nobody listens: seconds, less those of a loop that does nothing."""

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
    """What `bench count` has counted of each range of this very step; nothing where it has not, or could not."""
    if execution.mode == "eager" or config.micro_batches_of(collectives.ranks()) > 1:
        return {}
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    row = counted(config, names.get(execution.precision, ""), images)
    return row["parts"] if row else {}


def _add_counts(
    found: dict[str, dict[str, Any]], counts: Mapping[str, Mapping[str, Any]], device: torch.device
) -> None:
    """Adds counted bytes, and the roofline bound at the rates that are measured here."""
    for name in found.keys() & counts.keys():
        part, limit = counts[name], ceilings(device)
        bound = max(part["least_bytes"] / limit.copy_bytes_per_second, part["flops"] / limit.matmul_flops_per_second)
        found[name] |= {
            "counted_launches": sum(part[kind] for kind in KINDS), "bytes": part["bytes"],
            "bound_ms": 1e3 * bound,
        }  # fmt: skip


def text(row: Mapping[str, Any]) -> str:
    """The tables of a profile, as they are printed."""
    gpu, counted = row["kernels_reported"], any("bytes" in part for part in row["ranges"].values())
    ranks = "1 rank" if row["ranks"] == 1 else f"{row['ranks']} ranks"
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "ms": lambda part: f"{part['ms']:.3f}",
        "share": lambda part: f"{part['share']:.1%}",
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
        f"{row['step_ms']:.2f} ms a step over {row['steps']} under the profiler, "
        f"{row['unprofiled_step_ms']:.2f} ms without it",
        "",
        *_table(["range", *columns], lines_of_ranges),
        "ms and share are of the training loop's thread, threads of its planner's"
        + ("; GB and roofline bound by `bench count`" if counted else ""),
        f"{row['named_share']:.1%} of the loop's time is in named ranges; a mark costs {row['mark_ns']:.0f} ns where "
        f"nobody listens, the {row['marks']:.0f} of a step {row['marks_share']:.4%} of it",
        *_device_words(row),
        "",
        *_dearest_table("kernel" if gpu else "operator, without what it calls", "calls", row["operators"]),
    ]
    if "kinds" in row:
        kinds = [{"name": name, **one} for name, one in row["kinds"].items()]
        lines += ["", *_dearest_table("kind of kernel", "kernels", kinds)]
    lines.append("")
    if "gaps" in row:
        gaps = row["gaps"]
        lines.append(
            f"the device does nothing for {gaps['ms']:.3f} ms a step ({gaps['share']:.1%}), while the host is in"
        )
        lines += _table(
            ["range", "ms", "gaps", "longest, ms"],
            [
                [name, f"{one['ms']:.3f}", f"{one['gaps']:.1f}", f"{one['longest_ms']:.3f}"]
                for name, one in gaps["ranges"].items()
            ],
        )
    elif not row["on_gpu"]:
        lines.append("no gaps: on a CPU the host is the device")
    lines += [
        f"{name}: {one['worked_ms']:.3f} ms of work a step, {one['hidden_ms']:.3f} of it hidden; "
        f"{one['waited_ms']:.3f} ms are waited for"
        for name, one in row["hidden"].items()
    ]
    return "\n".join(lines)


def _dearest_table(name: str, number: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [[one["name"][:60], f"{one['ms']:.3f}", f"{one['share']:.1%}", f"{one[number]:.1f}"] for one in rows]
    return _table([name, "ms", "share", number], cells)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with a first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()
        for cells in (heads, *rows)
    ]


def _device_words(row: Mapping[str, Any]) -> list[str]:
    """How kernels came to their ranges, or that there are none to tell of."""
    captured = row["mode"] == "graph"
    if row["on_gpu"] and not row["kernels_reported"]:
        of = "the operators that were captured, by the same step executed launch by launch" if captured else "operators"
        return [f"this device reports no kernels: neither times nor gaps; launches are {of}"]
    if not captured:
        return []
    how = row["attribution"]
    return [
        f"captured step: of its kernels {how['name']} have their range by their name, {how['order']} by order among "
        f"those of one name, {how['not at all']} none, as in the same step executed launch by launch"
    ]


if __name__ == "__main__":
    sys.argv.insert(1, "profile")  # the result gives the command as an installed engine has it
    run_with_exit_codes(main, sys.argv[2:])
