"""`remixmatch data`, the paper's presets, and training on a folder from `prepare` to `predict`."""

import csv
import itertools
import json
import os
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from bench.images import crops, photographs
from engine.commands import main as cli
from engine.config.checks import folder_name, read_prior, resolve
from engine.config.config import Config, load_config
from engine.config.presets import PRESETS, PUBLISHED
from engine.errors import UserError
from engine.inference import export
from pipelines.data import cache, datasets
from pipelines.data.datasets import digits
from pipelines.data.folder import open_folder
from pipelines.data.pixels import resized, rgb
from pipelines.data.splits import RULES

QUICK = ["--steps", "2", "--batch", "4", "--k", "1", "--width", "8", "--blocks", "1", "--device", "cpu", "--quiet"]
# Takes minutes on a CPU core, with a network and settings similar to digits-40.
LEARNING = [
    *("--steps", "600", "--batch", "16", "--k", "2", "--width", "16", "--blocks", "1", "--ramp-kimg", "4"),
    *("--bn-momentum", "0.02", "--ema-decay", "0.99", "--lag", "16", "--view-steps", "4", "--eval-every", "100"),
    *("--device", "cpu", "--quiet"),
]


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    datasets.prepared.cache_clear()
    yield tmp_path / "data"
    datasets.prepared.cache_clear()


def say(capsys, *arguments):
    """Run a command and return what it prints."""
    capsys.readouterr()
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def fails(capsys, *arguments, code=2):
    """Run a command that must fail with an exit code; return its one line of output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    assert ended.value.code == code
    output = capsys.readouterr().err
    assert output.startswith("remixmatch: ") and len(output.splitlines()) == 1, output
    return output


def write_crops(root, originals, count, sides, labeled):
    """Write crops of photographs, one class each, for `data prepare`: the first labeled, a fifth for testing."""
    for name, photograph in originals.items():
        for number, image in enumerate(crops(photograph, count, *sides)):
            part = f"test/{name}" if number % 10 > 7 else f"train/{name}" if number < labeled else "unlabeled"
            path = root / part / f"{name} {number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)
    return root


@pytest.fixture
def photos(tmp_path):
    """Crops of two real photographs: classes china and flower, each with 8 labeled, 8 unlabeled and 4 test images."""
    return write_crops(tmp_path / "photos", photographs(), 20, (160, 120), labeled=8)


def test_help_and_invalid_input(capsys, tmp_path):
    assert "check-split" in say(capsys, "data", "--help")
    assert "data needs a command" in fails(capsys, "data")
    assert "unknown data command 'prepar'; did you mean prepare?" in fails(capsys, "data", "prepar")
    assert "missing data set; choose from digits, cifar10" in fails(capsys, "data", "info")
    assert "is neither a data set (digits, cifar10" in fails(capsys, "data", "prepare", "pets", "--size", 32)
    assert "no prepared data in" in fails(capsys, "data", "info", "cifar10")
    (tmp_path / "empty").mkdir()
    assert "a folder needs --size, for example --size 96" in fails(capsys, "data", "prepare", "empty")
    assert "--size must be from 8 to 1024 pixels, got 0" in fails(capsys, "data", "prepare", "empty", "--size", 0)
    assert "--source: no folder 'no'" in fails(capsys, "data", "prepare", "cifar10", "--source", "no")
    for command in ("info", "split", "prepare"):
        assert "unknown data set 'cifar-10'; did you mean cifar10" in fails(capsys, "data", command, "cifar-10")
        assert "unknown data set 'digit'; did you mean digits?" in fails(capsys, "data", command, "digit")
    assert "--labels is required, from 1 to 1437 (or --split all" in fails(capsys, "data", "split", "digits")
    papr = fails(capsys, "data", "split", "digits", "--split", "papr")
    assert papr.endswith("; got 'papr'; did you mean paper?\n")
    assert "has no labeled images" in fails(capsys, "data", "prepare", "empty", "--size", 16)
    assert "no is not a folder" in fails(capsys, "train", "folder", "--data", "no")
    assert "cifar-10-python.tar.gz is missing; download http" in fails(
        capsys, "data", "prepare", "cifar10", "--no-download"
    )
    output = fails(capsys, "data", "info", "digits", "--png", "no/grid.png")
    assert output == "remixmatch: no/grid.png cannot be written (No such file or directory)\n"
    with pytest.raises(SystemExit):
        cli.main(["data", "info", "digits", "--png", "no/grid.png"])
    assert not capsys.readouterr().out
    if not torch.cuda.is_available():
        no_gpu = fails(capsys, "data", "prepare", "empty", "--size", 16, "--decoder", "gpu")
        assert "--decoder gpu: torch sees no GPU here" in no_gpu


def test_list_and_info(capsys, tmp_path):
    listed = say(capsys, "data", "list")
    assert "digits             1437 training images, 1437 with a label, 360 test images, 10 classes, 16x16" in listed
    assert "run: remixmatch data prepare stl10" in listed
    output = say(capsys, "data", "info", "digits", "--png", tmp_path / "grid.png")
    data = digits()
    mean = data.train_images.reshape(-1, 3).mean(0)[0]
    deviation = data.train_images.reshape(-1, 3).std(0)[0]
    assert f"per channel {mean:.1f} {mean:.1f} {mean:.1f}, standard deviation {deviation:.1f}" in output
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (160, 160, 3)
    np.testing.assert_array_equal(grid[16:32, :16], data.train_images[np.flatnonzero(data.train_labels == 1)[0]])


def test_splits_are_printed_and_checked(capsys, tmp_path):
    indices = RULES["paper"](digits(), 40, 3).tolist()
    words = ["data", "split", "digits", "--labels", 40, "--seed", 3, "--split", "paper"]
    printed = json.loads(say(capsys, *words, "--json"))
    assert printed["train_rows"] == indices and len(printed["sha256"]) == len(printed["images_sha256"]) == 64
    assert say(capsys, *words).splitlines()[0] == " ".join(map(str, indices))
    (tmp_path / "theirs.txt").write_text("\n".join(map(str, reversed(indices))))
    check = ["data", "check-split", "theirs.txt", "--split", "paper", "--dataset", "digits"]
    assert say(capsys, *check, "--seed", 3).startswith("identical to rule paper, 40 labels of digits, seed 3")
    (tmp_path / "theirs.txt").write_text("\n".join(map(str, [*indices[1:], 1436])))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([*check, "--seed", "3"])
    assert ended.value.code == 1
    output = capsys.readouterr().out
    assert "different from rule paper" in output and "39 images in common" in output
    assert f"1 only in the rule: {indices[0]}\n1 only in theirs.txt: 1436\n" in output
    (tmp_path / "theirs.txt").write_text("1437")
    assert "contains index 1437, but digits has only 1437 training images" in fails(capsys, *check)
    assert "no run or file 'missing'" in fails(capsys, "data", "check-split", "missing")
    unknown = fails(capsys, "data", "split", "digits", "--labels", 40, "--split", "papers")
    assert "--split must be one of balanced, paper" in unknown and "; got 'papers'" in unknown
    assert "--labels must be at least 1, got 0" in fails(capsys, "data", "split", "digits", "--labels", 0)
    assert "--labels: labels must be from 1 to 1437" in fails(capsys, *words[:3], "--split", "paper", "--labels", 1438)
    assert "--dataset or --data is required" in fails(capsys, *check[:3])
    assert "--rule is now --split (see 'remixmatch data split --help')" in fails(capsys, *words, "--rule", "paper")
    both = fails(capsys, "data", "split", "digits-40", "--dataset", "digits", "--data", "x")
    assert "--dataset and --data both name the images" in both
    assert "unknown preset 'fashion-100-smal'; did you mean fash" in fails(capsys, *words[:2], "fashion-100-smal")
    named = fails(capsys, *check[:3], "--data", "digits")
    assert "--data digits: no such folder; --dataset digits names the data set" in named
    assert "need a preset, and digits is a data set" in fails(capsys, *words, "--dataset", "cifar10")


def test_split_of_a_run_is_checked(capsys, tmp_path):
    cli.main(["train", "digits-40", "--split", "paper", "--seed", "2", "--out", "run", *QUICK])
    written = json.loads((tmp_path / "run" / "split.json").read_text())
    assert written["split"] == "paper" and written["train_rows"] == RULES["paper"](digits(), 40, 2).tolist()
    assert say(capsys, "data", "check-split", "run").startswith("identical to rule paper, 40 labels of digits, seed 2")
    with pytest.raises(SystemExit):
        cli.main(["data", "check-split", "run", "--split", "balanced"])


def test_published_results_have_presets_and_paper_presets_use_the_paper_split():
    assert set(PUBLISHED) <= set(PRESETS)
    for config in PRESETS.values():
        if config.dataset.startswith(("cifar", "svhn", "stl")):
            assert config.split == "paper" and config.steps * config.batch == 2**26
            assert config.eval_every * config.batch == 65_536
    assert PRESETS["svhn-40"].flip is False and PRESETS["cifar10-40"].ramp_kimg == 8192
    stl = PRESETS["stl10-1000"]
    assert (stl.k, stl.anchor_augment, stl.max_shift, stl.depth, stl.width) == (4, "none", 12, 37, 64)
    assert Config().architecture == "WRN-28-2" and PRESETS["stl10-1000"].architecture == "WRN-37-4"


def test_preset_with_missing_data_shows_the_command_to_prepare_it(capsys):
    assert "run: remixmatch data prepare cifar10" in fails(capsys, "train", "cifar10-250")
    assert "preset 'folder' requires --data DIR" in fails(capsys, "train", "folder")


def test_settings_that_depend_on_the_images():
    def of(side, **changes):
        images = np.zeros((1, side, side, 3), np.uint8)
        data = datasets.DataSet("made", ("a", "b"), images, np.zeros(1, int), images, np.zeros(1, int))
        return resolve(Config(network="auto", max_shift=-1, **changes), data)

    assert (of(32).network, of(32).scales, of(32).max_shift) == ("wide-resnet", 3, 4)
    assert (of(96).network, of(96).scales, of(96).max_shift) == ("wide-resnet", 4, 12)
    assert of(224).network == "timm:resnet50"
    assert (of(32, scales=2).network, of(32, scales=2).scales, of(96, scales=5).scales) == ("wide-resnet", 2, 5)
    assert resolve(Config(), digits()) == Config()


def more_photographs():
    """Return the photographs of scikit-learn, and some of scikit-image, which include grayscale images."""
    folder = Path(find_spec("skimage").origin).parent / "data"
    files = {
        "astronaut": "astronaut.png", "Katze": "chelsea.png", "café crème": "coffee.png", "rocket": "rocket.jpg",
        "retina": "retina.jpg", "motorcycle": "motorcycle_left.png", "brick": "brick.png", "grass": "grass.png",
    }  # fmt: skip
    return photographs() | {name: Image.open(folder / file) for name, file in files.items()}


def by_export(path, images):
    """Return the class probabilities of an exported model, (N, L) float32."""
    if path.suffix == ".onnx":
        return onnxruntime.InferenceSession(path).run(["probabilities"], {"images": images})[0]
    if path.suffix == ".safetensors":
        model, _, _ = export.load_safetensors(path)
    else:
        model = torch.export.load(path).module()
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("each", [10, pytest.param(200, marks=pytest.mark.long)])
def test_a_folder_from_prepare_to_export(capsys, tmp_path, each):
    """Crops of ten photographs: 200 of each are enough to learn from, 10 of each only run all commands."""
    size, flags = ("16", QUICK) if each == 10 else ("32", LEARNING)
    root = write_crops(tmp_path / "photos", more_photographs(), each, (160, 120), labeled=4)
    classes = sorted(more_photographs())
    prepared = say(capsys, "data", "prepare", root, "--size", size)
    sizes = f"{8 * each} training images, 40 with a label, {2 * each} test images, 10 classes, {size}x{size}"
    assert sizes in prepared
    assert str(root) in say(capsys, "data", "list")
    assert "is intact" in say(capsys, "data", "info", root, "--verify")

    output = say(capsys, "train", "folder", "--data", root, "--out", "run", *flags)
    assert "folder seed 0: test accuracy" in output
    config = load_config(tmp_path / "run" / "config.json")
    assert (config.dataset, config.network) == (folder_name(root), "wide-resnet") and config.max_shift == int(size) // 8
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["labels"] == 40 == len(split["train_rows"]) and sorted(set(split["classes"])) == classes
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["labels"] == 40

    evaluated = json.loads(say(capsys, "eval", "run", "--json"))
    assert evaluated["images"] == 2 * each
    if each > 10:
        assert evaluated["test_accuracy"] > 90
    say(capsys, "predict", "run", root / "test", "--csv", "out.csv")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "class", *classes] and [row[0] for row in rows] == sorted(map(str, root.glob("test/*/*")))
    predicted = np.array([row[2:] for row in rows], float)
    assert [row[1] for row in rows] == [classes[c] for c in predicted.argmax(1)]

    images = np.stack([resized(rgb(Path(row[0]).read_bytes())[0], int(size)) for row in rows])
    data = open_folder(root)
    for to in export.SUFFIXES:
        say(capsys, "export", "run", "--to", to)
        path = tmp_path / "run" / f"model{export.SUFFIXES[to]}"
        np.testing.assert_allclose(by_export(path, images), predicted, atol=1e-5, err_msg=to)
        right = by_export(path, np.asarray(data.test_images)).argmax(1) == data.test_labels
        assert 100 * right.mean() == pytest.approx(evaluated["test_accuracy"])


def test_run_on_a_folder_resumes(capsys, photos):
    say(capsys, "data", "prepare", photos, "--size", 16)
    say(capsys, "train", "folder", "--data", photos, "--out", "run", *QUICK)
    say(capsys, "train", "folder", "--out", "run", "--resume", "--steps", "3", "--quiet")
    image = photos / "test" / "china" / "china 8.jpg"
    assert set(json.loads(say(capsys, "predict", "run", image, "--json"))["probabilities"]) == {"china", "flower"}


def test_older_run_does_not_resume_on_a_folder_prepared_differently(capsys, photos):
    say(capsys, "data", "prepare", photos, "--size", 16)
    say(capsys, "train", "folder", "--data", photos, "--out", "run", *QUICK)
    say(capsys, "data", "prepare", photos, "--size", 24)
    output = fails(capsys, "train", "folder", "--out", "run", "--resume", "--steps", "3", "--quiet")
    assert "run was started with different data; these differ: size of the images, labeled images" in output


def test_class_prior(capsys, photos, tmp_path):
    path = tmp_path / "prior.json"
    path.write_text(json.dumps({"flower": 3, "china": 1}))
    assert read_prior(path, ("china", "flower")) == (0.25, 0.75)
    say(capsys, "data", "prepare", photos, "--size", 16)
    say(capsys, "train", "folder", "--data", photos, "--class-prior", path, "--out", "run", *QUICK)
    assert load_config(tmp_path / "run" / "config.json").class_distribution == (0.25, 0.75)
    for text, words in [
        ('{"flower": 1}', "differ in china"),
        ('{"flower": 1, "china": 1, "dog": 0}', "differ in dog"),
        ('{"flower": 0, "china": 0}', "at least one of them positive"),
        ('{"flower": "1", "china": 1}', "class names to numbers"),
        ('{"flower": true, "china": 1}', "class names to numbers"),
        ('{"flower": Infinity, "china": 1}', "finite, nonnegative numbers"),
        ('{"flower": NaN, "china": 1}', "finite, nonnegative numbers"),
        ("{", "cannot be read"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_prior(path, ("china", "flower"))


def test_interruption_says_how_to_continue(capsys, photos, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.data.folder.decode", interrupted)
    output = fails(capsys, "data", "prepare", photos, "--size", 16, code=130)
    assert output == "remixmatch: interrupted; run the same command again to continue; decoded images are kept\n"


def test_skipped_files_are_reported(capsys, photos):
    (photos / "test/china/half.jpg").write_bytes((photos / "test/china/china 8.jpg").read_bytes()[:999])
    (photos / "test/china/again.jpg").write_bytes((photos / "train/china/china 3.jpg").read_bytes())
    (photos / "stray.jpg").write_bytes(b"")
    (photos / "unlabeled/phone.heic").write_bytes(b"")
    for name in "ab":
        Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(photos / f"unlabeled/{name}.png")
    for flags in ([], ["--again"], []):
        capsys.readouterr()
        cli.main(["data", "prepare", str(photos), "--size", "16", *flags])
        output = capsys.readouterr().err
        assert "remixmatch: skipping test/china/half.jpg: image file is truncated" in output
        assert "remixmatch: skipped 1 unreadable files\n" in output
        assert "train/china/china 3.jpg and test/china/again.jpg are the same image, once for training and" in output
        assert output.endswith(
            "remixmatch: skipped 1 image files outside train/CLASS/, test/CLASS/ and unlabeled/: stray.jpg\n"
            "remixmatch: left out 1 file (PIL does not read .heic here; convert it to JPEG or PNG): "
            "unlabeled/phone.heic\n"
            "remixmatch: 2 files: values stretched to 0 to 255 (unlabeled/a.png, unlabeled/b.png)\n"
        )


def test_folders_are_listed_and_verified(capsys, photos, tmp_path, data_dir, monkeypatch):
    root = photos.rename(tmp_path / "my photos")
    prepared = say(capsys, "data", "prepare", root, "--size", 16)
    assert prepared.endswith(f"train on it: remixmatch train folder --data '{root}'\n")
    assert say(capsys, "data", "list").splitlines()[-1].startswith(f"{root}: 32 training images")
    (cached,) = (data_dir / "folders").glob("my*")
    (data_dir / "folders" / ".other.partial").mkdir()
    os.truncate(cached / "train_images.npy", 1000)
    again = "run: remixmatch data prepare FOLDER --size 96"
    assert say(capsys, "data", "list").splitlines()[-1].endswith(f"has 1000 bytes, expected 24704; {again}")

    say(capsys, "data", "prepare", root, "--size", 16)
    content = bytearray((cached / "train_images.npy").read_bytes())
    content[-1] ^= 1
    (cached / "train_images.npy").write_bytes(content)
    output = fails(capsys, "data", "info", root, "--verify")
    again = f"remixmatch data prepare '{root}' --size 16 --again"
    assert output.endswith(f"train_images.npy is damaged (wrong checksum); run: {again}\n")
    say(capsys, *shlex.split(again)[1:])
    assert "is intact" in say(capsys, "data", "info", root, "--verify")


def test_unreadable_folders(capsys, photos, data_dir, monkeypatch):
    say(capsys, "data", "prepare", photos, "--size", 16)

    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as context:
        context.setattr(Path, "is_dir", refuse)
        for command in (["data", "list"], ["data", "info", photos], ["train", "folder", "--data", photos]):
            assert "cannot be read (Permission denied)" in fails(capsys, *command)
    monkeypatch.setattr(cache.np, "load", refuse)
    assert "cannot be read ([Errno 13] Permission denied" in fails(capsys, "data", "info", photos)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--network", "timm:resnet5"], "'resnet5'; did you mean resnet50"),
        (["--network", "timm"], "--network must be wide-resnet, timm:NAME or auto, got 'timm'"),
        (["--split", "paper", "--labels", 17], "labels must be from 1 to 16 (the number of labeled images), got 17"),
        (["--split", "balanced", "--labels", 18], "18 labels needs 9 images per class, but class china has 8"),
        (["--max-shift", 16], "--max-shift must be less than the images' shorter side of 16 pixels, got 16"),
        (["--class-prior", "no.json"], "--class-prior no.json cannot be read (No such file or directory)"),
    ],
)
def test_invalid_settings_for_a_folder(capsys, photos, tmp_path, flags, words):
    say(capsys, "data", "prepare", photos, "--size", 16)
    network = [] if "--network" in flags else ["--width", 8, "--blocks", 1]
    # With all steps of the preset, since a warning about a short run would come before the error.
    output = fails(capsys, "train", "folder", "--data", photos, "--out", "run", *network, *flags)
    assert words in output and not (tmp_path / "run").exists()


def test_changed_folder_is_reported_with_the_command_to_prepare_it(capsys, photos):
    say(capsys, "data", "prepare", photos, "--size", 16)
    say(capsys, "train", "folder", "--data", photos, "--out", "run", *QUICK)
    (photos / "unlabeled" / "china 10.jpg").unlink()
    output = (
        "photos has changed since it was prepared (unlabeled/china 10.jpg was removed); run: remixmatch data prepare"
    )
    commands = [
        ["train", "folder", "--data", photos],
        ["train", "folder", "--out", "run", "--resume"],
        ["eval", "run"],
        ["profile", "folder", "--data", photos],
        ["data", "info", photos],
        ["data", "split", photos, "--split", "all"],
        ["data", "check-split", "run"],
    ]
    for command in commands:
        assert f"{output} {photos} --size 16" in fails(capsys, *command)
    assert f"{output} {photos} --size 16" in say(capsys, "data", "list")


def test_counts_per_class_include_unlabeled_images_of_unknown_class(capsys, photos):
    say(capsys, "data", "prepare", photos, "--size", 16)
    labels, unlabeled = say(capsys, "data", "split", "folder", "--data", photos, "--split", "balanced", "--labels", 4,
                            "--imbalance-labeled", 1.5).splitlines()[1:3]  # fmt: skip
    unknown = len(list((photos / "unlabeled").iterdir()))
    assert labels.startswith("labels per class: ") and "unknown" not in labels
    assert unknown and unlabeled.startswith("unlabeled images per class: ")
    assert unlabeled.endswith(f"; {unknown} of unknown class")


def test_eval_says_if_the_test_images_are_others_than_at_training(capsys, photos):
    say(capsys, "data", "prepare", photos, "--size", 16)
    say(capsys, "train", "folder", "--data", photos, "--out", "run", *QUICK)
    (photos / "unlabeled" / "china 10.jpg").unlink()
    say(capsys, "data", "prepare", photos, "--size", 16)
    cli.main(["eval", "run"])
    output = capsys.readouterr()
    assert "8 images" in output.out and not output.err
    (photos / "test" / "china" / "china 8.jpg").unlink()
    say(capsys, "data", "prepare", photos, "--size", 16)
    cli.main(["eval", "run"])
    output = capsys.readouterr()
    assert "7 images" in output.out
    assert output.err == (
        "remixmatch: the test part has changed since training; these differ: test images (8 -> 7), "
        "test labels (8 -> 7)\n"
    )


def test_trained_run_does_not_need_its_data(capsys, photos, tmp_path):
    """Predict works if the folder was prepared with different classes or another size, or was deleted."""
    say(capsys, "data", "prepare", photos, "--size", 16)
    say(capsys, "train", "folder", "--data", photos, "--out", "run", *QUICK)
    image = shutil.copy(photos / "test/china/china 8.jpg", "image.jpg")
    predict, evaluate = ["predict", "run", image], ["eval", "run"]
    predicted = say(capsys, *predict)

    shutil.copytree(photos / "train/china", photos / "train/a third")
    assert say(capsys, *predict) == predicted
    say(capsys, "data", "prepare", photos, "--size", 24)
    assert say(capsys, *predict) == predicted
    output = "trained on 2 classes of 16x16 images, but its data now has 3 classes of 24x24 images (they differ"
    assert f"{output} in a third" in fails(capsys, *evaluate)

    shutil.rmtree(photos)
    shutil.rmtree(tmp_path / "data")
    assert say(capsys, *predict) == predicted
    say(capsys, "export", "run", "--to", "safetensors")
    assert export.load_safetensors(tmp_path / "run/model.safetensors")[1:] == (("china", "flower"), (16, 16))
    assert "photos is not a folder" in fails(capsys, *evaluate)


def test_run_without_class_names_says_how_to_restore_them(capsys, photos, tmp_path):
    say(capsys, "data", "prepare", photos, "--size", 16)
    train = ["train", "folder", "--data", photos, "--out", "run", *QUICK]
    say(capsys, *train)
    path = tmp_path / "run/split.json"
    split = json.loads(path.read_text())
    for name in ("class_names", "sides"):
        path.write_text(json.dumps({key: value for key, value in split.items() if key != name}))
        assert "run/split.json is missing or damaged" in fails(capsys, "eval", "run")
    path.write_text("{")
    assert "run/split.json is missing or damaged" in fails(capsys, "export", "run")
    path.unlink()
    output = fails(capsys, "predict", "run", photos / "test/china/china 8.jpg")
    assert (
        "run/split.json is missing or damaged; to restore it, run remixmatch train folder --out run --resume" in output
    )
    say(capsys, *train, "--resume")
    assert json.loads(path.read_text()) == split and "8 images" in say(capsys, "eval", "run")


def test_data_dir_is_a_flag(capsys, photos, tmp_path, data_dir, monkeypatch):
    flag = ["--data-dir", "an other"]
    monkeypatch.setattr(cache, "_flag", "")  # Restored by monkeypatch.
    output = say(capsys, "data", "prepare", photos, "--size", 16, *flag)
    assert output.endswith(f"train on it: remixmatch train folder --data {photos} --data-dir 'an other'\n")
    assert (tmp_path / "an other" / "folders").is_dir() and not data_dir.exists()
    assert cache.data_dir() == tmp_path / "an other"
    say(capsys, "train", "folder", "--data", photos, "--out", "run", *QUICK, *flag)
    monkeypatch.setenv("REMIXMATCH_DATA", str(data_dir))
    assert "no prepared data in" in fails(capsys, "eval", "run")
    assert "8 images" in say(capsys, "eval", "run", *flag)
    output = fails(capsys, "data", "info", "cifar10", *flag)
    assert output.endswith("; run: remixmatch data prepare cifar10 --data-dir 'an other'\n")


def test_finished_run_is_compared_with_the_paper(capsys, tmp_path, data_dir):
    folder = data_dir / "cifar10"
    with cache.writing(folder) as temporary:
        for part, count in (("train", 250), ("test", 20)):
            cache.array(temporary, f"{part}_images", (count, 32, 32, 3))
            cache.save(temporary, f"{part}_labels", np.arange(count) % 10)
        cache.finish(temporary, "cifar10", tuple("abcdefghij"))
    output = say(capsys, "train", "cifar10-250", "--out", "run", *QUICK, "--lag", "8")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["paper_error"] == 6.27 and summary["paper_deviation"] == 0.34
    assert summary["error"] == 100 - summary["median_last_20"]
    assert summary["difference_to_paper"] == pytest.approx(summary["error"] - 6.27)
    assert summary["same_settings_as_paper"] is False
    line = output.splitlines()[-1]
    error = summary["error"]
    assert line.startswith("test error: paper 6.27 ± 0.34 % (ReMixMatch (arXiv 1911.09785), table 1), ours")
    assert f"ours {error:.2f} %" in line
    assert line.endswith(f"difference {error - 6.27:+.2f} pp (settings differ from the preset)")


def test_narrow_networks_on_large_images_are_rejected(capsys, photos):
    """They were not measured on CPUs, see `engine.config.checks`."""
    say(capsys, "data", "prepare", photos, "--size", 97)
    wide_resnet = "--network", "wide-resnet", "--width", "8"  # The default for such images is a timm model.
    output = fails(capsys, "train", "folder", "--data", photos, "--out", "run", *QUICK, *wide_resnet)
    assert "--width must be at least 16 for images of more than 96 pixels, got 8" in output


def test_summary_reports_held_out_test_images(capsys, photos, tmp_path):
    (photos / "test").rename(tmp_path / "elsewhere")
    assert "2 labeled images are held out" in say(capsys, "data", "prepare", photos, "--size", 16)
    output = say(capsys, "train", "folder", "--data", photos, "--out", "run", *QUICK)
    assert "tested on 2 held-out labeled images" in output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["held_out_test_images"] == 2


def test_names_of_classes_are_printed_on_one_line(capsys, tmp_path):
    for part, name in itertools.product(("train", "test"), ("two\nlines", "red\x1b[31m")):
        (tmp_path / "odd" / part / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), (len(name), len(part), 0)).save(tmp_path / "odd" / part / name / "a.png")
    say(capsys, "data", "prepare", "odd", "--size", 8)
    table = say(capsys, "data", "info", "odd").split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["class", r"red\x1b[31m", r"two\nlines"]
    assert r"labels per class: red\x1b[31m 1, two\nlines 1" in say(capsys, "data", "split", "odd", "--split", "all")


def test_labels_are_not_silently_ignored(capsys):
    words = "--split all uses every label; leave out --labels, or give another --split"
    assert words in fails(capsys, "data", "split", "digits", "--labels", 3, "--split", "all")
    assert words in fails(capsys, "train", "digits-40", "--labels", 30, "--split", "all")
    long_tailed = ("digits-40", "--imbalance", 10, "--n1", 10, "--labels", 40)
    for command in (("data", "split"), ("train",)):
        assert "--n1 10 and the ratios set the number of labels" in fails(capsys, *command, *long_tailed)
    (Path.cwd() / "indices.txt").write_text("0\n1\n")
    for arguments, code in ((("--labels", 2), 2), ((), 1)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            check = ["data", "check-split", "indices.txt", "--dataset", "digits", "--split", "all"]
            cli.main([*check, *map(str, arguments)])
        assert ended.value.code == code


def test_equal_images_in_two_classes_are_a_warning(capsys, photos):
    one, other = sorted(photos.glob("train/*"))[:2]
    shutil.copy(sorted(one.iterdir())[0], other / "copy.png")
    capsys.readouterr()
    cli.main(["data", "prepare", str(photos), "--size", "16"])
    first = f"train/{one.name}/{sorted(one.iterdir())[0].name} ({one.name})"
    err = capsys.readouterr().err
    assert f"{first} and train/{other.name}/copy.png ({other.name}) are the same image in two classes\n" in err
    assert "1 image is also in another class\n" in err


def test_a_pipe_in_place_of_the_table_does_not_wait(capsys, photos):
    say(capsys, "data", "prepare", photos, "--size", 16)
    os.mkfifo(photos / "labels.csv")
    for arguments in (("prepare", photos, "--size", 16), ("info", photos)):
        assert "labels.csv cannot be read (not a regular file)" in fails(capsys, "data", *arguments)
    assert "labels.csv cannot be read (not a regular file)" in say(capsys, "data", "list")
