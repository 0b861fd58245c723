"""Confusion matrix of a classifier: accuracy, recall of each class, their means, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ALL, _LOWEST = 20, 10  # With more than _ALL classes, the table has the _LOWEST ones.


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count the images of each class by the class they are predicted as.

    Args:
        labels: (N,) int64.
        predicted: (N,) int64.
        classes: L.

    Returns:
        (L, L) int64, with a row for each label and a column for each predicted class.
    """
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def accuracy(matrix: np.ndarray) -> float:
    """Return the images that are predicted correctly, in percent."""
    return 100.0 * float(matrix.trace() / matrix.sum())


def recalls(matrix: np.ndarray) -> list[float | None]:
    """Return the images of each class that are predicted correctly, in percent; None for a class without images."""
    return recalls_of(matrix.diagonal(), matrix.sum(1))


def recalls_of(correct: np.ndarray, images: np.ndarray) -> list[float | None]:
    """Return the same from (L,) numbers of correctly predicted and of all images of each class."""
    counts = zip(correct.tolist(), images.tolist(), strict=True)
    return [100.0 * right / count if count else None for right, count in counts]


def balanced_accuracy(found: Sequence[float | None]) -> float:
    """Return the mean recall of the classes that have images, in percent."""
    return float(np.mean([recall for recall in found if recall is not None]))


def geometric_mean(found: Sequence[float | None]) -> float:
    """Return the geometric mean of the recalls of the classes that have images, in percent; 0 if one of them is 0."""
    known = np.array([recall for recall in found if recall is not None])
    return float(np.exp(np.log(known).mean())) if known.all() else 0.0


def recall_table(matrix: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return lines of text with the recall of each class and its most frequent mistake.

    With many classes, only those with the lowest recall are in the table. Classes without images are left out of it.
    """
    found = recalls(matrix)
    present = [number for number, recall in enumerate(found) if recall is not None]
    title = []
    if len(present) > _ALL:
        title = [f"the {_LOWEST} of {len(present)} classes with the lowest recall:"]
        present = sorted(present, key=lambda number: found[number] or 0.0)[:_LOWEST]
    rows = [("class", "images", "recall", "most often mistaken for")]
    for number in present:
        wrong = matrix[number].copy()
        wrong[number] = 0
        worst = int(wrong.argmax())
        images = matrix[number].sum()
        mistake = f"{names[worst]} ({wrong[worst]} of {images})" if wrong[worst] else ""
        rows.append((names[number], str(images), f"{found[number]:.2f} %", mistake))
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    table = [f"{a:{first}}  {b:>{second}}  {c:>{third}}  {d}".rstrip() for a, b, c, d in rows]
    return title + table
