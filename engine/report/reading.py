"""Reading of runs from their folders, for a report."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.config import Config, check_run_folder, load_config
from engine.config.methods import with_method
from engine.config.presets import PRESETS
from engine.errors import UserError
from engine.runs.folder import read_split, read_summary
from engine.runs.headline import Evaluations, evaluations_of, unequal_classes
from engine.runs.history import read_history, read_results
from engine.runs.progress import METRICS, read_metrics
from pipelines.files import read_json

REFERENCE = "remixmatch"  # the table row that others are compared with
SUMMED_UP = {"steps", "test_accuracy", "median_last_20", "train_seconds", "images_per_second"}
NAMED = ("preset", "method", "seed")  # fields in a group's name, or different within a group


@dataclass(frozen=True, eq=False)
class RunData:
    """A finished or unfinished run.

    Attributes:
        folder: Folder of the run.
        name: Unique name on the page.
        group: Name shared by runs that differ only in their seeds.
        config: Configuration of the run.
        summary: Content of summary.json; empty if the run is unfinished, also if it was given more steps.
        split: Content of split.json.
        metrics: Objects of metrics.jsonl.
        history: Records of history.jsonl.
        results: Arrays of results.npz; empty if the run is unfinished, or if the file is missing or damaged.
        profile: Names of profiled ranges and their shares of a step's time, in 0..1.
    """

    folder: Path
    name: str
    group: str
    config: Config
    summary: dict[str, Any]
    split: dict[str, Any]
    metrics: list[dict[str, float]]
    history: list[dict[str, Any]]
    results: dict[str, np.ndarray]
    profile: list[tuple[str, float]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; () if split.json is missing or damaged."""
        return tuple(map(str, self.split.get("class_names", ())))

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return bool(self.summary)

    @property
    def evaluations(self) -> Evaluations:
        """Numbers of evaluations of a finished run."""
        return evaluations_of(self.summary, self.config)

    @property
    def recalls(self) -> dict[str, float | None]:
        """Recall of each class at the last evaluation, in percent; {} if unfinished or of an earlier version."""
        return self.summary.get("recall", {})

    def recall(self, name: str) -> float | None:
        """Return the recall of a class; None if it is unknown."""
        return self.recalls.get(name)

    @property
    def unequal(self) -> bool:
        """Whether classes are unequal; see `unequal_classes`."""
        return unequal_classes(self.summary, self.config)

    def error(self, median_first: bool) -> float | None:
        """Test error in percent, the median over the last evaluations or the last; None if the run is unfinished."""
        if not self.done:
            return None
        return 100.0 - self.summary["median_last_20" if median_first else "test_accuracy"]

    @property
    def last_step(self) -> int:
        """Steps done, according to the metrics."""
        return int(self.metrics[-1]["step"])

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric."""
        rows = [row for row in self.metrics if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


@dataclass(frozen=True)
class Found:
    """Content of a page.

    Attributes:
        runs: The runs, at least one.
        table: Content of table.json in a folder of `reproduce`; for a folder of `ablate`, "title", "cells" and "costs"
            from ablate.csv; otherwise empty.
        left_out: One message for each run without metrics.
    """

    runs: list[RunData]
    table: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def read(paths: Sequence[Path]) -> Found:
    """Read runs, and folders of runs.

    Raises:
        UserError: A path contains no run with metrics, or a run whose configuration cannot be read.
    """
    if not paths:
        raise UserError("report requires the folder of a run, or a folder of runs")
    folders: dict[Path, None] = {}
    tables, left_out = [], []
    for path in paths:
        check_run_folder(path)
        inside = [path] if (path / "config.json").is_file() else _runs_in(path)
        begun = [folder for folder in inside if read_metrics(folder / METRICS)]
        if not inside:
            raise UserError(f"{path} contains no run: neither it nor its subfolders have a config.json")
        if not begun:
            raise UserError(f"{path} has nothing to report yet: metrics.jsonl is missing or empty")
        waiting = [folder for folder in inside if folder not in begun]
        left_out += [f"{folder.name} has no metrics: not started, or failed early" for folder in waiting]
        folders |= dict.fromkeys(begun)
        if inside != [path]:
            tables.append(read_json(path / "table.json") or read_ablation(path, inside))
    table = tables[0] if len(paths) == 1 and tables else {}
    cells = _cells_of(table)
    places = {name: place for place, name in enumerate(cells)}
    folders = dict.fromkeys(
        sorted(folders, key=lambda folder: places.get(folder.name, len(places)))
    )  # in the table's order
    rows = {name: str(cell["row"]) for name, cell in cells.items()}
    configs = {folder: load_config(folder / "config.json") for folder in folders}
    groups = _groups(configs, rows)
    names = _names(list(folders), cells)
    runs = [_read_run(folder, names[folder], groups[folder], configs[folder]) for folder in folders]
    # The reference first, and the runs of a group together.
    order = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    full = {run.group for run in runs if rows.get(run.folder.name) == REFERENCE}
    if len(paths) == 1:
        runs.sort(key=lambda run: (run.group not in full, order[run.group], run.config.seed))
    return Found(runs, table, left_out)


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/config.json") if path.is_file())


def _read_run(folder: Path, name: str, group: str, config: Config) -> RunData:
    split, summary = read_split(folder), read_summary(folder)
    results = read_results(folder)
    if not summary.keys() >= SUMMED_UP:
        summary = {}
    elif summary["steps"] != config.steps:
        summary, results = {}, None  # the run was given more steps, and these are of its earlier end
    if results and max(results["labels"].max(), results["predicted"].max()) >= len(split.get("class_names", ())):
        results = None  # they have other classes
    return RunData(
        folder=folder,
        name=name,
        group=group,
        config=config,
        summary=summary,
        split=split,
        metrics=read_metrics(folder / METRICS),
        history=read_history(folder),
        results=results or {},
        profile=read_profile(folder / "profile.json"),
    )


def read_ablation(folder: Path, cells: Sequence[Path]) -> dict[str, Any]:
    """Return the runs in a folder of `ablate`, and one row of ablate.csv per variant; empty without such a file.

    Args:
        folder: Folder with ablate.csv.
        cells: Folders of the runs, whose names end with their ID in the "cell" column.
    """
    try:
        with (folder / "ablate.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if {"cell", "variant", "preset", "seed"} <= row.keys()]
    except (OSError, ValueError, csv.Error):
        return {}
    names = {cell.name.rpartition("-")[2]: cell.name for cell in cells}
    known = [{**row, "cell": names[row["cell"]], "row": row["variant"]} for row in rows if row["cell"] in names]
    title = f"{', '.join(dict.fromkeys(row['preset'] for row in rows))}, ablated"
    return {"title": title, "cells": known, "costs": list({row["variant"]: row for row in rows}.values())}


def read_profile(path: Path) -> list[tuple[str, float]]:
    """Return names and shares of a profile's ranges, the largest first; none if the file is missing or invalid."""
    ranges = read_json(path).get("ranges")
    found = [
        (name, part["share"])
        for name, part in (ranges.items() if isinstance(ranges, dict) else ())
        if isinstance(part, dict) and isinstance(part.get("share"), (int, float))
    ]
    return sorted(found, key=lambda each: -each[1])


def _names(folders: Sequence[Path], cells: Mapping[str, Mapping[str, Any]]) -> dict[Path, str]:
    """Name runs by table row and seed, or by as many of the last parts of their paths as make the names unique."""
    presets = {cell.get("preset") for cell in cells.values()}
    if all(folder.name in cells for folder in folders):
        found = {}
        for folder in folders:
            cell = cells[folder.name]
            words = [f"{cell.get('preset')}"] if len(presets) > 1 else []
            found[folder] = " ".join([*words, str(cell["row"]), "seed", str(cell.get("seed"))])
        if len(set(found.values())) == len(folders):
            return found
    for parts in range(1, max(len(folder.resolve().parts) for folder in folders)):
        found = {folder: "/".join(folder.resolve().parts[-parts:]) for folder in folders}
        if len(set(found.values())) == len(folders):
            break
    return found


def _cells_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cells of a table by the names of their folders."""
    cells = table.get("cells")
    return {
        str(cell["cell"]): cell
        for cell in (cells if isinstance(cells, list) else ())
        if isinstance(cell, dict) and {"cell", "row"} <= cell.keys()
    }


def _groups(configs: dict[Path, Config], rows: dict[str, str]) -> dict[Path, str]:
    """Return a short name that runs with different seeds share: the table row, or method and changed fields."""
    changes = {folder: _changes(config) for folder, config in configs.items()}
    shared = set.intersection(*map(set, changes.values()))
    several = len({config.preset for config in configs.values()}) > 1
    found = {}
    for folder, config in configs.items():
        words = [config.preset] if several else []
        if folder.name in rows:
            words.append(rows[folder.name])
        else:
            usual = PRESETS[config.preset].method if config.preset in PRESETS else ""
            if not several or config.method != usual:
                words.append(config.method)
            words += [each for each in changes[folder] if each not in shared]
        found[folder] = ", ".join(words)
    return found


def _changes(config: Config) -> list[str]:
    """Return the fields that differ from the preset with the run's method."""
    base = PRESETS.get(config.preset, Config())
    if config.method != base.method:
        base = with_method(base, config.method)
    return [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(Config)
        if field.name not in NAMED and getattr(config, field.name) != getattr(base, field.name)
    ]
