"""The digits data set."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.data.datasets import DATASETS, digits


def test_digits_contain_all_of_scikit_learns_images():
    data = digits()
    assert data.train_images.shape == (1437, 16, 16, 3) and data.test_images.shape == (360, 16, 16, 3)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(data.test_labels), [36] * 10)
    np.testing.assert_array_equal(
        np.bincount(np.concatenate([data.train_labels, data.test_labels])), np.bincount(load_digits().target)
    )
    assert data.train_images.min() == 0 and data.train_images.max() == 255
    assert DATASETS["digits"]() is data


def test_digits_match_scikit_learn():
    """Compare images and labels as multisets."""
    data, source = digits(), load_digits()
    expected = []
    for image, label in zip(source.images, source.target, strict=True):
        gray = Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
        expected.append((gray.convert("RGB").tobytes(), int(label)))
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert sorted(zip(map(bytes, images), labels.tolist(), strict=True)) == sorted(expected)


def test_no_test_digit_is_a_training_digit():
    data = digits()
    train = {image.tobytes() for image in data.train_images}
    assert sum(image.tobytes() in train for image in data.test_images) == 0
