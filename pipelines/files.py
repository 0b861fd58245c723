"""Files that are written whole or not at all, JSON files that may be damaged, and what an error says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # ends the name of a file that is not complete yet


class _File(io.FileIO):
    """A file that remembers its first failed write, which a library on top may turn into an error of its own."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


@contextlib.contextmanager
def atomic_write(path: Path, *, sync: bool = False, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once the block has ended without an error.

    Until then it is `.NAME.partial` in the same folder, and a former file keeps its content. An error leaves no partial
    file. A kill may leave one, which the next write of the same file overwrites.

    Args:
        path: File to replace; its folder must exist.
        sync: Flush the file and its folder to the disk, so that the file survives a power cut.
        shared: Other processes may write the same file at the same time; the last one wins.

    Raises:
        OSError: The file could not be written, whatever a library in the block made of that error.
    """
    owner = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    partial = path.with_name(f".{path.name}{owner}{PARTIAL}")
    try:
        with _File(partial, "w") as raw:
            file = io.BufferedWriter(raw)
            try:
                yield file
                file.flush()
            except Exception as error:
                if raw.error not in (None, error):
                    raise raw.error from error
                raise
            if raw.error is not None:  # the block went on after it
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
    """Replace a file by `atomic_write`."""
    with atomic_write(path, shared=shared) as file:
        file.write(content)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Replace a file by `atomic_write`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"), shared=shared)


def sync_to_disk(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where the file is missing, damaged or anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one on each line; none where it is missing. Damaged lines are left out.

    Raises:
        OSError: The file is there and cannot be read: to go on as if it were empty might write over it.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def first_line(error: BaseException, most: int = 120) -> str:
    """Return the first line of what an error says, at most so many characters of it; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
