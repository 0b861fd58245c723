"""Label splits: which training images keep their labels, for the rules of the paper and of other code bases.

The authors of ReMixMatch and FixMatch choose labels with a published script (create_split.py) and numpy's legacy
generator, whose stream is frozen. Their splits can thus be reproduced from the labels and the seed. A rule is a
function from (data set, number of labels, seed) to sorted indices of training images. Its errors begin with the flag
whose value is not allowed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipelines.data.cache import DataSet
from pipelines.plan import stream

_STREAM, _HELD_OUT_STREAM = 100, 101  # Distinct from the streams of plans.
_HELD_OUT = 5  # One in this many labeled images of a class is held out.
Name = TypeVar("Name")


def paper(data: DataSet, labeled: int, seed: int) -> np.ndarray:
    """Return the split used for the paper's tables, with seeds 1 to 5.

    The images of each class are shuffled unless the seed is 0, with classes in `DataSet.class_order`. Each label then
    goes to the class furthest behind its share of the images; the first class in that order wins ties. The labels
    follow the class frequencies. If the data set has published folds of this size, the seed selects a fold.

    Raises:
        ValueError: There are not enough images or folds.
    """
    _check(data, labeled)
    if data.folds and len(data.folds[0]) == labeled:
        if seed >= len(data.folds):
            raise ValueError(f"--seed must select one of the published folds 0 to {len(data.folds) - 1}, got {seed}")
        return np.sort(data.folds[seed])
    orders = _paper_orders(data, seed)
    by_class = [orders[c] for c in data.class_order or range(len(data.classes))]
    share = np.array([len(images) for images in by_class], dtype=np.float64)
    # For data sets with folds, the authors assume equally frequent classes.
    share = np.ones(len(by_class)) if data.folds else share / share.max()
    taken = np.zeros(len(by_class), dtype=np.int64)
    chosen = []
    for _ in range(labeled):
        c = np.argmax(share - taken / max(taken.max(), 1))
        if taken[c] == len(by_class[c]):
            name = data.classes[(data.class_order or range(len(by_class)))[c]]
            raise ValueError(
                f"--labels: {labeled} labels with rule paper need more images of class {name} than the {taken[c]} "
                "available; use fewer labels"
            )
        chosen.append(by_class[c][taken[c]])
        taken[c] += 1
    return np.sort(np.array(chosen))


def balanced(data: DataSet, labeled: int, seed: int) -> np.ndarray:
    """Return a split with the same number of labels for every class.

    Raises:
        ValueError: `labeled` is not a positive multiple of the number of classes, or a class has too few images.
    """
    classes = len(data.classes)
    if labeled < classes or labeled % classes:
        raise ValueError(
            f"--labels: a balanced split requires a positive multiple of {classes} labels (the number of classes), "
            f"got {labeled}"
        )
    each = labeled // classes
    known = data.train_labels[data.train_labels >= 0]
    counts = np.bincount(known, minlength=classes)
    if each > counts.min():
        rarest = data.classes[counts.argmin()]
        raise ValueError(
            f"--labels: a balanced split of {labeled} labels needs {each} images per class, but class {rarest} has "
            f"{counts.min()}; use at most {counts.min() * classes} labels"
        )
    return np.sort(np.concatenate([images[:each] for images in _balanced_orders(data, seed)]))


def usb(data: DataSet, labeled: int, seed: int) -> np.ndarray:
    """Return the balanced split of USB, TorchSSL and FixMatch-pytorch, which shuffle with numpy's legacy generator.

    They use numpy's global generator; the splits agree if nothing else has drawn from it since it was seeded. If
    classes are equally frequent, the split is also the paper's for that seed.

    Raises:
        ValueError: See `balanced`.
    """
    balanced(data, labeled, 0)  # Raises the same errors.
    each = labeled // len(data.classes)
    return np.sort(np.concatenate([images[:each] for images in _usb_orders(data, seed)]))


def everything(data: DataSet, labeled: int, seed: int) -> np.ndarray:
    """Return all labeled images; `labeled` and `seed` are ignored.

    Raises:
        ValueError: No image has a label.
    """
    indices = np.flatnonzero(data.train_labels >= 0)
    if not len(indices):
        raise ValueError(f"--labels: {data.name} has no labeled training images")
    return indices


def hold_out(
    labeled: Sequence[tuple[Name, int]], classes: int
) -> tuple[list[tuple[Name, int]], list[tuple[Name, int]]]:
    """Hold out a fifth of the labeled images of each class for testing, at least one of two; the choice is fixed.

    Args:
        labeled: Images, by any name, and their classes.
        classes: Number of classes.

    Returns:
        The images that stay and those held out, both in the order given.
    """
    rng = stream(0, _HELD_OUT_STREAM, 0)
    by_class: list[list[int]] = [[] for _ in range(classes)]
    for index, (_, label) in enumerate(labeled):
        by_class[label].append(index)
    tested: set[int] = set()
    for indices in by_class:
        count = max(len(indices) // _HELD_OUT, 1) if len(indices) > 1 else 0
        tested |= {indices[place] for place in rng.permutation(len(indices))[:count]}
    kept = [pair for index, pair in enumerate(labeled) if index not in tested]
    return kept, [labeled[index] for index in sorted(tested)]


def _paper_orders(data: DataSet, seed: int) -> list[np.ndarray]:
    """Return the images of each class in the order in which `paper` labels them; those of the source for seed 0."""
    orders = [np.flatnonzero(data.train_labels == c) for c in range(len(data.classes))]
    if seed:
        rng = _legacy_generator(seed)
        for c in data.class_order or range(len(data.classes)):
            rng.shuffle(orders[c])
    return orders


def _balanced_orders(data: DataSet, seed: int) -> list[np.ndarray]:
    rng = stream(seed, _STREAM, 1)
    return [rng.permutation(np.flatnonzero(data.train_labels == c)) for c in range(len(data.classes))]


def _usb_orders(data: DataSet, seed: int) -> list[np.ndarray]:
    rng = _legacy_generator(seed)
    orders = [np.flatnonzero(data.train_labels == c) for c in range(len(data.classes))]
    for images in orders:
        rng.shuffle(images)
    return orders


RULES: dict[str, Callable[[DataSet, int, int], np.ndarray]] = {
    "balanced": balanced,
    "paper": paper,
    "usb": usb,
    "torchssl": usb,
    "fixmatch-pytorch": usb,
    "all": everything,
}
# The images of each class in the order in which a rule labels them: functions of (data set, seed).
ORDERS: dict[str, Callable[[DataSet, int], list[np.ndarray]]] = {
    "balanced": _balanced_orders,
    "paper": _paper_orders,
    "usb": _usb_orders,
    "torchssl": _usb_orders,
    "fixmatch-pytorch": _usb_orders,
}


def _legacy_generator(seed: int) -> np.random.RandomState:
    if seed >= 2**32:
        raise ValueError(f"--seed must be less than 2^32 for the split rules that use numpy's generator, got {seed}")
    return np.random.RandomState(seed)


def _check(data: DataSet, labeled: int) -> None:
    known = int((data.train_labels >= 0).sum())
    if not 1 <= labeled <= known:
        raise ValueError(f"--labels: labels must be from 1 to {known} (the number of labeled images), got {labeled}")


def digest(indices: np.ndarray) -> str:
    """Return the SHA-256 of a split: its indices in ascending order, as little-endian 64-bit integers."""
    return hashlib.sha256(np.sort(indices).astype("<i8").tobytes()).hexdigest()


def image_digest(images: np.ndarray, indices: np.ndarray) -> str:
    """Return the SHA-256 of a split's images in ascending order of index, to detect a different order of the source."""
    content = hashlib.sha256()
    for index in np.sort(indices):
        content.update(np.ascontiguousarray(images[index]).data)
    return content.hexdigest()


@dataclass(frozen=True)
class Comparison:
    """Difference between two splits.

    Attributes:
        common: Number of indices in both splits.
        missing: Indices only in the first split.
        extra: Indices only in the second split.
    """

    common: int
    missing: tuple[int, ...]
    extra: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether both splits are the same set."""
        return not self.missing and not self.extra


def compare(expected: Sequence[int] | np.ndarray, found: Sequence[int] | np.ndarray) -> Comparison:
    """Compare two splits as sets."""
    first, second = {int(index) for index in expected}, {int(index) for index in found}
    return Comparison(len(first & second), tuple(sorted(first - second)), tuple(sorted(second - first)))


def read_indices(path: Path) -> list[int]:
    """Read image indices from a run's split.json, a JSON list or object, a .npy file, or text with one per line.

    A JSON object holds the list under `train_rows`, `labeled`, `label` or `indices`.

    Raises:
        ValueError: The file cannot be read, or does not contain a list of unique indices.
    """
    try:
        if path.suffix == ".npy":
            indices = np.load(path, allow_pickle=False).tolist()
        else:
            text = path.read_text(encoding="utf-8")
            indices = json.loads(text) if text.lstrip()[:1] in ("[", "{") else [int(word) for word in text.split()]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "neither JSON nor one integer per line"
        raise ValueError(f"{path} cannot be read as a list of image indices ({reason})") from None
    if isinstance(indices, dict):
        lists = [indices[key] for key in ("train_rows", "labeled", "label", "indices") if key in indices]
        indices = lists[0] if lists else None
    if not isinstance(indices, list) or not indices or not all(type(i) is int and i >= 0 for i in indices):
        raise ValueError(f"{path} must contain a list of image indices, integers from 0")
    if len(set(indices)) < len(indices):
        raise ValueError(f"{path} contains an image index more than once")
    return indices
