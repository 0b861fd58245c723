"""Files of a folder: suffixes, symbolic links, and what is left out."""

import os
from pathlib import Path

import pytest

from pipelines.data.image_files import Found, describe_left_out, describe_remarks, find_files, real_paths


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def link(root, name, target):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(target)


ABOVE = "a link to a folder above it"


def test_files_are_images_pictures_of_other_formats_or_other_files(tmp_path):
    images = ["A.JPG", "b.jfif", "c.jpe", "d.avif", "e.jp2", "f.pgm", "g.tga", "h.Tiff", "sub/i.ico", "sub/j.psd"]
    put(tmp_path, *images, "a.HEIC", "sub/b.cr2", "c.svg", "notes.txt", "more.txt", "README", ".hidden.png", ".h/x.png")
    found = find_files(tmp_path)
    assert found.images == tuple(images)
    assert [name for name, _ in found.left_out] == ["a.HEIC", "c.svg", "sub/b.cr2"]
    assert found.others == ("README", "more.txt", "notes.txt")
    assert describe_left_out(found) == [
        "left out 1 file (PIL does not read .heic here; convert it to JPEG or PNG): a.HEIC",
        "left out 1 file (PIL does not read .svg here; convert it to JPEG or PNG): c.svg",
        "left out 1 file (PIL does not read .cr2 here; convert it to JPEG or PNG): sub/b.cr2",
        "left out 3 files without the suffix of an image: 2 .txt, 1 without suffix",
    ]


def test_linked_folders_are_searched_once(tmp_path):
    root, store = tmp_path / "root", tmp_path / "store"
    put(root, "own/a.png")
    put(store, "b.png", "deep/c.png")
    link(root, "first", store)
    link(root, "second", store)
    link(root, "part", store / "deep")
    link(root, "again", root / "own")
    link(root, "file.png", store / "b.png")
    found = find_files(root)
    assert found.images == ("file.png", "first/b.png", "first/deep/c.png", "own/a.png")
    assert not found.left_out and not found.others


def test_links_to_folders_above_and_circles_end(tmp_path):
    root = tmp_path / "root"
    put(root, "a/x.png", "a/b/y.png")
    link(root, "a/b/up", root / "a")
    link(root, "a/self", "self")
    link(root, "all", tmp_path)
    link(root, "here", root)
    link(root, "outside", tmp_path / "outside" / "deep")
    put(tmp_path, "outside/deep/z.png", "outside/no.png")
    link(tmp_path, "outside/deep/up", tmp_path / "outside")
    link(tmp_path, "outside/deep/root", root / "a")
    found = find_files(root)
    assert found.images == ("a/b/y.png", "a/x.png", "outside/z.png")
    assert found.left_out == (
        ("a/b/up", ABOVE),
        ("a/self", "a broken link"),
        ("all", ABOVE),
        ("here", ABOVE),
        ("outside/up", ABOVE),
    )
    inner = find_files(root / "a")
    assert inner.images == ("b/y.png", "x.png") and inner.left_out == (("b/up", ABOVE), ("self", "a broken link"))


def test_hidden_folders_can_be_linked(tmp_path):
    put(tmp_path, ".store/a.png")
    link(tmp_path, "photos", ".store")
    assert find_files(tmp_path).images == ("photos/a.png",)
    assert find_files(tmp_path / "photos").images == ("a.png",)


def test_broken_links_are_named(tmp_path):
    link(tmp_path, "folder", tmp_path / "no")
    link(tmp_path, "image.png", tmp_path / "no.png")
    found = find_files(tmp_path)
    assert found.left_out == (("folder", "a broken link"),)
    assert found.images == ("image.png",), "decoding reports it"


def test_nothing_is_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    put(tmp_path, "a.png")
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("opened"))
    assert find_files(tmp_path) == Found(("a.png", "pipe.png"), (), ("pipe",))


def test_used_files_are_recognized_through_links(tmp_path):
    put(tmp_path, "store/a.png", "store/b.png", "store/c.heic", "labels.csv", "notes.txt")
    link(tmp_path, "images", "store")
    used = ["images/a.png", "images/c.heic", "labels.csv"]
    assert find_files(tmp_path).without(tmp_path, used) == Found(("store/b.png",), (), ("notes.txt",))
    assert real_paths(Path("/"), ["a/b", "a/../c"]) == ["/a/b", "/c"]


def test_remarks_are_counted_by_kind():
    remarks = [(f"{n}.png", f"values stretched: {n} to 9") for n in range(5)] + [("a.jpg", "decoded by PIL: SIGSEGV")]
    assert describe_remarks(remarks) == [
        "5 files: values stretched (0.png, 1.png, 2.png and 2 more)",
        "1 file: decoded by PIL (a.jpg)",
    ]
