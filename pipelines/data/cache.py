"""Data sets and their on-disk cache of memory-mapped uint8 images.

A cache is a folder with `cache.json` and .npy files. It is written under a temporary name and then renamed, so that an
incomplete cache is never read. Opening checks the format and the file sizes; `verify` checks the contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import PARTIAL, Locked, lock, sync_to_disk

FORMAT = "remixmatch-cache-1"
DESCRIPTION, _KEY = "cache.json", "made-from"
_OPTIONAL = ("unlabeled", "folds")
_flag = ""  # The --data-dir flag of this process, repeated in the commands that messages suggest.


@dataclass(frozen=True, eq=False)
class DataSet:
    """Decoded images and labels, in memory or memory-mapped; must never be copied as a whole.

    Attributes:
        name: Name in `pipelines.data.datasets.DATASETS`, or `folder:` and the path of a folder.
        classes: Names of the L classes.
        train_images: (N, H, W, 3) uint8, labeled and unlabeled images.
        train_labels: (N,) int64, -1 for unknown labels.
        test_images: (M, H, W, 3) uint8.
        test_labels: (M,) int64.
        unlabeled: Indices of the training images used without labels. None for all of them, including the labeled
            ones, as in the paper.
        class_order: Order in which the paper's split visits the classes; () for ascending.
        folds: Published label splits, each as indices of training images; () if there are none.
        held_out: Number of labeled images held out as test images because the source has none; 0 otherwise.
        digests: SHA-256 of arrays by name, computed when they were stored; empty for data sets in memory.
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    unlabeled: np.ndarray | None = None
    class_order: tuple[int, ...] = ()
    folds: tuple[np.ndarray, ...] = ()
    held_out: int = 0
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def unlabeled_indices(self) -> np.ndarray:
        """Indices of the training images used without labels: (Nu,) int64."""
        return np.arange(len(self.train_images)) if self.unlabeled is None else self.unlabeled

    def class_counts(self, indices: np.ndarray) -> np.ndarray:
        """Return how many of some training images have each label, (L,) int64; unknown labels do not count."""
        labels = self.train_labels[indices]
        return np.bincount(labels[labels >= 0], minlength=len(self.classes))

    @property
    def sides(self) -> tuple[int, int]:
        """H and W of the images."""
        return self.train_images.shape[1:3]


class DataError(ValueError):
    """Missing or invalid data; the message says what is wrong and what to do."""


def data_dir() -> Path:
    """Return the folder of all caches: the variable REMIXMATCH_DATA, or ~/.cache/remixmatch."""
    given = os.environ.get("REMIXMATCH_DATA")
    return Path(given) if given else Path.home() / ".cache" / "remixmatch"


def set_data_dir(folder: Path | None) -> None:
    """Set the folder of all caches for this process and its children; None changes nothing."""
    global _flag
    _flag = f" --data-dir {shlex.quote(str(folder))}" if folder else ""
    if folder:
        os.environ["REMIXMATCH_DATA"] = str(folder.resolve())


def prepare_command(what: str, flags: str = "") -> str:
    """Return the command that prepares a data set or a folder, for a message.

    Args:
        what: Name of the data set, or path of the folder.
        flags: Additional flags. `--data-dir` is appended if this process was given one.
    """
    return f"remixmatch data prepare {shlex.quote(what)}{flags}{_flag}"


@contextlib.contextmanager
def writing(folder: Path, key: str = "") -> Iterator[Path]:
    """Yield a temporary folder to fill with `array` and `finish`; it replaces `folder` on success.

    Args:
        folder: The cache.
        key: Identifies the source of the cache. After an interruption, the next call with the same key continues with
            the same files. Without a key, they are discarded.

    Raises:
        DataError: The folder cannot be written, or another process is writing it.
    """
    folder = Path(os.path.realpath(folder))  # A cache may be a link to another disk.
    temporary = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.with_name(f".{folder.name}.lock")):
            kept = temporary / _KEY
            if not key or not kept.exists() or kept.read_text(encoding="utf-8") != key:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                kept.write_text(key, encoding="utf-8")
            try:
                yield temporary
                if not (temporary / DESCRIPTION).exists():
                    raise RuntimeError(f"{folder} was not finished")
                kept.unlink()
                for path in [*temporary.iterdir(), temporary]:
                    sync_to_disk(path)
                if folder.exists():
                    old = folder.with_name(f".{folder.name}.old")
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
                    temporary.rename(folder)
                    shutil.rmtree(old)
                else:
                    temporary.rename(folder)
                sync_to_disk(folder.parent)
            finally:
                if not key:
                    shutil.rmtree(temporary, ignore_errors=True)
    except Locked as holder:
        raise DataError(f"{folder} is being prepared by {holder}; wait until it has finished") from None
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written ({error.strerror or error})") from error


def array(folder: Path, name: str, shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """Create an array of an unfinished cache, memory-mapped for writing."""
    # Allocate disk blocks now: running out of space while writing to a memory map would kill the process.
    with (folder / f"{name}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        )
        size = file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize
        file.flush()
        if size > file.tell():
            os.posix_fallocate(file.fileno(), 0, size)
    return np.load(folder / f"{name}.npy", mmap_mode="r+")


def shorten(folder: Path, name: str, length: int) -> None:
    """Truncate an array of an unfinished cache to `length` entries."""
    path = folder / f"{name}.npy"
    values = np.load(path, mmap_mode="r")
    offset, shape, dtype = values.offset, (length, *values.shape[1:]), values.dtype  # type: ignore[attr-defined]
    del values
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with path.open("r+b") as file:
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == offset, "numpy pads the header so that its size does not depend on the array's length"
        file.truncate(offset + int(np.prod(shape)) * dtype.itemsize)


def save(folder: Path, name: str, values: np.ndarray) -> None:
    """Write a small array of an unfinished cache."""
    np.save(folder / f"{name}.npy", values)


def finish(
    folder: Path,
    name: str,
    classes: tuple[str, ...],
    class_order: tuple[int, ...] = (),
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write the description of a cache whose arrays are complete.

    Args:
        folder: Folder with `train_images`, `train_labels`, `test_images`, `test_labels`, and optionally `unlabeled` and
            `folds`.
        name: Name of the data set.
        classes: Names of the classes.
        class_order: See `DataSet`.
        source: Source of the data, as JSON values.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.glob("*.npy"))}
    description = {
        "format": FORMAT, "name": name, "classes": list(classes), "class_order": list(class_order),
        "source": dict(source or {}), "files": files,
    }  # fmt: skip
    (folder / DESCRIPTION).write_text(as_text(description), encoding="utf-8")


def as_text(description: Mapping[str, Any]) -> str:
    """Return the content of cache.json."""
    return json.dumps(description, indent=1) + "\n"


def read_description(folder: Path, command: str) -> dict[str, Any]:
    """Return the description of a cache after checking its format and the sizes of its files.

    Args:
        folder: The cache.
        command: Command that prepares it, for messages.

    Raises:
        DataError: The cache is missing, damaged, or has another format.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        found = str(description.get("format", "")) if isinstance(description, dict) else ""
        if not found.startswith("remixmatch-cache-"):
            raise DataError(f"{folder} is not a remixmatch cache; run: {command}")
        if found != FORMAT:
            raise DataError(f"{folder} has cache format {found}, expected {FORMAT}; run: {command}")
        for name, file in description["files"].items():
            size = (folder / name).stat().st_size if (folder / name).exists() else 0
            if size != file["bytes"]:
                raise DataError(f"{folder / name} has {size} bytes, expected {file['bytes']}; run: {command}")
    except FileNotFoundError:
        raise DataError(f"no prepared data in {folder}; run: {command}") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); run: {command}") from None
    return description


def open_cache(folder: Path, command: str) -> DataSet:
    """Open a cached data set.

    Args:
        folder: The cache.
        command: Command that prepares it, for messages.

    Raises:
        DataError: See `read_description`.
    """
    return open_described(folder, read_description(folder, command), command)


def open_described(folder: Path, description: Mapping[str, Any], command: str) -> DataSet:
    """Open a cached data set whose description has been read; see `open_cache`."""

    def read(name: str) -> np.ndarray:
        # Copy-on-write because torch requires writable arrays; nothing is ever written.
        return np.load(folder / f"{name}.npy", mmap_mode="c")

    try:
        optional = {name: read(name) for name in _OPTIONAL if f"{name}.npy" in description["files"]}
        return DataSet(
            name=description["name"],
            classes=tuple(description["classes"]),
            train_images=read("train_images"),
            train_labels=np.array(read("train_labels")),
            test_images=read("test_images"),
            test_labels=np.array(read("test_labels")),
            unlabeled=np.array(optional["unlabeled"]) if "unlabeled" in optional else None,
            class_order=tuple(description["class_order"]),
            folds=tuple(np.array(fold) for fold in optional.get("folds", ())),
            held_out=int(description["source"].get("held_out", 0)),
            digests={name.removesuffix(".npy"): file["sha256"] for name, file in description["files"].items()},
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read ({error}); run: {command}") from None


def unmap(images: np.ndarray) -> None:
    """Release the resident pages of a memory-mapped array; they are mapped again on the next read.

    The page cache keeps them while there is room. Does nothing if the array is not memory-mapped.
    """
    base: Any = images
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


_LARGE_BYTES, _AT_ONCE = 2**28, 32


def take_images(images: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Copy selected images: (N, H, W, 3) and (n,) int64 to (n, H, W, 3).

    In a large memory map, at most a few dozen images stay mapped at a time, because each may map a huge page.
    """
    if images.nbytes <= _LARGE_BYTES:
        return images[indices]
    parts = []
    for first in range(0, len(indices), _AT_ONCE):
        parts.append(images[indices[first : first + _AT_ONCE]])
        unmap(images)
    return np.concatenate(parts) if parts else images[indices]


def verify(folder: Path, command: str) -> None:
    """Compare the files of a cache with their checksums.

    Args:
        folder: The cache.
        command: Command that prepares it anew, for messages.

    Raises:
        DataError: A checksum differs; see also `read_description`.
    """
    for name, file in read_description(folder, command)["files"].items():
        if sha256(folder / name) != file["sha256"]:
            raise DataError(f"{folder / name} is damaged (wrong checksum); run: {command}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
