"""Folders of runs: their default location, and whether a folder already contains a run.

This module does not import torch, so that errors are reported before that takes its time.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from engine.config.config import RESUMABLE, Config, changed_fields, load_config
from engine.config.presets import PRESETS
from engine.errors import UserError
from pipelines.files import read_json

RUNS = Path("runs")


def default_folder(config: Config, resume: bool) -> Path:
    """Return the default folder of a run: `runs/PRESET-seedN`, or `runs/PRESET-METHOD-seedN` for another method.

    Repetitions get a number appended. When resuming, return the newest existing one.
    """
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
    begun = (folder / "config.json").exists()
    if begun and not resume:
        raise UserError(f"{folder} already contains a run; use --resume or a different --out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out must be a folder")
    if begun:
        _check_same_run(load_config(folder / "config.json"), config, folder)
    return begun


def _check_same_run(old: Config, new: Config, folder: Path) -> None:
    differing = changed_fields(old, new, ignored=RESUMABLE)
    if differing:
        raise UserError(f"{folder} was started with another configuration: {'; '.join(differing)}")
    if new.steps < old.steps:
        raise UserError(
            f"{folder} was started with --steps {old.steps}; it can be increased, but not reduced to {new.steps}"
        )


def read_classes(folder: Path) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Return a run's class names, and (H, W) of its images.

    Raises:
        UserError: The run's split.json is missing or damaged.
    """
    found = read_json(folder / "split.json")
    try:
        height, width = found["sides"]
        return tuple(found["class_names"]), (height, width)
    except (ValueError, KeyError, TypeError):
        preset = read_json(folder / "config.json").get("preset", "PRESET")
        raise UserError(
            f"{folder / 'split.json'} is missing or damaged; to restore it, run "
            f"remixmatch train {preset} --out {shlex.quote(str(folder))} --resume"
        ) from None
