"""Configurations as command lines that parse to the same configuration."""

import dataclasses

import pytest

from engine.commands.options import parse_train
from engine.config.config import Config
from engine.config.methods import ABLATIONS, METHODS, ablate, with_method
from engine.config.presets import PRESETS, command


def read_back(words):
    """Parse a command line of `remixmatch train`."""
    assert words[0] == "train"
    return parse_train(words[1:], PRESETS[words[1]]).config


@pytest.mark.parametrize("name", PRESETS)
def test_preset_needs_no_flags(name):
    assert command(PRESETS[name]) == ["train", name]


@pytest.mark.parametrize("name", ["cifar10-250", "svhn-40", "svhn-extra-40", "digits-40-supervised", "stl10-1000"])
@pytest.mark.parametrize("method", METHODS)
def test_method_is_one_flag(name, method):
    config = dataclasses.replace(with_method(PRESETS[name], method), seed=3)
    flags = [] if method == PRESETS[name].method else ["--method", method]
    assert command(config) == ["train", name, *flags, "--seed", "3"]
    assert read_back(command(config)) == config


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_become_flags(name):
    config = ablate(PRESETS["fashion-100-small"], name)
    assert read_back(command(config)) == config


def test_every_field_has_a_flag():
    other = {
        "k": 3, "class_distribution": (0.25, 0.75), "align": False, "hard_labels": True, "max_shift": -1, "flip": False,
        "weights": "a file", "pretrained": True, "lr": 1e-05, "stem_channels": 8, "seed": 2**62, "w_u": 1 / 3,
        "split": "all", "deterministic": True, "mu": 7,
    }  # fmt: skip
    base = PRESETS["cifar10-250"]
    config = dataclasses.replace(with_method(base, "mixmatch"), **other)
    assert read_back(command(config)) == config
    for field in dataclasses.fields(Config):
        if field.name in other:
            config = dataclasses.replace(base, **{field.name: other[field.name]})
            assert read_back(command(config)) == config and config != base
    probabilities = dataclasses.replace(base, class_distribution=(0.1,) * 10)
    assert read_back(command(dataclasses.replace(probabilities, k=1))).class_distribution == (0.1,) * 10


def test_method_and_ablation_combine():
    config = read_back(["train", "cifar10-250", "--method", "fixmatch", "--ablate", "k=4", "no-ema", "--mu", "2"])
    wanted = dataclasses.replace(with_method(PRESETS["cifar10-250"], "fixmatch"), k=4, ema_decay=0.0, mu=2)
    assert config == wanted
