"""Folders of runs: their default location, whether one already contains a run, and tolerant reading of its files.

This module does not import torch, so that errors are reported before that takes its time.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from engine.config.checks import check_seed
from engine.config.config import RESUMABLE, Config, changed_fields, load_config
from engine.config.presets import PRESETS
from engine.errors import UserError
from pipelines.files import read_json

RUNS = Path("runs")
CONFIG, SPLIT, CHECKPOINTS = "config.json", "split.json", "checkpoints"  # Names in a run's folder.
# What the files are like; see `pipelines.files.fits`. Runs of earlier versions lack some keys.
_SPLIT = {
    "class_names?": [str], "sides?": [int], "labels?": int, "sha256?": str, "images_sha256?": str, "classes?": [str],
}  # fmt: skip
_SUMMARY = {
    "steps": int, "test_accuracy": float, "median_last_20": float, "train_seconds": float, "cpu_seconds?": float,
    "images_per_second?": float, "device": str, "versions": {str: str}, "commit?": str, "ranks?": int,
    "balanced_accuracy?": float, "geometric_mean?": float, "recall?": {str: (float, None)},
    "evaluations?": int, "evaluations_after_ramp?": int, "paper_error?": float, "paper_deviation?": (float, None),
}  # fmt: skip


def default_folder(config: Config, resume: bool) -> Path:
    """Return the default folder of a run: `runs/PRESET-seedN`, or `runs/PRESET-METHOD-seedN` for another method.

    Repetitions get a number appended. When resuming, return the newest existing one.

    Raises:
        UserError: The seed is not allowed.
    """
    check_seed(config.seed)
    another = config.preset in PRESETS and PRESETS[config.preset].method != config.method
    name = f"{config.preset}{f'-{config.method}' if another else ''}-seed{config.seed}"
    folders = [RUNS / name]
    while folders[-1].exists():
        folders.append(RUNS / f"{name}-{len(folders) + 1}")
    return folders[-2] if resume and len(folders) > 1 else folders[-1]


def check_folder(config: Config, folder: Path, resume: bool) -> bool:
    """Return whether the folder already contains this run.

    Raises:
        UserError: It contains another run, or this run without `resume`; or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out must be a folder")
    begun = has_run(folder)
    if begun and not resume:
        raise UserError(f"{folder} already contains a run; use --resume or a different --out")
    if begun:
        _check_same_run(run_config(folder), config, folder)
    return begun


def has_run(folder: Path) -> bool:
    """Return whether a folder contains a run: its configuration, or at least its checkpoints."""
    return (folder / CONFIG).exists() or any((folder / CHECKPOINTS).glob("step-*.pt"))


def run_config(folder: Path) -> Config:
    """Return the configuration of the run in a folder.

    If config.json is missing or damaged, use the configuration in the newest checkpoint, with a warning.

    Raises:
        UserError: The folder contains no run, or neither file can be read.
    """
    try:
        return load_config(folder / CONFIG)
    except UserError:
        # Imported only here, since it imports torch.
        from engine.runs.checkpoint import newest_config

        config = newest_config(folder / CHECKPOINTS)
        if config is None:
            raise
        return config


def _check_same_run(old: Config, new: Config, folder: Path) -> None:
    differing = changed_fields(old, new, ignored=RESUMABLE)
    if differing:
        raise UserError(f"{folder} was started with another configuration: {'; '.join(differing)}")
    if new.steps < old.steps:
        raise UserError(
            f"{folder} was started with --steps {old.steps}; it can be increased, but not reduced to {new.steps}"
        )


def read_split(folder: Path) -> dict[str, Any]:
    """Return the content of a run's split.json; an empty one if the file is missing or damaged."""
    return read_json(folder / SPLIT, _SPLIT)


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the content of a run's summary.json; an empty one if the file is missing or damaged."""
    return read_json(folder / "summary.json", _SUMMARY)


def read_classes(folder: Path) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Return a run's class names, and (H, W) of its images.

    Raises:
        UserError: The run's split.json is missing or damaged.
    """
    found = read_split(folder)
    classes, sides = found.get("class_names"), found.get("sides", [])
    if classes and len(sides) == 2 and min(sides) > 0:
        return tuple(classes), (sides[0], sides[1])
    preset = read_json(folder / CONFIG).get("preset", "PRESET")
    raise UserError(
        f"{folder / SPLIT} is missing or damaged; to restore it, run "
        f"remixmatch train {preset} --out {shlex.quote(str(folder))} --resume"
    )
