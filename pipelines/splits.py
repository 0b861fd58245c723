"""Label splits: which training images keep their label, by the paper's rule and by others that are in use.

The authors of ReMixMatch and FixMatch choose labels by a published script (create_split.py), from numpy's legacy
generator, whose numbers never change: so their splits can be had again from labels and seed alone. A rule here is a
function of (data set, labels wanted, seed) to rows of the training images, in increasing order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.cache import DataSet
from pipelines.plan import stream

_STREAM = 100  # apart from the streams of plans


def paper(data: DataSet, labeled: int, seed: int) -> np.ndarray:
    """The split of the paper's tables, which use seeds 1 to 5.

    Each class's images are shuffled, unless the seed is 0, classes in `DataSet.class_order`; then labels go one by one
    to the class that is furthest behind its share of the images, the first of that order at a tie. So labels follow
    the classes' frequencies. A data set with published folds of that size has the fold of the seed's number.

    Raises:
        ValueError: there are not as many images or folds.
    """
    _check(data, labeled)
    if data.folds and len(data.folds[0]) == labeled:
        if seed >= len(data.folds):
            raise ValueError(f"{data.name} has published folds 0 to {len(data.folds) - 1}, got seed {seed}")
        return np.sort(data.folds[seed])
    rows = [np.flatnonzero(data.train_labels == c) for c in data.class_order or range(len(data.classes))]
    share = np.array([len(of_class) for of_class in rows], dtype=np.float64)
    # with folds, the authors take the classes to be equally frequent
    share = np.ones(len(rows)) if data.folds else share / share.max()
    if seed:
        chance = np.random.RandomState(seed)
        for of_class in rows:
            chance.shuffle(of_class)
    taken = np.zeros(len(rows), dtype=np.int64)
    chosen = []
    for _ in range(labeled):
        c = np.argmax(share - taken / max(taken.max(), 1))
        if taken[c] == len(rows[c]):
            name = data.classes[(data.class_order or range(len(rows)))[c]]
            raise ValueError(
                f"{labeled} labels by the paper's rule need more than the {taken[c]} images of class {name}"
            )
        chosen.append(rows[c][taken[c]])
        taken[c] += 1
    return np.sort(np.array(chosen))


def balanced(data: DataSet, labeled: int, seed: int) -> np.ndarray:
    """As many of every class.

    Raises:
        ValueError: `labeled` is not a positive multiple of the classes, or more than a class has.
    """
    classes = len(data.classes)
    if labeled < classes or labeled % classes:
        raise ValueError(
            f"labels must be a positive multiple of the {classes} classes so that the split is balanced, got {labeled}"
        )
    each = labeled // classes
    known = data.train_labels[data.train_labels >= 0]
    counts = np.bincount(known, minlength=classes)
    if each > counts.min():
        rarest = data.classes[counts.argmin()]
        raise ValueError(
            f"{labeled} labels need {each} images of every class, but class {rarest} has {counts.min()}; "
            f"at most {counts.min() * classes} labels"
        )
    rng = stream(seed, _STREAM, 1)
    return np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(data.train_labels == c))[:each] for c in range(classes)])
    )


def usb(data: DataSet, labeled: int, seed: int) -> np.ndarray:
    """The rule of USB, TorchSSL and FixMatch-pytorch: as many of every class, shuffled by numpy's seeded generator.

    They draw from numpy's global generator, and agree with this if nothing else has drawn from it since it was seeded.
    Where classes are equally frequent it is the paper's split of that seed, too.

    Raises:
        ValueError: see `balanced`.
    """
    balanced(data, labeled, 0)  # the same has to hold
    chance = np.random.RandomState(seed)
    chosen = []
    for c in range(len(data.classes)):
        rows = np.flatnonzero(data.train_labels == c)
        chance.shuffle(rows)
        chosen.append(rows[: labeled // len(data.classes)])
    return np.sort(np.concatenate(chosen))


def everything(data: DataSet, labeled: int, seed: int) -> np.ndarray:
    """Every image that has a label, whatever the other arguments.

    Raises:
        ValueError: no image has one.
    """
    rows = np.flatnonzero(data.train_labels >= 0)
    if not len(rows):
        raise ValueError(f"no training image of {data.name} has a label")
    return rows


RULES: dict[str, Callable[[DataSet, int, int], np.ndarray]] = {
    "balanced": balanced,
    "paper": paper,
    "usb": usb,
    "torchssl": usb,
    "fixmatch-pytorch": usb,
    "all": everything,
}


def _check(data: DataSet, labeled: int) -> None:
    known = int((data.train_labels >= 0).sum())
    if not 1 <= labeled <= known:
        raise ValueError(f"labels must be from 1 to the {known} that there are, got {labeled}")


def digest(rows: np.ndarray) -> str:
    """SHA-256 of a split: its rows in increasing order, as little-endian 64-bit integers."""
    return hashlib.sha256(np.sort(rows).astype("<i8").tobytes()).hexdigest()


def image_digest(images: np.ndarray, rows: np.ndarray) -> str:
    """SHA-256 of the images of a split, in increasing order of their rows: tells whether their source has an order."""
    content = hashlib.sha256()
    for row in np.sort(rows):
        content.update(np.ascontiguousarray(images[row]).data)
    return content.hexdigest()


@dataclass(frozen=True)
class Comparison:
    """Two splits.

    Attributes:
        common: how many rows both have.
        missing: rows of the first alone.
        extra: rows of the second alone.
    """

    common: int
    missing: tuple[int, ...]
    extra: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether they are the same set."""
        return not self.missing and not self.extra


def compare(expected: Sequence[int] | np.ndarray, found: Sequence[int] | np.ndarray) -> Comparison:
    """What two splits have in common."""
    one, other = {int(row) for row in expected}, {int(row) for row in found}
    return Comparison(len(one & other), tuple(sorted(one - other)), tuple(sorted(other - one)))


def read_indices(path: Path) -> list[int]:
    """Rows that a file lists: a run's split.json, a JSON list, an object with one, an array of numpy, or one a line.

    Raises:
        ValueError: the file cannot be read, or holds anything else.
    """
    try:
        if path.suffix == ".npy":
            rows = np.load(path, allow_pickle=False).tolist()
        else:
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if text.lstrip()[:1] in ("[", "{") else [int(word) for word in text.split()]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "neither JSON nor a number a line"
        raise ValueError(f"{path} cannot be read as a list of rows ({reason})") from None
    if isinstance(rows, dict):
        lists = [rows[key] for key in ("train_rows", "labeled", "label", "indices") if key in rows]
        rows = lists[0] if lists else None
    if not isinstance(rows, list) or not rows or not all(type(row) is int and row >= 0 for row in rows):
        raise ValueError(f"{path} does not hold a list of rows, numbers from 0")
    if len(set(rows)) < len(rows):
        raise ValueError(f"{path} names a row twice")
    return rows
