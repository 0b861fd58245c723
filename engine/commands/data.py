"""`remixmatch data`: prepare data sets, describe them, and show or check label splits."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from engine.commands.parsing import DataDir, parse, show_usage_if_asked
from engine.config.checks import FOLDER, check_labels, check_size, folder_name
from engine.config.config import Config, field_types, load_config
from engine.config.presets import PRESETS, of_data_set
from engine.config.values import choices, flag_of
from engine.errors import UserError, near_names, printable, unknown
from engine.runs.setup import open_data, setup_run
from pipelines.data import cache
from pipelines.data.cache import DataSet
from pipelines.data.datasets import DATASETS, PREPARED
from pipelines.data.splits import compare, digest, read_indices

log = logging.getLogger(__name__)

SUBCOMMANDS = {
    "prepare": "prepare a data set (downloaded if necessary) or a folder of your own images",
    "list": "list all data sets, and which of them are prepared",
    "info": "show image counts per class, mean and standard deviation, and sample images",
    "split": "show which images a preset, or a rule and a seed, label",
    "check-split": "compare the split of a run, or a list of indices, with a rule",
}
_SHOWN = 20  # Items shown of a long list.
_GRID = 10  # Images per class in a plot.
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # A machine with a usable GPU has one of these.


Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME", help_behavior_hint="(required)")]


@dataclass
class _DataOptions:
    data_dir: DataDir = None


@dataclass
class PrepareOptions(_DataOptions):
    """Prepare a data set or a folder of images for training. Does nothing if it is already prepared."""

    name: Name = ""
    """Name of a data set, or a folder with train/CLASS/*, unlabeled/* and test/CLASS/*, or with labels.csv."""
    size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(required for a folder)")] = None
    """For a folder: side of the images, 8 to 1024 pixels. The shorter side is resized, the longer cropped."""
    decoder: Annotated[
        Literal["auto", "cpu", "gpu"],
        tyro.conf.arg(
            help="For a folder: where DALI decodes and resizes JPEGs. auto uses a GPU if one is available. The results "
            "differ by a few gray levels, so a data set is prepared entirely with one of them."
        ),
    ] = "auto"
    source: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: none)")] = None
    """Folder with the original files, searched before anything is downloaded."""
    download: bool = True
    """Download missing files."""
    again: bool = False
    """Prepare the data even if it is already prepared."""


@dataclass
class ListOptions(_DataOptions):
    """List all data sets, and which of them are prepared."""


@dataclass
class InfoOptions(_DataOptions):
    """Show image counts per class, and the mean and standard deviation of the training images."""

    name: Name = ""
    """Name of a data set, or a prepared folder."""
    png: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """PNG file to write with ten images of every class."""
    verify: bool = False
    """Verify the checksums of the prepared files."""


def _selection() -> list[tuple[str, Any, Any]]:
    """Return the fields of the flags that decide which images are labeled, the same as those of `remixmatch train`."""
    found: list[tuple[str, Any, Any]] = []
    for each in dataclasses.fields(Config):
        if each.metadata.get("section") == "data":
            kind = field_types()[each.name]
            metavar = "{" + ",".join(choices(kind)) + "}" if choices(kind) else None
            hint = tyro.conf.arg(help=each.metadata["help"], metavar=metavar, help_behavior_hint="(default: see above)")
            found.append((each.name, Annotated[kind | None, hint], field(default=None)))
    return found


_FOLDER = Annotated[
    Path | None,
    tyro.conf.arg(metavar="DIR", help="Prepared folder of images, instead of --dataset.", help_behavior_hint=""),
]

SplitOptions: Any = dataclasses.make_dataclass(
    "SplitOptions",
    [
        ("name", Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME", help="Name of a preset, of a data "
        "set, or a prepared folder.", help_behavior_hint="(required)")], field(default="")),
        *_selection(),
        ("data", _FOLDER, field(default=None)),
        ("json", Annotated[bool, tyro.conf.arg(help="Print split.json without its checksum.")], field(default=False)),
    ],
    bases=(_DataOptions,),
    namespace={
        "__doc__": "Show which images `remixmatch train PRESET` labels, and how many of each class.\n\n"
        "Flags default to the preset's settings. For a data set, only --split defaults to that of its presets."
    },
)  # fmt: skip

CheckSplitOptions: Any = dataclasses.make_dataclass(
    "CheckSplitOptions",
    [
        ("given", Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="SPLIT", help="A run's folder, or "
        "a file of image indices: JSON, numpy, or one index per line.", help_behavior_hint="(required)")],
        field(default=None)),
        *_selection(),
        ("data", _FOLDER, field(default=None)),
    ],
    bases=(_DataOptions,),
    namespace={
        "__doc__": "Compare a split with the rule that chooses it. The exit code is 1 if they differ.\n\n"
        "Flags default to the run's settings. For a file, --split defaults to that of the data set's presets, and "
        "--labels to the number of its indices."
    },
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run `remixmatch data`.

    Args:
        argv: The subcommand and its arguments.

    Raises:
        UserError: Unknown subcommand, or invalid arguments.
    """
    more = "'remixmatch data COMMAND --help' shows more about a command."
    if show_usage_if_asked(argv, "command", "data COMMAND ...", SUBCOMMANDS, more):
        return
    commands: dict[str, tuple[Any, Callable[[Any], None]]] = {
        "prepare": (PrepareOptions, _prepare),
        "list": (ListOptions, _list),
        "info": (InfoOptions, _info),
        "split": (SplitOptions, _split),
        "check-split": (CheckSplitOptions, _check_split),
    }
    if argv[0] not in commands:
        raise unknown("data command", argv[0], commands)
    kind, run = commands[argv[0]]
    options: Any = parse(kind, f"data {argv[0]}", list(argv[1:]))
    cache.set_data_dir(options.data_dir)
    try:
        run(options)
    except cache.DataError as error:
        raise UserError(str(error)) from None
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


def data_name(given: str) -> str:
    """Return the name under which a data set is opened. Names of folders begin with FOLDER."""
    if not given:
        raise UserError(f"missing data set; choose from {', '.join(DATASETS)}, or give a folder of images")
    if given in DATASETS or given.startswith(FOLDER):
        return given
    from pipelines.data.folder import cache_of

    place = Path(given)
    if len(place.parts) == 1 and near_names(given, DATASETS) and not (place.exists() or cache_of(place).exists()):
        raise unknown("data set", given, DATASETS)
    return folder_name(given)


@contextmanager
def _progress():
    """Show one progress bar per task, from the first update on, so that early errors show no bar."""
    bars: Any = None
    tasks: dict[str, Any] = {}

    def update(task: str, done: int, total: int) -> None:
        nonlocal bars
        if bars is None:
            from rich.console import Console
            from rich.progress import Progress

            bars = Progress(console=Console(stderr=True))
            bars.start()
        if task not in tasks:
            tasks[task] = bars.add_task(task, total=total or None)
        bars.update(tasks[task], completed=done, total=total or None)

    try:
        yield update
    finally:
        if bars is not None:
            bars.stop()


def _prepare(options: PrepareOptions) -> None:
    name = data_name(options.name)
    if options.source and not options.source.is_dir():
        raise UserError(f"--source: no folder '{options.source}'")
    if name.startswith(FOLDER):
        _prepare_folder(Path(name.removeprefix(FOLDER)), options)
        return
    if name not in PREPARED:
        print(f"{name} is ready: it needs no preparation")
        return
    from pipelines.data.sources import prepare

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
    from pipelines.data.folder import prepare
    from pipelines.data.image_files import describe_remarks
    from pipelines.files import some

    if not root.exists():
        raise UserError(f"{options.name} is neither a data set ({', '.join(DATASETS)}) nor a folder")
    if options.size is None:
        raise UserError("a folder needs --size, for example --size 96")
    check_size(options.size, "--size")
    with _progress() as update:
        made = prepare(root, options.size, update, device=_decoder(options.decoder), again=options.again)
    for file, why in made.unreadable[:_SHOWN]:
        log.warning(f"skipping {file}: {why}")
    if made.unreadable:
        log.warning(f"skipped {len(made.unreadable)} unreadable files")
    for one, other in made.duplicates[:_SHOWN]:
        log.warning(f"{one} and {other} are the same image, once for training and once for testing")
    if made.duplicates:
        log.warning(f"{_images(len(made.duplicates))} used for both training and testing")
    kinds = {file: made.listing.classes[label] for file, label in made.listing.train}
    for one, other in made.conflicts[:_SHOWN]:
        log.warning(f"{one} ({kinds[one]}) and {other} ({kinds[other]}) are the same image in two classes")
    if made.conflicts:
        log.warning(f"{_images(len(made.conflicts))} also in another class")
    if made.strays:
        log.warning(
            f"skipped {len(made.strays)} image files outside train/CLASS/, test/CLASS/ and unlabeled/: "
            f"{some(made.strays)}"
        )
    for line in (*made.left_out, *describe_remarks(made.remarks)):
        log.warning(line)
    if made.listing.held_out:
        print(f"{made.listing.held_out} labeled images are held out for testing (the folder has no test part)")
    print(f"{root} is ready in {made.cache}: {_sizes(cache.open_cache(made.cache, ''))}")
    where = f" --data-dir {shlex.quote(str(options.data_dir))}" if options.data_dir else ""
    print(f"train on it: remixmatch train folder --data {shlex.quote(options.name)}{where}")


def _images(number: int) -> str:
    return "1 image is" if number == 1 else f"{number} images are"


def _decoder(wanted: str) -> str:
    if wanted == "cpu" or (wanted == "auto" and not any(map(Path.exists, _DRIVERS))):
        return "cpu"  # Without importing torch, which takes a second.
    from torch import cuda

    if wanted == "gpu" and not cuda.is_available():
        raise UserError("--decoder gpu: torch sees no GPU here; run 'remixmatch doctor' to see what is missing")
    return "gpu" if cuda.is_available() else "cpu"


def _sizes(data: DataSet) -> str:
    labeled = int((data.train_labels >= 0).sum())
    height, width = data.sides
    return (
        f"{len(data.train_images)} training images, {labeled} with a label, {len(data.test_images)} test images, "
        f"{len(data.classes)} classes, {width}x{height}"
    )


def _list(options: ListOptions) -> None:
    from pipelines.data.folder import open_folder, prepare_command

    for name in DATASETS:
        try:
            print(f"{name:18} {_sizes(open_data(name))}")
        except UserError as error:
            print(f"{name:18} {error}")
    folders = cache.data_dir() / "folders"
    for path in sorted(folders.iterdir()) if folders.is_dir() else ():
        if path.name.startswith("."):  # A lock, or an unfinished data set.
            continue
        try:
            root = Path(cache.read_description(path, prepare_command(Path("FOLDER")))["name"].removeprefix(FOLDER))
            print(printable(f"{root}: {_sizes(open_folder(root))}"))
        except cache.DataError as error:
            print(error)


def _info(options: InfoOptions) -> None:
    name = data_name(options.name)
    data = open_data(name)
    if options.verify and (name in PREPARED or name.startswith(FOLDER)):
        from pipelines.data.folder import cache_of, prepare_command

        root = Path(name.removeprefix(FOLDER))
        where = cache_of(root) if name.startswith(FOLDER) else cache.data_dir() / name
        again = prepare_command(root, data.sides[0]) if name.startswith(FOLDER) else cache.prepare_command(name)
        cache.verify(where, f"{again} --again")
        print(f"{where} is intact")
    if options.png:  # First, so that nothing is printed if it cannot be written.
        _draw(data, options.png)
    print(_sizes(data))
    print(f"\n{'class':24} {'labeled':>9} {'test':>9}")
    for c, label in enumerate(data.classes):
        print(f"{printable(label):24} {int((data.train_labels == c).sum()):9} {int((data.test_labels == c).sum()):9}")
    mean, deviation = _moments(data.train_images)
    shown = [" ".join(f"{value:.1f}" for value in values) for values in (mean, deviation)]
    print(f"\nmean of the training images per channel {shown[0]}, standard deviation {shown[1]} (0 to 255)")
    if options.png:
        print(f"{_GRID} images of every class: {options.png}")


def _moments(images: np.ndarray, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard deviation of each channel, (3,) each. Reads `chunk` images at a time."""
    sums = np.zeros((2, 3))
    for first in range(0, len(images), chunk):
        part = images[first : first + chunk].astype(np.float64).reshape(-1, 3)
        sums += part.sum(0), np.square(part).sum(0)
    mean, square = sums / (images.size / 3)
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _draw(data: DataSet, path: Path) -> None:
    from PIL import Image

    height, width = data.sides
    grid = np.full((len(data.classes) * height, _GRID * width, 3), 255, dtype=np.uint8)
    for c in range(len(data.classes)):
        for column, index in enumerate(np.flatnonzero(data.train_labels == c)[:_GRID]):
            grid[c * height : (c + 1) * height, column * width : (column + 1) * width] = data.train_images[index]
    try:
        Image.fromarray(grid).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from None


def _configuration(base: Config, options: Any) -> Config:
    """Return a configuration with the given flags applied, as in `remixmatch train`.

    Raises:
        UserError: Flags contradict each other.
    """
    given = {name: value for name, *_ in _selection() if (value := getattr(options, name)) is not None}
    if options.data is not None:
        if "dataset" in given:
            raise UserError("--dataset and --data both name the images; leave out one of them")
        if str(options.data) in DATASETS and not options.data.exists():
            raise UserError(f"--data {options.data}: no such folder; --dataset {options.data} names the data set")
        given["dataset"] = folder_name(options.data)
    config = dataclasses.replace(base, **given)
    check_labels(config, {name: flag_of(name) for name in given})
    return config


def _split(options: Any) -> None:
    name = options.name
    if name in PRESETS:
        config = _configuration(PRESETS[name], options)
    else:
        near = near_names(name, [*PRESETS, *DATASETS])
        if near and near[0] in PRESETS and not Path(name).exists():
            raise unknown("preset", name, PRESETS)
        named = data_name(name)
        if options.dataset is not None or options.data is not None:
            raise UserError(f"--dataset and --data need a preset, and {name} is a data set")
        config = _configuration(of_data_set(named), options)
        if options.labels is None and config.split != "all" and not config.n1:
            known = int((open_data(named).train_labels >= 0).sum())
            raise UserError(f"--labels is required, from 1 to {known} (or --split all, or a preset instead of {name})")
    setup = setup_run(config)
    if options.json:
        print(json.dumps(setup.identity))
        return
    data, indices, content = setup.data, setup.split, setup.identity
    print(" ".join(map(str, indices.tolist())))
    print(printable(f"labels per class: {_per_class(data, indices)}"))
    if "unlabeled_per_class" in content:
        print(printable(f"unlabeled images per class: {_per_class(data, data.unlabeled_indices)}"))
    print(f"SHA-256 of the indices {content['sha256']}\nSHA-256 of the images {content['images_sha256']}")


def _per_class(data: DataSet, indices: np.ndarray) -> str:
    counts = data.class_counts(indices)
    unknown = len(indices) - int(counts.sum())
    listed = ", ".join(f"{name} {n}" for name, n in zip(data.classes, counts, strict=True))
    return listed + (f"; {unknown} of unknown class" if unknown else "")


def _check_split(options: Any) -> None:
    path = options.given
    if path is None:
        raise UserError("missing argument SPLIT: give a run's folder, or a file of image indices")
    if path.is_dir():
        base, path = dataclasses.replace(load_config(path / "config.json"), log="none"), path / "split.json"
    elif not path.exists():
        raise UserError(f"no run or file '{path}'")
    elif options.dataset is None and options.data is None:
        raise UserError("--dataset or --data is required to check a file; name its images")
    else:
        base = of_data_set(data_name(options.dataset) if options.dataset else folder_name(options.data))
    config = _configuration(base, options)
    data = open_data(config.dataset)
    try:
        given = read_indices(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if max(given) >= len(data.train_images):
        raise UserError(
            f"{path} contains index {max(given)}, but {data.name} has only {len(data.train_images)} training images"
        )
    if options.labels is None:
        config = dataclasses.replace(config, labels=len(given))
    expected = setup_run(config, data=data).split
    result = compare(expected, given)
    compared = f"rule {config.split}, {len(expected)} labels of {data.name}, seed {config.seed}"
    if result.same:
        print(f"identical to {compared}; SHA-256 {digest(expected)}")
        return
    print(f"different from {compared}; {result.common} images in common")
    for place, indices in (("the rule", result.missing), (path, result.extra)):
        more = f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else ""
        print(f"{len(indices)} only in {place}: {' '.join(map(str, indices[:_SHOWN]))}{more}")
    sys.exit(1)
