"""Atomic file writes, tolerant reading of JSON files, and one-line error texts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # Suffix of files that are not complete yet.


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
    partial file. A killed process may leave one, which the next write of the same file overwrites.

    Args:
        path: File to replace; its folder must exist.
        sync: Flush the file and its folder to disk, so that the file survives a power failure.
        shared: Other processes may write the same file at the same time; the last one wins.

    Raises:
        OSError: The file could not be written, even if a library in the block raised another error instead.
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


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing or does not contain an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, skipping damaged lines; an empty list if the file is missing.

    Raises:
        OSError: The file exists but cannot be read. Treating it as empty could lead to overwriting it.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def first_line(error: BaseException, most: int = 120) -> str:
    """Return the first line of an error's message, at most `most` characters; its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
