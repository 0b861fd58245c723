"""Data sets given in Python: arrays, or data sets in the style of torchvision or Hugging Face."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.config.checks import PYTHON, check_size
from engine.errors import UserError
from engine.inference.inputs import each_image
from engine.inference.predict import Source, read_image
from pipelines.data.cache import DataSet
from pipelines.data.pixels import DecodeError, content, dimensions
from pipelines.data.splits import hold_out
from pipelines.data.table import UNLABELED
from pipelines.files import some

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")
_PARTS = ("train", "unlabeled", "test")
_IMAGE, _LABEL = ("image", "img"), ("label", "labels", "fine_label")
_MEASURED = 1000  # Images from which the size is determined.
_ANY = 8  # Size if none of them can be read, which is reported later.
_ACCEPTED = (
    "a folder; train_images, train_labels and maybe test_images, test_labels and classes, as a mapping or an object; a "
    "data set of (image, label) or of mappings with 'image' and 'label'; or a tuple (train, test) or (images, labels)"
)


@dataclass(frozen=True)
class _Part:
    """A part of a data set as given.

    Attributes:
        count: Number of images.
        examples: Images and labels.
        classes: Names of the classes; () if the part does not say.
    """

    count: int
    examples: Iterator[tuple[Any, Any]]
    classes: tuple[str, ...] = ()


def python_data_set(data: Any, size: int | None = None) -> DataSet:
    """Make a data set of images and labels given in Python; see `engine.api.train` for their forms.

    Images are converted to RGB, resized and cropped like image files. Without test images, a fifth of the labeled
    images of each class is held out, as for a folder.

    Args:
        data: The data.
        size: Side of the images in pixels; by default the most common shorter side of the first 1000 training images.

    Raises:
        UserError: The data have none of the accepted forms, or an image or a label cannot be used.
    """
    if size is not None:
        check_size(size, "size")
    parts = {name: part for name, part in _parts(data).items() if part.count or name == "train"}
    images: dict[str, np.ndarray] = {}
    given: dict[str, list[int | str | None]] = {}
    for name, part in parts.items():
        images[name], given[name] = _read(name, part, size)
        size = images[name].shape[1]
    classes, labels = _classes(parts, given)
    train_images, train_labels = images["train"], labels["train"]
    if "unlabeled" in images:
        train_images = np.concatenate([train_images, images["unlabeled"]])
        train_labels = np.concatenate([train_labels, np.full(len(images["unlabeled"]), -1)])
    if "test" in images:
        if (labels["test"] < 0).any():
            raise UserError(f"data: test image {labels['test'].argmin()} has no label")
        return DataSet(PYTHON, classes, train_images, train_labels, images["test"], labels["test"])
    _, tested = hold_out([(i, int(label)) for i, label in enumerate(train_labels) if label >= 0], len(classes))
    if not tested:
        raise UserError("data: there are no test images, and no class has two labeled images to hold one out")
    held = np.array([index for index, _ in tested])
    kept = np.setdiff1d(np.arange(len(train_labels)), held)
    return DataSet(
        PYTHON, classes, train_images[kept], train_labels[kept], train_images[held], train_labels[held],
        held_out=len(held),
    )  # fmt: skip


def _parts(data: Any) -> dict[str, _Part]:
    """Split data of any form into parts, of which `train` always exists."""
    fields = {name: data.get(name) if isinstance(data, Mapping) else getattr(data, name, None) for name in _ARRAYS}
    if fields["train_images"] is not None:
        _check_keys(data, _ARRAYS)
        given = {
            name: (fields[f"{name}_images"], fields[f"{name}_labels"])
            for name in ("train", "test")
            if fields[f"{name}_images"] is not None or fields[f"{name}_labels"] is not None
        }
        names = _names("classes", fields["classes"])
        return {name: _array_part(name, images, labels, names) for name, (images, labels) in given.items()}
    if isinstance(data, Mapping):
        _check_keys(data, _PARTS)
        given = {name: data[name] for name in _PARTS if data.get(name) is not None}
    elif isinstance(data, tuple) and len(data) == 2 and not _is_arrays(data):
        given = {name: part for name, part in zip(("train", "test"), data, strict=True) if part is not None}
    else:
        given = {"train": data}
    if "train" not in given:
        raise UserError(f"data has no part 'train'; give {_ACCEPTED}")
    return {name: _part(name, part) for name, part in given.items()}


def _check_keys(data: Any, known: Sequence[str]) -> None:
    if isinstance(data, Mapping) and (strange := [str(key) for key in data if key not in known]):
        raise UserError(f"data has unknown keys {some(strange)}; allowed are {', '.join(known)}")


def _is_arrays(data: tuple[Any, Any]) -> bool:
    """Return whether this is one array of images and one of labels."""
    return getattr(data[0], "ndim", 0) >= 3 and getattr(data[1], "ndim", 0) < 3


def _part(name: str, data: Any) -> _Part:
    if isinstance(data, tuple) and len(data) == 2:
        if isinstance(data[1], (int, float)) or _is_single(data[1]):
            raise UserError(
                f"data: the part '{name}' is a single (image, label); a tuple of two is (train, test) or "
                "(images, labels), so give several pairs as a list"
            )
        if _is_arrays(data):
            if name != "unlabeled":
                return _array_part(name, *data)
            data = data[0]
    rows = _listed(f"the part '{name}'", data)
    examples = (_example(name, index, rows[index]) for index in range(len(rows)))
    return _Part(len(rows), examples, _names_of(data))


def _array_part(name: str, images: Any, labels: Any, classes: tuple[str, ...] = ()) -> _Part:
    images = _listed(f"the array of {name} images", images)
    labels = [] if labels is None else _listed(f"the array of {name} labels", labels)
    if len(images) != len(labels):
        raise UserError(
            f"data: the part '{name}' has {len(images)} images, but {len(labels) or 'no'} labels; -1 stands for unknown"
        )
    return _Part(len(images), zip(images, labels, strict=True), classes)


def _listed(what: str, values: Any) -> Any:
    """Return images, labels or examples as something with a length and indices."""
    indexed = hasattr(values, "__len__") and hasattr(values, "__getitem__")
    if _is_single(values) or isinstance(values, Mapping) or not (indexed or isinstance(values, Iterable)):
        raise UserError(f"data must be {_ACCEPTED}; {what} is of type {type(values).__name__}")
    return values if indexed else list(values)


def _is_single(value: Any) -> bool:
    """Return whether this is text, bytes or an array without dimensions, although it seems to be iterable."""
    return isinstance(value, (str, bytes)) or getattr(value, "shape", None) == ()


def _example(name: str, index: int, row: Any) -> tuple[Any, Any]:
    if isinstance(row, Mapping):
        image = next((row[key] for key in _IMAGE if key in row), None)
        label = next((key for key in _LABEL if key in row), None)
        if image is None or (label is None and name != "unlabeled"):
            raise UserError(
                f"data: {name} example {index} has the keys {', '.join(map(str, row))}; it needs one of "
                f"{', '.join(_IMAGE)} and one of {', '.join(_LABEL)}"
            )
        return image, row[label] if label else None
    pair = isinstance(row, Sequence) and not isinstance(row, (str, bytes))
    if name == "unlabeled":
        return row[0] if pair and row else row, None
    if not pair or len(row) != 2:
        raise UserError(f"data: {name} example {index} must be (image, label) or a mapping, got {type(row).__name__}")
    return row[0], row[1]


def _names_of(data: Any) -> tuple[str, ...]:
    """Return the class names of a data set, of the one that it is a part of, or of all those that it joins."""
    features = getattr(data, "features", None)
    if isinstance(features, Mapping):
        names = next((getattr(features[key], "names", None) for key in _LABEL if key in features), None)
        return _names("the names of the labels", names)
    names = getattr(data, "classes", None)
    if isinstance(names, Iterable):  # It may also be a number or a method.
        return _names("classes", names)
    if hasattr(data, "dataset"):
        return _names_of(data.dataset)
    joined = getattr(data, "datasets", ())
    several = {_names_of(each) for each in joined} if isinstance(joined, (list, tuple)) else set()
    return several.pop() if len(several) == 1 else ()


def _names(what: str, given: Any) -> tuple[str, ...]:
    """Return class names given as a list in order, or as a mapping between names and numbers."""
    if given is None:
        return ()
    if _is_single(given) or isinstance(given, (set, frozenset)) or not isinstance(given, Iterable):
        raise UserError(
            f"data: {what} must be names in order, or a mapping of names to numbers, got {type(given).__name__}"
        )
    if not isinstance(given, Mapping):
        return tuple(map(_name, given))
    orders = set()
    for indices, names in ((given.values(), given.keys()), (given.keys(), given.values())):
        by_index = {_index(index): name for index, name in zip(indices, names, strict=True)}
        if by_index.keys() == set(range(len(given))):
            orders.add(tuple(_name(by_index[index]) for index in range(len(given))))
    if len(orders) != 1:
        raise UserError(f"data: {what} must map names to the numbers 0 to {len(given) - 1}, or these numbers to names")
    return orders.pop()


def _name(given: Any) -> str:
    """Return a class name as text; integers may be floating-point numbers."""
    given = given[0] if isinstance(given, tuple) else given  # A tuple holds synonyms.
    return str(int(given)) if isinstance(given, (float, np.floating)) and given.is_integer() else str(given)


def _index(given: Any) -> int | None:
    """Return the number of a class, which JSON writes as text if it is a key; None if this is no number."""
    return int(name) if (name := _name(given)).isdecimal() else None


def _read(name: str, part: _Part, size: int | None) -> tuple[np.ndarray, list[int | str | None]]:
    """Read the images, (N, size, size, 3) uint8, and the labels of a part."""
    labels: list[int | str | None] = []

    def sources() -> Iterator[tuple[int, Source]]:
        for index, (image, label) in enumerate(part.examples):
            source = _source(f"{name} image {index}", image)
            labels.append(None if name == "unlabeled" else _plain_label(f"{name} image {index}", label))
            yield index, source

    each = sources()
    if size is None:
        first = list(itertools.islice(each, _MEASURED))
        if not first:
            raise UserError(f"data: the part '{name}' has no images")
        sides = [side for _, source in first if (side := _side(source))]
        size = Counter(sides or [_ANY]).most_common(1)[0][0]
        check_size(size, "data: the most common side of the images")
        each = itertools.chain(first, each)
    images = np.empty((part.count, size, size, 3), dtype=np.uint8)
    for index, source in each:
        images[index] = read_image(source, size, warn=False, name=f"data: {name} image {index}")
    return images, labels


def _source(name: str, image: Any) -> Source:
    if isinstance(image, Mapping) and image.keys() >= {"bytes", "path"}:  # An image that was not decoded.
        image = image["bytes"] or image["path"]
    try:
        sources = list(each_image(image))
    except (TypeError, ValueError) as error:
        raise UserError(f"data: {name}: {error}") from None
    if len(sources) != 1:
        raise UserError(f"data: {name} must be a single image, got {len(sources)}; give the data set, not a loader")
    return sources[0]


def _side(source: Source) -> int:
    """Return the shorter side of an image, in pixels; 0 if it cannot be read."""
    if isinstance(source, Image.Image):
        return min(source.size)
    with contextlib.suppress(OSError, DecodeError):
        return min(dimensions(content(source) if isinstance(source, Path) else source))
    return 0


def _plain_label(name: str, label: Any) -> int | str | None:
    """Return a label as a number or a name; None if it is unknown."""
    value = label
    with contextlib.suppress(ValueError, RuntimeError):  # Arrays and tensors with more than one element.
        value = label.item() if hasattr(label, "item") else label
    if isinstance(value, str):
        return None if value.strip().lower() in UNLABELED else value.strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    number = int(value) if isinstance(value, int) or (isinstance(value, float) and value.is_integer()) else -2
    if number < -1:
        raise UserError(f"data: label {value!r} of {name} must be a number from 0, a name, or -1 or None for unknown")
    return number if number >= 0 else None


def _classes(
    parts: Mapping[str, _Part], given: Mapping[str, Sequence[int | str | None]]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return the names of the classes, and the labels of each part, (N,) int64, -1 for unlabeled images.

    The number of a label refers to the names of its own part, or else to those of the first part that has names.
    """
    kinds = {type(label) for labels in given.values() for label in labels if label is not None}
    if len(kinds) > 1:
        raise UserError("data: labels must be all numbers or all names")
    present = {label for label in given["train"] if label is not None}
    if not present:
        raise UserError("data: no training image has a label")
    names = next((part.classes for part in parts.values() if part.classes), ())
    classes = parts["train"].classes or names or _present_classes(present)
    if len(set(classes)) < max(len(classes), 2):
        raise UserError(f"data: there must be at least two classes with different names, got {some(classes)}")
    named = {name: _named(name, labels, parts[name].classes or names) for name, labels in given.items()}
    numbers = {name: number for number, name in enumerate(classes)}
    distinct = {part: {label for label in labels if label is not None} for part, labels in named.items()}
    for part, labels in distinct.items():
        if strange := sorted(labels - numbers.keys()):
            raise UserError(
                f"data: labels of the part '{part}' are none of the {len(classes)} training classes: {some(strange)}"
            )
    if missing := [name for name in classes if name not in distinct["train"]]:
        raise UserError(
            f"data: classes without labeled training images: {some(missing)}; add some, or leave out these classes"
        )
    return classes, {
        part: np.array([-1 if label is None else numbers[label] for label in labels], dtype=np.int64)
        for part, labels in named.items()
    }


def _present_classes(present: set[int | str]) -> tuple[str, ...]:
    """Return the names of classes whose names are not given, from the labels of the training images."""
    numbers = sorted(label for label in present if isinstance(label, int))
    if not numbers:
        return tuple(sorted(map(str, present)))
    gaps = [(low + 1, high - 1) for low, high in itertools.pairwise([-1, *numbers]) if high > low + 1]
    if gaps:
        missing = some([f"{first} to {last}" if last > first else f"{first}" for first, last in gaps])
        raise UserError(
            f"data: classes without labeled training images: {missing}; number the classes from 0 without gaps, or "
            "give names as labels"
        )
    return tuple(map(str, numbers))


def _named(part: str, labels: Sequence[int | str | None], names: tuple[str, ...]) -> list[str | None]:
    """Return labels as names; without names, numbers as text."""
    if strange := [label for label in labels if isinstance(label, int) and names and label >= len(names)]:
        raise UserError(f"data: label {strange[0]} of the part '{part}' is none of the {len(names)} classes")
    return [
        names[label] if isinstance(label, int) and names else None if label is None else str(label) for label in labels
    ]
