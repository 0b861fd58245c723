"""Data sets from a folder of images with few labels, converted once to a cache; see `pipelines.data.listing`."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data import cache
from pipelines.data.cache import DataError, DataSet
from pipelines.data.decode import DecodingProcess, decode
from pipelines.data.jpegs import BATCH
from pipelines.data.listing import RULES, Listing, scan, unused_files
from pipelines.data.stamps import contents_of, digest_of, replaced_files, stamps_of
from pipelines.files import some, write_text

SAVE_SECONDS = 1.0  # Minimum time between saves of decoded images.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`.

    Attributes:
        cache: Folder of the cache.
        listing: Files of the folder.
        unreadable: Skipped files and the reasons.
        duplicates: Pairs of a training file and a test file with the same image.
        conflicts: Pairs of training files of different classes with the same image.
        strays: Image files outside train/CLASS, unlabeled and test/CLASS.
        left_out: Descriptions of all other files.
        remarks: Files that were not decoded as usual, and how, see `pipelines.data.decode.decode`.
    """

    cache: Path
    listing: Listing
    unreadable: tuple[tuple[str, str], ...]
    duplicates: tuple[tuple[str, str], ...]
    strays: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()
    conflicts: tuple[tuple[str, str], ...] = ()


def cache_of(root: Path) -> Path:
    """Return the path of the cache of a folder of images."""
    path = root.resolve()
    return cache.data_dir() / "folders" / f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def prepare_command(root: Path, size: int = 96) -> str:
    """Return the command that prepares a folder, for a message."""
    return cache.prepare_command(str(root), f" --size {size}")


def prepare(
    root: Path,
    size: int,
    progress: Progress = lambda what, done, whole: None,
    threads: int = 0,
    device: str = "cpu",
    again: bool = False,
) -> Prepared:
    """Decode the images of a folder to its cache. Continues after an interruption, and skips unchanged folders.

    Images that an earlier cache of the same size has of unchanged files are copied, so that new labels cost little.

    Args:
        root: Folder of images.
        size: Side of the images in pixels.
        progress: Called regularly with a description, the amount done and the total.
        threads: Number of threads; 0 for one per core.
        device: See `pipelines.data.decode.decode`.
        again: Make the cache even if the folder has not changed.

    Raises:
        DataError: The folder is invalid, too few of its images can be read, or the cache cannot be written.
    """
    listing, folder = scan(root), cache_of(root)
    (stamps, times), (strays, left_out) = stamps_of(root, listing.files, RULES), unused_files(root, listing)
    key = _key(RULES, size, device, stamps, listing)
    description = {} if again else _description(folder)
    before = description.get("source", {})
    contents = contents_of(root, stamps, times, before, progress)
    replaced = replaced_files(before, contents)
    if before.get("key") == key and not replaced:
        if before.get("contents") != contents:  # Other times of change: without these, the files are read every time.
            renewed = {**description, "source": {**before, "contents": contents}}
            write_text(folder / cache.DESCRIPTION, cache.as_text(renewed))
        return _prepared(folder, listing, before, strays, left_out)

    unchanged = {file for file, stamp in stamps.items() if stamp == before.get("stamps", {}).get(file)} - replaced
    earlier, noted = _images_before(folder, before, size, device, unchanged)

    def decoded(files: Sequence[str], note: Callable[[int, str], None]) -> Iterator[tuple[int, np.ndarray | str]]:
        new = [index for index, name in enumerate(files) if name not in earlier]
        paths = [root / files[index] for index in new]
        rest = decode(paths, size, threads, device, lambda place, remark: note(new[place], remark), process)
        for index, name in enumerate(files):
            if name in noted:
                note(index, noted[name])
            yield index, earlier[name] if name in earlier else next(rest)[1]

    # Without the times of change, an interrupted preparation would keep images that have been replaced since.
    with (
        cache.writing(folder, key + digest_of(json.dumps(contents).encode())) as temporary,
        DecodingProcess() as process,
    ):
        unreadable: list[tuple[str, str]] = []
        remarks: list[tuple[str, str]] = []
        digests: dict[str, list[str]] = {}
        kept: dict[str, list[tuple[str, int]]] = {}
        for part, pairs in (("train", listing.train), ("test", listing.test)):
            bad, changed = _decode_part(decoded, temporary, part, [file for file, _ in pairs], size, progress)
            unreadable += [(pairs[index][0], why) for index, why in bad.items()]
            remarks += [(pairs[index][0], remark) for index, remark in changed.items()]
            kept[part] = [pair for index, pair in enumerate(pairs) if index not in bad]
            labels = np.array([label for _, label in kept[part]], dtype=np.int64)
            for c, name in enumerate(listing.classes):
                if part == "train" and not (labels == c).any():
                    file, why = next((pairs[index][0], why) for index, why in bad.items() if pairs[index][1] == c)
                    raise DataError(f"no labeled image of class {name} in {root} can be read: {file} ({why})")
            if not len(labels):
                raise DataError(f"no {part} image in {root} can be read: {some([why for _, why in unreadable])}")
            cache.shorten(temporary, f"{part}_images", len(labels))
            cache.save(temporary, f"{part}_labels", labels)
            images = np.load(temporary / f"{part}_images.npy", mmap_mode="r")
            digests[part] = [digest_of(image.tobytes()) for image in images]
        first = {pixels: kept["train"][index][0] for index, pixels in enumerate(digests["train"])}
        duplicates = [(first[d], kept["test"][index][0]) for index, d in enumerate(digests["test"]) if d in first]
        conflicts = _conflicts(digests["train"], kept["train"])
        for journal in temporary.glob("*.journal"):
            journal.unlink()
        source = {
            "folder": str(root.resolve()),
            "size": size,
            "decoder": device,
            "rules": RULES,
            "stamps": stamps,
            "contents": contents,
            "listing": _plain(listing),
            "held_out": listing.held_out,
            "key": key,
            "unreadable": unreadable,
            "twins": duplicates,
            "conflicts": conflicts,
            "remarks": remarks,
        }
        cache.finish(temporary, f"folder:{root.resolve()}", listing.classes, (), source)
    return _prepared(folder, listing, source, strays, left_out)


def _conflicts(digests: Sequence[str], pairs: Sequence[tuple[str, int]]) -> list[tuple[str, str]]:
    """Return pairs of labeled files with the same image and different classes."""
    first: dict[str, tuple[str, int]] = {}
    found = []
    for pixels, (file, label) in zip(digests, pairs, strict=True):
        if label >= 0 and first.setdefault(pixels, (file, label))[1] != label:
            found.append((first[pixels][0], file))
    return found


def _description(folder: Path) -> dict[str, Any]:
    """Return the description of an existing cache; an empty one if there is none or it is damaged."""
    try:
        return cache.read_description(folder, "")
    except DataError:
        return {}


def _prepared(
    folder: Path, listing: Listing, source: Mapping[str, Any], strays: tuple[str, ...], left_out: tuple[str, ...]
) -> Prepared:
    """Return the result of a preparation from the source in the description of its cache."""
    unreadable, duplicates, remarks, conflicts = (
        tuple((one, other) for one, other in source.get(name, ()))
        for name in ("unreadable", "twins", "remarks", "conflicts")
    )
    return Prepared(folder, listing, unreadable, duplicates, strays, left_out, remarks, conflicts)


def _images_before(
    folder: Path, source: Mapping[str, Any], size: int, device: str, unchanged: Collection[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the images of an existing cache whose files have not changed, memory-mapped, and remarks on them."""
    images: dict[str, np.ndarray] = {}
    try:
        if (source.get("rules"), source["size"], source["decoder"]) != (RULES, size, device):
            return {}, {}
        unreadable = {file for file, _ in source["unreadable"]}
        for part, pairs in zip(("train", "test"), source["listing"][1:], strict=True):
            stored = np.asarray(np.load(folder / f"{part}_images.npy", mmap_mode="r"))
            files = [file for file, _ in pairs if file not in unreadable]
            images |= {file: image for file, image in zip(files, stored, strict=True) if file in unchanged}
    except (OSError, ValueError, KeyError):  # There is no cache, or it is damaged.
        return {}, {}
    return images, {file: remark for file, remark in source.get("remarks", ()) if file in images}


def _plain(listing: Listing) -> list[Any]:
    return [listing.classes, listing.train, listing.test]


def _decode_part(
    decoded: Callable[[Sequence[str], Callable[[int, str], None]], Iterator[tuple[int, np.ndarray | str]]],
    temporary: Path,
    part: str,
    files: Sequence[str],
    size: int,
    progress: Progress,
) -> tuple[dict[int, str], dict[int, str]]:
    """Decode readable images into an array. Returns the reasons for unreadable files, and remarks, by their indices.

    A journal records the progress, so that a later call can continue.
    """
    journal, name = temporary / f"{part}.journal", f"{part}_images"
    bad: dict[int, str] = {}
    remarks: dict[int, str] = {}
    start = 0
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                start, failures, changes = json.loads(line)
            except ValueError:  # Truncated when the process was killed.
                break
            bad |= {int(index): why for index, why in failures.items()}
            remarks |= {int(index): remark for index, remark in changes.items()}
        bad = {index: why for index, why in bad.items() if index < start}
        images = np.load(temporary / f"{name}.npy", mmap_mode="r+")
    else:
        images = cache.array(temporary, name, (len(files), size, size, 3))
    written = start - len(bad)
    with journal.open("a", encoding="utf-8") as file:
        if start == 0:
            file.write("[0, {}, {}]\n")
        failures, changes, due = {}, {}, time.monotonic() + SAVE_SECONDS

        def note(index: int, remark: str) -> None:
            changes[start + index] = remark

        for index, image in decoded(files[start:], note):
            if isinstance(image, str):
                failures[start + index] = image
            else:
                images[written] = image
                written += 1
            done = start + index + 1
            if done == len(files) or (done % BATCH == 0 and time.monotonic() >= due):
                images.flush()  # type: ignore[attr-defined]
                file.write(json.dumps([done, failures, changes]) + "\n")
                file.flush()
                bad |= failures
                remarks |= changes
                failures, changes, due = {}, {}, time.monotonic() + SAVE_SECONDS
                progress(f"{part} images", done, len(files))
    return bad, remarks


def _key(rules: int, size: int, device: str, stamps: Mapping[str, str], listing: Listing) -> str:
    """Identify everything that decides the content of a cache."""
    version = [rules] if rules > 1 else []
    content = [cache.FORMAT, *version, size, device, stamps, _plain(listing)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_folder(root: Path, earlier_rules: bool = False) -> DataSet:
    """Open the data set of a prepared folder.

    Args:
        root: The folder.
        earlier_rules: Accept a cache that an earlier version of the engine prepared from the same files, for runs that
            were trained on it.

    Raises:
        DataError: The folder is not prepared, or has changed since.
    """
    folder = cache_of(root)
    if not root.exists() and not folder.exists():
        raise DataError(f"{root} is not a folder")
    description = cache.read_description(folder, prepare_command(root))
    source = description["source"]
    again = prepare_command(root, source["size"])
    if root.is_dir():  # If the folder is gone, its cache is sufficient.
        if changes := _changes(root, source):
            raise DataError(f"{root} has changed since it was prepared ({some(changes)}); run: {again}")
        if source.get("rules", 1) != RULES and not earlier_rules:
            raise DataError(
                f"{root} was prepared by another version of the engine, which reads some images differently; "
                f"run: {again}"
            )
    return cache.open_described(folder, description, again)


def _changes(root: Path, source: Mapping[str, Any]) -> list[str]:
    """Describe what has changed in a folder since it was prepared; empty if nothing has."""
    rules = source.get("rules", 1)
    listing = scan(root, rules)
    stamps, times = stamps_of(root, listing.files, rules)
    replaced = replaced_files(source, contents_of(root, stamps, times, source) if "contents" in source else {})
    key = _key(rules, source["size"], source.get("decoder", "cpu"), stamps, listing)
    if source.get("key") == key and not replaced:
        return []
    changes = []
    for name in sorted(source["stamps"].keys() | stamps.keys()):
        if name not in source["stamps"]:
            changes.append(f"{name} was added")
        elif name not in stamps:
            changes.append(f"{name} was removed")
        elif source["stamps"][name] != stamps[name] or name in replaced:
            changes.append(f"{name} was modified")
    if "listing" in source:
        before, now = _places(*source["listing"]), _places(*_plain(listing))
        changes += [
            f"{name}: {before[name]} -> {now[name]}"
            for name in sorted(before.keys() & now.keys())
            if before[name] != now[name]
        ]
    return changes or ["labels or parts of its images"]


def _places(
    classes: Sequence[str], train: Iterable[tuple[str, int]], test: Iterable[tuple[str, int]]
) -> dict[str, str]:
    """Return the class of every file, and whether it is a test image, as text for a message."""
    places = {file: classes[label] if label >= 0 else "unlabeled" for file, label in train}
    return places | {file: f"{classes[label]} (test)" for file, label in test}
