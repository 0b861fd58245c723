"""`remixmatch bench data`: opening a cache, preparing a folder of images, and training on many images and on few.

Opening: a cache of CIFAR-10's size, read from disk each time. Target: less than 0.5 s.
Preparing: a folder of photographs, in alternation with DALI alone, which reads, decodes, resizes and crops them.
Target: at least 0.7 times DALI's rate.
Training: on many images, on few, and on very few, in alternation, each in its own process. Targets: on many images, a
step takes at most 1.1 times as long as on few, and the process needs at most 2 GiB more than on very few.
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
from pipelines.data import cache
from pipelines.data.datasets import noise
from pipelines.data.folder import prepare
from pipelines.data.jpegs import BATCH, decoded_and_resized
from pipelines.data.pixels import placed

CIFAR_IMAGES, CIFAR_SIDE = 50_000, 32
PHOTOGRAPH, QUALITY = (500, 375), 90  # Width and height in pixels, and JPEG quality.
SIDE = 96
NO_IMAGES = 200  # So few that they do not matter for the memory of the process.
_LABELED = 5000
_CHUNK = 1000  # Images written at a time.


@dataclass
class DataOptions:
    """Time opening a cache, preparing a folder, and training on many images."""

    out: Path = records.OUT / "data.jsonl"
    """File to append records to."""
    parts: tuple[str, ...] = ("opening", "preparing", "training")
    """Parts to measure."""
    folder: Path | None = None
    """Folder for generated images, deleted afterwards; by default the system's. 100 KB per image prepared."""
    repeats: int = 15
    """Number of times the cache is opened; the median is reported."""
    rounds: int = 3
    """Rounds of preparing and training; the median is reported."""
    files: int = 500
    """Number of photographs to prepare."""
    threads: int = 0
    """Threads for preparing and for DALI alone; 0 means one per core."""
    images: int = 20_000
    """Number of training images in the large set."""
    few_images: int = 5000
    """Number of training images in the small set."""
    steps: int = 30
    """Steps of a training run; their median time is reported."""
    views: Literal["auto", "dali", "dali-graph", "fused"] = "auto"
    """Implementation of the views; see `remixmatch train`."""


def main(options: DataOptions) -> None:
    """Measure the parts one after another, and write a record for each.

    Raises:
        UserError: A flag is invalid, or the images do not fit into the folder.
        RuntimeError: A training run failed.
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
            with TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
                row = parts[part](options, Path(folder), device)
        except (cache.DataError, OSError) as error:
            raise UserError(f"--folder: {part} cannot store its images ({error})") from error
        BENCH.write(options.out, "data", device, part=part, **row)


def _seconds(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    begin = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - begin


def write_cache(folder: Path, images: int, side: int) -> Path:
    """Write a cache of noise with ten classes, the given number of training images and 100 test images; return it."""
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
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # Drop it from the page cache.
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
    deque(dali_alone(files[:BATCH], threads, decoder), maxlen=0)  # Import DALI.
    functions = {
        "prepare": lambda: _seconds(prepare, root, SIDE, threads=threads, device=decoder, again=True),
        "dali": lambda: _seconds(deque, dali_alone(files, threads, decoder), maxlen=0),
    }
    with _data_dir(folder / "data"):
        rounds = interleave(functions, options.rounds)
    decoded = math.ceil(len(files) / BATCH) * BATCH  # DALI alone fills its last batch.
    ratios = [len(files) / taken["prepare"] * taken["dali"] / decoded for taken in rounds]
    return {
        "images": len(files), "side": SIDE, "decoder": decoder, "threads": threads, "rounds": options.rounds,
        "prepare_images_per_second": len(files) / median(taken["prepare"] for taken in rounds),
        "dali_images_per_second": decoded / median(taken["dali"] for taken in rounds),
        **_median_and_range("prepare_ratio", ratios),
    }  # fmt: skip


def write_photographs(root: Path, count: int) -> list[Path]:
    """Write distinct JPEGs to a folder that `remixmatch data prepare` accepts.

    Args:
        root: The folder.
        count: Number of JPEGs, at least 4. A tenth is labeled, a tenth is for testing.

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
    """Read, decode, resize and crop all files once with DALI.

    Args:
        files: JPEG files.
        threads: DALI's number of threads.
        device: "cpu" or "gpu".

    Yields:
        Batches of images, (BATCH, SIDE, SIDE, 3) uint8. The last batch is filled up with the first files.
    """
    from nvidia.dali import fn, pipeline_def

    sides, start = placed(*PHOTOGRAPH, SIDE)

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=0 if device == "gpu" else None)
    def graph() -> Any:
        contents, _ = fn.readers.file(files=[str(path) for path in files])
        return decoded_and_resized(contents, sides[::-1], start[::-1], SIDE, device)

    pipeline = graph()
    pipeline.build()
    for _ in range(math.ceil(len(files) / BATCH)):
        (images,) = pipeline.run()
        yield np.asarray(images.as_cpu().as_tensor())


@contextmanager
def _data_dir(folder: Path) -> Iterator[None]:
    """Use a folder for this process's caches within the context."""
    before = os.environ.get("REMIXMATCH_DATA")
    os.environ["REMIXMATCH_DATA"] = str(folder)
    try:
        yield
    finally:
        del os.environ["REMIXMATCH_DATA"]
        if before is not None:
            os.environ["REMIXMATCH_DATA"] = before


def train_apart(folder: Path, images: int, steps: int, views: str) -> dict[str, float]:
    """Train in a separate process on the given number of SIDE x SIDE images; create their cache if it is missing.

    Returns:
        The output of `bench.runs.data_worker`.

    Raises:
        RuntimeError: Training failed.
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
    for metric in ("step_ms", "mean_step_ms", "cpu_step_ms"):
        many, few = ([taken[images][metric] for taken in rounds] for images in (options.images, options.few_images))
        ratios = [one / other for one, other in zip(many, few, strict=True)]
        name = metric.removesuffix("_ms")
        row |= {metric: median(many), f"few_{metric}": median(few), **_median_and_range(f"{name}_ratio", ratios)}
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
                "prepare / DALI": "{prepare_ratio:.2f} ({least_prepare_ratio:.2f} to {most_prepare_ratio:.2f})",
                "views": "{views}",
                "step, ms": "{step_ms:.1f}",
                "step on fewer images, ms": "{few_step_ms:.1f} ({few_images:,})",
                "relative step time": "{step_ratio:.2f} ({least_step_ratio:.2f} to {most_step_ratio:.2f})",
                "relative CPU time": "{cpu_step_ratio:.2f}",
                "data memory, MiB": "{data_memory_mib:.0f}",
            },
        ),
    },
)
