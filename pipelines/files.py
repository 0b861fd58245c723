"""Atomic file writes, locks, tolerant reading of JSON files, and one-line error texts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

_NAMED = 3  # Files named in a message before it abbreviates.
PARTIAL = ".partial"  # Suffix of files that are not complete yet.
# Errors of flock on file systems without locks, such as some network file systems.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO}
_ATTEMPTS = 10  # to lock a file that others remove
log = logging.getLogger(__name__)


class Locked(Exception):
    """Another process holds a lock. The text names it: its ID, its machine, and when it took the lock."""


class _File(io.FileIO):
    """File that records its first failed write, in case a library replaces that error by its own."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


@contextlib.contextmanager
def atomic_write(path: Path, *, sync: bool = False, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends without an error.

    Until then it is `.NAME.partial` in the same folder, and an existing file keeps its content. An error leaves no
    partial file. A killed process may leave one, which the next write of the same file overwrites. A device or a pipe,
    such as /dev/stdout, is not replaced but written to.

    Args:
        path: File to replace; its folder must exist.
        sync: Flush the file and its folder to disk, so that the file survives a power failure.
        shared: Other processes may write the same file at the same time; the last one wins.

    Raises:
        OSError: The file could not be written, even if a library in the block raised another error instead.
    """
    if path.parent == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir()):
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # Fails, instead of waiting, if nothing reads a pipe.
        os.set_blocking(descriptor, True)
        with open(descriptor, "wb") as device:
            yield device
        return
    owner = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    partial = path.with_name(f".{path.name}{owner}{PARTIAL}")
    try:
        if partial.is_symlink():  # Opening it would truncate the file that it points to.
            partial.unlink()
        with _File(partial, "w") as raw:
            file = io.BufferedWriter(raw)
            try:
                yield file
                file.flush()
            except Exception as error:
                if raw.error not in (None, error):
                    raise raw.error from error
                raise
            if raw.error is not None:  # The block ignored the error.
                raise raw.error
            if sync:
                os.fsync(raw.fileno())
        partial.replace(path)
        if sync:
            sync_to_disk(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(partial):
            error.filename = str(path)
        raise


def write_bytes(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Replace a file using `atomic_write`."""
    with atomic_write(path, shared=shared) as file:
        file.write(content)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Replace a file with UTF-8 text using `atomic_write`."""
    write_bytes(path, text.encode("utf-8"), shared=shared)


def sync_to_disk(path: Path) -> None:
    """Flush a file's content, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock while the block runs; the kernel releases it if the process is killed.

    The lock file is removed at the end. On a file system without locks, warn and run the block without one.

    Args:
        path: The lock file; its folder must exist. It names the process that holds the lock.

    Raises:
        Locked: Another process holds the lock.
        OSError: The lock file cannot be created, or is a symbolic link or another special file.
    """
    file = _open_locked(path)
    try:
        _name_owner(file)
        yield
    finally:
        # Removed while it is still locked: a process that opened it before sees that it has been removed.
        if _is_at(file, path):
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(file)


def _open_locked(path: Path) -> int:
    for attempt in itertools.count(1):
        # Without O_NOFOLLOW the file that a link points to would be written; O_NONBLOCK avoids waiting for a FIFO.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Locked(_owner(path)) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning(f"{path} cannot be locked ({error.strerror}); let no other process write there")
                return file
            # The former owner may have removed it since it was opened. Some file systems have no stable inode numbers.
            if _is_at(file, path) or attempt == _ATTEMPTS:
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    raise AssertionError("the last attempt returns")


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except OSError:
        return False


def _name_owner(file: int) -> None:
    owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # A full disk. The lock is held nevertheless.
        os.truncate(file, 0)
        os.pwrite(file, json.dumps(owner).encode(), 0)


def _owner(path: Path) -> str:
    owner = read_json(path)
    if not owner.keys() >= {"process", "host", "since"}:
        return "another process"
    return "process {process} on {host} since {since}".format_map(owner)


def checked_json(content: dict[str, Any]) -> str:
    """Return a JSON object as text, with a checksum that `read_json` compares."""
    return json.dumps({**content, "checksum": _checksum(content)}) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, kind: Any = None) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing or damaged.

    Args:
        path: The file.
        kind: What the object must be like, see `fits`.
    """
    try:
        content = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or (kind is not None and not fits(content, kind)):
        return {}
    return {} if content.pop("checksum", None) not in (None, _checksum(content)) else content


def read_json_lines(path: Path, valid: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file; an empty list if the file is missing.

    Damaged lines are skipped with one warning. An incomplete last line, as a kill leaves it, is skipped without one.

    Args:
        path: The file.
        valid: Whether a line's value is one of the file's objects.

    Raises:
        OSError: The file exists but cannot be read. Treating it as empty could lead to overwriting it.
    """
    try:
        text = read_file(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records, damaged = [], 0
    *lines, last = text.split("\n")
    for line in [*lines, last] if last else lines:
        record: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if valid(record):
            records.append(record)
        elif line is not last:
            damaged += 1
    if damaged:
        log.warning(f"{path}: skipped {damaged} damaged {'line' if damaged == 1 else 'lines'}")
    return records


def read_file(path: Path) -> bytes:
    """Read a file; raise OSError, instead of waiting, if it is a FIFO or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def fits(value: Any, kind: Any) -> bool:
    """Return whether a JSON value is of a kind.

    A kind is `int` (64 bits), `float` (any number), `bool`, `str` or None; a tuple of alternatives; a list with the
    kind of its elements; or a dictionary with the kinds of its values. A key such as "name?" may be missing. The key
    `str` stands for all other keys; without it, they may have any value.
    """
    if isinstance(kind, tuple):
        return any(fits(value, each) for each in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return False
        named = {name.removesuffix("?"): each for name, each in kind.items() if name is not str}
        required = {name for name in kind if name is not str and not name.endswith("?")}
        others = [each for name, each in value.items() if name not in named]
        return (
            required <= value.keys()
            and all(fits(value[name], each) for name, each in named.items() if name in value)
            and (str not in kind or all(fits(each, kind[str]) for each in others))
        )
    if kind is None:
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and -(2**63) <= value < 2**63
    return isinstance(value, kind)


def first_line(error: BaseException, most: int = 120) -> str:
    """Return the first line of an error's message, at most `most` characters; its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def some(names: Sequence[str]) -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
