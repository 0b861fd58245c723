"""The user's own images: a folder with few labels, prepared once into a cache.

    pets/train/CLASS/*   pets/unlabeled/*   pets/test/CLASS/*

Or pets/labels.csv with a line `file,label` for every image below pets/, the label empty where it is not known; a third
column may say `test`. Without a test part a fifth of the labeled images of every class is held out, always the same.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import cache
from pipelines.cache import DataError, DataSet
from pipelines.decode import BATCH, decode, image_files
from pipelines.plan import stream

_HELD_OUT = 5  # of so many labeled images of a class one is held out
_STREAM = 101  # apart from those of plans and splits
_NAMED = 3  # of many files, so many are named
TABLE = "labels.csv"
SAVE_SECONDS = 1.0  # of decoding, at least, before what there is of it is saved

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Listing:
    """The files of a folder, before any is opened.

    Attributes:
        classes: names, sorted.
        train: files below the folder and their classes, -1 where the class is not known: labeled ones first.
        test: likewise.
        held_out: how many of the labeled images were made the test part.
    """

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    held_out: int


@dataclass(frozen=True)
class Prepared:
    """What `prepare` has made.

    Attributes:
        cache: its folder.
        listing: what it was made from.
        unreadable: files that were left out, and why.
        duplicates: Pairs of a training file and a test file with the same image.
        strays: image files in the folder that are in no part of it.
    """

    cache: Path
    listing: Listing
    unreadable: tuple[tuple[str, str], ...]
    duplicates: tuple[tuple[str, str], ...]
    strays: tuple[str, ...]


def scan(root: Path) -> Listing:
    """Lists a folder.

    Raises:
        DataError: it is not as the module's docstring says, or cannot be read.
    """
    try:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder")
        train, test = _from_table(root) if (root / TABLE).exists() else _from_folders(root)
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror or error})") from None
    classes = tuple(sorted({label for _, label in train if label}))
    if len(classes) < 2:
        what = f"one class only, {classes[0]}" if classes else "no labeled image"
        raise DataError(f"{root} has {what}; it takes two classes, as train/CLASS/... or in {TABLE}")
    unknown = sorted({label for _, label in test} - set(classes))
    if unknown:
        raise DataError(f"{root}: test images of a class that no training image has: {some(unknown)}")
    numbers = {name: number for number, name in enumerate(classes)} | {"": -1}
    known = [(file, numbers[label]) for file, label in train if label]
    tested = [(file, numbers[label]) for file, label in test]
    if not tested:
        known, tested = _hold_out(known, len(classes))
        if not tested:
            raise DataError(
                f"{root} has no test part, and no class has two labeled images of which one can be held out"
            )
    return Listing(
        classes=classes,
        train=tuple(known + [(file, -1) for file, label in train if not label]),
        test=tuple(tested),
        held_out=0 if test else len(tested),
    )


def _from_folders(root: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    parts: dict[str, list[tuple[str, str]]] = {}
    for part in ("train", "test"):
        parts[part] = []
        classes = sorted((root / part).iterdir()) if (root / part).is_dir() else []
        for folder in (path for path in classes if path.is_dir() and not path.name.startswith(".")):
            files = [(file, folder.name) for file in _images(root, folder)]
            if not files:
                raise DataError(f"{folder} is a class without an image")
            parts[part] += files
    unlabeled = [(file, "") for file in _images(root, root / "unlabeled")]
    return parts["train"] + unlabeled, parts["test"]


def _from_table(root: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    path = root / TABLE
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if lines and [word.strip().lower() for word in lines[0][:2]] == ["file", "label"]:
        lines = lines[1:]
    wrong = [number for number, line in enumerate(lines, 1) if len(line) not in (2, 3)]
    if wrong:
        raise DataError(f"{path}: entry {wrong[0]} has {len(lines[wrong[0] - 1])} columns; there are file,label[,test]")
    files = [str(Path(line[0].strip())) for line in lines]
    twice = sorted(file for file, count in Counter(files).items() if count > 1)
    if twice:
        raise DataError(f"{path} names a file twice: {some(twice)}")
    there = set(_images(root, root))
    if missing := sorted(set(files) - there):
        raise DataError(f"{path} has {len(missing)} entries without an image file: {some(missing)}")
    if extra := sorted(there - set(files)):
        raise DataError(f"{path} has no entry for {len(extra)} files: {some(extra)}")
    parts: dict[str, list[tuple[str, str]]] = {"": [], "test": []}
    for name, line in sorted(zip(files, lines, strict=True)):
        part = line[2].strip().lower() if len(line) == 3 else ""
        label = line[1].strip()
        if part not in ("", "train", "test") or (part == "test" and not label):
            raise DataError(
                f"{path}: {name} is of part '{part}' with label '{label}'; a part is train or test, labeled"
            )
        parts["test" if part == "test" else ""].append((name, label))
    return parts[""], parts["test"]


def _images(root: Path, folder: Path) -> list[str]:
    """Names of the image files in a folder, from `root` on; none where there is no such folder."""
    inside = folder.relative_to(root)
    return [os.path.normpath(inside / name) for name in image_files(folder)] if folder.is_dir() else []


def _hold_out(known: Sequence[tuple[str, int]], classes: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    chance = stream(0, _STREAM, 0)
    tested: set[int] = set()
    for c in range(classes):
        rows = [row for row, (_, label) in enumerate(known) if label == c]
        count = max(len(rows) // _HELD_OUT, 1) if len(rows) > 1 else 0
        tested |= {rows[place] for place in chance.permutation(len(rows))[:count]}
    kept = [pair for row, pair in enumerate(known) if row not in tested]
    return kept, [known[row] for row in sorted(tested)]


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def cache_of(root: Path) -> Path:
    """Where a folder's cache lies."""
    where = root.resolve()
    return cache.data_dir() / "folders" / f"{where.name}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:12]}"


def prepare_command(root: Path, size: int | str = "SIZE") -> str:
    """The command line that prepares a folder, for a message."""
    return cache.prepare_command(str(root), f" --size {size}")


def prepare(
    root: Path,
    size: int,
    progress: Progress = lambda what, done, whole: None,
    threads: int = 0,
    device: str = "cpu",
    again: bool = False,
) -> Prepared:
    """Decodes a folder's images into its cache, going on where an interrupted call has stopped.

    A cache that is there is left as it is if the folder has not changed since.

    Args:
        root: the folder.
        size: side of the images, in pixels.
        progress: called now and then with what is done, how much of it, of how much.
        threads: 0 for as many as there are cores.
        device: see `pipelines.decode.decode`.
        again: make the cache anew in any case.

    Raises:
        DataError: the folder is not as it should be, hardly an image can be read, or the cache cannot be written.
    """
    listing, folder = scan(root), cache_of(root)
    stamps, strays = _stamps(root, listing), _strays(root, listing)
    key = hashlib.sha256(json.dumps([cache.FORMAT, size, device, stamps, _plain(listing)]).encode()).hexdigest()
    if not again and (made := _made_before(folder, listing, key, strays)):
        return made

    def decoded(files: Sequence[str]) -> Iterator[tuple[int, np.ndarray | str]]:
        return decode([root / name for name in files], size, threads, device)

    with cache.writing(folder, key) as temporary:
        unreadable: list[tuple[str, str]] = []
        digests: dict[str, list[bytes]] = {}
        kept: dict[str, list[tuple[str, int]]] = {}
        for part, pairs in (("train", listing.train), ("test", listing.test)):
            bad = _decode_part(decoded, temporary, part, [file for file, _ in pairs], size, progress)
            unreadable += [(pairs[row][0], why) for row, why in bad.items()]
            kept[part] = [pair for row, pair in enumerate(pairs) if row not in bad]
            labels = np.array([label for _, label in kept[part]], dtype=np.int64)
            for c, name in enumerate(listing.classes):
                if part == "train" and not (labels == c).any():
                    raise DataError(f"no labeled image of class {name} in {root} can be read")
            if not len(labels):
                raise DataError(f"no {part} image in {root} can be read: {some([why for _, why in unreadable])}")
            cache.shorten(temporary, f"{part}_images", len(labels))
            cache.save(temporary, f"{part}_labels", labels)
            images = np.load(temporary / f"{part}_images.npy", mmap_mode="r")
            digests[part] = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        first = {content: kept["train"][row][0] for row, content in enumerate(digests["train"])}
        duplicates = [(first[c], kept["test"][row][0]) for row, c in enumerate(digests["test"]) if c in first]
        for journal in temporary.glob("*.journal"):
            journal.unlink()
        source = {
            "folder": str(root.resolve()),
            "size": size,
            "decoder": device,
            "stamps": stamps,
            "held_out": listing.held_out,
            "key": key,
            "unreadable": unreadable,
            "twins": duplicates,
        }
        cache.finish(temporary, f"folder:{root.resolve()}", listing.classes, (), source)
    return Prepared(folder, listing, tuple(unreadable), tuple(duplicates), strays)


def _made_before(folder: Path, listing: Listing, key: str, strays: tuple[str, ...]) -> Prepared | None:
    """What an earlier call has made from the same, if it is whole."""
    try:
        source = cache.read_description(folder, "")["source"]
    except DataError:
        return None
    if source.get("key") != key:
        return None
    unreadable, duplicates = (tuple((one, other) for one, other in source[name]) for name in ("unreadable", "twins"))
    return Prepared(folder, listing, unreadable, duplicates, strays)


def _plain(listing: Listing) -> list[object]:
    return [listing.classes, listing.train, listing.test]


def _decode_part(
    decoded: Callable[[Sequence[str]], Iterator[tuple[int, np.ndarray | str]]],
    temporary: Path,
    part: str,
    files: Sequence[str],
    size: int,
    progress: Progress,
) -> dict[int, str]:
    """Fills an array with the images that can be read; returns the others and why they cannot.

    A journal says how far it came, so that a later call goes on from there.
    """
    journal, name = temporary / f"{part}.journal", f"{part}_images"
    bad: dict[int, str] = {}
    start = 0
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                start, found = json.loads(line)
            except ValueError:  # cut short by a kill
                break
            bad |= {int(row): why for row, why in found.items()}
        bad = {row: why for row, why in bad.items() if row < start}
        images = np.load(temporary / f"{name}.npy", mmap_mode="r+")
    else:
        images = cache.array(temporary, name, (len(files), size, size, 3))
    row = start - len(bad)
    with journal.open("a", encoding="utf-8") as file:
        if start == 0:
            file.write("[0, {}]\n")
        found, due = {}, time.monotonic() + SAVE_SECONDS
        for place, image in decoded(files[start:]):
            if isinstance(image, str):
                found[start + place] = image
            else:
                images[row] = image
                row += 1
            done = start + place + 1
            if done == len(files) or (done % BATCH == 0 and time.monotonic() >= due):
                images.flush()  # type: ignore[attr-defined]
                file.write(json.dumps([done, found]) + "\n")
                file.flush()
                bad |= found
                found, due = {}, time.monotonic() + SAVE_SECONDS
                progress(f"{part} images", done, len(files))
    return bad


def _strays(root: Path, listing: Listing) -> tuple[str, ...]:
    """Image files that are in no part of the folder, such as those of a folder whose name is misspelt."""
    known = {file for file, _ in (*listing.train, *listing.test)}
    return tuple(name for name in _images(root, root) if name not in known)


def _stamps(root: Path, listing: Listing) -> dict[str, str]:
    """Size and time of change of every file; "" for a link to nowhere, which decoding will tell."""
    stamps = {}
    for file, _ in (*listing.train, *listing.test):
        try:
            found = os.stat(root / file)
        except OSError:
            stamps[file] = ""
        else:
            stamps[file] = f"{found.st_size} {found.st_mtime_ns}"
    return stamps


def open_folder(root: Path) -> DataSet:
    """The data set of a folder that has been prepared.

    Raises:
        DataError: it has not, or has changed since.
    """
    folder = cache_of(root)
    if not root.exists() and not folder.exists():
        raise DataError(f"{root} is not a folder")
    found = cache.read_description(folder, prepare_command(root))
    size, before = found["source"]["size"], found["source"]["stamps"]
    if root.is_dir():  # without its files, the cache is all that is needed
        changes = list(_changes(before, _stamps(root, scan(root))))
        if changes:
            raise DataError(f"{root} has changed since it was prepared: {some(changes)}; {prepare_command(root, size)}")
    return cache.open_cache(folder, prepare_command(root, size))


def _changes(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        if name not in before:
            yield f"{name} is new"
        elif name not in now:
            yield f"{name} is gone"
        elif before[name] != now[name]:
            yield f"{name} is another"
