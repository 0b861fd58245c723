"""`remixmatch data`: prepares data sets, says what is there, and which images a split labels."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from engine.commands.parsing import parse, usage_is_all
from engine.config.checks import FOLDER, folder_name
from engine.config.config import load_config
from engine.errors import UserError
from engine.runs.setup import open_data
from pipelines import cache
from pipelines.cache import DataSet
from pipelines.datasets import DATASETS, PREPARED
from pipelines.splits import RULES, compare, digest, image_digest, read_indices

log = logging.getLogger(__name__)

SUBCOMMANDS = {
    "prepare": "download or read a data set, or a folder of your own images, into the cache",
    "list": "which data sets there are, and which are prepared",
    "info": "sizes, counts by class, mean, and a picture of some images",
    "split": "which images a rule and a seed label",
    "check-split": "compare a run's split, or a list of somebody else, with a rule",
}
_SHOWN = 20  # rows of a long list
_GRID = 10  # images of a class in a picture
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # one of them is there where a GPU can be used


@dataclass
class _Where:
    data_dir: Path | None = None
    """Where caches lie; by default the variable REMIXMATCH_DATA, or ~/.cache/remixmatch."""


@dataclass
class PrepareOptions(_Where):
    """Makes the cache of a data set, or of a folder of images. One that is there already is left alone."""

    name: tyro.conf.Positional[str] = ""
    """Name of a data set, or a folder with train/CLASS/*, unlabeled/* and test/CLASS/*, or with labels.csv."""
    size: int = 0
    """With a folder: side of the images, in pixels; the shorter side is resized to it, the longer one cropped."""
    decoder: Literal["auto", "cpu", "gpu"] = "auto"
    """With a folder: where DALI decodes and resizes JPEGs; auto is a GPU where there is one. The two differ by some
    grey levels, so that one cache is made by one of them."""
    source: Path | None = None
    """A folder in which the original files are looked for before they are downloaded."""
    download: bool = True
    """Whether missing files may be downloaded."""
    again: bool = False
    """Prepare it anew, whatever is there."""


@dataclass
class ListOptions(_Where):
    """Which data sets there are."""


@dataclass
class InfoOptions(_Where):
    """What is in a data set."""

    name: tyro.conf.Positional[str] = ""
    """Name of a data set, or a prepared folder."""
    png: Path | None = None
    """Write a picture with ten images of every class to this file."""
    verify: bool = False
    """Compare the cache with its checksums."""


@dataclass
class SplitOptions(_Where):
    """Which images keep their label."""

    name: tyro.conf.Positional[str] = ""
    """Name of a data set, or a prepared folder."""
    labels: int = 0
    """Labeled images."""
    seed: int = 1
    """Of the split."""
    rule: str = "paper"
    """paper, balanced, usb, torchssl, fixmatch-pytorch or all."""
    json: bool = False
    """Print a JSON object, as a run's split.json."""


@dataclass
class CheckSplitOptions(_Where):
    """Compares a split with a rule. Exit code 1 if they differ."""

    split: tyro.conf.Positional[Path | None] = None
    """A run's folder, or a file that lists rows: JSON, numpy, or one a line."""
    data: str = ""
    """Name of the data set; by default the run's."""
    labels: int = 0
    """Labeled images; by default as many as the list has."""
    seed: int | None = None
    """Of the rule; by default the run's, otherwise 1."""
    rule: str = "paper"
    """paper, balanced, usb, torchssl, fixmatch-pytorch or all."""


def main(argv: Sequence[str]) -> None:
    """Runs the subcommand that the first word names.

    Raises:
        UserError: no such subcommand, or a mistake in its flags.
        KeyboardInterrupt: SIGINT came; says how to go on.
    """
    more = "remixmatch data COMMAND --help says more."
    if usage_is_all(argv, "command", "data COMMAND ...", SUBCOMMANDS, more):
        return
    commands: dict[str, tuple[Any, Callable[[Any], None]]] = {
        "prepare": (PrepareOptions, _prepare),
        "list": (ListOptions, _list),
        "info": (InfoOptions, _info),
        "split": (SplitOptions, _split),
        "check-split": (CheckSplitOptions, _check_split),
    }
    if argv[0] not in commands:
        raise UserError(f"data takes one of {', '.join(commands)}, got '{argv[0]}'")
    kind, run = commands[argv[0]]
    options: Any = parse(kind, f"data {argv[0]}", list(argv[1:]))
    cache.set_data_dir(options.data_dir)
    try:
        run(options)
    except cache.DataError as error:
        raise UserError(str(error)) from None
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from there") from None


def data_name(given: str) -> str:
    """The name of a data set by which it is opened: a folder's begins with FOLDER."""
    if not given:
        raise UserError(f"which data set? there are {', '.join(DATASETS)}, or a folder of images")
    return given if given in DATASETS or given.startswith(FOLDER) else folder_name(given)


@contextmanager
def _progress():
    """A bar for each thing that is done, from when there is something to show: none stands above a mistake."""
    bars: Any = None
    tasks: dict[str, Any] = {}

    def update(what: str, done: int, whole: int) -> None:
        nonlocal bars
        if bars is None:
            from rich.console import Console
            from rich.progress import Progress

            bars = Progress(console=Console(stderr=True))
            bars.start()
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=whole or None)
        bars.update(tasks[what], completed=done, total=whole or None)

    try:
        yield update
    finally:
        if bars is not None:
            bars.stop()


def _prepare(options: PrepareOptions) -> None:
    name = data_name(options.name)
    if name.startswith(FOLDER):
        _prepare_folder(Path(name.removeprefix(FOLDER)), options)
        return
    if name not in PREPARED:
        print(f"{name} is ready: it needs no preparation")
        return
    from pipelines.sources import prepare

    folder = cache.data_dir() / name
    if not options.again:
        try:
            cache.read_description(folder, "")
            print(f"{name} is ready in {folder}")
            return
        except cache.DataError:
            pass
    with _progress() as update:
        prepare(name, options.source, options.download, update)
    print(f"{name} is ready in {folder}: {_sizes(open_data(name))}")


def _prepare_folder(root: Path, options: PrepareOptions) -> None:
    from pipelines.folder import prepare, some

    if not root.exists():
        raise UserError(f"{options.name} is neither a data set ({', '.join(DATASETS)}) nor a folder")
    if not 8 <= options.size <= 1024:
        raise UserError(f"--size must be from 8 to 1024 pixels, got {options.size}")
    with _progress() as update:
        made = prepare(root, options.size, update, device=_decoder(options.decoder), again=options.again)
    for file, why in made.unreadable[:_SHOWN]:
        log.warning(f"{file} is left out: {why}")
    if made.unreadable:
        log.warning(f"{len(made.unreadable)} files cannot be read and were left out")
    for one, other in made.duplicates[:_SHOWN]:
        log.warning(f"{one} and {other} are the same image, in training and in test")
    if made.duplicates:
        log.warning(f"{len(made.duplicates)} images are in training and in test")
    if made.strays:
        log.warning(
            f"{len(made.strays)} image files are left out, since they are neither in train/CLASS/ nor in test/CLASS/ "
            f"nor in unlabeled/: {some(made.strays)}"
        )
    if made.listing.held_out:
        print(f"{made.listing.held_out} labeled images are held out as the test part: there is none")
    print(f"{root} is ready in {made.cache}: {_sizes(open_data(folder_name(root)))}")
    where = f" --data-dir {shlex.quote(str(options.data_dir))}" if options.data_dir else ""
    print(f"train on it: remixmatch train folder --data {shlex.quote(options.name)}{where}")


def _decoder(wanted: str) -> str:
    if wanted == "cpu" or (wanted == "auto" and not any(map(Path.exists, _DRIVERS))):
        return "cpu"  # without importing torch, which takes a second
    from torch import cuda

    if wanted == "gpu" and not cuda.is_available():
        raise UserError("--decoder gpu: torch sees no GPU here; `remixmatch doctor` says what is missing")
    return "gpu" if cuda.is_available() else "cpu"


def _sizes(data: DataSet) -> str:
    labeled = int((data.train_labels >= 0).sum())
    height, width = data.sides
    return (
        f"{len(data.train_images)} training images, {labeled} with a label, {len(data.test_images)} test images, "
        f"{len(data.classes)} classes, {width}x{height}"
    )


def _list(options: ListOptions) -> None:
    for name in DATASETS:
        try:
            print(f"{name:18} {_sizes(open_data(name))}")
        except UserError as error:
            print(f"{name:18} {error}")
    folders = cache.data_dir() / "folders"
    for path in sorted(folders.iterdir()) if folders.is_dir() else ():
        if path.name.startswith("."):  # a lock, or what is not finished
            continue
        try:
            data = cache.open_cache(path, cache.prepare_command("FOLDER", " --size SIZE"))
            print(f"{data.name.removeprefix(FOLDER)}: {_sizes(data)}")
        except cache.DataError as error:
            print(error)


def _info(options: InfoOptions) -> None:
    name = data_name(options.name)
    data = open_data(name)
    if options.verify and name not in ("digits",):
        from pipelines.folder import cache_of, prepare_command

        root = Path(name.removeprefix(FOLDER))
        where = cache_of(root) if name.startswith(FOLDER) else cache.data_dir() / name
        again = prepare_command(root, data.sides[0]) if name.startswith(FOLDER) else cache.prepare_command(name)
        cache.verify(where, f"{again} --again")
        print(f"{where} is as it was written")
    print(_sizes(data))
    print(f"\n{'class':24} {'labeled':>9} {'test':>9}")
    for c, label in enumerate(data.classes):
        print(f"{label:24} {int((data.train_labels == c).sum()):9} {int((data.test_labels == c).sum()):9}")
    mean, deviation = _moments(data.train_images)
    shown = [" ".join(f"{value:.1f}" for value in values) for values in (mean, deviation)]
    print(f"\nmean of the training images by channel {shown[0]}, standard deviation {shown[1]} (0 to 255)")
    if options.png:
        _draw(data, options.png)
        print(f"{_GRID} images of every class: {options.png}")


def _moments(images: np.ndarray, rows: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, over as many images at a time."""
    sums = np.zeros((2, 3))
    for first in range(0, len(images), rows):
        part = images[first : first + rows].astype(np.float64).reshape(-1, 3)
        sums += part.sum(0), np.square(part).sum(0)
    mean, square = sums / (images.size / 3)
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _draw(data: DataSet, path: Path) -> None:
    from PIL import Image

    height, width = data.sides
    grid = np.full((len(data.classes) * height, _GRID * width, 3), 255, dtype=np.uint8)
    for c in range(len(data.classes)):
        for place, row in enumerate(np.flatnonzero(data.train_labels == c)[:_GRID]):
            grid[c * height : (c + 1) * height, place * width : (place + 1) * width] = data.train_images[row]
    try:
        Image.fromarray(grid).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from None


def _rows(rule: str, data: DataSet, labels: int, seed: int) -> np.ndarray:
    if rule not in RULES:
        raise UserError(f"--rule: there is no '{rule}'; there are {', '.join(RULES)}")
    if seed < 0:
        raise UserError(f"--seed must be at least 0, got {seed}")
    try:
        return RULES[rule](data, labels, seed)
    except ValueError as error:
        raise UserError(f"--labels: {error}") from None


def _split(options: SplitOptions) -> None:
    data = open_data(data_name(options.name))
    rows = _rows(options.rule, data, options.labels, options.seed)
    content = {
        "dataset": data.name, "seed": options.seed, "labels": len(rows), "split": options.rule,
        "train_rows": rows.tolist(), "sha256": digest(rows), "images_sha256": image_digest(data.train_images, rows),
    }  # fmt: skip
    if options.json:
        print(json.dumps(content))
        return
    print(" ".join(map(str, rows.tolist())))
    counts = np.bincount(data.train_labels[rows], minlength=len(data.classes))
    print("labels by class: " + ", ".join(f"{name} {n}" for name, n in zip(data.classes, counts, strict=True)))
    print(f"SHA-256 of the rows {content['sha256']}\nSHA-256 of the images {content['images_sha256']}")


def _check_split(options: CheckSplitOptions) -> None:
    if options.split is None:
        raise UserError("data check-split needs a run's folder, or a file with rows")
    name, seed = options.data, options.seed
    path = options.split
    if path.is_dir():
        config = load_config(path / "config.json")
        name, seed, path = name or config.dataset, config.seed if seed is None else seed, path / "split.json"
    if not name:
        raise UserError("of which data set? give it by --data")
    data, seed = open_data(data_name(name)), 1 if seed is None else seed
    try:
        found = read_indices(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if max(found) >= len(data.train_images):
        raise UserError(f"{path} names row {max(found)}; {data.name} has {len(data.train_images)} training images")
    expected = _rows(options.rule, data, options.labels or len(found), seed)
    result = compare(expected, found)
    what = f"rule {options.rule}, {len(expected)} labels of {data.name}, seed {seed}"
    if result.same:
        print(f"the same set: {what}; SHA-256 {digest(expected)}")
        return
    print(f"another set: {what}; {result.common} rows in common")
    for words, rows in (("only the rule has", result.missing), (f"only {path} has", result.extra)):
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        print(f"{words} {len(rows)}: {' '.join(map(str, rows[:_SHOWN]))}{more}")
    sys.exit(1)
