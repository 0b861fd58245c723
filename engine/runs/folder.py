"""A run's folder before and while it trains: where it is, whether it is this run's, and what says so in it.

Nothing in here needs torch: a mistake is told before torch is imported.
"""

from __future__ import annotations

from pathlib import Path

from engine.config.config import RESUMABLE, Config, changed_fields, load_config
from engine.config.presets import PRESETS
from engine.errors import UserError
from pipelines.files import read_json

RUNS = Path("runs")


def default_folder(config: Config, resume: bool) -> Path:
    """Where a run goes that names no folder: `runs/PRESET-seedN`, numbered on for a repetition.

    With another method than the preset's, its name follows the preset's.

    Resuming takes the newest of them.
    """
    another = config.preset in PRESETS and PRESETS[config.preset].method != config.method
    name = f"{config.preset}{f'-{config.method}' if another else ''}-seed{config.seed}"
    folders = [RUNS / name]
    while folders[-1].exists():
        folders.append(RUNS / f"{name}-{len(folders) + 1}")
    return folders[-2] if resume and len(folders) > 1 else folders[-1]


def check_folder(config: Config, folder: Path, resume: bool) -> bool:
    """Whether the folder holds this very run.

    Raises:
        UserError: it holds another one, or this one and nobody asked to resume it; it is a file.
    """
    begun = (folder / "config.json").exists()
    if begun and not resume:
        raise UserError(f"{folder} holds a run already; choose another --out, or go on with it by --resume")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out takes a folder")
    if begun:
        _check_same_run(load_config(folder / "config.json"), config, folder)
    return begun


def _check_same_run(old: Config, new: Config, folder: Path) -> None:
    differing = changed_fields(old, new, ignored=RESUMABLE)
    if differing:
        raise UserError(f"{folder} was begun with another configuration: {'; '.join(differing)}")
    if new.steps < old.steps:
        raise UserError(f"{folder} was begun with {old.steps} steps; --steps may grow, not shrink to {new.steps}")


def read_classes(folder: Path) -> tuple[tuple[str, ...], tuple[int, int]]:
    """A run's class names, and (H, W) of its images.

    Raises:
        UserError: the file that says so is missing or damaged.
    """
    found = read_json(folder / "split.json")
    try:
        height, width = found["sides"]
        return tuple(found["class_names"]), (height, width)
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'split.json'} is missing or damaged; remixmatch train ... --resume writes it again"
        ) from None
