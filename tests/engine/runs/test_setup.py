"""Setup of runs: the configuration is checked and the data opened exactly once."""

import dataclasses
import os
import re
import socket
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import engine.runs.setup as run_setup
import pipelines.data.folder as image_folder
from engine import run
from engine.api import train
from engine.commands.main import main
from engine.config.presets import preset
from engine.errors import UserError
from engine.inference.trained import load_ema_model
from engine.report.reading import read
from engine.runs.setup import open_data, setup_run
from engine.training.trainer import Trainer

SMALL = "--size 16 --steps 2 --batch 2 --k 1 --width 16 --blocks 1 --lag 3 --eval-every 2 --device cpu --quiet"


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A prepared folder of 40 images in two classes."""
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    chance = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "pets" / ("train" if number < 32 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    main(["data", "prepare", "pets", "--size", "16"])
    return tmp_path / "pets"


@pytest.fixture
def calls(images, monkeypatch):
    """Count the calls of functions that set up a run."""
    counted = Counter()

    def count(module, name):
        function = getattr(module, name)

        def wrapper(*arguments, **named):
            counted[name] += 1
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, wrapper)

    for name in ("validate", "open_data", "check_data"):
        count(run_setup, name)
    count(image_folder, "scan")
    return counted


ONCE = {"validate": 1, "open_data": 1, "scan": 1, "check_data": 1}


@pytest.mark.parametrize("quiet", [True, False])
def test_train_sets_up_once(calls, quiet):
    words = [word for word in SMALL.split() if quiet or word != "--quiet"]
    main(["train", "folder", "--data", "pets", *words[2:]])
    assert calls == ONCE


def test_the_api_sets_up_once(calls):
    train("folder", data="pets", steps=2, batch=2, k=1, width=16, blocks=1, lag=3, eval_every=2, device="cpu")
    assert calls == ONCE


def test_a_resumed_run_is_set_up_once(calls):
    words = SMALL.split()[2:]
    main(["train", "folder", "--data", "pets", *words, "--out", "run"])
    calls.clear()
    main(["train", "folder", "--data", "pets", "--out", "run", "--resume", "--steps", "3", "--quiet"])
    assert calls == ONCE


def test_a_profile_sets_up_once(calls):
    words = [word for word in SMALL.split()[2:] if word != "--quiet"]
    main(["profile", "folder", "--data", "pets", *words, "--warm-up", "1"])
    assert calls == ONCE


def test_setup_resolves_the_configuration_and_writes_nothing(images, tmp_path):
    config = preset("folder")
    data = open_data(f"folder:{images}")
    found = setup_run(config, tmp_path / "run", data=data)
    assert found.config.network == "wide-resnet" and found.config.scales == 3 and found.config.max_shift == 2
    assert found.data is data and len(found.split) == 32 and not found.resumed
    assert not (tmp_path / "run").exists()


def test_the_number_of_ranks_is_checked(tmp_path):
    with pytest.raises(UserError, match="--batch 16 cannot be shared by 3 ranks"):
        setup_run(preset("digits-40"), tmp_path / "run", ranks=3)


def test_a_class_prior_file_sets_the_class_distribution(tmp_path):
    path = tmp_path / "prior.json"
    path.write_text("{" + ", ".join(f'"{c}": {c + 1}' for c in range(10)) + "}")
    given = setup_run(preset("digits-40"), class_prior=path).config.class_distribution
    assert given == pytest.approx([(c + 1) / 55 for c in range(10)])


def test_a_run_started_in_between_keeps_its_folder(tmp_path):
    """Two runs with one folder are set up, as by two concurrent commands: the one that starts later writes nothing."""
    small = dict(batch=8, k=1, width=16, blocks=1, steps=2, eval_every=2, device="cpu")
    configs = [dataclasses.replace(preset("digits-40"), **small | dict(k=k)) for k in (1, 2)]
    first, second = (setup_run(config, tmp_path / "run") for config in configs)
    run.train(first, quiet=True)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already contains a run"):
        run.train(second, quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_a_folder_is_trained_by_one_process_at_a_time(tmp_path, monkeypatch):
    """Every write lies between the first and the last attempt of the second process."""
    small = dict(batch=8, k=1, width=8, blocks=1, steps=2, eval_every=2, checkpoint_every=1, device="cpu")
    config, folder = dataclasses.replace(preset("digits-40"), **small), tmp_path / "run"
    refused = []

    def also(function):
        def wrapper(*arguments):
            contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for resume in (True, False):
                with pytest.raises(UserError) as error:
                    run.train(dataclasses.replace(other, resumed=resume), quiet=True)
                refused.append(str(error.value))
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == contents
            return function(*arguments)

        return wrapper

    other = setup_run(config, folder)
    with monkeypatch.context() as patched:
        patched.setattr(run, "write_run_files", also(run.write_run_files))
        patched.setattr(run, "write_text", also(run.write_text))  # the last file, summary.json
        run.train(setup_run(config, folder), quiet=True)
    assert len(refused) == 4
    owner = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since [-\d]+ [:\d]+"
    for said in refused:
        assert re.fullmatch(
            rf"{re.escape(str(folder))} is being trained by {owner}; wait until it has finished, or stop it", said
        )
    assert not (folder / run.LOCK).exists()


def test_a_run_can_be_read_while_it_is_trained_and_resumed_after_an_error(tmp_path, monkeypatch):
    small = dict(batch=8, k=1, width=8, blocks=1, steps=2, eval_every=1, checkpoint_every=1, device="cpu")
    config, folder = dataclasses.replace(preset("digits-40"), **small), tmp_path / "run"
    advance = Trainer.advance

    def interrupted(self):
        advance(self)
        if self.step == 2:
            assert load_ema_model(folder).config == config and read([folder]).runs[0].last_step == 1
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "advance", interrupted)
        run.train(setup_run(config, folder), quiet=True)
    assert not (folder / run.LOCK).exists()
    assert run.train(setup_run(config, folder, resume=True), quiet=True)["steps"] == 2


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[]"])
def test_a_damaged_split_is_rewritten(tmp_path, content):
    config = dataclasses.replace(preset("digits-40"), steps=2)
    setup = setup_run(config, tmp_path / "run")
    run_setup.write_run_files(setup)
    whole = (tmp_path / "run" / "split.json").read_bytes()
    (tmp_path / "run" / "split.json").write_bytes(content)
    run_setup.write_run_files(setup_run(config, tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "split.json").read_bytes() == whole
