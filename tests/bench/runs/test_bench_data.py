"""The data bench: caches, photographs, fair comparisons, and a record for each part."""

import os

import numpy as np
import pytest
from PIL import Image

from bench.images import crops, photographs
from bench.runs import data
from bench.runs.data import DataOptions, dali_alone, write_cache, write_photographs
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.timing import interleave
from pipelines.data import cache
from pipelines.data.folder import open_folder, prepare, scan


def test_each_part_writes_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "CIFAR_IMAGES", 2000)
    monkeypatch.setenv("REMIXMATCH_DATA", "unchanged")
    out, folder = tmp_path / "rows.jsonl", tmp_path / "made"
    folder.mkdir()
    small = dict(repeats=2, rounds=1, files=70, images=1500, few_images=1000, steps=2, views="fused")
    data.main(DataOptions(out=out, folder=folder, **small))
    opening, preparing, training = records.read(out)
    assert (opening["part"], opening["images"], opening["side"]) == ("opening", 2000, 32)
    assert 0 < opening["open_seconds"] <= opening["most_open_seconds"]
    assert (preparing["part"], preparing["images"], preparing["side"]) == ("preparing", 70, 96)
    rates = preparing["prepare_images_per_second"], preparing["dali_images_per_second"]
    assert min(rates) > 0 and preparing["prepare_ratio"] == pytest.approx(rates[0] / rates[1])
    assert (training["part"], training["images"], training["few_images"]) == ("training", 1500, 1000)
    for name in ("step", "mean_step", "cpu_step"):
        assert training[f"{name}_ratio"] == pytest.approx(training[f"{name}_ms"] / training[f"few_{name}_ms"])
    assert abs(training["data_memory_mib"]) < training["peak_memory_mib"] / 2
    output = capsys.readouterr().out
    assert "part: opening; images: 2,000; side: 32; open, s: " in output
    assert "preparing; images: 70; side: 96; " in output
    assert "part: training; images: 1,500; side: 96; views: fused; step, ms: " in output
    assert not list(folder.iterdir()) and os.environ["REMIXMATCH_DATA"] == "unchanged"
    lines = data.BENCH.tables["data"].markdown([opening, preparing, training]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| opening", "| preparing", "| training"]


def test_rounds_alternate_in_order():
    called = []
    functions = {name: lambda name=name: called.append(name) or len(called) for name in "abc"}
    rounds = interleave(functions, 3)
    assert "".join(called) == "abccbaabc" and rounds[1] == {"c": 4, "b": 5, "a": 6}


def test_the_cache_of_noise(tmp_path):
    made = cache.open_cache(write_cache(tmp_path / "made", 2500, 8), "")
    assert made.train_images.shape == (2500, 8, 8, 3) and made.test_images.shape == (100, 8, 8, 3)
    assert len({image.tobytes() for image in made.train_images}) == 2500
    assert np.bincount(made.train_labels).tolist() == [250] * 10


def test_photographs_differ_and_can_be_prepared(tmp_path):
    files = write_photographs(tmp_path / "photographs", 45)
    assert len({path.read_bytes() for path in files}) == 45
    with Image.open(files[44]) as image:
        assert image.size == (500, 375) and image.format == "JPEG"
    listing = scan(tmp_path / "photographs")
    assert listing.classes == ("china", "flower") and len(listing.train) == 39 and len(listing.test) == 6
    assert sorted(label for _, label in listing.train) == [-1] * 33 + [0] * 3 + [1] * 3


def test_crops_are_parts_of_their_photograph():
    photograph = photographs()["flower"]
    assert photograph.size == (640, 427)
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, 640).astype(np.uint8)[None, :, None], (427, 1, 3)))
    spans = [np.ptp(np.asarray(crop)[..., 0].astype(int)) for crop in crops(gradient, 20, 50, 40)]
    shares = np.array(spans) / 255 * 640 / (427 * 50 / 40)  # Of the widest crop with this aspect ratio.
    assert 0.35 < shares.min() < 0.6 and 0.8 < shares.max() <= 1
    again, other = (next(crops(photograph, 1, 50, 40, seed)) for seed in (0, 1))
    assert again == next(crops(photograph, 1, 50, 40)) != other


def test_dali_alone_makes_the_same_images_as_prepare(tmp_path, monkeypatch):
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    root = tmp_path / "photographs"
    write_photographs(root, 70)
    prepare(root, data.SIDE)
    prepared = open_folder(root).train_images
    files = [root / name for name, _ in scan(root).train]
    alone = np.concatenate(list(dali_alone(files, 1, "cpu")))
    np.testing.assert_array_equal(alone[: len(files)], prepared)


def test_invalid_options(tmp_path):
    with pytest.raises(UserError, match="--parts: unknown part 'open'; choose from opening, preparing, training"):
        data.main(DataOptions(parts=("open",)))
    for flag, least in (("repeats", 1), ("rounds", 1), ("files", 8), ("images", 1000), ("few_images", 1000)):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} must be at least {least}, got {least - 1}"):
            data.main(DataOptions(out=tmp_path / "rows.jsonl", **{flag: least - 1}))
    with pytest.raises(UserError, match=r"--folder: opening cannot store its images .*No such file"):
        data.main(DataOptions(out=tmp_path / "rows.jsonl", folder=tmp_path / "no"))
