"""Configurations in and out: `--config FILE` and `--print-config`."""

import dataclasses
import json
import math
import os

import pytest
import yaml

from engine.commands.main import main
from engine.commands.train import _parse
from engine.config.config import Config, config_json
from engine.config.files import config_yaml, read_config
from engine.config.presets import PRESETS, preset
from engine.errors import UserError


@pytest.fixture
def file(tmp_path):
    """Write a file and return its path: `file("steps: 3")`."""

    def write(text, name="own.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-3\nsteps: 600", dict(lr=0.001, steps=600)),
        ("lr: 1.e-3", dict(lr=0.001)),
        ("w_u: 2", dict(w_u=2.0)),
        ("eval-every: 5  # as the flag is written", dict(eval_every=5)),
        ("flip: no\nalign: True\ntune: off", dict(flip=False, align=True, tune=False)),
        ("lr: .inf", dict(lr=math.inf)),
        ("lr: -.INF", dict(lr=-math.inf)),
        ("lr: 0.5e-1", dict(lr=0.05)),
        ("lr: 0", dict(lr=0.0)),
        ("log: none", dict(log="none")),
        ("dataset: 5", dict(dataset="5")),
        ("weights: no", dict(weights="no")),
        ('weights: ""', dict(weights="")),
        ("bn: 'joint'", dict(bn="joint")),
        ("seed: 1_000", dict(seed=1000)),
        ("max_shift: -1", dict(max_shift=-1)),
        ("class_distribution: [0.5, 5e-1]", dict(class_distribution=(0.5, 0.5))),
        ("class_distribution:\n- 1\n- 0", dict(class_distribution=(1.0, 0.0))),
        ("stem_channels: 8", dict(stem_channels=8)),
        ('{"k": 3, "flip": false}', dict(k=3, flip=False)),
        ("\ufeffk: 3", dict(k=3)),
        ("", {}),
        ("# nothing", {}),
    ],
)
def test_types_come_from_the_fields(file, text, expected):
    found = read_config(file(text))
    assert found == expected and [type(each) for each in found.values()] == [type(each) for each in expected.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", ": unknown configuration field 'stepz'; did you mean steps?"),
        ("color: red", ": unknown configuration field 'color'; 'remixmatch train"),
        ("steps: sixty", ": steps must be an integer, got 'sixty'"),
        ('steps: "60"', ": steps must be an integer, got '60'"),
        ('{"steps": "60"}', ": steps must be an integer, got '60'"),
        ('{"k": true}', ": k must be an integer, got True"),
        ("steps: 1e3", ": steps must be an integer, got '1e3'"),
        ("steps: 0600", ": steps must not begin with 0, which some YAML readers take for octal; got 0600"),
        ("lr: 010", ": lr must not begin with 0, which some YAML readers take for octal; got 010"),
        ("class_distribution: [010]", ": class_distribution must not begin with 0, which"),
        ("steps: 0x10", ": steps must be a decimal number, got 0x10"),
        ("seed: -0o17", ": seed must be a decimal number, got -0o17"),
        ("steps: .inf", ": steps must be an integer, got '.inf'"),
        ("steps: 12:30", ": steps must be an integer, got '12:30'"),
        ("steps:", ": steps must be an integer, got None"),
        ("seed: {a: 1}", ": seed must be an integer, got {}"),
        ("lr: fast", ": lr must be a number, got 'fast'"),
        ("log: no", ": log must be one of tensorboard, wandb, trackio, none; got 'no'"),
        ("flip: 'no'", ": flip must be true or false, got 'no'"),
        ("flip: 1", ": flip must be true or false, got '1'"),
        ("stem_channels: 9", ": stem_channels must be one of 3, 8; got 9"),
        ("class_distribution: 0.5", ": class_distribution must be numbers, got '0.5'"),
        ("class_distribution: &a [*a]", ": class_distribution must be numbers, got [[]]"),
        ("steps: 3\nk: 2\nsteps: 4", ": line 3 gives steps again"),
        ("eval-every: 3\neval_every: 4", ": line 2 gives eval_every again"),
        ('{"steps": 3, "steps": 4}', ": gives steps again"),
        ('{"bn-momentum": 0.5,\n\t"bn_momentum": 0.2}', ": gives bn_momentum again"),
        ("k: 3\n? [steps]\n: 4", ": line 2 has a list or a mapping where the name of a field belongs"),
        ("? {steps: 3}\n: 4", ": line 1 has a list or a mapping where"),
        ("method: fixmach", ": unknown method 'fixmach'; did you mean fixmatch"),
        ("preset: digits-4", ": unknown preset 'digits-4'; did you mean digits-40"),
        (f"seed: {'1' * 5000}", f": seed must be an integer, got '{'1' * 77}...'"),
        (f'{{"seed": {"1" * 5000}}}', f": seed must be an integer, got '{'1' * 77}...'"),
        (f'{{"lr": {"1" * 400}}}', f": lr must be a number, got {'1' * 77}..."),
        ('steps: "\\e[31m"', r": steps must be an integer, got '\x1b[31m'"),
        ('"\\e[31m": 3', r": unknown configuration field '\x1b[31m'; "),
        ('{"a\\nb": 3, "a\\nb": 4}', r": gives a\nb again"),
        ("- steps", ": must map names of fields to values, such as 'steps: 1000'"),
        ("steps", ": must map names of fields to values, such as 'steps: 1000'"),
        ("k: 3\nsteps: [", ", line 2: not YAML (expected the node content, but found '<stream end>')"),
        ("k: 3\n\tsteps: 3", ", line 2: not YAML (found character '\\t' that cannot start any token)"),
        ("k: \x00", ": not YAML (unacceptable character"),
        ("k: 3\n---\nk: 4", ", line 2: not YAML (but found another document)"),
    ],
)
def test_other_files_are_refused_in_one_line(file, text, message):
    path = file(text)
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"--config {path}{message}") and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    for name, reason in (("none.yaml", "No such file or directory"), ("picture.png", "'utf-8' codec can't decode")):
        with pytest.raises(UserError, match=f"^--config {tmp_path / name} cannot be read \\({reason}"):
            read_config(tmp_path / name)
    with pytest.raises(UserError, match=f"^--config {tmp_path}/config.json cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "word", ["no", "", "~", "a, b]", "x: y # z", "'\"", "two\nlines", "0x1", "folder:/ü \U0001f600"]
)
def test_every_configuration_is_yaml_that_reads_back(file, word):
    changes = dict(dataset=word, weights=word, lr=1e-5, class_distribution=(0.1, 1e-5), k=3)
    config = dataclasses.replace(preset("fashion-100-small"), **changes)
    path = file(config_yaml(config, dict.fromkeys(dataclasses.asdict(config), "somewhere # else")))
    assert Config(**read_config(path)) == config
    # Other readers find the same values.
    assert yaml.safe_load(path.read_text("utf-8")) == json.loads(config_json(config))
    assert Config(**read_config(file(config_json(config), "config.json"))) == config


def printed(capsys, *arguments):
    main(["train", *map(str, arguments), "--print-config"])
    return capsys.readouterr().out


def test_the_printed_configuration_can_be_given_back(file, capsys, elsewhere):
    flags = ["--method", "uda", "--ablate", "k=4", "--lr", "0.01", "--steps-scale", "0.1"]
    first = printed(capsys, "svhn-250", *flags)
    expected = _parse(["svhn-250", *flags]).config
    path = file(first)
    assert Config(**read_config(path)) == expected and expected != preset("svhn-250")
    assert Config(**read_config(file(printed(capsys, "--config", path), "again.yaml"))) == expected
    assert Config(**read_config(file(printed(capsys, "svhn-250", f"--config={path}"), "again.yaml"))) == expected


def test_pipes_and_standard_input_are_read_once(file, capsys, elsewhere):
    content = b"preset: digits-10\nlr: 0.5\n"
    saved = os.dup(0)
    try:
        for name in ("/dev/fd/{}", "-"):
            reader, writer = os.pipe()
            os.write(writer, content)
            os.close(writer)
            os.dup2(reader, 0)
            found = printed(capsys, "--config", name.format(reader))
            os.close(reader)
            assert "preset: digits-10  #" in found and f"lr: 0.5  # --config {name.format(reader)}\n" in found
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    with pytest.raises(SystemExit):
        main(["train", "digits-40", "--config", "/dev/null", "--gpus", "2"])
    assert capsys.readouterr().err == (
        "remixmatch: --config /dev/null must be a file and not a pipe, since each rank reads it\n"
    )


def test_the_last_of_two_files_names_the_preset(file, capsys, elsewhere):
    first, last = file("preset: digits-10", "a.yaml"), file("preset: digits-40\nk: 3", "b.yaml")
    assert "preset: digits-40  #" in printed(capsys, "--config", first, "--config", last)


def test_messages_have_no_control_characters(file, capsys, elsewhere):
    with pytest.raises(SystemExit):
        printed(capsys, "digits-40", "--config", file('dataset: "a\\e[31m\\nb"'))
    assert r"unknown data set 'a\x1b[31m\nb'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        printed(capsys, "digits-40", "--config", "no\x1b[31m.yaml")
    assert r"--config no\x1b[31m.yaml cannot be read" in capsys.readouterr().err


def sources(text):
    """Return the comment after each value, by field."""
    lines = [line.partition("  # ") for line in text.splitlines() if "  # " in line]
    return {entry.partition(":")[0]: source for entry, _, source in lines}


def test_each_printed_value_has_its_source(file, capsys, elsewhere):
    path = file("lr: 0.01\nk: 2\nw_u: 1.5\nlabels: 250\nthreshold: 0.5")
    flags = ["--method", "fixmatch", "--ablate", "no-ema", "--k", "3", "--steps-scale", "0.5", "--no-flip"]
    found = sources(printed(capsys, "cifar10-250", "--config", path, *flags))
    expected = {
        "preset": "preset cifar10-250", "dataset": "preset cifar10-250", "temperature": "default",
        "lr": f"--config {path}", "labels": f"--config {path}", "threshold": "--method fixmatch", "method": "--method",
        "mu": "--method fixmatch", "ema_decay": "--ablate no-ema", "k": "--k", "flip": "--flip",
        "steps": "--steps-scale 0.5", "bn_momentum": "--steps-scale 0.5",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found.keys() == dataclasses.asdict(Config()).keys()


def test_values_that_depend_on_the_data(capsys, elsewhere):
    found = printed(capsys, "digits-40", "--network", "auto", "--max-shift", "-1")
    assert "network: wide-resnet  # data\n" in found and "max_shift: 2  # data\n" in found


def test_a_file_with_a_method_or_preset(file, capsys, elsewhere):
    path = file("preset: digits-10\nmethod: fixmatch\nthreshold: 0.9")
    config = _parse(["digits-10", "--config", str(path)]).config
    assert (config.method, config.threshold, config.mu, config.steps) == ("fixmatch", 0.9, 7, 1500)
    for words, message in (
        (["digits-40", "--config", path], f"--config {path} is of another preset than digits-40; leave out the preset"),
        (["--config", path, "--method", "uda"], f"--method uda: --config {path} has method fixmatch; leave out one"),
        (["--config", file("k: 3", "b.yaml")], "b.yaml names no preset: remixmatch train PRESET --config "),
        (["--config"], "the preset comes first"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["train", *map(str, words)])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and message in err and err.count("\n") == 1
    over = _parse(["digits-40", "--config", str(file("method: remixmatch\nlr: 0.1", "c.yaml")), "--method", "fixmatch"])
    assert (over.config.threshold, over.config.lr) == (0.95, 0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_files_of_runs_are_configurations(file, name):
    path = file(config_json(preset(name)), "config.json")
    assert _parse([name, "--config", str(path)]).config == preset(name)
    assert _parse([name, "--config", str(path.parent)]).config == preset(name)
