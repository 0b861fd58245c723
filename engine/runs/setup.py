"""A run is set up once: its configuration is checked and completed, its data are opened, its folder is looked at.

Whoever trains begins here: the command line, `engine.api`, studies, benches and profiles. Nothing in here needs torch,
so a mistake is told before torch is imported.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.config.checks import FOLDER, check_data, check_name, read_prior, resolve, validate
from engine.config.config import Config, config_json
from engine.errors import UserError
from engine.runs.folder import check_folder
from pipelines.cache import DataError, DataSet
from pipelines.datasets import DATASETS
from pipelines.files import read_json, write_text
from pipelines.splits import digest, image_digest


@dataclass(frozen=True)
class RunSetup:
    """A run that can be trained.

    Attributes:
        config: complete: nothing in it is left to be found out from the data.
        data: the data set that it names.
        split: (labels,) int64, the training images that keep their label.
        folder: of the run; None for steps of which nothing is kept.
        resumed: whether the folder holds this very run already.
    """

    config: Config
    data: DataSet
    split: np.ndarray
    folder: Path | None = None
    resumed: bool = False


def setup_run(
    config: Config,
    folder: Path | None = None,
    resume: bool = False,
    ranks: int = 1,
    class_prior: Path | None = None,
    data: DataSet | None = None,
) -> RunSetup:
    """Set up a run; nothing is written.

    Args:
        config: what is trained. Fields that depend on the images (`network` auto, `max_shift` -1) may be open.
        folder: of the run, if it keeps anything.
        resume: whether the folder may hold this very run already.
        ranks: that will train it.
        class_prior: a file with the known probability of each class, instead of `class_distribution`.
        data: the data set that `config` names, where it is open already.

    Raises:
        UserError: a value that cannot work, data that are not there or do not fit, or a folder that holds another run.
    """
    validate(config, ranks)
    data = data or open_data(config.dataset)
    config = resolve(config, data)
    if class_prior:
        config = dataclasses.replace(config, class_distribution=read_prior(class_prior, data.classes))
    split = check_data(config, data)
    resumed = check_folder(config, folder, resume) if folder else False
    return RunSetup(config, data, split, folder, resumed)


def open_data(name: str) -> DataSet:
    """Open a data set by its name.

    Raises:
        UserError: there is none of that name, or it has not been prepared.
    """
    check_name(name)
    if name == "folder":
        raise UserError("which folder? give it by --data, as in: remixmatch train folder --data pets/")
    try:
        if name.startswith(FOLDER):
            from pipelines.folder import open_folder

            return open_folder(Path(name.removeprefix(FOLDER)))
        return DATASETS[name]()
    except DataError as error:
        raise UserError(str(error)) from None
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


def write_run_files(setup: RunSetup) -> None:
    """Write what makes a folder this run's: its configuration and its split.

    Raises:
        UserError: the folder was begun with other images under the same numbers.
    """
    folder, content = setup.folder, _split_json(setup)
    assert folder is not None
    _check_same_images(folder, content)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "split.json", content)
    write_text(folder / "config.json", config_json(setup.config))


def _check_same_images(folder: Path, content: str) -> None:
    before = read_json(folder / "split.json").get("images_sha256")
    if before and before != json.loads(content)["images_sha256"]:
        raise UserError(f"{folder} was begun with other images: those of its labels have changed since")


def _split_json(setup: RunSetup) -> str:
    config, split, data = setup.config, setup.split, setup.data
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
