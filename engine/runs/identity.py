"""The data that a run is trained on: the content of split.json, and how other data differ from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.config import Config
from engine.runs.folder import read_split
from pipelines.data.cache import DataSet
from pipelines.data.splits import digest, image_digest

# Keys that runs of all versions record, and what a difference means.
_RECORDED = {
    "class_names": "classes or their order",
    "sides": "size of the images",
    "sha256": "which images are labeled",
    "classes": "labels",
    "images_sha256": "labeled images",
}
# Parts that include what another difference has already named; and what they are called if it has not.
_REST = {
    "classes": (_RECORDED["class_names"], "classes"),
    "unlabeled images": (_RECORDED["images_sha256"], "unlabeled images"),
    "training labels": (_RECORDED["classes"], "hidden labels"),
}


def fingerprint(data: DataSet) -> dict[str, dict[str, Any]]:
    """Return the size and the SHA-256 of every part of a data set.

    Images of a prepared data set are not read: their digests were computed when it was prepared.
    """

    def images(part: str) -> str:
        return data.digests.get(f"{part}_images") or _sha256(getattr(data, f"{part}_images"))

    unlabeled = data.unlabeled_indices
    parts: dict[str, tuple[Sized, str]] = {
        "classes": (data.classes, _sha256(json.dumps(data.classes).encode())),
        "unlabeled images": (unlabeled, _sha256(images("train").encode() + unlabeled.astype("<i8").tobytes())),
        "training labels": (data.train_labels, _sha256(data.train_labels.astype("<i8"))),
        "test images": (data.test_images, images("test")),
        "test labels": (data.test_labels, _sha256(data.test_labels.astype("<i8"))),
    }
    return {name: {"count": len(values), "sha256": content} for name, (values, content) in parts.items()}


def describe(config: Config, data: DataSet, split: np.ndarray, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of split.json.

    Args:
        config: Configuration of the run.
        data: Its data set.
        split: (labels,) int64, indices of the labeled training images.
        before: Content of the run's earlier split.json, or an empty mapping. Its digest of the labeled images is kept
            if all training images are the same, instead of reading them again.
    """
    parts, indices, old = fingerprint(data), digest(split), before.get("data")
    content = {
        "dataset": config.dataset,
        "seed": config.seed,
        "labels": len(split),
        "split": config.split,
        "train_rows": split.tolist(),
        "sha256": indices,
        "images_sha256": before.get("images_sha256"),
        "classes": [data.classes[c] for c in data.train_labels[split]],
        "class_names": list(data.classes),
        "sides": list(data.sides),
        "data": parts,
        **_class_counts(config, data, split),
    }
    unread = isinstance(old, dict) and old.get("unlabeled images") == parts["unlabeled images"]
    if not (unread and content["images_sha256"] and before.get("sha256") == indices):
        content["images_sha256"] = image_digest(data.train_images, split)
    if not config.unlabeled:  # Such a run uses only the labeled images, which are recorded on their own.
        del parts["unlabeled images"], parts["training labels"]
    return content


def _class_counts(config: Config, data: DataSet, split: np.ndarray) -> dict[str, Any]:
    """Return the images per class and the unlabeled images, if their ratios are set; see `pipelines.data.imbalance`."""
    ratios = config.class_ratios
    if not (ratios.of_labeled or ratios.of_unlabeled):
        return {}
    content: dict[str, Any] = {
        "imbalance": [ratios.labeled, ratios.unlabeled],
        "labels_per_class": data.class_counts(split).tolist(),
    }
    if config.unlabeled:
        content["unlabeled_per_class"] = data.class_counts(data.unlabeled_indices).tolist()
        if data.unlabeled is not None:
            content["unlabeled_rows"] = data.unlabeled.tolist()
    return content


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the differences between the data of two split.json; what only one of them records is not compared."""
    found = [name for key, name in _RECORDED.items() if key in before and before[key] != now[key]]
    old = before.get("data")
    changed = changed_parts(old if isinstance(old, dict) else {}, now["data"], now["data"])
    for part, name in changed:
        if part == "training labels" != name and any(other == "unlabeled images" for other, _ in changed):
            continue  # Another number of images has another number of labels.
        included, rest = _REST.get(part, ("", part))
        if included not in found:
            found.append(name.replace(part, rest))
    return found


def changed_test_parts(folder: Path, data: DataSet) -> list[str]:
    """Name the parts of a run's test data that have changed since it was trained, as far as the run records them."""
    before = read_split(folder).get("data")
    parts = ("test images", "test labels")
    return [name for _, name in changed_parts(before if isinstance(before, dict) else {}, fingerprint(data), parts)]


def changed_parts(
    before: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]], parts: Iterable[str]
) -> list[tuple[str, str]]:
    """Return the parts whose fingerprints differ, each with its description, such as "test images (4 -> 6)"."""
    changed = []
    for part in parts:
        old = before.get(part)
        if isinstance(old, dict) and old != now[part]:
            counts = old.get("count"), now[part]["count"]
            changed.append((part, part if counts[0] == counts[1] else f"{part} ({counts[0]} -> {counts[1]})"))
    return changed


def _sha256(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else np.ascontiguousarray(content).data).hexdigest()
