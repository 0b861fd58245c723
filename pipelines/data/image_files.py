"""Which files of a folder are images, and which are left out."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from pipelines.data.pixels import suffixes
from pipelines.files import some

# Suffixes of pictures that PIL does not read, or only with a plugin.
_OTHER_PICTURES = {
    ".3fr", ".ai", ".arw", ".cr2", ".cr3", ".crw", ".dcm", ".dng", ".emf", ".eps", ".erf", ".exr", ".hdr", ".heic",
    ".heics", ".heif", ".hif", ".jls", ".jxl", ".jxr", ".kdc", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pdf",
    ".pef", ".ps", ".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw", ".svg", ".svgz", ".wdp", ".wmf", ".x3f", ".xcf",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Files below a folder, without hidden ones.

    Attributes:
        images: Relative paths of the files with the suffix of a format that PIL reads, sorted.
        left_out: Relative paths of pictures in other formats, broken links and links to folders above themselves, and
            the reasons, sorted.
        others: Relative paths of all other files, sorted.
    """

    images: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    others: tuple[str, ...]

    def without(self, folder: Path, used: Sequence[str]) -> Found:
        """Return the files below the same folder that are not used, even under another path through a link."""
        paths = set(real_files(folder, used))

        def unused(names: Sequence[str]) -> Iterator[bool]:
            return (path not in paths for path in real_files(folder, names))

        named = [name for name, _ in self.left_out]
        return Found(
            tuple(compress(self.images, unused(self.images))),
            tuple(compress(self.left_out, unused(named))),
            tuple(compress(self.others, unused(self.others))),
        )


def find_files(folder: Path) -> Found:
    """Find the files below a folder, following symbolic links.

    Each real folder is searched once, under its own path if that is below `folder`. No file is opened.

    Raises:
        OSError: The folder or a subfolder cannot be read.
    """
    images: list[str] = []
    left_out: list[tuple[str, str]] = []
    others: list[str] = []
    top = os.path.realpath(folder)
    searched: set[str] = set()
    starts = [""]  # Relative paths of the folder itself and of links to folders, which are added as they are found.
    for start in starts:
        target = os.path.realpath(os.path.join(folder, start))
        if start:
            parent = os.path.realpath(os.path.dirname(os.path.join(folder, start)))
            if target in (os.path.commonpath([target, top]), os.path.commonpath([target, parent])):
                left_out.append((start, "a link to a folder above it"))
                continue
        for inside, folders, names in _walk(target, searched):
            here = os.path.normpath(os.path.join(start, inside))
            links = [name for name in folders if os.path.islink(os.path.join(target, inside, name))]
            starts += [os.path.normpath(os.path.join(here, name)) for name in links]
            for name in names:
                path = os.path.normpath(os.path.join(here, name))
                if is_image(name):
                    images.append(path)
                elif reason := why_left_out(Path(target, inside, name)):
                    left_out.append((path, reason))
                else:
                    others.append(path)
    return Found(tuple(sorted(images)), tuple(sorted(left_out)), tuple(sorted(others)))


def _walk(top: str, searched: set[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the relative path, the folders and the files of `top` and each folder below it, without hidden ones.

    Links to folders are yielded, but not followed. Folders in `searched` are skipped, and all others added to it.
    """

    def fail(error: OSError) -> None:
        raise error

    for path, folders, names in os.walk(top, onerror=fail):
        if path in searched:
            folders.clear()
            continue
        searched.add(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield os.path.relpath(path, top), folders, [name for name in names if not name.startswith(".")]


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of an image that PIL reads."""
    return os.path.splitext(name)[1].lower() in suffixes()


def why_left_out(path: Path) -> str:
    """Return why a file without the suffix of an image that PIL reads is worth naming; "" if it is not."""
    suffix = path.suffix.lower()
    if suffix in _OTHER_PICTURES:
        return f"PIL does not read {suffix} here; convert it to JPEG or PNG"
    return "a broken link" if path.is_symlink() and not path.exists() else ""


def describe_left_out(found: Found) -> list[str]:
    """Return one line per reason for leaving out files: their number, and the first names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in found.left_out:
        reasons.setdefault(reason, []).append(name)
    lines = [f"left out {counted(len(names))} ({reason}): {some(names)}" for reason, names in reasons.items()]
    if found.others:
        suffixes_found = Counter(os.path.splitext(name)[1].lower() for name in found.others)
        kinds = [f"{count} {suffix or 'without suffix'}" for suffix, count in suffixes_found.most_common()]
        lines.append(f"left out {counted(len(found.others))} without the suffix of an image: {some(kinds)}")
    return lines


def describe_remarks(remarks: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line per kind of remark: the number of files, the kind, and the first names.

    Args:
        remarks: Files and remarks, see `pipelines.data.pixels.rgb`.
    """
    kinds: dict[str, list[str]] = {}
    for name, remark in remarks:
        kinds.setdefault(remark.partition(":")[0], []).append(name)
    return [f"{counted(len(names))}: {kind} ({some(names)})" for kind, names in kinds.items()]


def counted(files: int) -> str:
    """Return a number of files as words."""
    return "1 file" if files == 1 else f"{files} files"


def real_paths(root: Path, names: Iterable[str]) -> list[str]:
    """Return the absolute path of each file without links to folders, which is the same however a file is reached."""
    resolve = functools.cache(os.path.realpath)
    places = (os.path.split(root / name) for name in names)
    return [os.path.join(resolve(folder), name) for folder, name in places]


def real_files(root: Path, names: Iterable[str]) -> list[str]:
    """Return the absolute path of each file without any links; broken links are kept."""
    return [
        os.path.realpath(path) if os.path.islink(path) and os.path.exists(path) else path
        for path in real_paths(root, names)
    ]
