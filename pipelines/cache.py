"""What a data set is, and data sets on disk: uint8 images that are memory-mapped, so that opening costs little.

A cache is a folder with `cache.json` and arrays in numpy's format. It is written under another name and renamed whole,
so that a half-written one is never read. Opening looks at the version and at the sizes of the files, `verify` at their
contents.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import PARTIAL, sync_to_disk

FORMAT = "remixmatch-cache-1"
_DESCRIPTION, _KEY = "cache.json", "made-from"
_OPTIONAL = ("unlabeled", "folds")
_flag = ""  # of the command line, with which this process was told where caches lie


@dataclass(frozen=True, eq=False)
class DataSet:
    """Decoded images by number, and their labels; in memory or memory-mapped, so that nothing may copy all of them.

    Attributes:
        name: as in `pipelines.datasets.DATASETS`.
        classes: names of the L classes.
        train_images: (N, H, W, 3) uint8, labeled and unlabeled ones.
        train_labels: (N,) int64, -1 where the label is not known.
        test_images: (M, H, W, 3) uint8.
        test_labels: (M,) int64.
        unlabeled: rows of the training images that are trained on without their label; None for all of them, as in the
            paper, the labeled ones included.
        class_order: classes in the order in which the paper's split goes through them; () for ascending.
        folds: published label splits, each rows of the training images; () without any.
        held_out: how many labeled images were made the test part, where the source has none; 0 otherwise.
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

    @property
    def unlabeled_indices(self) -> np.ndarray:
        """Rows of the training images that are trained on without their label: (Nu,) int64."""
        return np.arange(len(self.train_images)) if self.unlabeled is None else self.unlabeled

    @property
    def sides(self) -> tuple[int, int]:
        """H and W."""
        return self.train_images.shape[1:3]


class DataError(ValueError):
    """Data that is not there, or not as it should be; the message says what, and what to do."""


def data_dir() -> Path:
    """Where caches lie: the variable REMIXMATCH_DATA, or ~/.cache/remixmatch."""
    given = os.environ.get("REMIXMATCH_DATA")
    return Path(given) if given else Path.home() / ".cache" / "remixmatch"


def set_data_dir(folder: Path | None) -> None:
    """Has this process, and those that it starts, look for caches there; None leaves all as it is."""
    global _flag
    _flag = f" --data-dir {shlex.quote(str(folder))}" if folder else ""
    if folder:
        os.environ["REMIXMATCH_DATA"] = str(folder.resolve())


def prepare_command(what: str, flags: str = "") -> str:
    """The command line that prepares a data set or a folder, for a message.

    Args:
        what: its name, or the folder.
        flags: besides the place of caches where this process was given one.
    """
    return f"remixmatch data prepare {shlex.quote(what)}{flags}{_flag}"


@contextlib.contextmanager
def writing(folder: Path, key: str = "") -> Iterator[Path]:
    """Gives a folder to be filled by `array` and `finish`, which takes the place of `folder` if all went well.

    Args:
        folder: the cache.
        key: says what it is made from; what an interrupted process has made from the same is given again.

    Raises:
        DataError: the folder cannot be written, or another process is writing it.
    """
    temporary = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{folder} is being prepared by another process") from None
            kept = temporary / _KEY
            if not key or not kept.exists() or kept.read_text(encoding="utf-8") != key:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                kept.write_text(key, encoding="utf-8")
            try:
                yield temporary
                if not (temporary / _DESCRIPTION).exists():
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
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error})") from error


def array(folder: Path, name: str, shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """A new array of a cache under way, memory-mapped for writing."""
    # its blocks are asked for now: a disk that gets full under a memory map would kill the process
    with (folder / f"{name}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        )
        size = file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize
        file.flush()
        if size > file.tell():
            os.posix_fallocate(file.fileno(), 0, size)
    return np.load(folder / f"{name}.npy", mmap_mode="r+")


def shorten(folder: Path, name: str, rows: int) -> None:
    """Leaves the first rows of an array of a cache under way."""
    path = folder / f"{name}.npy"
    values = np.load(path, mmap_mode="r")
    offset, shape, dtype = values.offset, (rows, *values.shape[1:]), values.dtype  # type: ignore[attr-defined]
    del values
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with path.open("r+b") as file:
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == offset, "numpy leaves room for every length of an array"
        file.truncate(offset + int(np.prod(shape)) * dtype.itemsize)


def save(folder: Path, name: str, values: np.ndarray) -> None:
    """A small array of a cache under way."""
    np.save(folder / f"{name}.npy", values)


def finish(
    folder: Path,
    name: str,
    classes: tuple[str, ...],
    class_order: tuple[int, ...] = (),
    source: Mapping[str, Any] | None = None,
) -> None:
    """Describes a cache whose arrays are complete.

    Args:
        folder: has `train_images`, `train_labels`, `test_images`, `test_labels`, perhaps `unlabeled` and `folds`.
        name: of the data set.
        classes: names.
        class_order: see `DataSet`.
        source: what it was made from: plain values.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.glob("*.npy"))}
    description = {
        "format": FORMAT, "name": name, "classes": list(classes), "class_order": list(class_order),
        "source": dict(source or {}), "files": files,
    }  # fmt: skip
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def read_description(folder: Path, again: str) -> dict[str, Any]:
    """The description of a cache whose files have the right sizes.

    Args:
        folder: the cache.
        again: the command that prepares it.

    Raises:
        DataError: it is not there, damaged, foreign, or of another version.
    """
    path = folder / _DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not str(found.get("format", "")).startswith("remixmatch-cache-"):
            raise DataError(f"{folder} is not a cache of this engine; prepare it again: {again}")
        if found["format"] != FORMAT:
            raise DataError(f"{folder} is of another version ({found['format']}); prepare it again: {again}")
        for name, file in found["files"].items():
            size = (folder / name).stat().st_size if (folder / name).exists() else 0
            if size != file["bytes"]:
                raise DataError(
                    f"{folder / name} has {size} bytes instead of {file['bytes']}; prepare it again: {again}"
                )
    except FileNotFoundError:
        raise DataError(f"there is no data in {folder}; prepare it: {again}") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); prepare it again: {again}") from None
    return found


def open_cache(folder: Path, again: str) -> DataSet:
    """A data set from its cache.

    Raises:
        DataError: see `read_description`.
    """
    found = read_description(folder, again)

    def read(name: str) -> np.ndarray:
        # copy on write: torch wants arrays that it may write to, and nothing ever does
        return np.load(folder / f"{name}.npy", mmap_mode="c")

    try:
        optional = {name: read(name) for name in _OPTIONAL if f"{name}.npy" in found["files"]}
        return DataSet(
            name=found["name"],
            classes=tuple(found["classes"]),
            train_images=read("train_images"),
            train_labels=np.array(read("train_labels")),
            test_images=read("test_images"),
            test_labels=np.array(read("test_labels")),
            unlabeled=np.array(optional["unlabeled"]) if "unlabeled" in optional else None,
            class_order=tuple(found["class_order"]),
            folds=tuple(np.array(fold) for fold in optional.get("folds", ())),
            held_out=int(found["source"].get("held_out", 0)),
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read ({error}); prepare it again: {again}") from None


def unmap(images: np.ndarray) -> None:
    """Takes what was read of a memory map out of the process's memory; it is mapped again when it is read again.

    The system's own cache keeps it as long as there is room. Nothing happens to an array that is not mapped.
    """
    base: Any = images
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


_LARGE_BYTES, _AT_ONCE = 2**28, 32


def take_images(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some images, copied: (N, H, W, 3) and (n,) int64 to (n, H, W, 3).

    Of a large memory map no more than some tens of images are mapped at a time, each of which can be a huge page.
    """
    if images.nbytes <= _LARGE_BYTES:
        return images[rows]
    parts = []
    for first in range(0, len(rows), _AT_ONCE):
        parts.append(images[rows[first : first + _AT_ONCE]])
        unmap(images)
    return np.concatenate(parts) if parts else images[rows]


def verify(folder: Path, again: str) -> None:
    """Compares the contents of a cache's files with their checksums.

    Raises:
        DataError: one of them differs, or see `read_description`.
    """
    for name, file in read_description(folder, again)["files"].items():
        if sha256(folder / name) != file["sha256"]:
            raise DataError(f"{folder / name} is damaged: its checksum differs; prepare it again: {again}")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
