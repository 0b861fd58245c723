"""Runs and their data: a run resumes only with the data it was started with, on every rank."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from engine import run
from engine.config.presets import preset
from engine.errors import RankError, UserError
from engine.runs import identity
from engine.runs.setup import setup_run, write_run_files
from pipelines.data.cache import DataSet


@pytest.fixture
def data():
    """Eight training images in two classes, six of them labeled, and four test images."""
    levels = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    labels = np.array([0, 1, 0, 1, 0, 1, -1, -1])
    return DataSet("made", ("cat", "dog"), levels[:8], labels, levels[8:], np.array([0, 1, 0, 1]))


def settings(method="remixmatch", split="all", labels=4):
    small = dict(batch=4, k=1, width=16, blocks=1, scales=2, max_shift=1, dataset="folder")
    return dataclasses.replace(
        preset("folder"), method=method, split=split, labels=labels, network="wide-resnet", **small
    )


def swapped(labels):
    """Return labels with the two classes swapped."""
    return np.where(labels < 0, labels, 1 - labels)


def changed(data, name, index, value):
    values = getattr(data, name).copy()
    values[index] = value
    return dataclasses.replace(data, **{name: values})


DIFFERENCES = {
    "labels": lambda data: dataclasses.replace(data, train_labels=swapped(data.train_labels)),
    "classes or their order": lambda data: dataclasses.replace(data, classes=("dog", "cat")),
    "labeled images": lambda data: changed(data, "train_images", 2, 99),
    "unlabeled images": lambda data: changed(data, "train_images", 7, 99),
    "unlabeled images (8 -> 7)": lambda data: dataclasses.replace(
        data, train_images=data.train_images[:7], train_labels=data.train_labels[:7]
    ),
    "unlabeled images (8 -> 2)": lambda data: dataclasses.replace(data, unlabeled=np.array([6, 7])),
    "test images": lambda data: changed(data, "test_images", 0, 99),
    "test labels": lambda data: changed(data, "test_labels", 0, 1),
    "test images (4 -> 3)": lambda data: dataclasses.replace(
        data, test_images=data.test_images[:3], test_labels=data.test_labels[:3]
    ),
    "which images are labeled": lambda data: changed(data, "train_labels", 6, 0),
    "size of the images": lambda data: dataclasses.replace(
        data, train_images=data.train_images[:, :6, :6], test_images=data.test_images[:, :6, :6]
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_run_does_not_resume_with_other_data(data, tmp_path, difference):
    write_run_files(setup_run(settings(), tmp_path / "run", data=data))
    written = (tmp_path / "run/split.json").read_bytes()
    setup_run(settings(), tmp_path / "run", resume=True, data=data)
    with pytest.raises(UserError, match="run was started with different data; these differ: ") as error:
        setup_run(settings(), tmp_path / "run", resume=True, data=DIFFERENCES[difference](data))
    named = str(error.value).split("differ: ")[1].split("; restore")[0].split(", ")
    assert difference in named and "\n" not in str(error.value)
    if difference in ("labels", "test labels", "test images", "unlabeled images", "labeled images"):
        assert named == [difference]
    if difference == "classes or their order":
        assert named == [difference, "labels"]
    assert (tmp_path / "run/split.json").read_bytes() == written


def test_hidden_labels_matter_where_they_are_evaluated(data, tmp_path):
    """With four of six labels in use, the other two measure pseudo-labels; a supervised run has none."""
    for method, matter in (("remixmatch", True), ("supervised", False)):
        folder = tmp_path / method
        setup = setup_run(settings(method, "balanced"), folder, data=data)
        write_run_files(setup)
        hidden = np.setdiff1d(np.arange(6), setup.split)
        other = changed(data, "train_labels", hidden, 1 - data.train_labels[hidden])
        assert len(hidden) == 2
        # The rule must choose the same images, so that only the hidden labels differ.
        again = dataclasses.replace(setup, data=other)
        before = json.loads((folder / "split.json").read_text())
        now = identity.describe(setup.config, other, again.split, before)
        assert identity.differences(before, now) == (["hidden labels"] if matter else [])


def test_another_size_of_the_images_is_the_cause_of_other_settings(data, tmp_path):
    """The largest shift is an eighth of the size unless it is given."""
    config = dataclasses.replace(settings(), max_shift=-1)
    write_run_files(setup_run(config, tmp_path, data=data))
    larger = {name: getattr(data, name).repeat(3, 1).repeat(3, 2) for name in ("train_images", "test_images")}
    words = r"these differ: size of the images; restore them \(8x8 pixels; now 24x24\), or start a new run"
    with pytest.raises(UserError, match=words):
        setup_run(config, tmp_path, resume=True, data=dataclasses.replace(data, **larger))
    with pytest.raises(UserError, match="started with another configuration: seed"):
        setup_run(dataclasses.replace(config, seed=9), tmp_path, resume=True, data=data)


def test_an_unlabeled_image_more_changes_no_label(data, tmp_path):
    write_run_files(setup_run(settings(), tmp_path, data=data))
    more = dataclasses.replace(
        data,
        train_images=np.concatenate([data.train_images, data.train_images[:1] + 50]),
        train_labels=np.append(data.train_labels, -1),
    )
    with pytest.raises(UserError, match=r"these differ: unlabeled images \(8 -> 9\); restore"):
        setup_run(settings(), tmp_path, resume=True, data=more)


def test_equally_many_other_unlabeled_images_are_noticed(data, tmp_path):
    write_run_files(setup_run(settings(), tmp_path, data=dataclasses.replace(data, unlabeled=np.arange(2, 8))))
    with pytest.raises(UserError, match="these differ: unlabeled images; restore"):
        setup_run(settings(), tmp_path, resume=True, data=dataclasses.replace(data, unlabeled=np.arange(6)))


def test_the_digest_of_other_labeled_images_is_not_kept(data, tmp_path):
    config = setup_run(settings(), data=data).config
    before = identity.describe(config, data, np.array([0, 1]), {})
    now = identity.describe(config, data, np.array([2, 3]), before)
    assert now["images_sha256"] == hashlib.sha256(data.train_images[2:4].tobytes()).hexdigest()


def test_images_that_a_supervised_run_does_not_use_may_change(data, tmp_path):
    write_run_files(setup_run(settings("supervised"), tmp_path, data=data))
    setup_run(settings("supervised"), tmp_path, resume=True, data=changed(data, "train_images", 7, 99))
    with pytest.raises(UserError, match="these differ: labeled images; restore"):
        setup_run(settings("supervised"), tmp_path, resume=True, data=changed(data, "train_images", 0, 99))


@pytest.mark.parametrize("kept", [("images_sha256",), ("images_sha256", "class_names", "classes", "sides", "sha256")])
def test_runs_of_earlier_versions_resume(data, tmp_path, kept):
    write_run_files(setup_run(settings(), tmp_path, data=data))
    path = tmp_path / "split.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in kept}))
    setup_run(settings(), tmp_path, resume=True, data=data)
    setup_run(settings(), tmp_path, resume=True, data=DIFFERENCES["test images"](data))
    with pytest.raises(UserError, match="differ: labeled images"):
        setup_run(settings(), tmp_path, resume=True, data=DIFFERENCES["labeled images"](data))
    if "classes" in kept:
        with pytest.raises(UserError, match="differ: labels;"):
            setup_run(settings(), tmp_path, resume=True, data=DIFFERENCES["labels"](data))


@pytest.mark.parametrize("part", [None, 3, [], {"test images": 3, "test labels": None, "unlabeled images": []}])
def test_damaged_parts_of_a_split_are_not_compared(data, tmp_path, part):
    write_run_files(setup_run(settings(), tmp_path, data=data))
    path = tmp_path / "split.json"
    content = json.loads(path.read_text()) | {"data": part}
    del content["checksum"]
    path.write_text(json.dumps(content))
    assert setup_run(settings(), tmp_path, resume=True, data=data).resumed


def test_a_flipped_bit_is_no_other_data(data, tmp_path, caplog):
    """Whichever bit of split.json flips, the run resumes, the file is restored, and a warning says so."""
    write_run_files(setup_run(settings(), tmp_path, data=data))
    path = tmp_path / "split.json"
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 29):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        caplog.clear()
        write_run_files(setup_run(settings(), tmp_path, resume=True, data=data))
        assert path.read_bytes() == whole
        # Without its key, the checksum is unknown, as in a run of an earlier version; all other content is intact.
        in_key = 0 <= place - whole.index(b"checksum") < len(b"checksum")
        assert in_key or "split.json is missing or damaged" in caplog.text


def test_fingerprints_are_sha256_digests_of_plain_arrays(data):
    found = identity.fingerprint(data)
    content = hashlib.sha256(data.test_images.tobytes()).hexdigest()
    assert found["test images"] == {"count": 4, "sha256": content}
    labels = b"".join(int(label).to_bytes(8, "little", signed=True) for label in [0, 1, 0, 1, 0, 1, -1, -1])
    assert found["training labels"] == {"count": 8, "sha256": hashlib.sha256(labels).hexdigest()}


def test_resuming_reads_no_images_of_a_prepared_data_set(data, tmp_path, monkeypatch):
    stored = dataclasses.replace(data, digests={"train_images": "a" * 64, "test_images": "b" * 64})
    write_run_files(setup_run(settings(), tmp_path, data=stored))

    def refuse(*arguments):
        raise AssertionError("images were read")

    monkeypatch.setattr(identity, "image_digest", refuse)
    assert setup_run(settings(), tmp_path, resume=True, data=stored).resumed
    other = dataclasses.replace(stored, digests=stored.digests | {"test_images": "c" * 64})
    with pytest.raises(UserError, match="differ: test images;"):
        setup_run(settings(), tmp_path, resume=True, data=other)


@pytest.mark.parametrize("difference", ["labels", "classes or their order", "test images", "unlabeled images (8 -> 7)"])
def test_a_rank_with_other_data_raises(data, tmp_path, monkeypatch, difference):
    """This process is another rank: it receives the setup of rank 0 and opens its own data."""
    first = setup_run(settings(), tmp_path, data=data)
    sent = identity.fingerprint(data), first.config, first.split, first.folder, first.resumed
    monkeypatch.setattr(run.collectives, "run_on_rank_0", lambda function: sent)
    monkeypatch.setattr(run.collectives, "rank", lambda: 1)
    monkeypatch.setattr(run, "open_data", lambda name, begun: data)
    assert run.share(lambda: first).split.tolist() == first.split.tolist()
    monkeypatch.setattr(run, "open_data", lambda name, begun: DIFFERENCES[difference](data))
    with pytest.raises(RankError, match="rank 1 has other data of folder than rank 0; these differ: "):
        run.share(lambda: first)
