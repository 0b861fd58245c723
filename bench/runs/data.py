"""`remixmatch bench data`: opening a cache, preparing a folder of images, and training on many images and on few.

Opening: a cache in CIFAR-10's shape, whose files are read from the disk each time. It should take less than 0.5 s.
Preparing: a folder of photographs, in turn with what DALI alone takes to read, decode, resize and crop them. It should
be at least 0.7 times as fast.
Training: on many images, on few, and on next to none, in turn, each in a process of its own. On many a step should take
at most 1.1 times as long as on few, and the process at most 2 GiB more than on next to none.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from bench.images import crops, photographs
from bench.registry import Bench, Table
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.process import output
from engine.measuring.timing import bench_device, interleave
from pipelines import cache
from pipelines.datasets import noise
from pipelines.decode import BATCH, decoded_and_resized
from pipelines.folder import prepare

CIFAR_IMAGES, CIFAR_SIDE = 50_000, 32
PHOTOGRAPH, QUALITY = (500, 375), 90  # width and height in pixels, and JPEG's quality
SIDE = 96
NO_IMAGES = 200  # next to none, to train in a process whose memory the images do not count in
_LABELED = 5000
_CHUNK = 1000  # images written at a time


@dataclass
class DataOptions:
    """Times opening a cache, preparing a folder, and training on many images."""

    out: Path = records.OUT / "data.jsonl"
    """Rows are added to this file."""
    parts: tuple[str, ...] = ("opening", "preparing", "training")
    """What is measured."""
    folder: Path | None = None
    """Where the images are made, and removed afterwards; by default where the system has its temporary files.
    Preparing takes 100 KB an image, training 28."""
    repeats: int = 15
    """Openings; the median counts."""
    rounds: int = 3
    """Turns of preparing and of training; the median counts."""
    files: int = 500
    """Photographs that are prepared."""
    threads: int = 0
    """Of preparing and of DALI alone; 0 for as many as there are cores."""
    images: int = 20_000
    """Many images to train on."""
    few_images: int = 5000
    """Few images to train on."""
    steps: int = 30
    """Steps of a training run; the median of their times counts."""
    views: Literal["auto", "dali", "fused"] = "auto"
    """What makes the views; see `remixmatch train`."""


def main(options: DataOptions) -> None:
    """Measures the parts one after another, and writes a row for each.

    Raises:
        UserError: a flag that cannot work, or a folder that cannot hold the images.
        RuntimeError: a training run failed.
    """
    parts: dict[str, Callable[[DataOptions, Path, torch.device], dict[str, Any]]] = {
        "opening": _opening,
        "preparing": _preparing,
        "training": _training,
    }
    records.check_choices(options, parts=parts)
    records.check_numbers(options, repeats=1, rounds=1, files=8, threads=0, images=1000, few_images=1000, steps=2)
    device = bench_device()
    for part in options.parts:
        try:
            with TemporaryDirectory(dir=options.folder) as folder:
                row = parts[part](options, Path(folder), device)
        except (cache.DataError, OSError) as error:
            raise UserError(f"--folder: {part} needs a place for its images ({error})") from error
        BENCH.write(options.out, "data", device, part=part, **row)


def _seconds(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    begin = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - begin


def write_cache(folder: Path, images: int, side: int) -> Path:
    """Writes a cache of noise, with ten classes, so many training images and 100 test images, and returns it."""
    with cache.writing(folder) as temporary:
        for part, rows in (("train", images), ("test", 100)):
            into = cache.array(temporary, f"{part}_images", (rows, side, side, 3))
            for first in range(0, rows, _CHUNK):
                into[first : first + _CHUNK] = noise(len(into[first : first + _CHUNK]), side, first)
            into.flush()  # type: ignore[attr-defined]
            labels = np.where(np.arange(rows) < _LABELED, np.arange(rows) % 10, -1)
            cache.save(temporary, f"{part}_labels", labels)
        cache.finish(temporary, folder.name, tuple("0123456789"))
    return folder


def _opening(options: DataOptions, folder: Path, device: torch.device) -> dict[str, Any]:
    made = write_cache(folder / "cifar10", CIFAR_IMAGES, CIFAR_SIDE)

    def open_from_disk() -> float:
        for path in made.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # forget what is in memory of it
        begin = time.perf_counter()
        cache.open_cache(made, "")
        return time.perf_counter() - begin

    times = [open_from_disk() for _ in range(options.repeats)]
    return {
        "images": CIFAR_IMAGES, "side": CIFAR_SIDE, "repeats": options.repeats,
        "open_seconds": median(times), "most_open_seconds": max(times),
    }  # fmt: skip


def _preparing(options: DataOptions, folder: Path, device: torch.device) -> dict[str, Any]:
    root, decoder = folder / "photographs", "gpu" if device.type == "cuda" else "cpu"
    files = write_photographs(root, options.files)
    threads = options.threads or len(os.sched_getaffinity(0))
    deque(dali_alone(files[:BATCH], threads, decoder), maxlen=0)  # imports DALI
    functions = {
        "prepare": lambda: _seconds(prepare, root, SIDE, threads=threads, device=decoder, again=True),
        "dali": lambda: _seconds(deque, dali_alone(files, threads, decoder), maxlen=0),
    }
    with _data_dir(folder / "data"):
        rounds = interleave(functions, options.rounds)
    decoded = math.ceil(len(files) / BATCH) * BATCH  # by DALI alone, which fills its last batch
    ratios = [len(files) / taken["prepare"] * taken["dali"] / decoded for taken in rounds]
    return {
        "images": len(files), "side": SIDE, "decoder": decoder, "threads": threads, "rounds": options.rounds,
        "prepare_images_per_second": len(files) / median(taken["prepare"] for taken in rounds),
        "dali_images_per_second": decoded / median(taken["dali"] for taken in rounds),
        **_median_and_range("prepare_ratio", ratios),
    }  # fmt: skip


def write_photographs(root: Path, count: int) -> list[Path]:
    """Writes JPEGs that all differ into a folder as `remixmatch data prepare` takes it.

    Args:
        root: the folder.
        count: of the JPEGs, at least 4. A tenth is labeled, a tenth for testing.

    Returns:
        The files.
    """
    originals = photographs()

    def write(name: str) -> list[Path]:
        paths = []
        numbers = range(sorted(originals).index(name), count, len(originals))
        for place, image in enumerate(crops(originals[name], len(numbers), *PHOTOGRAPH)):
            folder = root / {0: f"train/{name}", 1: f"test/{name}"}.get(place % 10, "unlabeled")
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{numbers[place]:06}.jpg")
            image.save(paths[-1], quality=QUALITY)
        return paths

    with ThreadPool(len(originals)) as pool:
        return [path for paths in pool.map(write, originals) for path in paths]


def dali_alone(files: list[Path], threads: int, device: str) -> Iterator[np.ndarray]:
    """Has DALI read, decode, resize and crop all files once.

    Args:
        files: JPEGs.
        threads: of DALI.
        device: "cpu" or "gpu".

    Yields:
        Batches of images, (BATCH, SIDE, SIDE, 3) uint8; after the last file they begin again with the first.
    """
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=0 if device == "gpu" else None)
    def graph() -> Any:
        contents, _ = fn.readers.file(files=[str(path) for path in files])
        return decoded_and_resized(contents, SIDE, device)

    pipeline = graph()
    pipeline.build()
    for _ in range(math.ceil(len(files) / BATCH)):
        (images,) = pipeline.run()
        yield np.asarray(images.as_cpu().as_tensor())


@contextmanager
def _data_dir(folder: Path) -> Iterator[None]:
    """Has caches of this process in a folder, for as long as this lasts."""
    before = os.environ.get("REMIXMATCH_DATA")
    os.environ["REMIXMATCH_DATA"] = str(folder)
    try:
        yield
    finally:
        del os.environ["REMIXMATCH_DATA"]
        if before is not None:
            os.environ["REMIXMATCH_DATA"] = before


def train_apart(folder: Path, images: int, steps: int, views: str) -> dict[str, float]:
    """Trains in a process of its own, on so many images of SIDE, whose cache is made where `folder` has none.

    Returns:
        What `bench.runs.data_worker` prints.

    Raises:
        RuntimeError: training failed.
    """
    data = folder / f"{images}"
    if not data.exists():
        write_cache(data / "stl10", images, SIDE)
    with TemporaryDirectory(dir=folder) as run:
        return json.loads(
            output("bench.runs.data_worker", f"{run}/run", str(steps), views, REMIXMATCH_DATA=str(data.resolve()))
        )


def _training(options: DataOptions, folder: Path, device: torch.device) -> dict[str, Any]:
    sizes = NO_IMAGES, options.few_images, options.images
    functions = {images: partial(train_apart, folder, images, options.steps, options.views) for images in sizes}
    rounds = interleave(functions, options.rounds)
    row: dict[str, Any] = {
        "images": options.images, "few_images": options.few_images, "side": SIDE, "views": options.views,
        "steps": options.steps, "rounds": options.rounds,
    }  # fmt: skip
    for figure in ("step_ms", "mean_step_ms", "cpu_step_ms"):
        many, few = ([taken[images][figure] for taken in rounds] for images in (options.images, options.few_images))
        ratios = [one / other for one, other in zip(many, few, strict=True)]
        name = figure.removesuffix("_ms")
        row |= {figure: median(many), f"few_{figure}": median(few), **_median_and_range(f"{name}_ratio", ratios)}
    none, few, many = ([taken[images]["peak_memory_mib"] for taken in rounds] for images in sizes)
    memory = {"peak_memory_mib": max(many), "few_peak_memory_mib": max(few), "data_memory_mib": max(many) - min(none)}
    return row | memory


def _median_and_range(name: str, values: list[float]) -> dict[str, float]:
    return {name: median(values), f"least_{name}": min(values), f"most_{name}": max(values)}


BENCH = Bench(
    options=DataOptions,
    main=main,
    quick="--parts opening preparing --repeats 1 --rounds 1 --files 8",
    tables={
        "data": Table(
            key=("part", "images", "few_images", "side", "views", "decoder"),
            columns={
                "part": "{part}",
                "images": "{images:,}",
                "side": "{side}",
                "open, s": "{open_seconds:.4f}",
                "prepare, images/s": "{prepare_images_per_second:,.0f}",
                "DALI alone, images/s": "{dali_images_per_second:,.0f}",
                "prepare / DALI alone": "{prepare_ratio:.2f} ({least_prepare_ratio:.2f} to {most_prepare_ratio:.2f})",
                "views": "{views}",
                "step, ms": "{step_ms:.1f}",
                "with fewer images, ms": "{few_step_ms:.1f} ({few_images:,})",
                "step / with fewer": "{step_ratio:.2f} ({least_step_ratio:.2f} to {most_step_ratio:.2f})",
                "of CPU time": "{cpu_step_ratio:.2f}",
                "memory for the data, MiB": "{data_memory_mib:.0f}",
            },
        ),
    },
)
