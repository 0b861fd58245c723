"""Long-tailed training sets against the definitions of the literature, computed exactly or as its code does."""

from decimal import Decimal, localcontext

import numpy as np
import pytest

from pipelines.data.datasets import DataSet, digits
from pipelines.data.imbalance import Imbalance, choose, class_counts, counts_of_total
from pipelines.data.splits import RULES


def made(counts, unknown=0, seed=0):
    """Return a data set of tiny images with N images of each class, in random order."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(-1, len(counts)), (unknown, *counts)))
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)
    return DataSet("made up", tuple("abcdefghij"[: len(counts)]), images, labels, images[:1], labels[:1])


def exact_counts(largest, gamma, classes):
    """Return N_k = N_1 gamma^(-(k - 1) / (L - 1)), rounded down, with 60 digits."""
    found = []
    with localcontext() as context:
        context.prec = 60
        for k in range(1, classes + 1):
            value = Decimal(int(largest)) * (-(Decimal(abs(gamma)).ln()) * (k - 1) / (classes - 1)).exp()
            nearest = value.to_integral_value()
            found.append(int(nearest if abs(value - nearest) < Decimal("1e-40") else value))
    return found[::-1] if gamma < 0 else found


@pytest.mark.parametrize("classes", [2, 4, 10, 100])
@pytest.mark.parametrize("gamma", [1, 2, 10, 20, 50, 100, 150, 1000, -100, -8])
def test_counts_are_those_of_the_formula(gamma, classes):
    for largest in (1, 30, 150, 200, 1500, 3000, 4500, 6000):
        assert class_counts(largest, gamma, classes).tolist() == exact_counts(largest, gamma, classes)


def test_counts_of_the_literature():
    """CIFAR-10 in DARP and USB: N_1 = 1500 and gamma = 100 have 15 labels in the last class."""
    tail = [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]
    assert class_counts(1500, 100, 10).tolist() == tail and class_counts(1500, -100, 10).tolist() == tail[::-1]
    assert counts_of_total(sum(tail), 100, 10).tolist() == tail


@pytest.mark.parametrize("gamma", [1.5, 10, 100, -30])
def test_a_total_is_met_and_as_close_to_the_formula_as_whole_numbers_can_be(gamma):
    """The counts are those of one N_1, which need not be whole: no class could give an image to another one."""
    for total in (*range(1, 60), 250, 492, 812):
        counts = counts_of_total(total, gamma, 10)
        shares = np.array([float(abs(gamma)) ** (-k / 9) for k in range(10)])[:: -1 if gamma < 0 else 1]
        assert counts.sum() == total
        lowest, highest = (counts / shares).max(), ((counts + 1) / shares).min()
        assert lowest <= highest * (1 + 1e-8), "there is an N_1 from lowest to highest with these counts"
    for largest in (1, 7, 200):
        whole = class_counts(largest, gamma, 10)
        assert counts_of_total(int(whole.sum()), gamma, 10).tolist() == whole.tolist()


def usb_sets(labels, seed, of_labeled, of_unlabeled):
    """Choose images as USB does: shuffle each class with numpy's global generator, labeled ones first."""
    np.random.seed(seed)
    labeled, unlabeled = [], []
    for c, (first, more) in enumerate(zip(of_labeled, of_unlabeled, strict=True)):
        images = np.where(labels == c)[0]
        np.random.shuffle(images)
        labeled += images[:first].tolist()
        unlabeled += images[: first + more].tolist()
    return sorted(labeled), sorted(unlabeled)


@pytest.mark.parametrize("gammas", [(10, 10), (10, -5), (4, 1), (-6, 3), (1, 7)])
def test_rule_usb_chooses_the_images_of_usb(gammas):
    data = made((90, 80, 100, 120))
    n1, m1 = 20, 30
    of_labeled = exact_counts(n1, gammas[0], 4) if gammas[0] != 1 else [20] * 4
    labels = 80 if gammas[0] == 1 else 1
    split, unlabeled = choose(data, "usb", labels, 5, Imbalance(*gammas, n1 if gammas[0] != 1 else 0, m1))
    expected = usb_sets(data.train_labels, 5, of_labeled, exact_counts(m1, gammas[1], 4))
    assert (split.tolist(), unlabeled.tolist()) == expected


@pytest.mark.parametrize("rule", [name for name in RULES if name != "all"])
@pytest.mark.parametrize("gammas", [(3, 5), (3, -5), (1, 5), (3, 1)])
def test_every_rule_takes_labeled_and_then_unlabeled_images_in_its_own_order(rule, gammas):
    data = made((60, 70, 50, 80))
    known = data.train_labels
    split, unlabeled = choose(data, rule, 40, 2, Imbalance(*gammas))
    assert split.dtype == np.int64 and (np.diff(split) > 0).all() and len(split) == 40
    per_class = np.bincount(known[split], minlength=4)
    if gammas[0] == 1:
        np.testing.assert_array_equal(split, RULES[rule](data, 40, 2))
    else:
        assert per_class.tolist() == counts_of_total(40, gammas[0], 4).tolist()
        fewer = choose(data, rule, 30, 2, Imbalance(*gammas))[0]
        assert set(fewer) < set(split), "the images of a class have an order"
        # The order is that of the rule: for equal counts, both choose the same images of each class.
        alike = RULES[rule](data, 4 * 10, 2) if rule != "paper" else None
        if alike is not None:
            for c in range(4):
                some, others = set(split[known[split] == c]), set(alike[known[alike] == c])
                assert some <= others or others <= some
    if gammas[1] == 1:
        assert unlabeled is None
        return
    assert (np.diff(unlabeled) > 0).all() and set(split) <= set(unlabeled)
    rest = np.bincount(known[np.setdiff1d(unlabeled, split)], minlength=4)
    assert rest.tolist() == exact_counts(rest.max(), gammas[1], 4)
    # A larger M_1 does not fit.
    room = np.bincount(known) - per_class
    assert (rest <= room).all() and (np.array(exact_counts(rest.max() + 1, gammas[1], 4)) > room).any()
    fewer = choose(data, rule, 40, 2, Imbalance(*gammas, m1=5))[1]
    assert set(fewer) < set(unlabeled) and len(fewer) == 40 + sum(exact_counts(5, gammas[1], 4))


def test_equal_classes_are_those_of_the_rule():
    for gamma in (1.0, -1.0):
        split, unlabeled = choose(digits(), "balanced", 40, 3, Imbalance(gamma, gamma))
        assert unlabeled is None and split.tolist() == RULES["balanced"](digits(), 40, 3).tolist()


@pytest.mark.parametrize(
    ("imbalance", "labels", "words"),
    [
        (Imbalance(10, 10), 11, "--labels 11 with imbalance 10 leaves 1 of 4 classes without a label; use at least 17"),
        (Imbalance(10, 10, n1=9), 1, "--n1 9 with imbalance 10 leaves 1 of 4 classes without a label; use at least 10"),
        (Imbalance(100, 1), 11, "leaves 2 of 4 classes without a label; use a smaller imbalance$"),
        (Imbalance(100, 1, n1=9), 11, "leaves 2 of 4 classes without a label; use a smaller imbalance$"),
        (Imbalance(300, 1), 11, "leaves 2 of 4 classes without a label; use a smaller imbalance$"),
        (Imbalance(1e308, 1), 11, "with imbalance 1e.308 leaves 3 of 4 classes without a label; use a smaller imb"),
        (Imbalance(2, 2, n1=61), 1, "--n1 61 with imbalance 2 needs 61 labeled images of class a, which has 60"),
        (Imbalance(2, 2, m1=45), 50, "--m1 45 with imbalance 2 needs more images of class a .* use at most 43"),
        (Imbalance(2, 2), 300, "--labels 300 with imbalance 2 needs 103 labeled images of class a, which has 60"),
    ],
)
def test_impossible_counts_raise(imbalance, labels, words):
    with pytest.raises(ValueError, match=words) as error:
        choose(made((60, 70, 50, 80)), "balanced", labels, 0, imbalance)
    assert "\n" not in str(error.value)


def test_the_least_number_of_labels_is_enough():
    for gamma in (10, 2.5, 100, -7):
        with pytest.raises(ValueError, match=r"use at least \d+$") as error:
            choose(made((200,) * 4), "balanced", 4 if gamma != 2.5 else 3, 0, Imbalance(gamma, 1))
        least = int(str(error.value).split()[-1])
        split, _ = choose(made((200,) * 4), "balanced", least, 0, Imbalance(gamma, 1))
        assert len(split) == least
        with pytest.raises(ValueError, match="without a label"):
            choose(made((200,) * 4), "balanced", least - 1, 0, Imbalance(gamma, 1))


def test_unknown_labels_and_rule_all():
    data = made((60, 70, 50, 80), unknown=9)
    with pytest.raises(ValueError, match="9 training images of made up have no label; --imbalance-unlabeled 1"):
        choose(data, "balanced", 40, 0, Imbalance(3, 3))
    assert choose(data, "balanced", 40, 0, Imbalance(3, 1))[1] is None
    with pytest.raises(ValueError, match="--split all labels every image"):
        choose(data, "all", 40, 0, Imbalance(3, 1))


def test_a_given_unlabeled_set_is_not_left():
    whole = made((60, 70, 50, 80))
    some = np.flatnonzero(np.arange(260) % 2)
    data = DataSet(**{**vars(whole), "unlabeled": some})
    split, unlabeled = choose(data, "paper", 40, 1, Imbalance(2, 4))
    assert set(unlabeled) <= set(some) and set(split) & set(some) <= set(unlabeled)
