"""Files of a folder of images, before any is opened: their classes, and which are training or test images.

    pets/train/CLASS/*   pets/unlabeled/*   pets/test/CLASS/*

Alternatively, pets/labels.csv has a line `file,label` for every image below pets/, with an empty label if it is
unknown; an optional third column may contain `test`. Without test images, a fixed fifth of the labeled images of every
class is held out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.cache import DataError
from pipelines.data.image_files import describe_left_out, find_files, real_files
from pipelines.data.splits import hold_out
from pipelines.data.table import TABLE, read_table
from pipelines.files import some

# Version of the rules that turn files into images, labels and parts; a cache of another version is out of date.
# Version 1 recorded neither its number nor the targets of links. It read files behind several links several times, took
# labels such as 1.0 as names, and read values of more than 8 bits differently.
RULES = 2


@dataclass(frozen=True)
class Listing:
    """Files of a folder, before any is opened.

    Attributes:
        classes: Names of the classes, sorted.
        train: Relative paths of the training images and their classes, -1 if unknown; labeled ones first.
        test: Relative paths of the test images and their classes.
        held_out: Number of labeled images held out as test images.
    """

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    held_out: int

    @property
    def files(self) -> list[str]:
        """Relative paths of all images."""
        return [file for file, _ in (*self.train, *self.test)]


def scan(root: Path, rules: int = RULES) -> Listing:
    """List the files of a folder. Of several links to one file in one part, only the first is listed.

    Args:
        root: The folder.
        rules: Version of the rules, see `RULES`.

    Raises:
        DataError: The folder cannot be read, or does not have the structure described in the module docstring.
    """
    try:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder")
        train, test = _from_table(root, rules) if os.path.lexists(root / TABLE) else _from_folders(root)
        if rules > 1:
            train, test = _once(root, train, test)
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror or error})") from None
    classes = tuple(sorted({label for _, label in train if label}))
    if len(classes) < 2:
        what = f"only one class, {classes[0]}" if classes else "no labeled images"
        others = sorted(path.name for path in root.iterdir() if path.suffix.lower() in (".csv", ".tsv"))
        hint = f" (rename {others[0]} to {TABLE})" if others and TABLE not in others else ""
        raise DataError(f"{root} has {what}; provide at least two classes in train/CLASS/ or {TABLE}{hint}")
    unknown = sorted({label for _, label in test} - set(classes))
    if unknown:
        raise DataError(f"{root} has test classes without training images: {some(unknown)}")
    numbers = {name: number for number, name in enumerate(classes)} | {"": -1}
    known = [(file, numbers[label]) for file, label in train if label]
    tested = [(file, numbers[label]) for file, label in test]
    if not tested:
        known, tested = hold_out(known, len(classes))
        if not tested:
            raise DataError(
                f"{root} has no test images, and no class has the two labeled images needed to hold one out; add test "
                "images or labels"
            )
    return Listing(
        classes=classes,
        train=tuple(known + [(file, -1) for file, label in train if not label]),
        test=tuple(tested),
        held_out=0 if test else len(tested),
    )


def _from_folders(root: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    parts: dict[str, list[tuple[str, str]]] = {}
    for part in ("train", "test"):
        parts[part] = []
        classes = sorted((root / part).iterdir()) if (root / part).is_dir() else []
        for folder in (path for path in classes if path.is_dir() and not path.name.startswith(".")):
            files = [(file, folder.name) for file in _images(root, folder)]
            if not files:
                others = "".join(f" ({line})" for line in describe_left_out(find_files(folder)))
                raise DataError(f"class folder {folder} contains no images{others}; add some or delete it")
            parts[part] += files
    unlabeled = [(file, "") for file in _images(root, root / "unlabeled")]
    return parts["train"] + unlabeled, parts["test"]


def _from_table(root: Path, rules: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    entries = read_table(root, _images(root, root), as_written=rules < 2)
    train, test = (
        [(each.file, each.label) for each in entries if (each.part == "test") is is_test] for is_test in (False, True)
    )
    return train, test


def _once(
    root: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Leave out further paths of a file within a part, and a file without a label if another path gives it one.

    Raises:
        DataError: Two paths of a file have different labels.
    """
    paths = real_files(root, [file for file, _ in (*train, *test)])
    labeled: dict[str, tuple[str, str]] = {}
    for path, (file, label) in zip(paths, (*train, *test), strict=True):
        before, known = labeled.setdefault(path, (file, label)) if label else ("", "")
        if known != label:
            raise DataError(
                f"{root}: {before} ({known}) and {file} ({label}) are the same file under two labels; delete one of "
                "them, or correct its label"
            )
    parts = []
    for entries, places in ((train, paths[: len(train)]), (test, paths[len(train) :])):
        first: dict[str, tuple[str, str]] = {}
        for path, (file, label) in zip(places, entries, strict=True):
            if path not in first or (label and not first[path][1]):
                first[path] = (file, label)
        parts.append(list(first.values()))
    return parts[0], parts[1]


def _images(root: Path, folder: Path) -> list[str]:
    """Return the image files in a folder, relative to `root`; none if the folder does not exist."""
    inside = folder.relative_to(root)
    return [os.path.normpath(inside / name) for name in find_files(folder).images] if folder.is_dir() else []


def unused_files(root: Path, listing: Listing) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return unused image files, for example because a folder's name is misspelled, and describe all other files."""
    rest = find_files(root).without(root, [*listing.files, TABLE])
    return rest.images, tuple(describe_left_out(rest))
