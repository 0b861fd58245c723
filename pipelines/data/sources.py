"""Conversion of the paper's data sets from their original files to caches, with torchvision.

Images keep the order of their source, on which the paper's label splits depend.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data import cache
from pipelines.data.cache import DataError
from pipelines.files import atomic_write, first_line

# Location of the files in Debian's package dataset-fashion-mnist: the originals, recompressed.
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_DEBIAN_MD5 = {
    "train-images-idx3-ubyte.gz": "cf8536b0aa1a6ac5fa3f23001093305c",
    "train-labels-idx1-ubyte.gz": "10bea18fdb374794d4bb42e356e600c9",
    "t10k-images-idx3-ubyte.gz": "f78720b4224f21cce2f2ccf2d7a94c9a",
    "t10k-labels-idx1-ubyte.gz": "0d30e22e447f3c33dab9ed536400ac01",
}
_CHUNK = 4096  # Images copied at a time.
_DIGITS = tuple(str(digit) for digit in range(10))

Progress = Callable[[str, int, int], None]  # Description, amount done, total (0 if unknown).


@dataclass(frozen=True)
class SourceFile:
    """Original file of a data set.

    Attributes:
        location: Path relative to the data set's download folder.
        md5: MD5 in hexadecimal, from torchvision.
        urls: URLs, in the order in which to try them.
    """

    location: str
    md5: str
    urls: tuple[str, ...]


@dataclass
class _Content:
    """Data set before it is written. `convert` maps chunks of its images to (n, H, W, 3) uint8."""

    train: Sequence[np.ndarray]
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    class_order: tuple[int, ...] = ()
    folds: np.ndarray | None = None
    convert: Callable[[np.ndarray], np.ndarray] = field(default=lambda images: images)


def files(name: str) -> list[SourceFile]:
    """Return the original files of a data set in SOURCES."""
    from torchvision import datasets as tv

    if name in ("cifar10", "cifar100"):
        kind: Any = tv.CIFAR10 if name == "cifar10" else tv.CIFAR100
        return [SourceFile(kind.filename, kind.tgz_md5, (kind.url,))]
    if name == "stl10":
        return [SourceFile(tv.STL10.filename, tv.STL10.tgz_md5, (tv.STL10.url,))]
    if name.startswith("svhn"):
        splits = ("train", "test", "extra") if name == "svhn-extra" else ("train", "test")
        return [SourceFile(file, md5, (url,)) for url, file, md5 in (tv.SVHN.split_list[split] for split in splits)]
    raw = "FashionMNIST/raw/"
    mirrors = tv.FashionMNIST.mirrors
    return [
        SourceFile(raw + file, md5, tuple(mirror + file for mirror in mirrors))
        for file, md5 in tv.FashionMNIST.resources
    ]


def _cifar(name: str, folder: Path) -> _Content:
    from torchvision import datasets as tv

    kind = tv.CIFAR10 if name == "cifar10" else tv.CIFAR100
    train, test = (kind(folder, train=train, download=True) for train in (True, False))
    labels = (np.array(part.targets, dtype=np.int64) for part in (train, test))
    return _Content([train.data], next(labels), test.data, next(labels), tuple(train.classes))


def _svhn(name: str, folder: Path) -> _Content:
    from torchvision import datasets as tv

    splits = ("train", "extra") if name == "svhn-extra" else ("train",)
    parts = [tv.SVHN(folder, split=split) for split in (*splits, "test")]
    images = [part.data.transpose(0, 2, 3, 1) for part in parts]
    labels = [part.labels.astype(np.int64) for part in parts]
    # The authors number the classes digit - 1, so digit 0 comes last.
    order = (*range(1, 10), 0)
    return _Content(images[:-1], np.concatenate(labels[:-1]), images[-1], labels[-1], _DIGITS, order)


def _stl10(name: str, folder: Path) -> _Content:
    from torchvision import datasets as tv

    tv.STL10(folder, split="test", download=True)  # Unpacks the archive and verifies its files.
    base = folder / tv.STL10.base_folder

    def images(file: str) -> np.ndarray:
        """Return images stored by channel and column, memory-mapped since the unlabeled ones are 2.8 GB."""
        return np.memmap(base / file, np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)

    def labels(file: str) -> np.ndarray:
        return np.fromfile(base / file, np.uint8).astype(np.int64) - 1

    unlabeled = images("unlabeled_X.bin")
    known = labels("train_y.bin")
    lines = (base / "fold_indices.txt").read_text(encoding="ascii").split("\n")
    folds = np.array([[int(number) for number in line.split()] for line in lines if line.strip()], dtype=np.int64)
    return _Content(
        train=[images("train_X.bin"), unlabeled],
        train_labels=np.concatenate([known, np.full(len(unlabeled), -1)]),
        test=images("test_X.bin"),
        test_labels=labels("test_y.bin"),
        classes=tuple((base / "class_names.txt").read_text(encoding="ascii").split()),
        folds=folds,
    )


def _fashion(name: str, folder: Path) -> _Content:
    from torchvision import datasets as tv
    from torchvision.datasets.utils import extract_archive

    for file in files(name):
        extract_archive(str(folder / file.location))
    train, test = (tv.FashionMNIST(folder, train=train) for train in (True, False))
    convert = _padded if name == "fashion-mnist" else _halved
    images, labels = ([getattr(part, what).numpy() for part in (train, test)] for what in ("data", "targets"))
    return _Content(images[:1], labels[0], images[1], labels[1], tuple(train.classes), convert=convert)


def _padded(gray: np.ndarray) -> np.ndarray:
    """Pad (n, 28, 28) with two black pixels on each side and repeat the channel: (n, 32, 32, 3)."""
    return np.repeat(np.pad(gray, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=-1)


def _halved(gray: np.ndarray) -> np.ndarray:
    """Average 2x2 pixels of (n, 28, 28), pad with one black pixel, repeat the channel: (n, 16, 16, 3)."""
    means = gray.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).round().astype(np.uint8)
    return np.repeat(np.pad(means, ((0, 0), (1, 1), (1, 1)))[..., None], 3, axis=-1)


SOURCES: dict[str, Callable[[str, Path], _Content]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn": _svhn,
    "svhn-extra": _svhn,
    "stl10": _stl10,
    "fashion-mnist": _fashion,
    "fashion-mnist-16": _fashion,
}
_SAME_FILES = {"svhn-extra": "svhn", "fashion-mnist-16": "fashion-mnist"}


def prepare(
    name: str,
    source: Path | None = None,
    download: bool = True,
    progress: Progress = lambda what, done, whole: None,
) -> Path:
    """Make the cache of a data set, downloading missing original files.

    Args:
        name: Name of a data set in SOURCES.
        source: Folder to search for original files before downloading them.
        download: Whether missing files may be downloaded.
        progress: Called regularly with a description, the amount done and the total.

    Returns:
        The cache.

    Raises:
        DataError: A file is missing or damaged, or the cache cannot be written.
    """
    folder, raw = cache.data_dir() / name, cache.data_dir() / "downloads" / _SAME_FILES.get(name, name)
    with cache.writing(folder) as temporary:
        checksums = {}
        for file in files(name):
            _fetch(file, raw, source, download, progress)
            checksums[Path(file.location).name] = cache.sha256(raw / file.location)
        try:
            content = SOURCES[name](name, raw)
        except Exception as error:  # Each format has its own errors for damaged archives.
            raise DataError(f"the files of {name} in {raw} cannot be read: {first_line(error)}") from error
        _write(temporary, content, progress)
        cache.finish(temporary, name, content.classes, content.class_order, {"files": checksums})
    return folder


def _fetch(file: SourceFile, raw: Path, source: Path | None, download: bool, progress: Progress) -> None:
    """Copy or download an original file unless it exists, and check its checksum."""
    from torchvision.datasets.utils import download_url

    path = raw / file.location
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in filter(None, (source, _DEBIAN)):
        existing = folder / path.name
        if not path.exists() and existing.exists():
            _check(existing, file)
            with atomic_write(path) as copy:
                shutil.copyfile(existing, copy.name)
    by_hand = f"download {file.urls[0]} (MD5 {file.md5}) to {path.parent}"
    if not path.exists():
        if not download:
            raise DataError(f"{path.name} is missing; {by_hand}")
        progress(f"downloading {path.name}", 0, 0)
        for url in file.urls:
            try:
                with atomic_write(path) as fetched:
                    download_url(url, str(path.parent), Path(fetched.name).name, file.md5)
                break
            except Exception as error:  # A network error or a wrong checksum.
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
        else:
            raise DataError(f"{path.name} cannot be downloaded automatically; {by_hand}")
    _check(path, file)


def _check(path: Path, file: SourceFile) -> None:
    """Raise DataError if a file has the wrong checksum."""
    with path.open("rb") as content:
        md5 = hashlib.file_digest(content, "md5").hexdigest()
    if md5 not in (file.md5, _DEBIAN_MD5.get(path.name)):
        raise DataError(f"{path} is damaged (MD5 {md5}, expected {file.md5}); delete it and try again")


def _write(folder: Path, content: _Content, progress: Progress) -> None:
    sides = content.convert(np.asarray(content.test[:1])).shape[1:]
    parts = {"train": content.train, "test": [content.test]}
    total = sum(len(images) for arrays in parts.values() for images in arrays)
    done = 0
    for name, arrays in parts.items():
        written = cache.array(folder, f"{name}_images", (sum(map(len, arrays)), *sides))
        start = 0
        for images in arrays:
            for first, last in _chunks(len(images)):
                written[start + first : start + last] = content.convert(np.asarray(images[first:last]))
                progress("converting", done + last, total)
            start, done = start + len(images), done + len(images)
        written.flush()  # type: ignore[attr-defined]
        del written
    cache.save(folder, "train_labels", content.train_labels)
    cache.save(folder, "test_labels", content.test_labels)
    if content.folds is not None:
        cache.save(folder, "folds", content.folds)


def _chunks(length: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, _CHUNK):
        yield first, min(first + _CHUNK, length)
