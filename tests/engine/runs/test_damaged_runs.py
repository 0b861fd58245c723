"""Folders of runs that are damaged, incomplete, or contain files of another run."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from engine import api, run
from engine.commands import main as cli
from engine.config.presets import preset
from engine.runs import checkpoint
from engine.runs.setup import setup_run
from engine.training.trainer import CHECKPOINTS
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
