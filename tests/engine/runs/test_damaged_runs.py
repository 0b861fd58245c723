"""Folders of runs that are damaged, incomplete, or contain files of another run."""

import dataclasses
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from engine import api, run
from engine.commands import main as cli
from engine.config.config import run_identity
from engine.config.presets import preset
from engine.errors import UserError
from engine.inference.trained import load_ema_model
from engine.report.reading import read
from engine.runs import checkpoint
from engine.runs.folder import CHECKPOINTS, read_summary, run_config
from engine.runs.history import History, read_history, read_results
from engine.runs.progress import MetricsLog, read_metrics
from engine.runs.setup import setup_run, write_run_files
from pipelines.data.datasets import digits

SMALL = dict(batch=8, k=1, width=8, blocks=1, steps=4, eval_every=2, log_every=1, checkpoint_every=2, device="cpu")


def trained(folder, **changes):
    config = dataclasses.replace(preset("digits-40"), **SMALL | changes)
    run.train(setup_run(config, folder), quiet=True)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with checkpoints of steps 2 and 4."""
    return trained(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module", params=[dict(seed=1), dict(width=16)], ids=["same shapes", "other shapes"])
def foreign(request, tmp_path_factory):
    """The newest checkpoint of another run, and the field that differs."""
    folder = trained(tmp_path_factory.mktemp("foreign") / "run", **request.param)
    ((name, value),) = request.param.items()
    return checkpoint.list_checkpoints(folder / CHECKPOINTS)[-1], f"{name} is {value}"


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(digits().test_images[0]).save(path)
    return path


def command(capsys, *words):
    """Run a command and return its exit code, what it printed, and its messages."""
    capsys.readouterr()
    code = 0
    try:
        cli.main([str(word) for word in words])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    return code, said.out, said.err


def users(folder, image):
    """Return the commands that load a run's model."""
    return [
        ["eval", folder, "--json"],
        ["predict", folder, image, "--json"],
        ["export", folder, "--out", image.parent / "x"],
    ]


def test_every_command_loads_the_checkpoint_from_which_the_run_would_resume(made, copy, foreign, image, capsys):
    newest, difference = foreign
    last = checkpoint.list_checkpoints(copy / CHECKPOINTS)[-1]
    last.unlink()
    expected = [command(capsys, *words)[:2] for words in users(copy, image)]
    exported, probabilities = (image.parent / "x").read_bytes(), api.load(copy).predict([image])
    shutil.copy(newest, last)
    for words, right in zip(users(copy, image), expected, strict=True):
        code, out, err = command(capsys, *words)
        assert (code, out) == right and code == 0
        assert err == f"remixmatch: {last} is a checkpoint of another run ({difference}); trying the previous one\n"
    assert len((image.parent / "x").read_bytes()) == len(exported)
    assert np.array_equal(api.load(copy).predict([image]), probabilities)
    code, _, err = command(capsys, "train", "digits-40", "--out", copy, "--resume")
    assert code == 0 and f"{last} is a checkpoint of another run ({difference})" in err
    assert f"resuming {copy} from step 2" in err


def test_only_checkpoints_of_another_run_are_refused_and_kept(copy, foreign, image, capsys):
    newest, difference = foreign
    shutil.rmtree(copy / CHECKPOINTS)
    (copy / CHECKPOINTS).mkdir()
    kept = copy / CHECKPOINTS / newest.name
    shutil.copy(newest, kept)
    metrics = (copy / "metrics.jsonl").read_bytes()
    for words in [*users(copy, image), ["train", "digits-40", "--out", copy, "--resume", "--quiet"]]:
        code, out, err = command(capsys, *words)
        assert (code, out) == (2, "") and len(err.splitlines()) == 2
        assert err.splitlines()[-1] == (
            f"remixmatch: {copy / CHECKPOINTS} has no valid checkpoint of this run, but one of another run "
            f"({difference}); move the checkpoints of the other run away, or restore config.json and split.json of "
            "this run"
        )
    assert kept.read_bytes() == newest.read_bytes() and (copy / "metrics.jsonl").read_bytes() == metrics


def test_checkpoints_without_an_identity_are_compared_by_the_shapes_of_the_network(copy, image, capsys):
    """As for checkpoints of a run whose data had another number of classes."""
    newest = checkpoint.list_checkpoints(copy / CHECKPOINTS)[-1]
    content = torch.load(newest, weights_only=True)
    state = content["content"]["state"]["ema_model"]
    name = next(reversed(state))
    state[name] = state[name][:-1].clone()
    torch.save(content, newest)
    code, _, err = command(capsys, "predict", copy, image)
    assert code == 0 and re.search(rf"another run \(ema_model.{name} is \(\d+", err)


# Damaged files


def resume(folder):
    """Do what a resumed run does before its first step, and return the step of its checkpoint."""
    setup = setup_run(run_config(folder), folder, resume=True, data=digits())
    write_run_files(setup)
    metrics, history = MetricsLog(folder, 4), History(folder, 4, 2)
    metrics.add(5, loss=1.0)
    metrics.close()
    history.add(6, {})
    found = checkpoint.load_newest(folder / CHECKPOINTS, run_identity(setup.config))
    return found.step if found else 0


FILES = [
    "config.json", "split.json", "metrics.jsonl", "history.jsonl", "logged.json", "summary.json", "results.npz",
    "checkpoints/step-00000004.pt",
]  # fmt: skip
FLIPS = 25  # per file


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_one_line_or_repaired(made, tmp_path, name):
    chance = random.Random(name)
    content = (made / name).read_bytes()
    for number in range(FLIPS):
        place, bit = chance.randrange(len(content)), chance.randrange(8)
        flipped = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
        folder = tmp_path / str(number)
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns("*.png", "*.safetensors"))
        (folder / name).write_bytes(flipped)
        for use in (load_ema_model, lambda folder: read([folder]), resume):
            try:
                result = use(folder)
            except UserError as error:
                # A changed value of a setting is named as such; every other file is named, or is no obstacle.
                assert "\n" not in str(error) and (name == "config.json" or name in str(error)), (place, bit, use)
                assert use is not resume or name == "config.json", (place, bit)
            else:
                assert use is not resume or result == 4 or (name.endswith(".pt") and result == 2), (place, bit)
        shutil.rmtree(folder)


def test_a_damaged_split_is_made_again(copy, caplog):
    """Its own checksum tells a damaged digest from data that have changed."""
    path = copy / "split.json"
    whole = path.read_bytes()
    digest = json.loads(whole)["images_sha256"]
    path.write_text(whole.decode().replace(digest, digest[:-1] + "x"))
    resume(copy)
    assert path.read_bytes() == whole
    assert caplog.messages == [f"{path} is missing or damaged; it is made again from the data as they are now"]


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"\xff", b"[]", b"{}", b'{"preset": 3}', b'{"preset": "digits-40", "seed": 0}']
)
def test_a_damaged_configuration_is_restored_from_the_newest_checkpoint(made, copy, image, capsys, content):
    path, whole = copy / "config.json", (made / "config.json").read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    code, out, err = command(capsys, "predict", copy, image)
    assert code == 0 and out.startswith(f"{image}: ") and len(err.splitlines()) == 1
    newest = checkpoint.list_checkpoints(copy / CHECKPOINTS)[-1]
    assert f"config.json of {copy} is missing or damaged; using the configuration in {newest}" in err
    with pytest.raises(UserError, match="already contains a run; use --resume"):
        setup_run(run_config(copy), copy)
    code, _, err = command(capsys, "train", "digits-40", "--out", copy, "--resume", "--quiet")
    assert code == 0 and path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_a_configuration_that_is_no_file_is_read_from_the_newest_checkpoint(copy, image, capsys, kind):
    path, newest = copy / "config.json", checkpoint.list_checkpoints(copy / CHECKPOINTS)[-1]
    whole = path.read_bytes()
    path.unlink()
    path.mkdir() if kind == "folder" else path.symlink_to(path)
    said = f"remixmatch: config.json of {copy} is missing or damaged; using the configuration in {newest}\n"
    for words in users(copy, image):
        assert command(capsys, *words)[::2] == (0, said)
        checkpoint._saved_config.cache_clear()  # As in another process.
    code, _, err = command(capsys, "train", "digits-40", "--out", copy, "--resume", "--quiet")
    if kind == "loop":
        assert code == 0 and path.read_bytes() == whole
    else:
        assert code == 2 and err.startswith(said) and len(err.splitlines()) == 2
        assert f"cannot write {path} (Is a directory)" in err
    newest.parent.rename(copy / "elsewhere")
    path.unlink() if kind == "loop" else path.rmdir()
    path.mkdir()
    code, _, err = command(capsys, "eval", copy)
    assert (code, err) == (2, f"remixmatch: {path} cannot be read (not a regular file)\n")


def test_a_configuration_of_a_later_version_is_not_cut_down(copy):
    for name in (CHECKPOINTS + "/step-00000002.pt", CHECKPOINTS + "/step-00000004.pt"):
        content = torch.load(copy / name, weights_only=True)
        content["run"]["later"] = 1
        torch.save(content, copy / name)
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {"later": 1}))
    with pytest.raises(UserError, match="is not a configuration of this version"):
        run_config(copy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("metrics.jsonl", {"loss": "1"}), ("metrics.jsonl", {"loss": None}), ("metrics.jsonl", {"step": 1.5}),
        ("history.jsonl", {"step": 0}), ("history.jsonl", {"p_model": [0.5]}),
        ("history.jsonl", {"bins": {"blur": []}}),
        ("history.jsonl", {"guesses": {"images": 1, "accuracy": 0.5, "confidence": 0.5, "bins": [[1]]}}),
    ],
)  # fmt: skip
def test_records_of_the_wrong_kind_are_skipped_with_one_warning(copy, caplog, name, change):
    first, *rest = (copy / name).read_text().splitlines()
    (copy / name).write_text("\n".join([json.dumps(json.loads(first) | change), *rest]) + "\n")
    found = read_metrics(copy / name) if name == "metrics.jsonl" else read_history(copy)
    assert found == [json.loads(line) for line in rest]
    assert caplog.messages == [f"{copy / name}: skipped 1 damaged line"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("labels", np.zeros(3, np.uint16)), ("labels", np.array("x")), ("predicted", np.zeros(0, np.uint16)),
        ("confidence", np.array("x")), ("test_images", np.zeros(2, np.int64)), ("errors", np.array([10**6])),
        ("error_images", np.zeros((1, 8, 8, 3), np.uint8)), ("views", np.zeros((2, 2), np.uint8)),
        ("captions", np.array([["x"]])), ("captions", np.zeros((8, 5))),
    ],
)  # fmt: skip
def test_results_of_the_wrong_kind_are_not_read(copy, name, values):
    assert read_results(copy) is not None
    with np.load(copy / "results.npz") as found:
        arrays = dict(found) | {name: values}
    np.savez(copy / "results.npz", **arrays)
    assert read_results(copy) is None


@pytest.mark.parametrize("change", [{"steps": "4"}, {"train_seconds": None}, {"versions": []}, {"device": 3}])
def test_a_summary_of_the_wrong_kind_counts_as_missing(copy, change):
    whole = json.loads((copy / "summary.json").read_text())
    assert read_summary(copy) == whole
    (copy / "summary.json").write_text(json.dumps(whole | change))
    assert read_summary(copy) == {} and not read([copy]).runs[0].done


@pytest.mark.parametrize("change", [{"sides": [0, 8]}, {"sides": [8]}, {"sides": "88"}, {"class_names": []}])
def test_a_split_without_classes_names_the_command_that_restores_it(copy, change):
    split = json.loads((copy / "split.json").read_text())
    del split["checksum"]
    (copy / "split.json").write_text(json.dumps(split | change))
    with pytest.raises(UserError) as error:
        load_ema_model(copy)
    advice = f"to restore it, run remixmatch train digits-40 --out {copy} --resume"
    assert str(error.value) == f"{copy / 'split.json'} is missing or damaged; {advice}"
