"""`remixmatch ablate PRESET`: measure each component's cost and benefit.

A variant is the full method with one component changed (`engine.config.methods.ABLATIONS`). Its cost is the time of its
training step, including views. The step is timed in alternation with the full method's, each in its own process.
Launches and bytes come from `bench count`. Its benefit is measured by training it, with the same jobs as in `remixmatch
reproduce ablation`, and comparing it with the full method, paired by seed. All measurements are kept in the output
folder, so the command can be resumed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import tyro

from engine.commands.parsing import parse, show_usage_if_asked
from engine.config.config import Config
from engine.config.methods import ABLATIONS
from engine.config.scaling import trained_samples
from engine.errors import UserError, cannot_write, unknown
from engine.measuring import records
from engine.measuring.counts import IMAGES, counted
from engine.measuring.step_worker import StepWorker, sample_interleaved
from engine.runs.progress import duration
from engine.studies import jobs, paper_tables, reproduce, table_results
from engine.studies.ablation_table import AblationRow, markdown, to_csv
from engine.studies.paper_tables import REMIXMATCH, Entry
from engine.training.execution import pick_device
from pipelines.data.cache import set_data_dir
from pipelines.files import write_text

log = logging.getLogger(__name__)

OUT = Path("runs") / "ablate"
MEASURED = "measured.jsonl"  # File of the measured costs in the output folder.

# Groups of ablations that --axes accepts.
AXES: dict[str, tuple[str, ...]] = {
    "k": ("k=1", "k=2", "k=4", "k=8", "k=16"),
    "losses": ("no-rotation", "no-premixup", "no-mixup", "l2"),
    "alignment": ("no-alignment",),
    "augmentation": ("no-strong", "no-weak", "randaugment", "ctaugment-code"),
    "guess": ("mean-guess", "weak-only", "joint-guess"),
    "averages": ("no-ema", "bn-split", "bn-stats-pool"),
}
assert sorted(name for names in AXES.values() for name in names) == sorted(ABLATIONS)


@dataclass
class AblateOptions:
    """Time, count and train the variants of a preset, and write ablate.csv, table.md and chart.png.

    Flags of `remixmatch train` after `--` apply to every variant, as in: remixmatch ablate digits-40 -- --batch 8
    """

    axes: tuple[str, ...] = tuple(AXES)
    """Groups of ablations, or names of single ablations."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds, each with its own label split and initial weights."""
    time_only: bool = False
    """Time and count, but train nothing."""
    count: bool = True
    """Show launches and bytes on a GPU if `remixmatch bench count` has counted them."""
    repeats: int = 9
    """Number of rounds in which a variant and the full method alternate."""
    seconds: float = 0.5
    """Minimum duration of a timing sample."""
    out: Path | None = None
    """Folder of the jobs and results; by default runs/ablate/PRESET. Several machines may share the jobs."""
    rows: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Make table and chart from records in these files, written by --collect of ablate or reproduce; run nothing."""
    collect: Path | None = None
    """Append a record to this file for every measurement and finished job that it lacks, and run nothing."""
    training: reproduce.JobOptions = field(default_factory=reproduce.JobOptions)


def main(argv: Sequence[str]) -> None:
    """Run `remixmatch ablate`.

    Args:
        argv: The preset, flags, and after `--` flags for all variants.

    Raises:
        UserError: A preset, axis or flag is invalid, or jobs failed.
        Stopped: A signal was received; running jobs are saved.
    """
    texts = {name: ", ".join(names) for name, names in AXES.items()}
    more = "The words above are the axes. remixmatch ablate PRESET --help lists all flags."
    if show_usage_if_asked(argv, "preset", "ablate PRESET [flags] [-- flags of train]", texts, more):
        return
    name, *rest = argv
    here = rest.index("--") if "--" in rest else len(rest)
    options: AblateOptions = parse(AblateOptions, f"ablate {name}", rest[:here])
    records.check_minimum("--repeats", options.repeats, 1)
    if not 0 < options.seconds < math.inf:
        raise UserError(f"--seconds must be more than 0, got {options.seconds}")
    options.training.check()
    reproduce.check_different("seeds", options.seeds)
    reproduce.check_seeds(options.seeds)
    set_data_dir(options.training.data_dir)
    entries = paper_tables.make_entries(
        paper_tables.TABLES["ablation"],
        rest[here + 1 :],
        options.seeds,
        (REMIXMATCH, *variants_of(options.axes)),
        (name,),
        options.training.steps_scale,
    )
    if not options.rows or paper_tables.needs_data(entries):
        entries = paper_tables.with_data(entries)
    out = options.out or OUT / options.training.scaled(name)
    configs: dict[str, Config] = {}
    for entry in entries:
        configs.setdefault(entry.row, entry.job.config)
    if len(configs) == 1:
        raise UserError(f"--axes {' '.join(options.axes)}: the preset already has these settings; nothing to compare")
    measured, failed = out / MEASURED, ""
    try:
        if options.collect:
            _collect(entries, configs, out, options.collect)
            return
        if options.rows:
            found = table_results.collected(options.rows)
            rows = [row for path in options.rows for row in records.read(path)]
            costs, counts = (_known(rows, kind, configs) for kind in ("costs", "counts"))
        else:
            counts = {}
            statuses = table_results.read_statuses(out, entries)
            untrained = [entry for entry in entries if statuses[entry.job.digest].state != "done"]
            missing = configs.keys() - _known(records.read(measured), "costs", configs).keys()
            _announce(name, len(missing), len(configs), len(untrained), len(entries), options)
            costs = _once(measured, configs, lambda row: time_step(configs[row], configs[REMIXMATCH], options))
            if not options.time_only:
                _announce_training(untrained, statuses, costs, options)
            failed = "" if options.time_only else reproduce.train(entries, out, options.training)
            found = table_results.read_statuses(out, entries)
        if options.count:
            counts |= {row: _counted(config) for row, config in configs.items() if row not in counts}
        write(name, entries, found, costs, counts, out, options)
    except OSError as error:
        raise cannot_write(out, error) from error
    if failed:
        raise UserError(failed)


def _announce(name: str, untimed: int, variants: int, untrained: int, runs: int, options: AblateOptions) -> None:
    """Say what will be done, before anything is measured."""
    words = [f"{name}: timing the steps of {untimed} of {variants} variants, {options.repeats} rounds each"]
    if not options.time_only:
        words.append(f"then training {untrained} of {runs} runs ({variants} variants, {len(options.seeds)} seeds)")
    log.info(", ".join(words) + ("" if untimed + untrained else "; everything is done already"))


def _announce_training(
    untrained: Sequence[Entry],
    statuses: Mapping[str, jobs.Status],
    costs: Mapping[str, Mapping[str, Any]],
    options: AblateOptions,
) -> None:
    """Say how long training will take at the measured step times."""
    left = [
        (entry.job.config.steps - statuses[entry.job.digest].step) * costs[entry.row]["step_ms"] / 1000
        for entry in untrained
        if entry.row in costs
    ]
    if not left:
        return
    workers = len(reproduce.environments(options.training.workers, reproduce.devices(untrained)))
    seconds = sum(left) / len(left) * len(untrained) / workers
    log.info(
        f"training {len(untrained)} runs, {workers} at a time: about {duration(seconds)} at the measured step times, "
        "without evaluations"
    )


def variants_of(axes: Sequence[str]) -> list[str]:
    """Return the ablations of the given axes.

    Raises:
        UserError: An axis is unknown.
    """
    wanted: dict[str, None] = {}
    for axis in axes:
        if axis not in AXES and axis not in ABLATIONS:
            raise UserError(f"--axes: {unknown('axis or ablation', axis, [*AXES, *ABLATIONS])}")
        wanted |= dict.fromkeys(AXES.get(axis, (axis,)))
    return list(wanted)


def _keys(configs: Mapping[str, Config]) -> dict[str, str]:
    """Return the key of each variant in records: a hash of its configuration, ignoring the seed."""
    return {row: jobs.digest(dataclasses.replace(config, seed=0)) for row, config in configs.items()}


def _known(rows: Sequence[records.Row], kind: str, configs: Mapping[str, Config]) -> dict[str, records.Row]:
    """Return the last record of each variant.

    Args:
        rows: Records of any bench.
        kind: "costs" or "counts".
        configs: Configurations by the name of the variant.
    """
    keys = _keys(configs)
    # A ratio is valid only for the full method that it was measured against.
    found = {
        row["cell"]: row
        for row in rows
        if row["bench"] == "ablate" and row.get("kind") == kind and row["full"] == keys[REMIXMATCH]
    }
    return {variant: found[key] for variant, key in keys.items() if key in found}


def _once(path: Path, configs: Mapping[str, Config], measure: Any) -> dict[str, records.Row]:
    """Return the cost of each variant, read from a file, or measured and appended to it.

    If a variant cannot be measured, warn and leave it out; the next call tries again.

    Args:
        path: File of the records.
        configs: Configurations by the name of the variant, the full method first.
        measure: Function that takes the name of a variant and returns its cost.
    """
    keys, known = _keys(configs), _known(records.read(path), "costs", configs)
    missing, begin = [variant for variant in configs if variant not in known], time.monotonic()
    for number, variant in enumerate(missing, 1):
        try:
            cost = measure(variant)
        except (RuntimeError, UserError) as error:
            log.warning(f"{variant}: cannot measure its cost ({' '.join(str(error).split())})")
            continue
        device = pick_device(configs[variant])
        known[variant] = records.record(
            "ablate", device, kind="costs", preset=configs[variant].preset, variant=variant, cell=keys[variant],
            full=keys[REMIXMATCH], **cost,
        )  # fmt: skip
        records.append(path, known[variant])
        print(f"{variant}: " + ", ".join(f"{name} {value:.4g}" for name, value in cost.items()), flush=True)
        left = (time.monotonic() - begin) / number * (len(missing) - number)
        log.info(f"timed {number} of {len(missing)} variants" + (f"; about {duration(left)} left" if left else ""))
    return {variant: known[variant] for variant in configs if variant in known}


def _collect(entries: Sequence[Entry], configs: Mapping[str, Config], out: Path, path: Path) -> None:
    """Append a record for every finished job and measured variant that the file lacks."""
    there, measured = records.read(path), records.read(out / MEASURED)
    for row in _known(measured, "costs", configs).values():
        if row not in there:
            records.append(path, row)
    table_results.collect(entries, out, path)


def time_step(config: Config, full: Config, options: AblateOptions) -> dict[str, float]:
    """Time a variant's step, including views, in alternation with the full method's.

    Returns:
        "step_ms", median milliseconds per step; "ratio", the median ratio to the full method's step over the rounds,
        with quartiles "ratio_low" and "ratio_high"; "images_per_second", trained images per second; "memory_mib", peak
        memory of the GPU, or of the process on a CPU.

    Raises:
        RuntimeError: One of the two cannot be run.
    """
    with _worker(config) as own, _worker(full) as other:
        pair = {"variant": own, "full": other}
        for process in pair.values():
            process.ready()
        first = max(process.ask("sample 1") for process in pair.values())
        steps = math.ceil(options.seconds / (first * config.view_steps))
        taken = sample_interleaved(pair, options.repeats, steps)
        memory = own.ask("memory")
    ratios = [variant / whole for variant, whole in zip(taken["variant"], taken["full"], strict=True)]
    low, high = np.percentile(ratios, (25, 75)).tolist()
    seconds = median(taken["variant"])
    return {
        "step_ms": 1e3 * seconds, "ratio": median(ratios), "ratio_low": low, "ratio_high": high,
        "images_per_second": trained_samples(config) / seconds, "memory_mib": memory,
    }  # fmt: skip


def _worker(config: Config) -> StepWorker:
    return StepWorker(dataclasses.asdict(config), config.views)


def _counted(config: Config) -> dict[str, float]:
    """Return launches and gigabytes of the captured step on a GPU; empty if `bench count` has not counted it."""
    images = IMAGES.get(config.dataset)
    if images is None:
        return {}
    row = counted(config, "bf16" if config.precision == "auto" else config.precision, images)
    return {"launches": row["launches"], "gigabytes": row["bytes"] / 1e9} if row else {}


def write(
    name: str,
    entries: Sequence[Entry],
    found: Mapping[str, jobs.Status],
    costs: Mapping[str, Mapping[str, Any]],
    counts: Mapping[str, Mapping[str, Any]],
    out: Path,
    options: AblateOptions,
) -> None:
    """Write ablate.csv, table.md and chart.png from the results so far, and print the table."""
    lines = table_results.make_lines("ablation", entries, found)
    variants = [AblationRow(line.row, costs.get(line.row, {}), counts.get(line.row, {}), line) for line in lines]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "ablate.csv", to_csv(name, entries, found, variants), shared=True)
    title = table_results.title(f"{name}, ablations", entries, options.training.steps_scale)
    text = markdown(title, variants)
    write_text(out / "table.md", text, shared=True)
    print(text, end="")
    if any(variant.cost or variant.line.from_full for variant in variants):
        from engine.studies import charts  # Importing matplotlib takes a second.

        charts.cost_and_benefit(variants, title, out / "chart.png")
    print(f"\n{out / 'table.md'}, ablate.csv, chart.png")
