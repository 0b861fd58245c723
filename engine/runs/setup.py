"""Setup of a run: validate and complete the configuration, open the data, check the folder.

The command line, `engine.api`, studies, benchmarks and profiles all start here. This module does not import torch, so
that errors are reported before that takes its time.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.checks import FOLDER, PYTHON, check_data, check_name, check_seed, read_prior, resolve, validate
from engine.config.config import Config, config_json
from engine.errors import UserError
from engine.runs.folder import SPLIT, check_folder, read_split
from engine.runs.identity import describe, differences
from pipelines.data.cache import DataError, DataSet
from pipelines.data.datasets import DATASETS
from pipelines.files import checked_json, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSetup:
    """A run that is ready to train.

    Attributes:
        config: Complete configuration; fields that depend on the data are resolved.
        data: The data set named by `config`, with the unlabeled images of the run.
        split: (labels,) int64, indices of the labeled training images.
        folder: Folder of the run; None if nothing is saved.
        resumed: Whether the folder already contains this run.
    """

    config: Config
    data: DataSet
    split: np.ndarray
    folder: Path | None = None
    resumed: bool = False

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Content of split.json."""
        before = read_split(self.folder) if self.folder else {}
        return describe(self.config, self.data, self.split, before)


def setup_run(
    config: Config,
    folder: Path | None = None,
    resume: bool = False,
    ranks: int = 1,
    class_prior: Path | None = None,
    data: DataSet | None = None,
) -> RunSetup:
    """Set up a run without writing anything.

    Args:
        config: Configuration; fields that depend on the images may be unresolved (`network` auto, `max_shift` -1).
        folder: Folder of the run, if anything is saved.
        resume: Whether the folder may already contain this run.
        ranks: Number of ranks that will train it.
        class_prior: A file with the known probability of each class, instead of `class_distribution`.
        data: The data set named by `config`, if it is already open.

    Raises:
        UserError: A value is invalid, the data are missing or do not match, or the folder contains another run.
    """
    validate(config, ranks)
    if not (resume and folder and (folder / "config.json").exists()):  # Earlier versions allowed larger seeds.
        check_seed(config.seed)
    data = data or open_data(config.dataset, begun=resume)
    config = resolve(config, data)
    if class_prior:
        config = dataclasses.replace(config, class_distribution=read_prior(class_prior, data.classes))
    split, data = check_data(config, data)
    try:
        resumed = check_folder(config, folder, resume) if folder else False
    except UserError:
        if folder and resume:  # The size of the images decides other settings, which are not the cause.
            _check_same_size(config, data, folder)
        raise
    setup = RunSetup(config, data, split, folder, resumed)
    if folder:
        _check_same_data(setup, folder)
    return setup


def open_data(name: str, begun: bool = False) -> DataSet:
    """Open a data set by its name.

    Args:
        name: Name of the data set.
        begun: Whether it is for a run that exists; see `pipelines.data.folder.open_folder`.

    Raises:
        UserError: The name is unknown, or the data set has not been prepared.
    """
    check_name(name)
    if name == "folder":
        raise UserError("preset 'folder' requires --data DIR, for example: remixmatch train folder --data pets/")
    if name == PYTHON:
        raise UserError(
            "this run's data were given in Python: continue it there with train(..., data=..., resume=True), and "
            "evaluate it with load(...).predict(...)"
        )
    try:
        if name.startswith(FOLDER):
            from pipelines.data.folder import open_folder

            return open_folder(Path(name.removeprefix(FOLDER)), earlier_rules=begun)
        return DATASETS[name]()
    except DataError as error:
        raise UserError(str(error)) from None
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


def write_run_files(setup: RunSetup) -> None:
    """Write the configuration and the split to the run's folder."""
    folder = setup.folder
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SPLIT, checked_json(setup.identity))
    write_text(folder / "config.json", config_json(setup.config))


def _check_same_size(config: Config, data: DataSet, folder: Path) -> None:
    """Raise UserError if a run was started with images of another size."""
    before = read_split(folder)
    sides = tuple(before.get("sides", data.sides))
    if before.get("dataset") == config.dataset and sides != data.sides:
        was, now = (f"{width}x{height}" for height, width in (sides, data.sides))
        raise _other_data(folder, "size of the images", f"restore them ({was} pixels; now {now})")


def _check_same_data(setup: RunSetup, folder: Path) -> None:
    """Raise UserError if a run was started with other data."""
    before = read_split(folder)
    if setup.resumed and not before:
        log.warning(f"{folder / SPLIT} is missing or damaged; it is made again from the data as they are now")
    if before and (found := differences(before, setup.identity)):
        raise _other_data(folder, ", ".join(found))


def _other_data(folder: Path, differing: str, fix: str = "restore them") -> UserError:
    return UserError(
        f"{folder} was started with different data; these differ: {differing}; {fix}, or start a new run with another "
        "--out"
    )
