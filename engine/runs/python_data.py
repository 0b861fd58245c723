"""Data sets given in Python: arrays, or data sets in the style of torchvision or Hugging Face."""

from __future__ import annotations

import contextlib
import io
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
from pipelines.data.splits import hold_out
from pipelines.data.table import UNLABELED
from pipelines.files import some

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")
_PARTS = ("train", "unlabeled", "test")
_IMAGE, _LABEL = ("image", "img"), ("label", "labels", "fine_label")
_MEASURED = 1000  # Images from which the size is determined.
_ACCEPTED = (
    "a folder; train_images, train_labels and maybe test_images, test_labels and classes, as a mapping or an object; a "
    "data set of (image, label) or of mappings with 'image' and 'label'; or a tuple (train, test)"
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
    parts = _parts(data)
    images: dict[str, np.ndarray] = {}
    given: dict[str, list[int | str | None]] = {}
    for name, part in parts.items():
        images[name], given[name] = _read(name, part, size)
        size = images[name].shape[1]
    classes = _class_names(next((part.classes for part in parts.values() if part.classes), ()), given)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = {
        name: np.array([-1 if v is None else numbers[v] if isinstance(v, str) else v for v in values], dtype=np.int64)
        for name, values in given.items()
    }
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
            if fields[f"{name}_images"] is not None
        }
        names = _names(fields["classes"])
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
    return getattr(data[0], "ndim", 0) >= 3


def _part(name: str, data: Any) -> _Part:
    if isinstance(data, tuple) and len(data) == 2 and _is_arrays(data):
        return _array_part(name, *data)
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, (str, bytes, Mapping)) or not (indexed or isinstance(data, Iterable)):
        raise UserError(f"data must be {_ACCEPTED}; the part '{name}' is of type {type(data).__name__}")
    rows = data if indexed else list(data)
    examples = (_example(name, index, rows[index]) for index in range(len(rows)))
    return _Part(len(rows), examples, _names_of(data))


def _array_part(name: str, images: Any, labels: Any, classes: tuple[str, ...] = ()) -> _Part:
    if labels is None or len(images) != len(labels):
        count = "no" if labels is None else len(labels)
        raise UserError(f"data: the part '{name}' has {len(images)} images, but {count} labels; -1 stands for unknown")
    return _Part(len(images), zip(images, labels, strict=True), classes)


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
    if not isinstance(row, Sequence) or len(row) != 2:
        raise UserError(f"data: {name} example {index} must be (image, label) or a mapping, got {type(row).__name__}")
    return row[0], row[1]


def _names_of(data: Any) -> tuple[str, ...]:
    """Return the class names that a data set comes with, or the one that it is a part of."""
    features = getattr(data, "features", None)
    if isinstance(features, Mapping):
        return next((_names(getattr(features[key], "names", None)) for key in _LABEL if key in features), ())
    if names := _names(getattr(data, "classes", None)):
        return names
    return _names_of(data.dataset) if hasattr(data, "dataset") else ()


def _names(given: Any) -> tuple[str, ...]:
    if given is None or isinstance(given, str) or not isinstance(given, Iterable):
        return ()
    return tuple(str(name[0] if isinstance(name, tuple) else name) for name in given)  # A tuple holds synonyms.


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
        size = Counter(_side(f"{name} image {index}", source) for index, source in first).most_common(1)[0][0]
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


def _side(name: str, source: Source) -> int:
    if isinstance(source, Image.Image):
        return min(source.size)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
            return min(image.size)
    except OSError as error:
        raise UserError(f"data: {name} cannot be read as an image ({error.strerror or 'unknown format'})") from None


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


def _class_names(names: tuple[str, ...], given: Mapping[str, Sequence[int | str | None]]) -> tuple[str, ...]:
    """Return the names of the classes, after checking all labels against them."""
    labels = {part: [label for label in values if label is not None] for part, values in given.items()}
    kinds = {type(label) for values in labels.values() for label in values}
    if len(kinds) > 1:
        raise UserError("data: labels must be all numbers or all names")
    if not labels["train"]:
        raise UserError("data: no training image has a label")
    if kinds == {int}:
        names = names or tuple(map(str, range(max(map(int, labels["train"])) + 1)))
        allowed: set[Any] = set(range(len(names)))
    else:
        names = names or tuple(sorted(set(map(str, labels["train"]))))
        allowed = set(names)
    if len(set(names)) < max(len(names), 2):
        raise UserError(f"data: there must be at least two classes with different names, got {some(names)}")
    for part, values in labels.items():
        if strange := [label for label in values if label not in allowed]:
            raise UserError(f"data: label {strange[0]!r} of the part '{part}' is none of the {len(names)} classes")
    return names
