"""What a data set is: decoded images by number, and their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class DataSet:
    """Decoded images by number, and their labels; in memory or memory-mapped, so that nothing may copy all of them.

    Attributes:
        name: as in `pipelines.datasets.DATASETS`.
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
