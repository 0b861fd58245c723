"""Data sets.

A data set is added by writing one function that returns a `DataSet` and entering it in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipelines.plan import stream

_SPLIT_STREAM = 100  # apart from the streams of plans
_DIGITS_TEST_PER_CLASS = 36


@dataclass(frozen=True, eq=False)
class DataSet:
    """Decoded images by number, and their labels; in memory or memory-mapped, so that nothing may copy all of them.

    Attributes:
        name: as in `DATASETS`.
        classes: names of the L classes.
        train_images: (N, H, W, 3) uint8, labeled and unlabeled ones.
        train_labels: (N,) int64, -1 where the label is not known.
        test_images: (M, H, W, 3) uint8.
        test_labels: (M,) int64.
        unlabeled: rows of the training images that are trained on without their label; None for all of them, as in the
            paper, the labeled ones included.
        class_order: classes in the order in which the paper's split goes through them; () for ascending.
        folds: published label splits, each rows of the training images; () without any.
        held_out: how many labeled images were made the test part, where the source has none; 0 otherwise.
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    unlabeled: np.ndarray | None = None
    class_order: tuple[int, ...] = ()
    folds: tuple[np.ndarray, ...] = ()
    held_out: int = 0

    @property
    def unlabeled_rows(self) -> np.ndarray:
        """Rows of the training images that are trained on without their label: (Nu,) int64."""
        return np.arange(len(self.train_images)) if self.unlabeled is None else self.unlabeled

    @property
    def sides(self) -> tuple[int, int]:
        """H and W."""
        return self.train_images.shape[1:3]


@lru_cache(maxsize=1)
def digits() -> DataSet:
    """scikit-learn's 1 797 handwritten digits, doubled from 8x8 to 16x16 and repeated over three channels.

    The test part is 36 images a class, 360 in all, drawn once and for ever; the other 1 437 are for training.
    """
    from PIL import Image

    # the file that sklearn.datasets.load_digits reads, without importing scikit-learn, which takes twenty times as long
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is required"
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    labels = table[:, -1].astype(np.int64)
    grey = (table[:, :-1].reshape(-1, 8, 8) * (255.0 / 16.0)).round().astype(np.uint8)
    doubled = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in grey]
    images = np.repeat(np.stack(doubled)[..., None], 3, axis=-1)

    rng = stream(0, _SPLIT_STREAM, 0)
    test = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:_DIGITS_TEST_PER_CLASS] for c in range(10)])
    )
    train = np.setdiff1d(np.arange(len(labels)), test)
    return DataSet(
        name="digits",
        classes=tuple(str(c) for c in range(10)),
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )


@lru_cache(maxsize=2)
def prepared(name: str) -> DataSet:
    """A data set that `remixmatch data prepare` has made the cache of.

    Raises:
        DataError: it has not, or the cache is damaged.
    """
    from pipelines import cache

    return cache.open_cache(cache.data_dir() / name, cache.prepare_command(name))


PREPARED = ("cifar10", "cifar100", "svhn", "svhn-extra", "stl10", "fashion-mnist", "fashion-mnist-16")
DATASETS: dict[str, Callable[[], DataSet]] = {"digits": digits} | {name: partial(prepared, name) for name in PREPARED}
