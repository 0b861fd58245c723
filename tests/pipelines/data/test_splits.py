"""Label splits: reference implementation of the paper's rule, golden values, digests, comparisons, foreign lists."""

import hashlib
import json
import struct

import numpy as np
import pytest

from pipelines.data.datasets import DataSet, digits
from pipelines.data.splits import RULES, compare, digest, image_digest, read_indices


def made(labels, class_order=(), folds=()):
    """Return a data set of black images with the given labels."""
    labels = np.array(labels)
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    names = tuple(f"class {c}" for c in range(labels.max() + 1))
    return DataSet("made up", names, images, labels, images[:1], labels[:1], None, class_order, folds)


def uneven(seed, counts=(50, 7, 23, 90, 41), unknown=30):
    """Return imbalanced labels in random order, some of them unknown."""
    labels = np.repeat(np.arange(-1, len(counts)), (unknown, *counts))
    return np.random.default_rng(seed).permutation(labels)


def slow_paper(labels, wanted, seed, order):
    """Choose labels as the authors' script does, with Python lists."""
    by_class = [[index for index, label in enumerate(labels) if label == c] for c in order]
    most = max(len(images) for images in by_class)
    if seed != 0:
        generator = np.random.RandomState(seed)
        for images in by_class:
            generator.shuffle(images)
    taken, chosen = [0] * len(by_class), []
    while len(chosen) < wanted:
        behind = [len(images) / most - n / max(*taken, 1) for images, n in zip(by_class, taken, strict=True)]
        c = behind.index(max(behind))
        chosen.append(by_class[c][taken[c]])
        taken[c] += 1
    return sorted(chosen)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 2, 3, 4, 0)])
@pytest.mark.parametrize("wanted", [1, 5, 40, 171])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_paper_rule_matches_the_authors_script(seed, wanted, order):
    labels = uneven(seed)
    split = RULES["paper"](made(labels, () if order[0] == 0 else order), wanted, seed)
    assert split.dtype == np.int64 and split.tolist() == slow_paper(labels, wanted, seed, order)


def test_golden_splits():
    """Check fixed values that no change of numpy or of this code may alter."""
    data = made(np.arange(1000) % 10)
    assert RULES["paper"](data, 10, 1).tolist() == [5, 38, 66, 403, 441, 447, 649, 800, 894, 952]
    assert RULES["usb"](data, 10, 1).tolist() == [5, 38, 66, 403, 441, 447, 649, 800, 894, 952]
    assert RULES["paper"](data, 10, 0).tolist() == list(range(10))
    assert RULES["balanced"](data, 10, 1).tolist() == [45, 104, 226, 271, 428, 497, 520, 889, 913, 952]


def test_paper_rule_follows_class_frequencies():
    """In SVHN, for example, 40 labels are not 4 per class."""
    counts = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), counts))
    data = made(labels, class_order=(*range(1, 10), 0))
    split = RULES["paper"](data, 40, 1)
    chosen = np.bincount(labels[split], minlength=10)
    assert chosen.sum() == 40 and chosen[1] == chosen.max() == 7 and chosen[9] < 4
    assert split.tolist() == slow_paper(labels, 40, 1, (*range(1, 10), 0))
    assert split.tolist() != slow_paper(labels, 40, 1, range(10)), "digit 0 is shuffled last"


def test_the_seed_selects_a_published_fold():
    folds = (np.array([5, 3, 1]), np.array([4, 0, 2]))
    data = made([0, 0, 0, 1, 1, 1, -1, -1], folds=folds)
    assert RULES["paper"](data, 3, 0).tolist() == [1, 3, 5] and RULES["paper"](data, 3, 1).tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="one of the published folds 0 to 1, got 2"):
        RULES["paper"](data, 3, 2)
    # For other sizes, classes are assumed to be equally frequent.
    data = made([0] * 8 + [1] * 2, folds=folds)
    assert np.bincount(data.train_labels[RULES["paper"](data, 4, 0)]).tolist() == [2, 2]


def test_rules_paper_and_usb_agree_for_balanced_classes():
    data = made(np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60)))
    for seed in (1, 2, 3):
        np.testing.assert_array_equal(RULES["paper"](data, 250, seed), RULES["usb"](data, 250, seed))
    assert RULES["paper"](data, 250, 1).tolist() != RULES["paper"](data, 250, 2).tolist()


def test_usb_rule_matches_numpys_global_generator():
    """FixMatch-pytorch and TorchSSL draw from numpy's global generator after seeding it."""
    labels = uneven(3, counts=(20, 30, 25))
    np.random.seed(7)
    chosen = [np.random.choice(np.flatnonzero(labels == c), 4, replace=False) for c in range(3)]
    assert RULES["fixmatch-pytorch"](made(labels), 12, 7).tolist() == sorted(np.concatenate(chosen).tolist())
    assert RULES["torchssl"] is RULES["usb"] is RULES["fixmatch-pytorch"]


@pytest.mark.parametrize("rule", RULES)
def test_images_without_a_label_are_never_chosen(rule):
    labels = uneven(1, counts=(9, 9, 9), unknown=200)
    split = RULES[rule](made(labels), 27, 4)
    assert (labels[split] >= 0).all() and len(set(split.tolist())) == 27


def test_balanced_splits_are_balanced_seeded_and_sorted():
    data = digits()
    split = RULES["balanced"](data, 40, 1)
    np.testing.assert_array_equal(np.bincount(data.train_labels[split]), [4] * 10)
    np.testing.assert_array_equal(split, np.sort(split))
    np.testing.assert_array_equal(split, RULES["balanced"](data, 40, 1))
    assert not np.array_equal(split, RULES["balanced"](data, 40, 2))


@pytest.mark.parametrize("rule", ["balanced", "usb"])
@pytest.mark.parametrize("labeled", [0, 5, 41, -10])
def test_indivisible_label_counts_raise(rule, labeled):
    with pytest.raises(ValueError, match=f"positive multiple of 10 labels .*, got {labeled}"):
        RULES[rule](digits(), labeled, 0)


def test_too_many_labels_raise():
    with pytest.raises(ValueError, match="class 8 has 138; use at most 1380"):
        RULES["balanced"](digits(), 1390, 0)
    assert len(RULES["balanced"](digits(), 1380, 0)) == 1380
    with pytest.raises(ValueError, match=r"from 1 to 1437 \(the number of labeled images\), got 1438"):
        RULES["paper"](digits(), 1438, 1)
    with pytest.raises(ValueError, match="need more images of class class 1 than the 2 available"):
        RULES["paper"](made([0] * 8 + [1] * 2, folds=(np.arange(3),)), 9, 1)
    with pytest.raises(ValueError, match="made up has no labeled training images"):
        RULES["all"](DataSet("made up", ("a",), *[np.full(3, -1)] * 4), 1, 0)


def test_digests_of_indices_and_images_in_ascending_order():
    images = np.random.default_rng(0).integers(256, size=(9, 2, 3, 3), dtype=np.uint8)
    expected = hashlib.sha256(struct.pack("<3q", 1, 4, 8)).hexdigest()
    assert digest(np.array([8, 1, 4])) == expected == digest(np.array([1, 4, 8], np.int32))
    content = hashlib.sha256(images[1].tobytes() + images[4].tobytes() + images[8].tobytes()).hexdigest()
    assert image_digest(images, np.array([8, 1, 4])) == content
    assert image_digest(images[::-1], np.array([8, 1, 4])) != content


def test_splits_are_compared_as_sets():
    assert compare([3, 1, 2], np.array([1, 2, 3])).same
    found = compare([1, 2, 3, 4], [3, 4, 5])
    assert (found.common, found.missing, found.extra, found.same) == (2, (1, 2), (5,), False)


def test_supported_formats_of_index_lists(tmp_path):
    indices = [5, 0, 7]
    for name, text in [
        ("a.json", json.dumps(indices)),
        ("b.json", json.dumps({"train_rows": indices, "classes": ["x"] * 3})),
        ("c.json", json.dumps({"label": indices})),
        ("d.txt", "5\n0\n7\n"),
    ]:
        (tmp_path / name).write_text(text)
        assert read_indices(tmp_path / name) == indices
    np.save(tmp_path / "e.npy", np.array(indices))
    assert read_indices(tmp_path / "e.npy") == indices


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("five\n", "neither JSON nor one integer per line"),
        ("[1, 2", "neither JSON"),
        ("[]", "must contain a list of image indices"),
        ('{"rows of": [1]}', "must contain"),
        ("[1, -2]", "must contain"),
        ("[1, 2.5]", "must contain"),
        ("[1, 2, 1]", "contains an image index more than once"),
    ],
)
def test_invalid_index_lists_raise(tmp_path, text, words):
    path = tmp_path / "list"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_indices(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        read_indices(tmp_path / "no")


@pytest.mark.parametrize("rule", ["paper", "usb", "torchssl", "fixmatch-pytorch"])
def test_a_seed_that_numpys_legacy_generator_refuses_is_named(rule):
    data = made(uneven(0))
    RULES[rule](data, 5, 2**32 - 1)
    with pytest.raises(ValueError, match=r"^--seed must be less than 2\^32 .*, got 4294967296$"):
        RULES[rule](data, 5, 2**32)
    with pytest.raises(ValueError, match=r"^--labels: "):
        RULES[rule](data, 0, 1)
    assert len(RULES["balanced"](data, 5, 2**32)) == 5
