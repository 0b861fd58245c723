"""The paper's data sets, from their original files to a cache: read and verified by torchvision.

Images keep the order of their source, which the paper's label splits rest on.
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

from pipelines import cache
from pipelines.cache import DataError
from pipelines.files import atomic_write, first_line

# Debian's package dataset-fashion-mnist has the original files there, packed anew
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_DEBIAN_MD5 = {
    "train-images-idx3-ubyte.gz": "cf8536b0aa1a6ac5fa3f23001093305c",
    "train-labels-idx1-ubyte.gz": "10bea18fdb374794d4bb42e356e600c9",
    "t10k-images-idx3-ubyte.gz": "f78720b4224f21cce2f2ccf2d7a94c9a",
    "t10k-labels-idx1-ubyte.gz": "0d30e22e447f3c33dab9ed536400ac01",
}
_CHUNK = 4096  # images copied at a time
_DIGITS = tuple(str(digit) for digit in range(10))

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class SourceFile:
    """An original file.

    Attributes:
        place: below the folder of downloads.
        md5: hexadecimal, as torchvision knows it.
        urls: where it can be had, in the order in which to try.
    """

    place: str
    md5: str
    urls: tuple[str, ...]


@dataclass
class _Content:
    """A data set before it is written: arrays that convert themselves chunk by chunk to (n, H, W, 3) uint8."""

    train: Sequence[np.ndarray]
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    class_order: tuple[int, ...] = ()
    folds: np.ndarray | None = None
    convert: Callable[[np.ndarray], np.ndarray] = field(default=lambda images: images)


def files(name: str) -> list[SourceFile]:
    """The original files of a data set of SOURCES."""
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
    # the authors number classes digit - 1, so that digit 0 comes last
    order = (*range(1, 10), 0)
    return _Content(images[:-1], np.concatenate(labels[:-1]), images[-1], labels[-1], _DIGITS, order)


def _stl10(name: str, folder: Path) -> _Content:
    from torchvision import datasets as tv

    tv.STL10(folder, split="test", download=True)  # unpacks the archive, and verifies its files
    base = folder / tv.STL10.base_folder

    def images(file: str) -> np.ndarray:
        """Stored by channel and column; memory-mapped, since the unlabeled ones are 2.8 GB."""
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
        extract_archive(str(folder / file.place))
    train, test = (tv.FashionMNIST(folder, train=train) for train in (True, False))
    convert = _padded if name == "fashion-mnist" else _halved
    images, labels = ([getattr(part, what).numpy() for part in (train, test)] for what in ("data", "targets"))
    return _Content(images[:1], labels[0], images[1], labels[1], tuple(train.classes), convert=convert)


def _padded(grey: np.ndarray) -> np.ndarray:
    """(n, 28, 28) with two black pixels around, the channel repeated: (n, 32, 32, 3)."""
    return np.repeat(np.pad(grey, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=-1)


def _halved(grey: np.ndarray) -> np.ndarray:
    """(n, 28, 28) as means of 2x2 pixels with a black one around, the channel repeated: (n, 16, 16, 3)."""
    means = grey.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).round().astype(np.uint8)
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
    """Makes the cache of a data set, fetching its original files where they are not there yet.

    Args:
        name: of SOURCES.
        source: a folder in which original files are looked for first.
        download: whether missing ones may be fetched.
        progress: called now and then.

    Returns:
        The cache.

    Raises:
        DataError: a file is missing or damaged, or the cache cannot be written.
    """
    folder, raw = cache.data_dir() / name, cache.data_dir() / "downloads" / _SAME_FILES.get(name, name)
    with cache.writing(folder) as temporary:
        checksums = {}
        for file in files(name):
            _fetch(file, raw, source, download, progress)
            checksums[Path(file.place).name] = cache.sha256(raw / file.place)
        try:
            content = SOURCES[name](name, raw)
        except Exception as error:  # a damaged archive fails in as many ways as there are formats
            raise DataError(f"the files of {name} in {raw} cannot be read: {first_line(error)}") from error
        _write(temporary, content, progress)
        cache.finish(temporary, name, content.classes, content.class_order, {"files": checksums})
    return folder


def _fetch(file: SourceFile, raw: Path, source: Path | None, download: bool, progress: Progress) -> None:
    """Has an original file in its place, with the right checksum."""
    from torchvision.datasets.utils import download_url

    path = raw / file.place
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in filter(None, (source, _DEBIAN)):
        there = folder / path.name
        if not path.exists() and there.exists():
            _check(there, file)
            with atomic_write(path) as copy:
                shutil.copyfile(there, copy.name)
    wanted = f"{path.name} (MD5 {file.md5}, {file.urls[0]})"
    if not path.exists():
        if not download:
            raise DataError(f"{path.name} is missing: put {wanted} into {path.parent}")
        progress(f"downloading {path.name}", 0, 0)
        for url in file.urls:
            try:
                with atomic_write(path) as fetched:
                    download_url(url, str(path.parent), Path(fetched.name).name, file.md5)
                break
            except Exception as error:  # of the network, or a checksum
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
        else:
            raise DataError(f"{path.name} cannot be downloaded: put {wanted} into {path.parent}")
    _check(path, file)


def _check(path: Path, file: SourceFile) -> None:
    """Raises DataError where a file has another checksum."""
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "md5").hexdigest()
    if found not in (file.md5, _DEBIAN_MD5.get(path.name)):
        raise DataError(f"{path} is damaged: its MD5 is {found}, not {file.md5}; remove it and try again")


def _write(folder: Path, content: _Content, progress: Progress) -> None:
    sides = content.convert(np.asarray(content.test[:1])).shape[1:]
    parts = {"train": content.train, "test": [content.test]}
    total = sum(len(images) for of_part in parts.values() for images in of_part)
    done = 0
    for name, of_part in parts.items():
        into = cache.array(folder, f"{name}_images", (sum(map(len, of_part)), *sides))
        start = 0
        for images in of_part:
            for first, last in _chunks(len(images)):
                into[start + first : start + last] = content.convert(np.asarray(images[first:last]))
                progress("converting", done + last, total)
            start, done = start + len(images), done + len(images)
        into.flush()  # type: ignore[attr-defined]
        del into
    cache.save(folder, "train_labels", content.train_labels)
    cache.save(folder, "test_labels", content.test_labels)
    if content.folds is not None:
        cache.save(folder, "folds", content.folds)


def _chunks(length: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, _CHUNK):
        yield first, min(first + _CHUNK, length)
