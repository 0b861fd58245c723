"""Long-tailed training sets: unequally many labeled and unlabeled images per class.

Class k of L has N_k = N_1 * gamma^(-(k - 1) / (L - 1)) images, rounded down, so gamma is the ratio of the largest class
to the smallest one (Cui et al. 2019, arXiv 1901.05555). Labeled and unlabeled images have a gamma each, and their own
N_1 and M_1 (DARP, arXiv 2007.08844; CReST, arXiv 2102.09559; USB). A negative gamma reverses the order of the classes,
as in USB. The unlabeled set contains the labeled images and M_k further ones, as in USB. The test set does not change.

Errors begin with the flag whose value is not allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.data.cache import DataSet
from pipelines.data.splits import ORDERS, RULES

_NEARLY = 1e-6  # Whole numbers stay whole in spite of rounding errors.


@dataclass(frozen=True)
class Imbalance:
    """Class ratios of the training images.

    Attributes:
        labeled: gamma of the labeled images; 1 leaves the counts to the split rule.
        unlabeled: gamma of the unlabeled images; 1 uses equally many, or all without `m1`.
        n1: N_1, labeled images of the largest class; 0 to derive it from the number of labels.
        m1: M_1, unlabeled images of the largest class, in addition to the labeled ones; 0 for as many as there are.
    """

    labeled: float = 1.0
    unlabeled: float = 1.0
    n1: int = 0
    m1: int = 0

    @property
    def of_labeled(self) -> bool:
        """Whether labeled images are chosen by this module."""
        return abs(self.labeled) != 1

    @property
    def of_unlabeled(self) -> bool:
        """Whether unlabeled images are chosen by this module."""
        return abs(self.unlabeled) != 1 or self.m1 > 0


def ratios(gamma: float, classes: int) -> np.ndarray:
    """Return the size of each class as a fraction of the largest one: (L,) float64 in (0, 1]."""
    found = abs(gamma) ** (-np.arange(classes) / max(classes - 1, 1))
    return found[::-1] if gamma < 0 else found


def class_counts(largest: int, gamma: float, classes: int) -> np.ndarray:
    """Return the number of images of each class, (L,) int64, for the number of images of the largest one."""
    return np.floor(largest * ratios(gamma, classes) + _NEARLY).astype(np.int64)


def counts_of_total(total: int, gamma: float, classes: int) -> np.ndarray:
    """Return the number of images of each class, (L,) int64, for their sum.

    N_1 is the largest number whose counts do not exceed the sum. The rest, less than L, go one at a time to the class
    with the largest quotient of its ratio and its count + 1, the larger one at a tie (D'Hondt's method). So the counts
    are those of a fractional N_1, and those of a whole N_1 for the sum of its counts.
    """
    if gamma < 0:
        return counts_of_total(total, -gamma, classes)[::-1]
    low, high = 0, total + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if class_counts(middle, gamma, classes).sum() <= total else (low, middle)
    counts, shares = class_counts(low, gamma, classes), ratios(gamma, classes)
    for _ in range(total - int(counts.sum())):
        quotients = shares / (counts + 1)
        counts[np.argmax(quotients >= quotients.max() * (1 - 1e-9))] += 1
    return counts


def choose(
    data: DataSet, rule: str, labels: int, seed: int, imbalance: Imbalance
) -> tuple[np.ndarray, np.ndarray | None]:
    """Choose the labeled and the unlabeled training images.

    The rule decides in which order the images of a class are taken: first the labeled ones, then the unlabeled ones.

    Args:
        data: The data set.
        rule: Name of a rule, see `pipelines.data.splits.RULES`.
        labels: Number of labels; ignored if the imbalance has an `n1`, or the rule is "all".
        seed: Seed of the rule.
        imbalance: Class ratios.

    Returns:
        Indices of the labeled images, and those of the unlabeled ones, each sorted, int64. Instead of the latter None
        for the unlabeled set of the data set.

    Raises:
        ValueError: The data set does not have the images, or the rule leaves no choice.
    """
    if not (imbalance.of_labeled or imbalance.of_unlabeled):
        return RULES[rule](data, labels, seed), None
    if rule not in ORDERS:
        flag = "--m1" if imbalance.m1 else "--imbalance"
        raise ValueError(f"--split {rule} labels every image, so {flag} has no images to choose from")
    orders = ORDERS[rule](data, seed)
    split = _labeled(data, orders, labels, imbalance) if imbalance.of_labeled else RULES[rule](data, labels, seed)
    return split, _unlabeled(data, orders, split, imbalance) if imbalance.of_unlabeled else None


def _labeled(data: DataSet, orders: list[np.ndarray], labels: int, imbalance: Imbalance) -> np.ndarray:
    gamma, classes = imbalance.labeled, len(data.classes)
    flag, known = ("--n1", imbalance.n1) if imbalance.n1 else ("--labels", labels)
    counts = class_counts(known, gamma, classes) if imbalance.n1 else counts_of_total(known, gamma, classes)
    if not counts.all():
        # With N_1 = gamma, the smallest class has one image.
        smallest = np.floor(abs(gamma) * ratios(gamma, classes) + _NEARLY)
        least = np.ceil(abs(gamma)) if imbalance.n1 else smallest.sum()
        fits = (smallest <= [len(images) for images in orders]).all()
        advice = f"use at least {least:.0f}" if fits else "use a smaller imbalance"
        raise ValueError(
            f"{flag} {known} with imbalance {gamma:g} leaves {(counts == 0).sum()} of {classes} classes without a "
            f"label; {advice}"
        )
    for name, images, count in zip(data.classes, orders, counts, strict=True):
        if len(images) < count:
            raise ValueError(
                f"{flag} {known} with imbalance {gamma:g} needs {count} labeled images of class {name}, which has "
                f"{len(images)}; use less"
            )
    return np.sort(np.concatenate([images[:count] for images, count in zip(orders, counts, strict=True)]))


def _unlabeled(data: DataSet, orders: list[np.ndarray], split: np.ndarray, imbalance: Imbalance) -> np.ndarray:
    gamma, used = imbalance.unlabeled, data.unlabeled_indices
    if unknown := int((data.train_labels[used] < 0).sum()):
        raise ValueError(
            f"{'--m1' if imbalance.m1 else '--imbalance'} cannot choose unlabeled images by class: {unknown} training "
            f"images of {data.name} have no label; --imbalance-unlabeled 1 without --m1 uses all of them"
        )
    rest = [images[np.isin(images, used) & ~np.isin(images, split)] for images in orders]
    room, shares = np.array([len(images) for images in rest]), ratios(gamma, len(rest))
    # The largest M_1 for which M_k, rounded down, is at most the number of images of every class.
    most = int((np.ceil((room + 1 - _NEARLY) / shares) - 1).min())
    if imbalance.m1 > most:
        scarce = data.classes[int((room - class_counts(imbalance.m1, gamma, len(rest))).argmin())]
        raise ValueError(
            f"--m1 {imbalance.m1} with imbalance {gamma:g} needs more images of class {scarce} than there are besides "
            f"its labeled ones; use at most {most}"
        )
    counts = class_counts(imbalance.m1 or most, gamma, len(rest))
    chosen = [images[:count] for images, count in zip(rest, counts, strict=True)]
    return np.sort(np.concatenate([split[np.isin(split, used)], *chosen]))
