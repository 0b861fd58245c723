"""Prepared data and the folder on disk: every change of images, labels, classes or parts is noticed."""

import hashlib
import json
import os
import shutil

import pytest
from PIL import Image

from pipelines.data import folder, stamps
from pipelines.data.cache import DataError
from pipelines.data.decode import decode
from pipelines.data.folder import cache_of, open_folder, prepare, scan
from pipelines.data.pixels import content


def put(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, level, level)).save(path)
    os.utime(path, ns=(10**18, 10**18))  # All images have one size and one time.


@pytest.fixture
def sorted_pets(tmp_path, data_dir):
    """Three cats, three dogs, a test image of each and two unlabeled images, in folders."""
    root = tmp_path / "pets"
    for number, kind in enumerate(("cat", "dog")):
        for i in range(3):
            put(root / f"train/{kind}/{kind}{i}.bmp", 10 * number + i)
        put(root / f"test/{kind}/{kind}.bmp", 50 + number)
        put(root / f"unlabeled/{kind}.bmp", 60 + number)
    prepare(root, 8)
    return root


@pytest.fixture
def listed_pets(tmp_path, data_dir):
    """The same images in labels.csv."""
    root = tmp_path / "pets"
    lines = []
    for number, kind in enumerate(("cat", "dog")):
        for i in range(5):
            put(root / f"{kind}{i}.bmp", 10 * number + i)
            lines.append(f"{kind}{i}.bmp,{kind if i < 4 else ''},{'test' if i == 3 else 'train'}\n")
    (root / "labels.csv").write_text("".join(lines))
    prepare(root, 8)
    return root


def edit(root, before, after):
    path = root / "labels.csv"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("cat0.bmp,cat", "cat0.bmp,dog", "cat0.bmp: cat -> dog"),
        ("cat0.bmp,cat", "cat0.bmp,", "cat0.bmp: cat -> unlabeled"),
        ("cat4.bmp,", "cat4.bmp,cat", "cat4.bmp: unlabeled -> cat"),
        ("cat0.bmp,cat,train", "cat0.bmp,cat,test", r"cat0.bmp: cat -> cat \(test\)"),
        ("cat3.bmp,cat,test", "cat3.bmp,cat,", r"cat3.bmp: cat \(test\) -> cat"),
        ("dog3.bmp,dog", "dog3.bmp,cat", r"dog3.bmp: dog \(test\) -> cat \(test\)"),
        (",dog,", ",a dog,", "dog0.bmp: dog -> a dog, dog1.bmp: dog -> a dog"),
        ("cat4.bmp,,train\n", "", "does not list all image files"),
    ],
)
def test_an_edited_table_is_noticed(listed_pets, before, after, words):
    edit(listed_pets, before, after)
    with pytest.raises(DataError, match=words) as error:
        open_folder(listed_pets)
    assert "missing" in str(error.value) or str(error.value).startswith(
        f"{listed_pets} has changed since it was prepared ("
    )
    assert "\n" not in str(error.value)


def test_a_table_with_the_same_content_is_no_change(listed_pets):
    path = listed_pets / "labels.csv"
    path.write_text("file,label,part\n" + "".join(sorted(path.read_text().splitlines(True), reverse=True)) + "\n")
    assert open_folder(listed_pets).train_labels.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]


def test_a_change_of_the_layout_is_noticed(listed_pets):
    """The table goes, and folders come: the same files with the same labels in other parts."""
    (listed_pets / "labels.csv").unlink()
    with pytest.raises(DataError, match="has no labeled images"):
        open_folder(listed_pets)
    for kind in ("cat", "dog"):
        for i in range(4):
            place = listed_pets / "train" / kind
            place.mkdir(parents=True, exist_ok=True)
            (listed_pets / f"{kind}{i}.bmp").rename(place / f"{kind}{i}.bmp")
    with pytest.raises(DataError, match=r"has changed since .*cat0.bmp was removed"):
        open_folder(listed_pets)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda root: (root / "train/cat/cat0.bmp").rename(root / "train/dog/cat0.bmp"),
            "train/cat/cat0.bmp was removed, train/dog/cat0.bmp was added",
        ),
        (
            lambda root: (root / "train/cat/cat0.bmp").rename(root / "test/cat/cat0.bmp"),
            "test/cat/cat0.bmp was added, train/cat/cat0.bmp was removed",
        ),
        (lambda root: (root / "unlabeled/cat.bmp").unlink(), "unlabeled/cat.bmp was removed"),
        (lambda root: put(root / "unlabeled/new.bmp", 70), "unlabeled/new.bmp was added"),
        (lambda root: os.utime(root / "test/dog/dog.bmp"), "test/dog/dog.bmp was modified"),
        (lambda root: (root / "test/dog/dog.bmp").write_bytes(b""), "test/dog/dog.bmp was modified"),
        (
            lambda root: (root / "labels.csv").write_text(
                "".join(f"{path.relative_to(root)},{path.name[:3]}\n" for path in root.rglob("*.bmp"))
            ),
            r"has changed since .*: unlabeled -> cat",
        ),
    ],
)
def test_changed_folders_are_noticed(sorted_pets, harm, words):
    harm(sorted_pets)
    with pytest.raises(DataError, match=words):
        open_folder(sorted_pets)


def swap(root):
    """Exchange two images of one size and one time."""
    one, other = root / "train/cat/cat0.bmp", root / "train/dog/dog0.bmp"
    one.rename(root / "between")
    other.rename(one)
    (root / "between").rename(other)


def test_images_replaced_by_others_of_equal_size_and_time_are_noticed(sorted_pets, monkeypatch):
    assert open_folder(sorted_pets).train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12, 60, 61]
    swap(sorted_pets)
    with pytest.raises(DataError, match=r"\(train/cat/cat0.bmp was modified, train/dog/dog0.bmp was modified\); run"):
        open_folder(sorted_pets)
    decoded = []
    monkeypatch.setattr(folder, "decode", lambda files, *more: decoded.extend(files) or decode(files, *more))
    prepare(sorted_pets, 8)
    assert [path.name for path in decoded] == ["cat0.bmp", "dog0.bmp"]
    assert open_folder(sorted_pets).train_images[:, 0, 0, 0].tolist() == [10, 1, 2, 0, 11, 12, 60, 61]


def test_an_interrupted_preparation_does_not_keep_replaced_images(sorted_pets):
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(sorted_pets, 8, interrupted, again=True)
    swap(sorted_pets)
    prepare(sorted_pets, 8, again=True)
    assert open_folder(sorted_pets).train_images[:, 0, 0, 0].tolist() == [10, 1, 2, 0, 11, 12, 60, 61]


def test_other_permissions_are_no_change_and_the_files_are_read_once(sorted_pets, monkeypatch):
    for path in sorted_pets.rglob("*.bmp"):
        path.chmod(0o600)
    read = []
    monkeypatch.setattr(stamps, "content", lambda path: read.append(path) or content(path))
    monkeypatch.setattr(folder, "decode", None)
    assert len(open_folder(sorted_pets).train_images) == 8 and len(read) == 10
    prepare(sorted_pets, 8)
    assert len(read) == 20
    prepare(sorted_pets, 8)
    assert len(open_folder(sorted_pets).train_images) == 8 and len(read) == 20, "the new times have been recorded"


def test_runs_on_links_and_labels_as_the_first_version_read_them_can_go_on(listed_pets, monkeypatch):
    """Links to listed images were images of their own, and 1.0 a class."""
    table = listed_pets / "labels.csv"
    (listed_pets / "again.bmp").symlink_to("cat0.bmp")
    table.write_text(table.read_text().replace("cat,", "0.0,").replace("dog,", "1.0,") + "again.bmp,1.0,\n")
    with pytest.raises(DataError, match="under two labels"):
        prepare(listed_pets, 8)
    with monkeypatch.context() as earlier:
        earlier.setattr(folder, "scan", lambda root, rules=1: scan(root, 1))
        earlier.setattr(folder, "RULES", 1)
        prepare(listed_pets, 8)
    data = open_folder(listed_pets, earlier_rules=True)
    assert data.classes == ("0.0", "1.0") and data.train_images[0, 0, 0, 0] == 0 and data.train_labels[0] == 1


def test_a_link_to_another_file_of_equal_size_and_time_is_noticed(sorted_pets, tmp_path):
    link = sorted_pets / "unlabeled/link.bmp"
    for number in range(2):
        put(tmp_path / f"elsewhere/{number}.bmp", 80 + number)
    link.symlink_to(tmp_path / "elsewhere/0.bmp")
    prepare(sorted_pets, 8)
    assert open_folder(sorted_pets).train_images[-1].max() == 80
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere/1.bmp")
    with pytest.raises(DataError, match=r"unlabeled/link.bmp was modified"):
        open_folder(sorted_pets)
    prepare(sorted_pets, 8)
    assert open_folder(sorted_pets).train_images[-1].max() == 81


def test_a_linked_folder_with_another_target_is_noticed(sorted_pets, tmp_path):
    linked = sorted_pets / "train/cow"
    for number in range(2):
        put(tmp_path / f"herd {number}/cow.bmp", 90 + number)
    linked.symlink_to(tmp_path / "herd 0")
    prepare(sorted_pets, 8)
    linked.unlink()
    linked.symlink_to(tmp_path / "herd 1")
    with pytest.raises(DataError, match=r"train/cow/cow.bmp was modified"):
        open_folder(sorted_pets)


def test_a_folder_behind_a_link_and_a_copied_folder_are_the_same(sorted_pets, tmp_path):
    """Neither another name for the folder nor a copy in its place with the files' times is a change."""
    (tmp_path / "link").symlink_to(sorted_pets)
    assert len(open_folder(tmp_path / "link").train_images) == 8
    shutil.copytree(sorted_pets, tmp_path / "copy")
    shutil.rmtree(sorted_pets)
    (tmp_path / "copy").rename(sorted_pets)
    assert len(open_folder(sorted_pets).train_images) == 8


def test_other_rules_require_another_preparation(sorted_pets, monkeypatch):
    monkeypatch.setattr(folder, "RULES", folder.RULES + 1)
    words = r"was prepared by another version of the engine, which reads some images differently; run: .* --size 8$"
    with pytest.raises(DataError, match=words):
        open_folder(sorted_pets)
    assert len(open_folder(sorted_pets, earlier_rules=True).train_images) == 8
    prepare(sorted_pets, 8)
    assert len(open_folder(sorted_pets).train_images) == 8


def as_first_version(root):
    """Rewrite the description of a cache as the first version of the engine wrote it."""
    path = cache_of(root) / "cache.json"
    description = json.loads(path.read_text())
    source = description["source"]
    listing = source.pop("listing")
    del source["rules"]
    del source["contents"]
    content = ["remixmatch-cache-1", source["size"], "cpu", source["stamps"], listing]
    source["key"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path.write_text(json.dumps(description))


def test_caches_of_the_first_version_serve_existing_runs_and_notice_changes(listed_pets):
    as_first_version(listed_pets)
    with pytest.raises(DataError, match="was prepared by another version of the engine"):
        open_folder(listed_pets)
    assert open_folder(listed_pets, earlier_rules=True).train_labels.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    edit(listed_pets, "cat0.bmp,cat", "cat0.bmp,dog")
    with pytest.raises(DataError, match=r"has changed since it was prepared \(labels or parts of its images\); run: "):
        open_folder(listed_pets, earlier_rules=True)
    os.utime(listed_pets / "cat1.bmp")
    with pytest.raises(DataError, match=r"\(cat1.bmp was modified\)"):
        open_folder(listed_pets, earlier_rules=True)


def test_preparing_again_decodes_only_files_that_have_changed(listed_pets, monkeypatch):
    decoded = []

    def counting(files, *arguments):
        decoded.extend(path.name for path in files)
        return original(files, *arguments)

    original = folder.decode
    monkeypatch.setattr(folder, "decode", counting)
    edit(listed_pets, "cat4.bmp,", "cat4.bmp,dog")
    edit(listed_pets, "cat0.bmp,cat,train", "cat0.bmp,cat,test")
    (listed_pets / "dog4.bmp").write_bytes(b"nothing")
    assert prepare(listed_pets, 8).unreadable == (("dog4.bmp", "unknown image format"),)
    assert decoded == ["dog4.bmp"]
    put(listed_pets / "dog1.bmp", 200)
    os.utime(listed_pets / "dog1.bmp")
    put(listed_pets / "new.bmp", 201)
    edit(listed_pets, "cat1.bmp,cat", "new.bmp,dog,\ncat1.bmp,dog")
    decoded.clear()
    prepare(listed_pets, 8)
    assert sorted(decoded) == ["dog1.bmp", "dog4.bmp", "new.bmp"]
    written = (cache_of(listed_pets) / "cache.json").read_text()
    assert open_folder(listed_pets).train_images[:, 0, 0, 0].tolist() == [1, 2, 4, 10, 200, 12, 201]
    prepare(listed_pets, 8, again=True)
    assert (cache_of(listed_pets) / "cache.json").read_text() == written and len(decoded) == 3 + 11
    prepare(listed_pets, 9)
    assert len(decoded) == 3 + 11 + 11, "of another size"
