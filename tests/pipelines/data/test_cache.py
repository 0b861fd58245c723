"""Caches: atomic, checked for format and sizes, and complete."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipelines.data import cache
from pipelines.data.cache import DataError
from tests.processes import ROOT

COMMAND = "remixmatch data prepare made"


def write(folder, images=20, side=4, key="", **options):
    rng = np.random.default_rng(images)
    with cache.writing(folder, key) as temporary:
        for part, count in (("train", images), ("test", images // 2)):
            cache.array(temporary, f"{part}_images", (count, side, side, 3))[:] = rng.integers(
                256, size=(count, side, side, 3)
            )
            cache.save(temporary, f"{part}_labels", np.arange(count) % 3 - (part == "train"))
        cache.finish(temporary, "made", ("a", "b", "c"), **options)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "made")


def test_a_cache_returns_what_was_written(tmp_path):
    folder = write(tmp_path / "made", class_order=(1, 2, 0))
    data = cache.open_cache(folder, COMMAND)
    rng = np.random.default_rng(20)
    np.testing.assert_array_equal(data.train_images, rng.integers(256, size=(20, 4, 4, 3)))
    np.testing.assert_array_equal(data.test_images, rng.integers(256, size=(10, 4, 4, 3)))
    assert (data.name, data.classes, data.class_order, data.sides) == ("made", ("a", "b", "c"), (1, 2, 0), (4, 4))
    assert data.train_labels.dtype == np.int64 and data.train_labels.min() == -1
    assert data.unlabeled is None and data.folds == () and len(data.unlabeled_indices) == 20
    assert isinstance(data.train_images, np.memmap)
    assert data.digests["test_images"] == hashlib.sha256((folder / "test_images.npy").read_bytes()).hexdigest()
    torch.from_numpy(np.asarray(data.train_images))  # Must not warn about an array that is not writable.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    cache.verify(folder, COMMAND)


def test_opening_does_not_read_the_images(tmp_path):
    folder = tmp_path / "large"
    with cache.writing(folder) as temporary:
        for part in ("train", "test"):
            cache.array(temporary, f"{part}_images", (50_000, 32, 32, 3))
            cache.save(temporary, f"{part}_labels", np.zeros(50_000, np.int64))
        cache.finish(temporary, "large", ("a", "b"))
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom pipelines.data import cache\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data = cache.open_cache(Path(sys.argv[1]), '')\n"
        "print(len(data.train_images), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    images, kibibytes = map(int, done.stdout.split())
    assert images == 50_000 and kibibytes < 20_000, "of 300 MB"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda folder: (folder / "cache.json").unlink(),
            "no prepared data in .*; run: remixmatch data prepare",
        ),
        (lambda folder: (folder / "cache.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "cache.json").write_text("[1]"), "is not a remixmatch cache"),
        (lambda folder: (folder / "cache.json").write_text('{"format": "other-1"}'), "is not a remixmatch cache"),
        (
            lambda folder: (folder / "cache.json").write_text('{"format": "remixmatch-cache-0"}'),
            "has cache format remixmatch-cache-0, expected remixmatch-cache-1",
        ),
        (lambda folder: os.truncate(folder / "train_images.npy", 500), "has 500 bytes, expected 1088"),
        (lambda folder: (folder / "test_labels.npy").unlink(), "test_labels.npy has 0 bytes"),
    ],
)
def test_invalid_caches_are_not_opened(folder, harm, words):
    harm(folder)
    with pytest.raises(DataError, match=words) as error:
        cache.open_cache(folder, COMMAND)
    assert "\n" not in str(error.value) and COMMAND in str(error.value)


def test_verify_detects_changed_bytes(folder):
    path = folder / "train_images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    cache.open_cache(folder, COMMAND)
    with pytest.raises(DataError, match=r"train_images.npy is damaged \(wrong checksum\); run: remixmatch data"):
        cache.verify(folder, COMMAND)


def test_an_error_leaves_the_existing_cache(folder):
    before = json.loads((folder / "cache.json").read_text())
    with pytest.raises(ZeroDivisionError), cache.writing(folder) as temporary:
        cache.array(temporary, "train_images", (3, 4, 4, 3))
        raise ZeroDivisionError
    assert json.loads((folder / "cache.json").read_text()) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["made"]
    write(folder, images=30)
    assert len(cache.open_cache(folder, COMMAND).train_images) == 30


def test_a_killed_process_leaves_no_cache(tmp_path):
    folder = tmp_path / "made"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom pipelines.data import cache\n"
        "with cache.writing(Path(sys.argv[1])) as temporary:\n"
        "    cache.array(temporary, 'train_images', (9, 4, 4, 3))\n"
        "    print('writing', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    with (
        pytest.raises(DataError, match=rf"is being prepared by process {process.pid} on .*; wait until"),
        cache.writing(folder),
    ):
        pass
    process.kill()
    process.wait()
    with pytest.raises(DataError, match="no prepared data"):
        cache.open_cache(folder, COMMAND)
    write(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_preparing_neither_follows_nor_truncates_a_linked_lock(folder, tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".made.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DataError, match=r"\.made\.lock cannot be written \(Too many levels of symbolic links\)$"):
        write(folder, images=30)
    assert (tmp_path / "precious").read_text() == "kept" and len(cache.open_cache(folder, COMMAND).train_images) == 20


def test_a_cache_that_is_a_link_stays_on_the_other_disk(folder, tmp_path):
    (tmp_path / "disk").mkdir()
    folder.rename(tmp_path / "disk" / "elsewhere")
    folder.symlink_to(tmp_path / "disk" / "elsewhere")
    write(folder, images=30)
    assert folder.is_symlink() and len(cache.open_cache(folder, COMMAND).train_images) == 30
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["elsewhere"]


def test_writing_continues_with_the_same_key(tmp_path):
    for key, expected in (("one", False), ("one", True), ("other", False)):
        with pytest.raises(ZeroDivisionError), cache.writing(tmp_path / "made", key) as temporary:
            assert (temporary / "half").exists() is expected
            (temporary / "half").write_text("")
            raise ZeroDivisionError
    write(tmp_path / "made", key="third")
    assert not (tmp_path / "made" / "half").exists()


def test_arrays_are_shortened_in_place(tmp_path):
    with cache.writing(tmp_path / "made") as temporary:
        made = cache.array(temporary, "images", (100_000, 2, 2, 3))
        made[:] = np.arange(100_000).astype(np.uint8)[:, None, None, None]
        made.flush()
        cache.shorten(temporary, "images", 7)
        left = np.load(temporary / "images.npy")
        assert left.shape == (7, 2, 2, 3) and (left[:, 0, 0, 0] == np.arange(7)).all()
        cache.finish(temporary, "made", ())


def test_an_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written \((Not a directory|File exists)\)"):
        write(tmp_path / "file" / "made")


def test_a_full_disk_raises_a_one_line_error(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        write(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_folder_of_all_caches(tmp_path, monkeypatch):
    monkeypatch.delenv("REMIXMATCH_DATA", raising=False)
    assert cache.data_dir().parts[-2:] == (".cache", "remixmatch")
    cache.set_data_dir(None)
    assert "REMIXMATCH_DATA" not in os.environ
    monkeypatch.setenv("REMIXMATCH_DATA", "")  # Restores the variable after the test.
    monkeypatch.setattr(cache, "_flag", "")
    cache.set_data_dir(tmp_path)
    assert cache.data_dir() == tmp_path
    assert cache.prepare_command("a b", " --size 8") == f"remixmatch data prepare 'a b' --size 8 --data-dir {tmp_path}"


@pytest.mark.parametrize("large", [0, 2**40])
def test_take_images_returns_copies(tmp_path, monkeypatch, large):
    monkeypatch.setattr(cache, "_LARGE_BYTES", large)
    whole = np.random.default_rng(0).integers(256, size=(100, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", whole)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for indices in (np.arange(99, 0, -1), np.array([5, 5, 0]), np.arange(0)):
        taken = cache.take_images(mapped, indices)
        np.testing.assert_array_equal(taken, whole[indices])
        assert taken.flags.owndata or taken.base is None or not np.shares_memory(taken, mapped)
