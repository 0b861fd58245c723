"""Registry of data sets.

To add a data set, write a function that returns a `DataSet` and add it to `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipelines.data import cache
from pipelines.data.cache import DataSet
from pipelines.plan import stream

NOISE_32 = "noise-32"
_SPLIT_STREAM = 100  # Distinct from the streams of plans.
_DIGITS_TEST_PER_CLASS = 36


@lru_cache(maxsize=1)
def digits() -> DataSet:
    """Return scikit-learn's 1 797 handwritten digits, enlarged from 8x8 to 16x16, with three equal channels.

    The fixed test set has 36 images per class, 360 in total; the other 1 437 images are for training.
    """
    from PIL import Image

    # Read the file of sklearn.datasets.load_digits directly: importing scikit-learn takes twenty times as long.
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is required"
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    labels = table[:, -1].astype(np.int64)
    gray = (table[:, :-1].reshape(-1, 8, 8) * (255.0 / 16.0)).round().astype(np.uint8)
    doubled = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in gray]
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


def noise(images: int, side: int, seed: int = 0) -> np.ndarray:
    """Return (images, side, side, 3) uint8, uniformly random."""
    return np.random.default_rng(seed).integers(256, size=(images, side, side, 3), dtype=np.uint8)


@lru_cache(maxsize=1)
def noise_32() -> DataSet:
    """Return random images with CIFAR-10's shape and a tenth of its size, for benchmarks without a download."""
    train, test = np.arange(5000) % 10, np.arange(1000) % 10
    return DataSet(
        name=NOISE_32,
        classes=tuple(str(c) for c in range(10)),
        train_images=noise(len(train), 32, 0),
        train_labels=train,
        test_images=noise(len(test), 32, 1),
        test_labels=test,
    )


@lru_cache(maxsize=2)
def prepared(name: str) -> DataSet:
    """Return a data set whose cache was made by `remixmatch data prepare`.

    Raises:
        DataError: The data set is not prepared, or its cache is damaged.
    """
    return cache.open_cache(cache.data_dir() / name, cache.prepare_command(name))


PREPARED = ("cifar10", "cifar100", "svhn", "svhn-extra", "stl10", "fashion-mnist", "fashion-mnist-16")
DATASETS: dict[str, Callable[[], DataSet]] = {
    "digits": digits,
    **{name: partial(prepared, name) for name in PREPARED},
    NOISE_32: noise_32,
}
