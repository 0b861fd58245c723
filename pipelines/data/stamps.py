"""How changed files are noticed without reading them all: stamps, and digests of files with other times of change."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.image_files import real_files
from pipelines.data.pixels import DecodeError, content

_PROGRESS_SECONDS = 1.0  # Time between reports while files are read.


def stamps_of(root: Path, files: Sequence[str], rules: int) -> dict[str, str]:
    """Return size, modification time and, behind links, the target of every file.

    Args:
        root: The folder.
        files: Paths relative to it.
        rules: Version of the rules, see `pipelines.data.listing.RULES`; the first one records no targets.

    Returns:
        A stamp for every file. A broken link has the stamp "", and is reported when it is decoded.
    """
    start = os.path.realpath(root)
    stamps = {}
    for file, target in zip(files, real_files(root, files), strict=True):
        try:
            status = os.stat(os.path.join(root, file))
        except OSError:
            stamps[file] = ""
            continue
        stamps[file] = f"{status.st_size} {status.st_mtime_ns}"
        if rules > 1 and target != os.path.join(start, file):
            stamps[file] += f" {target}"
    return stamps


def contents_of(
    root: Path,
    stamps: Mapping[str, str],
    source: Mapping[str, Any],
    progress: Callable[[str, int, int], None] = lambda what, done, whole: None,
) -> dict[str, list[Any]]:
    """Return the time of change (ctime, in ns) and the digest of every file.

    A file that is replaced by another one of equal size and modification time has another time of change. So has a file
    whose permissions change, or a copy of the whole folder, which must not be decoded again: the digest tells. Only
    files whose stamp or time of change differs from the source of an earlier cache are read.
    """
    before, known = source.get("stamps", {}), source.get("contents", {})

    def entry(file: str) -> list[Any]:
        path = root / file
        try:
            changed = os.stat(path).st_ctime_ns
            if file in known and (stamps[file], changed) == (before.get(file), known[file][0]):
                return known[file]
            return [changed, digest_of(content(path))]
        except (OSError, DecodeError):  # Decoding will report it.
            return [0, ""]

    found, due = {}, time.monotonic() + _PROGRESS_SECONDS
    for number, file in enumerate(stamps):
        found[file] = entry(file)
        if time.monotonic() >= due:
            progress("checksums", number + 1, len(stamps))
            due = time.monotonic() + _PROGRESS_SECONDS
    return found


def replaced_files(source: Mapping[str, Any], contents: Mapping[str, Sequence[Any]]) -> set[str]:
    """Return the files whose digests differ from those in the source of a cache."""
    known = source.get("contents", {})  # Earlier versions did not record them.
    return {file for file, (_, digest) in contents.items() if file in known and known[file][1] != digest}


def digest_of(data: bytes) -> str:
    """Return the BLAKE2b digest of data in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
