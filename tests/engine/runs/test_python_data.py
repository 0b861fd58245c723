"""Data sets given in Python: arrays, torchvision's and Hugging Face's style, and runs on them."""

import io
import os
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import FakeData

from engine import api
from engine.commands.main import main
from engine.errors import UserError
from engine.runs.python_data import python_data_set
from pipelines.data.folder import open_folder, prepare
from tests.pages import ROOT, blocks

SMALL = dict(steps=2, batch=4, k=1, width=16, blocks=1, lag=3, eval_every=2, device="cpu", log="none")


def images(count, side=8, first=0):
    """Return images of one gray level each, first, first + 1, ..., as (count, side, side, 3) uint8."""
    return np.arange(first, first + count, dtype=np.uint8)[:, None, None, None] * np.ones((side, side, 3), np.uint8)


def levels(array):
    """Return the gray levels of images."""
    assert (array == array[:, :1, :1, :1]).all()
    return array[:, 0, 0, 0].tolist()


def arrays():
    return {
        "train_images": images(6), "train_labels": [0, 1, None, 1, -1, 0],
        "test_images": images(2, first=50), "test_labels": [1, 0],
    }  # fmt: skip


class Rows:
    """Data set of mappings that names its classes in its features, as those of Hugging Face do."""

    def __init__(self, rows, label="label", names=None):
        self.rows, self.features = rows, {"image": None, label: SimpleNamespace(names=names)}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def rows(labels, label="label", image="img", first=0, names=None):
    pictures = map(Image.fromarray, images(len(labels), first=first))
    return Rows([{image: picture, label: c} for picture, c in zip(pictures, labels, strict=True)], label, names)


@dataclass
class Arrays:
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple


def pairs(labels, first=0):
    return [(Image.fromarray(image), c) for image, c in zip(images(len(labels), first=first), labels, strict=True)]


LABELS = [0, 1, -1, 1, -1, 0]
FORMS = {
    "mapping": arrays(),
    "object": Arrays(images(6), np.array(LABELS), images(2, first=50), np.array([1, 0]), ("0", "1")),
    "floating-point labels with NaN": arrays() | {"train_labels": np.array([0, 1, np.nan, 1, np.nan, 0])},
    "tensors": {
        "train_images": torch.from_numpy(images(6)).movedim(-1, 1), "train_labels": torch.tensor(LABELS),
        "test_images": torch.from_numpy(images(2, first=50)).movedim(-1, 1), "test_labels": torch.tensor([1, 0]),
    },
    "tuples of arrays": ((images(6), LABELS), (images(2, first=50), [1, 0])),
    "gray arrays": ((images(6)[..., 0], LABELS), (images(2, first=50)[..., 0], [1, 0])),
    "lists of pairs": (pairs(LABELS), pairs([1, 0], 50)),
    "iterators": (iter(pairs(LABELS)), iter(pairs([1, 0], 50))),
    "scalar labels": (pairs([np.int64(c) for c in LABELS]), pairs([torch.tensor(1), torch.tensor(0)], 50)),
    "mappings": (rows(LABELS), rows([1, 0], first=50)),
    "fine_label": (rows([0, 1, None, 1, None, 0], "fine_label", "image"), rows([1, 0], "labels", first=50)),
    "named splits": {"train": rows(LABELS), "test": rows([1, 0], first=50)},
    "labels as pandas writes them": (pairs([0.0, 1.0, "-1.0", 1.0, "-1", 0.0]), pairs([1.0, 0.0], 50)),
    "classes as floating-point numbers": arrays() | {"classes": np.array([0.0, 1.0], np.float32)},
    "names as labels": (pairs(["0", "1", "?", "1", "", "0"]), pairs(["1", "0"], 50)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_makes_the_same_data_set(form):
    data = python_data_set(FORMS[form])
    assert levels(data.train_images) == [0, 1, 2, 3, 4, 5] and data.train_labels.tolist() == LABELS
    assert levels(data.test_images) == [50, 51] and data.test_labels.tolist() == [1, 0]
    assert data.classes == ("0", "1") and data.sides == (8, 8) and data.held_out == 0
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == data.test_labels.dtype == np.int64


def test_unlabeled_images_follow_the_training_images():
    data = python_data_set(
        {"train": rows([0, 1]), "unlabeled": rows([7, "x"], first=20), "test": rows([1, 0], first=50)}
    )
    assert levels(data.train_images) == [0, 1, 20, 21] and data.train_labels.tolist() == [0, 1, -1, -1]


def test_class_names_come_with_the_data():
    assert python_data_set((rows(LABELS, names=["cat", "dog"]), rows([1, 0]))).classes == ("cat", "dog")
    assert python_data_set(arrays() | {"classes": ["cat", "dog"]}).classes == ("cat", "dog")
    named = python_data_set((pairs(["b", "a", None]), pairs(["b"])))
    assert named.classes == ("a", "b") and named.train_labels.tolist() == [1, 0, -1]
    given = python_data_set(
        arrays() | {"train_labels": list("yxxyxy"), "test_labels": ["x", "y"], "classes": ["y", "x"]}
    )
    assert given.classes == ("y", "x") and given.train_labels.tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "classes",
    [
        {"dog": 1, "cat": 0},
        {1: "dog", 0: "cat"},
        {"1": "dog", "0": "cat"},
        {"dog": np.int64(1), "cat": 0.0},
        {"cat": 0, "dog": 1}.keys(),
        np.array(["cat", "dog"]),
    ],
)
def test_classes_in_any_form(classes):
    data = python_data_set(arrays() | {"classes": classes})
    assert data.classes == ("cat", "dog") and data.train_labels.tolist() == LABELS


def test_a_mapping_of_numbers_to_numbers_names_the_classes():
    assert python_data_set(arrays() | {"classes": {0: 7, 1: 3}}).classes == ("7", "3")
    assert python_data_set(arrays() | {"classes": {"7": 1, "3": 0}}).classes == ("3", "7")


def test_each_part_numbers_its_own_classes():
    """Three classes; the test part lacks one and has another order."""
    train = rows([0, 1, 2, 0, 2, 1], names=["cat", "cow", "dog"])
    data = python_data_set((train, rows([1, 0, 0], names=["dog", "cat"])))
    assert data.classes == ("cat", "cow", "dog")
    assert data.train_labels.tolist() == [0, 1, 2, 0, 2, 1] and data.test_labels.tolist() == [0, 2, 2]
    assert python_data_set((train, rows([2, 0]))).test_labels.tolist() == [2, 0], "the names of the training part"
    unnamed = python_data_set((rows([0, 1, 2]), rows([1], names=["cat", "cow", "dog"])))
    assert unnamed.classes == ("cat", "cow", "dog") and unnamed.test_labels.tolist() == [1]
    more = python_data_set((train, rows([1], names=["bee", "cow"])))
    assert more.test_labels.tolist() == [1], "a test class without images does not matter"
    with pytest.raises(UserError, match=r"labels of the part 'test' are none of the 3 training classes: bee$"):
        python_data_set((train, rows([1, 0], names=["bee", "cow"])))


def test_joined_data_sets_keep_the_names_that_they_share():
    cats, pets = rows([0, 0], names=["cat", "dog"]), rows([1, 1], names=["cat", "dog"])
    assert python_data_set(ConcatDataset([cats, Subset(pets, [0, 1])])).classes == ("cat", "dog")
    assert python_data_set(ConcatDataset([cats, rows([1, 1], names=["cat", "cow"])])).classes == ("0", "1")


def test_an_empty_test_part_is_no_test_part():
    expected = python_data_set({"train_images": images(6), "train_labels": LABELS})
    empty = {"test_images": images(0), "test_labels": np.array([], int)}
    for data in (
        {"train_images": images(6), "train_labels": LABELS} | empty,
        {"train_images": images(6), "train_labels": LABELS} | empty | {"test_labels": None},
        {"train": pairs(LABELS), "test": []},
        (pairs(LABELS), iter([])),
    ):
        made = python_data_set(data)
        assert made.held_out == 2 and made.test_labels.tolist() == [0, 1]
        np.testing.assert_array_equal(made.test_images, expected.test_images)
        np.testing.assert_array_equal(made.train_images, expected.train_images)


def test_unlabeled_images_need_no_label():
    tensors = torch.from_numpy(images(2, first=20)).movedim(-1, 1)
    for given in (
        images(2, first=20),
        list(images(2, first=20)),
        images(2, first=20)[..., 0],
        tensors,
        TensorDataset(tensors),
        (images(2, first=20), None),
        [image for image, _ in pairs([0, 0], 20)],
        tuple(image for image, _ in pairs([0, 0], 20)),
        (image for image in images(2, first=20)),
        [{"image": image} for image in images(2, first=20)],
    ):
        data = python_data_set({"train": pairs([0, 1]), "unlabeled": given, "test": pairs([1, 0])})
        assert levels(data.train_images) == [0, 1, 20, 21] and data.train_labels.tolist() == [0, 1, -1, -1]


def test_paths_in_arrays(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, image in zip(paths, images(6), strict=True):
        Image.fromarray(image).save(path)
    for given in (np.array(list(map(str, paths))), np.array(paths), [np.array(str(path)) for path in paths]):
        data = python_data_set(arrays() | {"train_images": given})
        assert levels(data.train_images) == [0, 1, 2, 3, 4, 5]


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    Image.fromarray(images(1, 40)[0]).save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "pipe.png")
    for second, reason in (
        ("pipe.png", r"cannot be read as an image \(a pipe, socket or device instead of a file\)"),
        ("missing.png", "no such file"),
    ):
        given = {"train_images": [tmp_path / "0.png", tmp_path / second], "train_labels": [0, 1]}
        with pytest.raises(UserError, match=f"^data: train image 1:? {reason}$"):
            python_data_set(given)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(UserError, match=r"train image 0 cannot be read as an image \(more than 1400 pixels"):
        python_data_set([(tmp_path / "0.png", 0), (tmp_path / "0.png", 1)])


def test_torchvision_data_sets_and_their_subsets():
    fake = FakeData(30, (3, 16, 16), num_classes=3)
    data = python_data_set((fake, Subset(fake, range(5))))
    assert data.classes == ("0", "1", "2") and data.sides == (16, 16)
    assert data.train_labels.tolist() == [int(label) for _, label in fake]
    np.testing.assert_array_equal(data.train_images[7], np.asarray(fake[7][0]))
    np.testing.assert_array_equal(data.test_images, data.train_images[:5])
    fake.classes = [("tench", "Tinca tinca"), "cat", "dog"]
    assert python_data_set((Subset(fake, range(9)), None)).classes == ("tench", "cat", "dog")


def test_a_fifth_is_held_out_as_in_a_folder():
    labels = [0] * 10 + [1] * 5 + [-1] * 10
    data = python_data_set((images(25), labels))
    assert data.held_out == 3 and data.test_labels.tolist() == [0, 0, 1]
    assert sorted(levels(data.train_images) + levels(data.test_images)) == list(range(25))
    assert data.train_labels.tolist() == [0] * 8 + [1] * 4 + [-1] * 10


def test_images_of_other_sizes_are_read_like_files(tmp_path, monkeypatch):
    """The same pictures as files and in Python: gray, RGBA, 16 bits, a palette, not square, with an orientation."""
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotated by 90 degrees.
    pictures = [
        Image.fromarray(rng.integers(256, size=(12, 20, 3), dtype=np.uint8)),
        Image.fromarray(rng.integers(256, size=(20, 12), dtype=np.uint8)),
        Image.fromarray(rng.integers(256, size=(12, 13, 4), dtype=np.uint8)),
        Image.fromarray(rng.integers(2**16, size=(31, 40), dtype=np.uint16)),
        Image.fromarray(rng.integers(256, size=(9, 9, 3), dtype=np.uint8)).quantize(16),
        Image.fromarray(rng.integers(256, size=(12, 15, 3), dtype=np.uint8)),
    ]
    for number, picture in enumerate(pictures):
        for part in ("train", "test"):
            path = tmp_path / f"pets/{part}/{number % 2}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, exif=exif if number == 5 else b"")
    prepare(tmp_path / "pets", 12)
    expected = open_folder(tmp_path / "pets").train_images  # By class: 0, 2, 4, 1, 3, 5.
    paths = [tmp_path / f"pets/train/{number % 2}/{number}.png" for number in range(6)]
    opened = [Image.open(path) for path in paths]
    contents = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    arrays = [np.asarray(picture) for picture in pictures[:3]]
    for given in (paths, opened, contents):
        examples = list(zip(given, [0, 1] * 3, strict=True))
        data = python_data_set((examples, examples))
        assert data.sides == (12, 12), "the most common shorter side"
        np.testing.assert_array_equal(data.train_images[[0, 2, 4, 1, 3, 5]], expected)
        np.testing.assert_array_equal(data.test_images, data.train_images)
    both = python_data_set((list(zip(arrays, [0, 1, 0], strict=True)), pairs([0, 1])))
    np.testing.assert_array_equal(both.train_images[[0, 2, 1]], expected[[0, 1, 3]])
    assert python_data_set((images(6, 40), LABELS), 16).sides == (16, 16)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, r"data must be a folder; .* the part 'train' is of type int$"),
        ({"train_images": images(2), "labels": [0, 1]}, "data has unknown keys labels; allowed are train_images,"),
        ({"train": rows([0, 1]), "validation": rows([0, 1])}, "unknown keys validation; allowed are train, unlabeled"),
        ({"test": rows([0, 1])}, "data has no part 'train'"),
        ({"train_images": images(2)}, "the part 'train' has 2 images, but no labels; -1 stands for unknown"),
        ((images(3), [0, 1]), "the part 'train' has 3 images, but 2 labels"),
        ([(images(1)[0], 0, 1)], r"train example 0 must be \(image, label\) or a mapping, got tuple"),
        (Rows([{"pixels": 1, "label": 0}]), "train example 0 has the keys pixels, label; it needs one of image,"),
        (pairs([0, -2]), "label -2 of train image 1 must be a number from 0, a name, or -1 or None for unknown"),
        (pairs([0, 0.5]), "label 0.5 of train image 1 must be a number"),
        (pairs([0, [0, 1]]), r"label \[0, 1\] of train image 1 must be a number"),
        (pairs([0, "dog"]), "labels must be all numbers or all names"),
        (pairs([None, -1]), "no training image has a label"),
        (pairs([0, 0]), "there must be at least two classes with different names, got 0"),
        (pairs([0, 1]), "no test images, and no class has two labeled images to hold one out"),
        ((pairs([0, 1]), pairs([1, 2])), "labels of the part 'test' are none of the 2 training classes: 2$"),
        ((pairs([0, 1]), pairs([1, -1])), "test image 1 has no label"),
        (pairs([1, 2]), "classes without labeled training images: 0; number the classes from 0 without gaps"),
        (pairs([0, 1, 255, 3]), "classes without labeled training images: 2, 4 to 254; number"),
        (pairs([0, 1, 2**40]), "classes without labeled training images: 2 to 1099511627775; number"),
        (pairs([0, 2**70]), "classes without labeled training images: 1 to 1180591620717411303423; number"),
        (arrays() | {"classes": ["cat", "dog", "unseen"]}, "labeled training images: unseen; add some, or leave out"),
        (rows([0, 1], names=["a", "b", "c"]), "classes without labeled training images: c; add some"),
        ((rows([0, 1], names=["a", "b"]), rows([2], names=["b", "a"])), "label 2 of the part 'test' is none of the 2"),
        ((pairs("ab"), pairs("acbd")), "labels of the part 'test' are none of the 2 training classes: c, d$"),
        (arrays() | {"classes": {"cat", "dog"}}, "classes must be names in order, or a mapping .*, got set$"),
        (arrays() | {"classes": "cat dog"}, "classes must be names in order, or a mapping .*, got str$"),
        (arrays() | {"classes": 2}, "classes must be names in order, or a mapping .*, got int$"),
        (arrays() | {"classes": {"cat": 1, "dog": 2}}, "classes must map names to the numbers 0 to 1, or these"),
        (arrays() | {"classes": {"cat": 0, "dog": 0}}, "classes must map names to the numbers 0 to 1, or these"),
        (arrays() | {"classes": {0: 1, 1: 2, 2: 0}}, "classes must map names to the numbers 0 to 2, or these"),
        (rows([0, 1], names={"a", "b"}), "the names of the labels must be names in order, .*, got set$"),
        ((pairs([0])[0], pairs([1])[0]), r"'train' is a single \(image, label\); a tuple of two is \(train, test\) or"),
        (((images(1)[0], 0), (images(1)[0], 1)), r"'train' is a single \(image, label\); a tuple of two is"),
        ((images(1)[0], np.int64(0)), r"'train' is a single \(image, label\); a tuple of two is"),
        ((images(4), images(2)), r"train example 0 must be \(image, label\) or a mapping, got ndarray"),
        (["ab", "cd"], r"train example 0 must be \(image, label\) or a mapping, got str"),
        ({"train_images": "pets", "train_labels": [0, 1, 0, 1]}, "the array of train images is of type str$"),
        ({"train_images": np.array("pets"), "train_labels": [0, 1]}, "the array of train images is of type ndarray$"),
        (arrays() | {"test_images": None}, "the array of test images is of type NoneType$"),
        (arrays() | {"classes": np.array("cat")}, "classes must be names in order, or a mapping .*, got ndarray$"),
        ([(Image.new("RGB", (0, 9)), 0)], r"data: train image 0: images have no pixels, got \(0, 9\)$"),
        ({"train_images": images(2), "train_labels": 3}, "the array of train labels is of type int$"),
        (arrays() | {"classes": ["cat"]}, "at least two classes with different names, got cat"),
        (arrays() | {"classes": ["cat", "cat"]}, "at least two classes with different names, got cat, cat"),
        (arrays() | {"train_images": images(6) / 255.0}, "train image 0: images must be uint8, .* got float64"),
        ([(images(4), torch.tensor([0, 1, 0, 1]))], "train image 0 must be a single image, got 4; give the data set"),
        ([], "the part 'train' has no images"),
        ([(b"nothing", 0)], r"data: train image 0 cannot be read as an image \(unknown image format\)"),
        ((images(4, 6), [0, 1, 0, 1]), "most common side of the images must be from 8 to 1024 pixels, got 6"),
    ],
)  # fmt: skip
def test_invalid_data_raise_a_one_line_error(data, words):
    with pytest.raises(UserError, match=words) as error:
        python_data_set(data)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def given():
    """Striped images in two classes, 12 of 16 labeled, and four test images, in torchvision's style."""
    rng = np.random.default_rng(0)
    made = np.repeat(rng.integers(256, size=(20, 8, 1, 3), dtype=np.uint8), 8, axis=2)
    made[1::2] = made[1::2].swapaxes(1, 2)
    examples = [(Image.fromarray(image), number % 2 if number < 12 else -1) for number, image in enumerate(made[:16])]
    return examples, [(Image.fromarray(image), number % 2) for number, image in enumerate(made[16:])]


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    return api.train("folder", data=given, out=tmp_path_factory.mktemp("runs") / "run", **SMALL)


def test_a_run_on_data_given_in_python_predicts(given, finished):
    model = api.load(finished.folder)
    assert model.classes == ("0", "1") and model.side == 8 and finished.summary["labels"] == 12
    predicted = model.predict([image for image, _ in given[1]])
    right = 100 * np.mean(predicted.argmax(1) == [0, 1, 0, 1])
    assert right == finished.summary["test_accuracy"]


def test_a_run_on_data_given_in_python_resumes_with_the_same_data(given, finished):
    swapped = [(image, 1 - label if label >= 0 else label) for image, label in given[0]]
    with pytest.raises(UserError, match="started with different data; these differ: labels;"):
        api.train("folder", data=(swapped, given[1]), out=finished.folder, resume=True, **SMALL)
    with pytest.raises(UserError, match=r"these differ: test images \(4 -> 3\), test labels \(4 -> 3\);"):
        api.train("folder", data=(given[0], given[1][:3]), out=finished.folder, resume=True, **SMALL)
    more = api.train("folder", data=given, out=finished.folder, resume=True, **SMALL | {"steps": 3})
    assert more.summary["steps"] == 3


@pytest.mark.parametrize("command", [["eval"], ["train", "folder", "--resume", "--out"]])
def test_commands_say_that_the_data_were_given_in_python(finished, capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command, str(finished.folder)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 1
    assert "this run's data were given in Python: continue it there with train(..., data=..., resume=True)" in error


def test_folders_may_be_given_as_before(tmp_path, monkeypatch):
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    with pytest.raises(UserError, match="no is not a folder"):
        api.train("folder", data=tmp_path / "no", out=tmp_path / "run", **SMALL)
    with pytest.raises(UserError, match="size must be from 8 to 1024 pixels, got 4"):
        api.train("folder", data=arrays(), size=4, out=tmp_path / "run", **SMALL)


def test_the_example_in_the_documentation(given, monkeypatch):
    page = (ROOT / "docs/own-images.md").read_text(encoding="utf-8")
    (code,) = [code for language, code in blocks(page) if language == "py"]
    made = []
    monkeypatch.setattr(api, "train", lambda preset, data, out, size=None: made.append(python_data_set(data, size)))
    names = {"train_set": given[0], "test_set": given[1], "images": images(6, 32), "labels": LABELS}
    exec(code, names)
    found = [(len(data.train_images), data.sides, data.held_out) for data in made]
    assert found == [(16, (8, 8), 0), (4, (32, 32), 2), (22, (8, 8), 0)]


def test_contents_of_files_are_measured():
    content = io.BytesIO()
    Image.fromarray(images(1, 24)[0]).save(content, "PNG")
    assert python_data_set(([(content.getvalue(), c) for c in (0, 1, 0)], None)).sides == (24, 24)


IMAGES = {"train_images": np.zeros((12, 8, 8, 3), np.uint8), "train_labels": np.arange(12) % 3}


@pytest.mark.parametrize(
    ("preset", "arguments", "message"),
    [
        ("digits-40", dict(split="all", labels=20), "--split all uses every label; leave out --labels"),
        ("folder", dict(data=IMAGES, labels=6), "--split all uses every label; leave out --labels"),
        ("digits-40", dict(n1=20, labels=40, imbalance=10), "--n1 20 and the ratios set the number of labels"),
        ("folder", dict(data=IMAGES, dataset="digits"), "dataset and data both name the images; leave out one"),
        ("digits-40", dict(ablate="k=4", k=2), "--ablate k=4 sets --k 4; leave out --k 2"),
    ],
)
def test_arguments_that_exclude_each_other(tmp_path, preset, arguments, message):
    with pytest.raises(UserError, match=f"^{message}"):
        api.train(preset, out=tmp_path / "run", steps=1, progress=False, **arguments)
    assert not (tmp_path / "run").exists()
