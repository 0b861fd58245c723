"""The tables of `remixmatch reproduce`: their jobs in order, and the errors that the paper reports.

Each training run is a job (see `engine.studies.jobs`). The most informative jobs come first: one seed of everything
before the second seed of anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.commands.options import TrainOptions, parse_train
from engine.config.checks import validate
from engine.config.config import Config, changes
from engine.config.methods import ABLATIONS, METHODS, ablate, with_method
from engine.config.presets import PUBLISHED, PublishedError, preset
from engine.config.scaling import scaled, trained_samples
from engine.errors import UserError, unknown
from engine.runs.setup import open_data, setup_run
from engine.studies.jobs import Job
from pipelines.data.cache import DataSet

REMIXMATCH = "remixmatch"
_NO_SEED = -1  # No flag can have this value.

BASELINES = ("mixmatch", "fixmatch", "uda", "pseudo-label", "supervised")


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        text: One-line description.
        presets: The presets it covers.
        rows: Methods, or the full method and its ablations; the full method comes first.
        seeds: Default seeds.
        kind: Whether rows are methods, ablations, or any of both and of VARIANTS.
        equal_samples: Whether each run trains on as many samples as its method with K = 1, in fewer steps.
    """

    text: str
    presets: tuple[str, ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    kind: Literal["method", "ablation", "variant"] = "method"
    equal_samples: bool = False


# Rows that are neither methods nor ablations.
MARGINALS: dict[str, dict[str, Any]] = {
    "marginal=labels": dict(marginal="labels"),
    "marginal=uniform": dict(marginal="uniform"),
}
K_OF_METHODS: dict[str, dict[str, Any]] = {
    f"{method}-k{k}": dict(method=method, k=k)
    for method in (REMIXMATCH, "fixmatch", "freematch", "softmatch")
    for k in (1, 2, 4, 8)
}
VARIANTS = MARGINALS | K_OF_METHODS

_OVER_K = PaperTable(
    "digits with K = 1, 2, 4 and 8 for four methods, equal steps",
    ("digits-40",),
    tuple(K_OF_METHODS),
    (0, 1, 2, 3, 4),
    kind="variant",
)

TABLES = {
    "cifar10": PaperTable(
        "CIFAR-10 with 250, 1 000 and 4 000 labels, and baselines",
        ("cifar10-250", "cifar10-1000", "cifar10-4000"),
        (REMIXMATCH, *BASELINES),
    ),
    "svhn": PaperTable(
        "SVHN with 250, 1 000 and 4 000 labels, and baselines",
        ("svhn-250", "svhn-1000", "svhn-4000"),
        (REMIXMATCH, *BASELINES),
    ),
    "stl10": PaperTable("STL-10 with 1 000 labels, K = 4 and 1", ("stl10-1000", "stl10-1000-k1"), (REMIXMATCH,)),
    "few-labels": PaperTable(
        "CIFAR-10 and SVHN with 40 labels", ("cifar10-40", "svhn-40", "svhn-extra-40"), (REMIXMATCH,)
    ),
    # The authors' scripts use split 3.
    "ablation": PaperTable(
        "ReMixMatch with one component removed at a time, CIFAR-10 with 250 labels",
        ("cifar10-250",),
        (REMIXMATCH, *ABLATIONS),
        (3,),
        "ablation",
    ),
    "digits": PaperTable(
        "scikit-learn's digits with 40 labels, and baselines", ("digits-40",), tuple(METHODS), (0, 1, 2, 3, 4)
    ),
    "fashion": PaperTable(
        "Fashion-MNIST at 16x16 with 100 labels, and baselines", ("fashion-100-small",), tuple(METHODS)
    ),
    "imbalance": PaperTable(
        "Fashion-MNIST at 16x16 with unequal classes, ratios 10 and 100: targets of alignment, and FixMatch",
        ("fashion-lt10-small", "fashion-lt100-small"),
        (REMIXMATCH, *MARGINALS, "no-alignment", "fixmatch"),
        kind="variant",
    ),
    "k": _OVER_K,
    "k-samples": dataclasses.replace(
        _OVER_K, text="the same with equal numbers of trained samples", equal_samples=True
    ),
}  # fmt: skip

_PAPER = "ReMixMatch (arXiv 1911.09785)"
# Test errors in percent, by preset and method.
PUBLISHED_ERRORS: dict[tuple[str, str], PublishedError] = {
    **{(name, REMIXMATCH): figure for name, figure in PUBLISHED.items()},
    **{
        (f"{data}-{labels}", "mixmatch"): PublishedError(error, None, f"{_PAPER}, table 1")
        for data, errors in {"cifar10": (11.08, 7.75, 6.24), "svhn": (3.78, 3.27, 2.89)}.items()
        for labels, error in zip((250, 1000, 4000), errors, strict=True)
    },
}
# Measured on one split, so the full method's error differs from that over five splits.
PUBLISHED_ABLATIONS: dict[tuple[str, str], PublishedError] = {
    ("cifar10-250", name): PublishedError(error, None, f"{_PAPER}, section 4.3")
    for name, error in {
        REMIXMATCH: 5.94, "k=1": 7.32, "k=2": 6.74, "k=4": 6.21, "k=16": 5.93, "no-rotation": 6.08, "no-premixup": 6.66,
        "no-alignment": 7.28, "l2": 17.28, "no-strong": 12.51, "no-weak": 29.36,
    }.items()
}  # fmt: skip


def compared_with(row: str) -> str:
    """Return the row that a row's differences are taken from: the same method with K = 1, or ReMixMatch."""
    return f"{K_OF_METHODS[row]['method']}-k1" if row in K_OF_METHODS else REMIXMATCH


def papers_difference(row: str, k: int) -> float | None:
    """Return how much an ablation raises the error in the paper, in pp; None if the paper does not report it.

    Args:
        row: Name of the ablation.
        k: K of the full method it is compared with. The paper has all other ablations at K = 8 only.
    """
    errors = {name: figure.error for (_, name), figure in PUBLISHED_ABLATIONS.items()}
    errors["k=8"] = errors[REMIXMATCH]
    full = f"k={k}" if row.startswith("k=") else REMIXMATCH
    return errors[row] - errors[full] if row != REMIXMATCH and row in errors and full in errors else None


@dataclass(frozen=True)
class Entry:
    """A job and its place in a table.

    Attributes:
        row: Name of the method or ablation.
        preset: Name of the preset.
        seed: Seed of the run.
        base: The table's configuration, before --steps-scale and the flags after `--`.
        job: The training run.
    """

    row: str
    preset: str
    seed: int
    base: Config
    job: Job


def make_entries(
    table: PaperTable,
    flags: Sequence[str] = (),
    seeds: Sequence[int] = (),
    rows: Sequence[str] = (),
    presets: Sequence[str] = (),
    steps_scale: float = 1.0,
) -> list[Entry]:
    """Return the jobs of a table in the order in which they start: seed by seed, the full method first.

    Args:
        table: The table.
        flags: Flags of `remixmatch train` for every job.
        seeds: Seeds; by default the table's.
        rows: Methods or ablations; by default the table's.
        presets: Presets; by default the table's.
        steps_scale: See `engine.config.scaling.scaled`.

    Raises:
        UserError: A row is unknown, a job's configuration is invalid, or flags make two jobs identical.
    """
    allowed = {
        "method": METHODS, "ablation": {REMIXMATCH: {}, **ABLATIONS}, "variant": METHODS | ABLATIONS | VARIANTS,
    }[table.kind]  # fmt: skip
    rows = rows or table.rows
    for row in rows:
        if row not in allowed:
            raise UserError(f"--methods: {unknown(table.kind, row, allowed)}")
    rows = tuple(sorted(rows, key=lambda row: row != REMIXMATCH))
    entries = []
    for seed in seeds or table.seeds:
        for row in rows:
            for name in presets or table.presets:
                whole = dataclasses.replace(preset(name), seed=seed)
                base = whole
                if table.kind != "ablation" and row in METHODS:
                    base = with_method(whole, row)
                elif row in VARIANTS:
                    settings = VARIANTS[row]
                    base = dataclasses.replace(with_method(whole, settings.get("method", REMIXMATCH)), **settings)
                elif row != REMIXMATCH:
                    base = ablate(whole, row)
                    if base == whole:  # The ablation's K is the preset's.
                        continue
                if table.equal_samples:
                    single = dataclasses.replace(base, k=1)
                    base = scaled(base, trained_samples(single) / trained_samples(base))
                unseeded = dataclasses.replace(base, seed=_NO_SEED)
                changed = dataclasses.replace(_with_flags(unseeded, tuple(flags)), seed=seed)
                config = scaled(changed, steps_scale)
                label = f"{name}-{row}-seed{seed}"
                try:
                    validate(config)
                except UserError as error:
                    raise UserError(f"{label}: {error}") from None
                entries.append(Entry(row, name, seed, base, Job(label, config)))
    if not entries:
        raise UserError("no jobs left: the preset already has the settings of every given ablation")
    _check_different(entries)
    return entries


def _check_different(entries: Sequence[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.job.digest, entry)
        if other is not entry:
            raise UserError(
                f"{other.job.label} and {entry.job.label} have the same configuration: leave out one of them, or "
                "change the flags after --"
            )


@functools.cache  # Parsing is slow, and the result is the same for each seed.
def _with_flags(config: Config, flags: tuple[str, ...]) -> Config:
    """Apply flags of `remixmatch train` to a configuration without a seed.

    Raises:
        UserError: A flag cannot be shared by all jobs.
    """
    if not flags:
        return config
    options = parse_train(["", *flags], config, "reproduce TABLE --")
    shared = TrainOptions(config)
    for group in ("folder", "ablations", "source", "ranks"):
        for name, value in vars(getattr(options, group)).items():
            if value != getattr(getattr(shared, group), name):
                raise UserError(f"--{name.replace('_', '-')} after -- cannot be shared by all jobs")
    for name in changes(config, options.config).keys() & {"method", "seed"}:
        raise UserError(f"--{name} after -- cannot be shared by all jobs")
    return options.config


def needs_data(entries: Sequence[Entry]) -> bool:
    """Whether the configuration of any job depends on its data."""
    return any(entry.job.config.network == "auto" or entry.job.config.max_shift < 0 for entry in entries)


def with_data(entries: Sequence[Entry]) -> list[Entry]:
    """Complete the jobs' configurations with the settings that depend on their images.

    Raises:
        UserError: A data set is missing, or lacks something that a job needs.
    """
    opened: dict[str, DataSet] = {}
    found = []
    for entry in entries:
        try:
            config = entry.job.config
            opened[config.dataset] = opened.get(config.dataset) or open_data(config.dataset)
            setup = setup_run(config, data=opened[config.dataset])
        except UserError as error:
            raise UserError(f"{entry.job.label}: {error}") from None
        found.append(dataclasses.replace(entry, job=dataclasses.replace(entry.job, config=setup.config)))
    return found
