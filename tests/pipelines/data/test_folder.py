"""Folders of images: listing, preparation and errors."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipelines.data import folder, splits
from pipelines.data.cache import DataError
from pipelines.data.decode import decode
from pipelines.data.folder import open_folder, prepare, scan
from tests.processes import ROOT


def put(root, name, number):
    """Save an image of one color that encodes its number."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (number, 255 - number, 7)).save(path)


@pytest.fixture
def pets(tmp_path, data_dir):
    """Return a folder with three dogs, two cats, four unlabeled images, and a dog and a cat for testing."""
    root = tmp_path / "pets"
    for number in range(3):
        put(root, f"train/dog/{number}.png", number)
    for number in range(3, 5):
        put(root, f"train/cat/nested {number}/x.png", number)
    for number in range(5, 9):
        put(root, f"unlabeled/{number}.png", number)
    put(root, "test/dog/a.png", 9)
    put(root, "test/cat/b.png", 10)
    (root / "train/dog/notes.txt").write_text("not an image")
    put(root, "train/dog/.hidden.png", 99)
    return root


def numbers(images):
    assert (images[..., 0].astype(int) + images[..., 1] == 255).all()
    return images[:, 4, 4, 0].tolist()


def test_labeled_images_come_first_and_classes_are_sorted(pets):
    made = prepare(pets, 8)
    data = open_folder(pets)
    assert data.classes == ("cat", "dog") and data.sides == (8, 8)
    assert numbers(data.train_images) == [3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert data.train_labels.tolist() == [0, 0, 1, 1, 1, -1, -1, -1, -1]
    assert numbers(data.test_images) == [10, 9] and data.test_labels.tolist() == [0, 1]
    assert made.unreadable == () and made.duplicates == () == made.strays and made.listing.held_out == 0


def test_labels_can_be_given_in_a_table(pets, tmp_path):
    lines = ["file,label,part"]
    for path in sorted(pets.rglob("*.png")):
        file = path.relative_to(pets)
        if not path.name.startswith("."):
            label = "" if file.parts[0] == "unlabeled" else file.parts[1]
            lines.append(f"{file},{label},{'test' if file.parts[0] == 'test' else ''}")
    (pets / "labels.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    listing = scan(pets)
    assert listing.classes == ("cat", "dog") and len(listing.test) == 2
    assert sorted(label for _, label in listing.train) == [-1] * 4 + [0] * 2 + [1] * 3
    assert dict(listing.train)["train/dog/1.png"] == 1


def test_a_fifth_of_every_class_is_held_out_without_test_images(tmp_path, data_dir):
    root = tmp_path / "pets"
    for number in range(11):
        put(root, f"train/{'a' if number < 10 else 'b'}/{number:02}.png", number)
    put(root, "train/b/more.png", 11)
    listing = scan(root)
    assert listing.held_out == 3 and [label for _, label in listing.test] == [0, 0, 1]
    assert len(listing.train) == 9 and not {file for file, _ in listing.train} & {file for file, _ in listing.test}
    assert scan(root) == listing, "the choice is fixed"


class Counted(list):
    """List that counts how often its items are read one after another."""

    read = 0

    def __iter__(self):
        for item in super().__iter__():
            self.read += 1
            yield item


def test_holding_out_takes_time_in_proportion_to_the_images():
    known = Counted((f"{number}.png", number % 500) for number in range(1500))
    kept, tested = splits.hold_out(known, 500)
    assert known.read <= 2 * len(known), "not once for every class"
    assert len(kept) == 1000 and sorted(label for _, label in tested) == list(range(500))


def test_the_images_held_out_never_change():
    """The choice of the first version; a run resumes only with the same test images."""
    known = [(f"{number}.png", number % 3) for number in range(30)]
    assert [file for file, _ in splits.hold_out(known, 4)[1]] == [f"{n}.png" for n in (10, 17, 18, 22, 23, 24)]


def test_unreadable_files_are_skipped(pets):
    (pets / "train/dog/1.png").write_bytes(b"nothing")
    (pets / "unlabeled/8.png").write_bytes(b"")
    made = prepare(pets, 8)
    assert dict(made.unreadable).keys() == {"train/dog/1.png", "unlabeled/8.png"}
    data = open_folder(pets)
    assert numbers(data.train_images) == [3, 4, 0, 2, 5, 6, 7]
    assert data.train_labels.tolist() == [0, 0, 1, 1, -1, -1, -1]


def test_images_in_both_training_and_test_are_reported(pets):
    put(pets, "test/dog/again.png", 2)
    assert prepare(pets, 8).duplicates == (("train/dog/2.png", "test/dog/again.png"),)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda root: (root / "train/empty").mkdir(), "class folder .*empty contains no images"),
        (lambda root: put(root, "test/bird/x.png", 1), "has test classes without training images: bird"),
        (lambda root: [path.unlink() for path in root.glob("train/cat/*/*")], "class folder .*cat contains no images"),
        (lambda root: os.rename(root / "train/cat", root / "unlabeled/cat"), "has only one class, dog"),
        (lambda root: os.rename(root / "train", root / "trained"), "has no labeled images"),
        (
            lambda root: (os.rename(root / "train", root / "trained"), (root / "Labels.csv").write_text("")),
            r"or labels\.csv \(rename Labels\.csv to labels\.csv\)",
        ),
        (lambda root: (root / "labels.csv").symlink_to("none"), r"labels\.csv cannot be read \(No such file or"),
        (lambda root: (root / "labels.csv").write_text("a,b,c,d\n"), r"labels\.csv, line 1 names no column 'label'"),
        (lambda root: (root / "labels.csv").write_text("no.png,cat\n"), "line 1: there is no image file 'no.png'"),
        (
            lambda root: (root / "labels.csv").write_text("test/cat/b.png,cat\n"),
            "missing: test/dog/a.png, train/cat/nested 3/x.png, train/cat/nested 4/x.png and 7 more",
        ),
        (lambda root: (root / "labels.csv").write_bytes(b"\xff\xfe\x00"), r"labels\.csv, line 1 is not valid UTF-16"),
    ],
)
def test_invalid_folders_raise_a_one_line_error(pets, harm, words):
    harm(pets)
    with pytest.raises(DataError, match=words) as error:
        scan(pets)
    assert "\n" not in str(error.value)


def test_a_class_without_readable_images_raises(pets):
    for path in [*pets.glob("train/dog/[0-9].png"), pets / "train/cat/nested 3/x.png"]:
        path.write_bytes(b"nothing")
    words = r"no labeled image of class dog in .* can be read: train/dog/0.png \(unknown image format\)$"
    with pytest.raises(DataError, match=words):
        prepare(pets, 8)
    with pytest.raises(DataError, match=r"no prepared data in .*; run: remixmatch data prepare .* --size 96"):
        open_folder(pets)
    with pytest.raises(DataError, match="is not a folder"):
        scan(pets / "no")


def test_a_changed_folder_raises(pets):
    prepare(pets, 8)
    (pets / "unlabeled/8.png").unlink()
    put(pets, "unlabeled/new.png", 20)
    put(pets, "train/dog/0.png", 30)
    with pytest.raises(DataError, match=r"has changed since it was prepared .*; run: .*--size 8$") as error:
        open_folder(pets)
    message = str(error.value)
    assert "train/dog/0.png was modified" in message and "8.png was removed" in message
    assert "new.png was added" in message
    prepare(pets, 8)
    assert 20 in numbers(open_folder(pets).train_images)


def test_the_cache_is_sufficient_if_the_folder_is_gone(pets):
    prepare(pets, 8)
    os.rename(pets, pets.with_name("moved"))
    assert len(open_folder(pets).train_images) == 9


def test_an_interrupted_preparation_continues(tmp_path, data_dir):
    root = tmp_path / "many"
    for number in range(1200):
        put(
            root,
            f"{'train/a' if number < 5 else 'train/b' if number < 10 else 'unlabeled'}/{number:04}.png",
            number % 250,
        )
    (root / "unlabeled/0300.png").write_bytes(b"nothing")
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom pipelines.data import folder\n"
        "def progress(what, done, whole):\n    if done >= 1024:\n        os.kill(os.getpid(), 9)\n"
        "folder.SAVE_SECONDS = 0\n"
        "folder.prepare(Path(sys.argv[1]), 8, progress)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, root], cwd=ROOT).returncode == -9
    with pytest.raises(DataError, match="no prepared data"):
        open_folder(root)
    seen, original = [], folder.decode
    made = []

    def counting(files, *arguments):
        made.append(len(files))
        return original(files, *arguments)

    folder.decode = counting
    try:
        result = prepare(root, 8, lambda *words: seen.append(words))
    finally:
        folder.decode = original
    assert made[0] == 1198 - 1024, "only training images that were not decoded before"
    assert dict(result.unreadable).keys() == {"unlabeled/0300.png"}
    data = open_folder(root)
    expected = [n % 250 for n in range(1200) if n != 300]
    tested = numbers(data.test_images)
    assert sorted(numbers(data.train_images) + tested) == sorted(expected) and len(tested) == 2
    assert numbers(data.train_images)[-5:] == expected[-5:]
    assert np.all(data.train_labels[8:] == -1)
    continued = description(root)
    prepare(root, 8, again=True)
    assert description(root) == continued, "identical to an uninterrupted preparation, including checksums"


def description(root):
    return (folder.cache_of(root) / "cache.json").read_text()


def test_an_unchanged_folder_is_not_decoded_again(pets, monkeypatch):
    (pets / "unlabeled/8.png").write_bytes(b"nothing")
    put(pets, "test/dog/again.png", 2)
    first, written = prepare(pets, 8), description(pets)
    assert first.unreadable and first.duplicates
    made = []
    monkeypatch.setattr(folder, "decode", lambda files, *others: made.append(files) or decode(files, *others))
    assert prepare(pets, 8) == first and made == [] and description(pets) == written
    assert prepare(pets, 8, again=True) == first and len(made) == 2
    (folder.cache_of(pets) / "train_labels.npy").unlink()
    assert prepare(pets, 8) == first and len(made) == 4, "the cache was damaged"
    prepare(pets, 9)
    assert len(made) == 6 and open_folder(pets).sides == (9, 9)


def test_broken_links_are_skipped(pets):
    (pets / "unlabeled/link.png").symlink_to(pets / "no.png")
    assert prepare(pets, 8).unreadable == (("unlabeled/link.png", "No such file or directory"),)
    assert len(open_folder(pets).train_images) == 9


def test_images_outside_the_expected_subfolders_are_reported(pets):
    put(pets, "unlabelled/1.png", 60)
    put(pets, "train/x.png", 61)
    strays = ("train/x.png", "unlabelled/1.png")
    assert prepare(pets, 8).strays == prepare(pets, 8).strays == strays
    assert len(open_folder(pets).train_images) == 9


def test_hidden_folders_are_ignored(pets):
    put(pets, "train/.hidden/x.png", 50)
    put(pets, "train/cat/.hidden/x.png", 51)
    assert scan(pets).classes == ("cat", "dog") and len(scan(pets).train) == 9


@pytest.mark.parametrize("part", ["unlabeled", "train", "train/cat", "train/cat/nested 3"])
def test_an_unreadable_subfolder_raises(pets, monkeypatch, part):
    def refusing(function):
        def read(path="."):
            if os.fspath(path) == str(pets / part):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return function(path)

        return read

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(DataError, match=rf"pets/{part} cannot be read \(Permission denied\)"):
        scan(pets)


def test_file_names_may_contain_any_bytes(tmp_path, data_dir):
    root = tmp_path / os.fsdecode(b"p\xff ts")
    for number, name in enumerate(("a b/1.png", "a b/2.png", "é 猫/3.png", os.fsdecode(b"\xe9/4.png"))):
        put(root, f"train/{name}", number)
        put(root, f"test/{name}", number + 10)
    (root / "train/a b" / os.fsdecode(b"\xfc.png")).write_bytes(b"nothing")
    made = prepare(root, 8)
    assert made.unreadable[0][0] == os.fsdecode(b"train/a b/\xfc.png") and prepare(root, 8) == made
    data = open_folder(root)
    assert data.classes == ("a b", "é 猫", os.fsdecode(b"\xe9")) and numbers(data.train_images) == [0, 1, 2, 3]


def test_commands_in_messages_can_be_pasted(tmp_path, data_dir):
    root = tmp_path / "my pets"
    put(root, "train/a/1.png", 1)
    with pytest.raises(DataError, match="my pets is not a folder"):
        open_folder(tmp_path / "no" / "my pets")
    with pytest.raises(DataError, match=r"; run: remixmatch data prepare '.*/my pets' --size 96$"):
        open_folder(root)


def test_linked_folders_are_part_of_the_data_set(pets, tmp_path):
    put(tmp_path, "store/1.png", 60)
    put(tmp_path, "store/2.png", 61)
    (pets / "unlabeled/more").symlink_to(tmp_path / "store")
    put(pets, "photos/3.png", 62)
    (pets / "train/cat/photos").symlink_to(pets / "photos")
    (pets / "train/cat/everything").symlink_to(pets)
    made = prepare(pets, 8)
    assert numbers(open_folder(pets).train_images) == [3, 4, 62, 0, 1, 2, 5, 6, 7, 8, 60, 61]
    assert made.strays == (), "photos/3.png is used as train/cat/photos/3.png"
    assert made.left_out == (
        "left out 1 file (a link to a folder above it): train/cat/everything",
        "left out 1 file without the suffix of an image: 1 .txt",
    )


def test_one_file_under_two_labels_raises(pets):
    (pets / "train/dog/also").symlink_to("../cat")
    words = (
        r"train/cat/nested 3/x.png \(cat\) and train/dog/also/nested 3/x.png \(dog\) are the same file under two labels"
    )
    with pytest.raises(DataError, match=words):
        scan(pets)
    (pets / "train/dog/also").unlink()
    (pets / "test/cat/link.png").symlink_to(pets / "train/dog/0.png")
    with pytest.raises(DataError, match=r"train/dog/0.png \(dog\) and test/cat/link.png \(cat\) are the same file"):
        scan(pets)


def test_a_file_behind_several_links_is_read_once(pets):
    (pets / "unlabeled/everything").symlink_to("../train")
    (pets / "train/dog/again.png").symlink_to("0.png")
    (pets / "unlabeled/five.png").symlink_to(pets / "unlabeled/5.png")
    for number in range(2):
        (pets / f"unlabeled/lost{number}.png").symlink_to("nowhere.png")
    made = prepare(pets, 8)
    assert numbers(open_folder(pets).train_images) == [3, 4, 0, 1, 2, 5, 6, 7, 8] and made.strays == ()
    assert [file for file, _ in made.unreadable] == ["unlabeled/lost0.png", "unlabeled/lost1.png"]


def table_of_linked_folder(root, folder, link, named):
    """Make four images in a folder with a link to it, and return the lines of a table that names them by either."""
    for number in range(4):
        put(root, f"{folder}/{number}.png", number)
    (root / link).symlink_to(folder)
    return [f"{named}/{number}.png,{'ab'[number % 2]}" for number in range(4)]


def test_one_file_under_two_labels_in_a_table_raises(tmp_path, data_dir):
    root = tmp_path / "pets"
    lines = table_of_linked_folder(root, "cat", "alias", named="cat")
    (root / "labels.csv").write_text("\n".join([*lines, "alias/0.png,b"]))
    with pytest.raises(DataError, match=r"alias/0.png \(b\) and cat/0.png \(a\) are the same file under two labels"):
        scan(root)
    (root / "labels.csv").write_text("\n".join([*lines, "alias/0.png,"]))
    listing = scan(root)
    assert sorted((*listing.train, *listing.test)) == [(f"cat/{number}.png", number % 2) for number in range(4)]


def test_equal_images_in_two_classes_are_reported(pets):
    put(pets, "train/dog/copy.png", 3)
    put(pets, "unlabeled/copy.png", 3)
    conflicts = (("train/cat/nested 3/x.png", "train/dog/copy.png"),)
    assert prepare(pets, 8).conflicts == conflicts == prepare(pets, 8).conflicts


def test_a_table_may_name_files_through_links(tmp_path, data_dir):
    root = tmp_path / "pets"
    lines = table_of_linked_folder(root, "store", "images", named="images")
    (root / "labels.csv").write_text("\n".join(lines))
    made = prepare(root, 8)
    assert made.strays == () == made.left_out and len(made.listing.train) + len(made.listing.test) == 4
    (root / "labels.csv").write_text("\n".join(lines[1:]))
    with pytest.raises(DataError, match=r"does not list all image files; missing: store/0.png"):
        scan(root)


def test_remarks_survive_an_interruption(pets, monkeypatch):
    for number, name in enumerate(("train/cat/deep.png", "unlabeled/deep.png")):
        Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * (number + 1)).save(pets / name)
    remarks = (
        ("train/cat/deep.png", "values stretched to 0 to 255: mode I;16, 0 to 399"),
        ("unlabeled/deep.png", "values stretched to 0 to 255: mode I;16, 0 to 798"),
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(pets, 8, interrupted)
    made = prepare(pets, 8)
    assert made.remarks == remarks and prepare(pets, 8) == made
    shutil.copy(pets / "train/cat/deep.png", pets / "train/cat/copy.png")
    assert prepare(pets, 8).remarks == (("train/cat/copy.png", remarks[0][1]), *remarks), "also if little is decoded"


def test_pictures_in_other_formats_are_named(pets):
    os.mkfifo(pets / "unlabeled/pipe.png")
    (pets / "unlabeled/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(90))
    (pets / "unlabeled/renamed.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(90))
    made = prepare(pets, 8)
    assert made.unreadable == (
        ("unlabeled/pipe.png", "a pipe, socket or device instead of a file"),
        ("unlabeled/renamed.jpg", "PIL does not read HEIC; convert it to JPEG or PNG"),
    )
    assert made.left_out[0].endswith("PIL does not read .heic here; convert it to JPEG or PNG): unlabeled/phone.HEIC")
    for path in (pets / "train/cat").rglob("*.png"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"cat contains no images \(left out 2 files \(PIL does not read .heic.*; add"):
        scan(pets)
