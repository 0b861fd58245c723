"""Data that a run saves for `remixmatch report`, in addition to its metrics.

history.jsonl has records of at most MOST_ROWS evaluations: p~(y), p(y), CTAugment's bins, and the quality of
pseudo-labels. results.npz is written at the end: predictions on the test images, the most confident errors and a few
views as images, so that a report needs neither the data nor the network. Nothing here affects training.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.config import Config
from pipelines.ctaugment import BINS, NAMES
from pipelines.data.cache import DataSet
from pipelines.files import atomic_write, fits, read_file, read_json_lines, write_text

log = logging.getLogger(__name__)

HISTORY, RESULTS = "history.jsonl", "results.npz"
MOST_ROWS = 200
MOST_PREDICTIONS = 50_000
MOST_ERRORS = 24
LARGEST_SIDE = 96  # of a saved image, in pixels

_RECORD = {  # What a record is like; see `pipelines.files.fits`.
    "step": int,
    "p_model?": [float],
    "label_marginal?": [float],
    "bins?": {str: [[float]]},
    "guesses?": {"images": int, "accuracy": float, "confidence": float, "bins": [[int]]},
}
_ARRAYS = ("labels", "predicted", "confidence", "test_images", "errors", "error_images", "views", "captions")

# The quality of pseudo-labels is measured on 128 to 256 images, each time after training on 100 times as many. A pass
# without gradient costs about a third of a training pass, so this takes 0.33 % of a run's time.
_LEAST_IMAGES, _MOST_IMAGES, _ROWS_AN_IMAGE = 128, 256, 100


class History:
    """Writer of history.jsonl: a record per evaluation; every second one is dropped when there are too many.

    The steps alone decide which records stay, and resuming drops those of steps that will be trained again, so a
    resumed run ends with the same file as an undisturbed one. Each new record replaces the whole file. If that fails,
    training continues and the next record retries.

    Args:
        folder: Folder of the run.
        step: Steps done when the run starts or resumes.
        every: Steps between evaluations.
    """

    def __init__(self, folder: Path, step: int, every: int) -> None:
        self._path, self._every = folder / HISTORY, every
        found = read_history(folder)
        self._rows = [(row["step"], _line(row)) for row in found if row["step"] <= step]
        first = self._rows[0][0] // every if self._rows and self._rows[0][0] % every == 0 else 1
        self._stride = first & -first  # evaluations between records that stay, a power of two
        self._trouble = False
        if len(self._rows) < len(found):
            self._write()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Add a record. The newest one is always in the file, even if it will be dropped later."""
        rows = self._rows
        if rows and rows[-1][0] % (self._every * self._stride):
            rows.pop()
        rows.append((step, _line({"step": step, **values})))
        while len(rows) > MOST_ROWS:
            self._stride *= 2
            rows[:-1] = [row for row in rows[:-1] if row[0] % (self._every * self._stride) == 0]
        self._write()

    def catch_up(self) -> None:
        """Retry writing if the last attempt failed or the file is missing."""
        if self._trouble or (self._rows and not self._path.exists()):
            self._write()

    def _write(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, "".join(line for _, line in self._rows))
        except OSError as error:
            if not self._trouble:
                log.warning(f"cannot write {self._path} ({error.strerror or error}); retrying")
            self._trouble = True
        else:
            self._trouble = False


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's history.jsonl; see `engine.runs.progress.read_metrics`."""
    return read_json_lines(folder / HISTORY, _is_record)


def _is_record(row: Any) -> bool:
    """Return whether an object is a record, and its lists have the lengths that reports rely on."""
    counts = {name: int(np.count_nonzero(BINS[number])) for number, name in enumerate(NAMES)}
    return (
        fits(row, _RECORD)
        and row["step"] > 0
        and len({len(row[name]) for name in ("p_model", "label_marginal") if name in row}) < 2
        and all(len(found) == counts.get(name, len(found)) for name, found in row.get("bins", {}).items())
        and all(len(pair) == 2 for pair in row.get("guesses", {}).get("bins", ()))
    )


def named_bins(weights: np.ndarray) -> dict[str, list[list[float]]]:
    """Return CTAugment's bin weights by transformation: for each of its parameters, a list over its bins.

    Args:
        weights: (T, 2, 17) float64.
    """
    return {
        name: [[round(float(w), 3) for w in weights[row, p, :bins]] for p, bins in enumerate(BINS[row]) if bins]
        for row, name in enumerate(NAMES)
        if BINS[row].any()
    }


@dataclass(frozen=True)
class GuessedImages:
    """Training images on which pseudo-labels are compared with true labels that are hidden from training.

    Attributes:
        rows: (n,) int64, indices of the training images, evenly spaced.
        every: Evaluations between two comparisons, a power of two; 0 without such images.
    """

    rows: np.ndarray
    every: int

    def due(self, step: int, config: Config) -> bool:
        """Return whether to compare at the evaluation of `step`; always true for the last one."""
        if not self.every:
            return False
        return step == config.steps or step % (config.eval_every * self.every) == 0


def guessed_images(config: Config, data: DataSet, split: np.ndarray, images_per_step: int) -> GuessedImages:
    """Choose the images on which pseudo-labels are compared with true labels, for the report only.

    Args:
        config: Configuration of the run.
        data: Its data set.
        split: (labels,) int64, indices of the labeled training images, which are excluded.
        images_per_step: Images that a step trains on, over all ranks.
    """
    hidden = np.setdiff1d(data.unlabeled_indices, split) if config.unlabeled else np.empty(0, np.int64)
    hidden = hidden[data.train_labels[hidden] >= 0]
    rows_between = config.eval_every * images_per_step
    count = min(max(rows_between // _ROWS_AN_IMAGE, _LEAST_IMAGES), _MOST_IMAGES, len(hidden))
    if config.bn == "split":  # which needs full groups
        group = config.batch // config.bn_groups
        count = max(count // group, 1) * group if len(hidden) >= group else 0
    if not count:
        return GuessedImages(np.empty(0, np.int64), 0)
    evaluations = math.ceil(count * _ROWS_AN_IMAGE / rows_between)
    return GuessedImages(
        hidden[np.linspace(0, len(hidden) - 1, count).astype(np.int64)], 1 << (evaluations - 1).bit_length()
    )


@dataclass(frozen=True)
class SampleViews:
    """A few images and their views.

    Attributes:
        images: (R, C, H, W, 3) uint8. Each row holds an image, its weak view if the method has one, and strong views.
        captions: (R, C); the first of each row is "image".
    """

    images: np.ndarray
    captions: Sequence[Sequence[str]]


def save_results(folder: Path, probabilities: np.ndarray, rows: slice, data: DataSet, views: SampleViews) -> None:
    """Write results.npz.

    Args:
        folder: Folder of the run.
        probabilities: (n, L) float32, predictions for the test images with indices `rows`.
        rows: The result of `predicted_rows`.
        data: The data set.
        views: Views of training images.

    Raises:
        OSError: The file cannot be written.
    """
    labels = data.test_labels[rows]
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MOST_ERRORS]
    with atomic_write(folder / RESULTS) as file:
        np.savez_compressed(
            file,
            labels=labels.astype(np.uint16),
            predicted=predicted.astype(np.uint16),
            confidence=confidence.astype(np.float16),
            test_images=np.int64(len(data.test_labels)),
            errors=worst,
            error_images=_small(data.test_images[rows][worst]),
            views=_small(views.images),
            captions=np.array(views.captions, dtype=np.str_),
        )


def predicted_rows(data: DataSet) -> slice:
    """Return the test images whose predictions are saved: all, or every n-th if there are many."""
    return slice(None, None, max(math.ceil(len(data.test_labels) / MOST_PREDICTIONS), 1))


def _small(images: np.ndarray) -> np.ndarray:
    """Shrink (..., H, W, 3) uint8 images that are larger than LARGEST_SIDE."""
    factor = math.ceil(max(images.shape[-3:-1]) / LARGEST_SIDE)
    if factor == 1:
        return images
    from PIL import Image

    flat = images.reshape(-1, *images.shape[-3:])
    small = [np.asarray(Image.fromarray(image).reduce(factor)) for image in flat]
    height, width = (-(-side // factor) for side in images.shape[-3:-1])
    return np.array(small, dtype=np.uint8).reshape(*images.shape[:-3], height, width, 3)


def read_results(folder: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays written by `save_results`; None if they are missing or damaged, as in an unfinished run."""
    try:
        with np.load(io.BytesIO(read_file(folder / RESULTS)), allow_pickle=False) as found:
            arrays = {name: found[name] for name in _ARRAYS}
    except Exception:  # damaged files raise all kinds of errors
        return None
    return arrays if _well_formed(arrays) else None


def _well_formed(arrays: Mapping[str, np.ndarray]) -> bool:
    """Return whether arrays have the dtypes and shapes that `save_results` writes."""
    count, errors, grid = (arrays[name].shape for name in ("labels", "errors", "captions"))
    expected: dict[str, tuple[str, tuple[int, ...]]] = {  # Kinds of dtypes, and leading axes of shapes.
        "labels": ("u", count), "predicted": ("u", count), "confidence": ("f", count), "test_images": ("i", ()),
        "errors": ("i", errors), "error_images": ("u", errors), "views": ("u", grid), "captions": ("U", grid),
    }  # fmt: skip
    axes = {"error_images": 3, "views": 3}  # further axes: H, W, 3
    return (
        (len(count), len(errors), len(grid)) == (1, 1, 2)
        and 0 not in (*count, *grid)
        and all(
            arrays[name].dtype.kind == kind
            and arrays[name].shape[: len(shape)] == shape
            and arrays[name].ndim == len(shape) + axes.get(name, 0)
            for name, (kind, shape) in expected.items()
        )
        and all(arrays[name].dtype == np.uint8 and arrays[name].shape[-1] == 3 for name in axes)
        and bool(np.all((arrays["errors"] >= 0) & (arrays["errors"] < count[0])))
        and bool(np.isfinite(arrays["confidence"]).all())
    )
