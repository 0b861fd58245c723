"""How changed files are noticed without reading them all: stamps, and digests of files with other times of change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.data.image_files import real_files
from pipelines.data.pixels import DecodeError, content

_PROGRESS_SECONDS = 1.0  # Time between reports while files are read.


def stamps_of(root: Path, files: Sequence[str], rules: int) -> tuple[dict[str, str], dict[str, int]]:
    """Return what tells whether files have changed, without reading them.

    Args:
        root: The folder.
        files: Paths relative to it.
        rules: Version of the rules, see `pipelines.data.listing.RULES`; the first one records no targets.

    Returns:
        A stamp for every file: its size, modification time and, behind links, the target. And its time of change
        (ctime, in ns). A broken link has the stamp "" and the time 0, and is reported when it is decoded.
    """
    start = os.path.realpath(root)
    stamps, times = dict.fromkeys(files, ""), dict.fromkeys(files, 0)
    for file, target in zip(files, real_files(root, files), strict=True):
        with contextlib.suppress(OSError):
            status = os.stat(os.path.join(root, file))
            link = f" {target}" if rules > 1 and target != os.path.join(start, file) else ""
            stamps[file], times[file] = f"{status.st_size} {status.st_mtime_ns}{link}", status.st_ctime_ns
    return stamps, times


def contents_of(
    root: Path,
    stamps: Mapping[str, str],
    times: Mapping[str, int],
    source: Mapping[str, Any],
    progress: Callable[[str, int, int], None] = lambda what, done, whole: None,
) -> dict[str, list[Any]]:
    """Return the time of change and the digest of every file.

    A file that is replaced by another one of equal size and modification time has another time of change. So has a file
    whose permissions change, or a copy of the whole folder, which must not be decoded again: the digest tells. Only
    files whose stamp or time of change differs from the source of an earlier cache are read.
    """
    before, known = source.get("stamps", {}), source.get("contents", {})
    found = {
        file: known[file]
        for file, stamp in stamps.items()
        if file in known and (stamp, times[file]) == (before.get(file), known[file][0])
    }

    def read(file: str) -> list[Any]:
        try:
            return [times[file], digest_of(content(root / file))]
        except (OSError, DecodeError):  # Decoding will report it.
            return [0, ""]

    rest, due = [file for file in stamps if file not in found], time.monotonic() + _PROGRESS_SECONDS
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for number, (file, value) in enumerate(zip(rest, pool.map(read, rest), strict=True), 1):
            found[file] = value
            if time.monotonic() >= due:
                progress("checksums", number, len(rest))
                due = time.monotonic() + _PROGRESS_SECONDS
    return {file: found[file] for file in stamps}


def replaced_files(source: Mapping[str, Any], contents: Mapping[str, Sequence[Any]]) -> set[str]:
    """Return the files whose digests differ from those in the source of a cache."""
    known = source.get("contents", {})  # Earlier versions did not record them.
    return {file for file, (_, digest) in contents.items() if file in known and known[file][1] != digest}


def digest_of(data: bytes) -> str:
    """Return the BLAKE2b digest of data in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
