"""A run's folder before and while it trains: where it is, whether it is this run's, and what says so in it.

Nothing in here needs torch: a mistake is told before torch is imported.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from engine.config.config import Config, changed_fields, config_json, load_config
from engine.config.presets import PRESETS
from engine.errors import UserError
from pipelines.data_set import DataSet
from pipelines.files import write_text
from pipelines.splits import digest, image_digest

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


def describe(config: Config, folder: Path, data: DataSet, split: np.ndarray) -> None:
    """Writes what makes a folder this run's: configuration and split.

    Args:
        config: of the run.
        folder: made if missing.
        data: the data set.
        split: (labels,) int64, training images that keep their label.

    Raises:
        UserError: the folder was begun with other images under the same numbers.
    """
    content = _split_json(config, split, data)
    _check_same_images(folder, content)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "split.json", content)
    write_text(folder / "config.json", config_json(config))


def _check_same_run(old: Config, new: Config, folder: Path) -> None:
    differing = changed_fields(dataclasses.replace(old, steps=new.steps, log=new.log), new)
    if differing:
        raise UserError(f"{folder} was begun with another configuration: {'; '.join(differing)}")
    if new.steps < old.steps:
        raise UserError(f"{folder} was begun with {old.steps} steps; --steps may grow, not shrink to {new.steps}")


def _check_same_images(folder: Path, content: str) -> None:
    try:
        before = json.loads((folder / "split.json").read_text(encoding="utf-8")).get("images_sha256")
    except (OSError, json.JSONDecodeError, AttributeError):  # not there, of an earlier version, or damaged
        return
    if before and before != json.loads(content)["images_sha256"]:
        raise UserError(f"{folder} was begun with other images: those of its labels have changed since")


def _split_json(config: Config, split: np.ndarray, data: DataSet) -> str:
    content = {
        "dataset": config.dataset,
        "seed": config.seed,
        "labels": len(split),
        "split": config.split,
        "train_rows": split.tolist(),
        "sha256": digest(split),
        "images_sha256": image_digest(data.train_images, split),
        "classes": [data.classes[c] for c in data.train_labels[split]],
        "class_names": data.classes,
        "sides": data.sides,
    }
    return json.dumps(content) + "\n"


def read_classes(folder: Path) -> tuple[tuple[str, ...], tuple[int, int]] | None:
    """A run's class names, and (H, W) of its images; None where an earlier version has not written them."""
    try:
        found = json.loads((folder / "split.json").read_text(encoding="utf-8"))
        height, width = found["sides"]
        return tuple(found["class_names"]), (height, width)
    except (OSError, ValueError, KeyError, TypeError):
        return None
