"""Warnings about settings without effect."""

import dataclasses

import pytest
import torch

from engine.api import train
from engine.commands.main import main
from engine.config.methods import METHODS, with_method
from engine.config.warnings import unused
from engine.training.trainer import digests
from pipelines.ctaugment import initial_weights
from pipelines.plan import make_plan
from tests.engine.training.noise_training import NoiseTraining

P_Y = (0.1, 0.2, 0.3, 0.2, 0.2)
OF_UNLABELED = {
    "k": 3, "mu": 2, "anchor": "guess-only", "guess": "mean", "guess_pass": "joint", "guess_network": "ema",
    "temperature": 0.3, "hard_labels": True, "threshold": 0.2, "align": False, "class_distribution": P_Y,
    "marginal": "labels", "marginal_decay": 0.5, "unlabeled_loss": "l2", "w_u": 9.0, "w_u1": 9.0, "w_rot": 9.0,
    "ramp_kimg": 0.0, "ramp": "cosine", "anchor_augment": "none",
}  # fmt: skip
# A setting, a value, what turns the setting off, and what leaves it on.
CASES = [
    *((name, value, {"method": "supervised"}, {}) for name, value in OF_UNLABELED.items()),
    ("threshold_decay", 0.5, {"method": "fixmatch"}, {"method": "freematch"}),
    ("threshold_decay", 0.5, {}, {"method": "softmatch"}),
    ("dash_epoch_kimg", 8 / 1024, {"method": "adamatch"}, {"method": "dash", "dash_epoch_kimg": 0.5}),
    ("temperature", 0.3, {"hard_labels": True}, {}),
    ("ramp", "cosine", {"ramp_kimg": 0.0}, {}),
    ("marginal", "uniform", {"align": False}, {}),
    ("marginal_decay", 0.5, {"align": False}, {}),
    ("class_distribution", P_Y, {"align": False}, {}),
    ("marginal_decay", 0.5, {"marginal": "uniform"}, {}),
    ("marginal_decay", 0.5, {"class_distribution": P_Y}, {}),
    ("anchor_augment", "none", {"anchor": "none", "guess": "mean"}, {}),
    ("ctaugment", "code", {"augment": "none"}, {"augment": "randaugment"}),
    ("lag", 30, {"augment": "none"}, None),
    ("bn_groups", 2, {}, {"bn": "split"}),
]


def result(config):
    """Return digests of what a few steps train and draw; what a step does to images is in its plan."""
    training = NoiseTraining(config)
    with torch.no_grad():  # Confident enough for some pseudo-labels to be used.
        training.state.network.head.weight.mul_(30)
    training.advance(13 if config.method == "dash" else 2)  # Dash warms up for ten epochs, here of one step.
    networks = {"f": training.state.network.state_dict(), "ema": training.state.ema_model.state_dict()}
    plan = make_plan(training.spec, 0, 0, initial_weights())
    return digests(networks | {"plan": dataclasses.asdict(plan) if config.unlabeled else {}})


def configured(tiny, changes):
    changes = dict(changes)
    config = with_method(tiny(k=2, batch=8, ramp_kimg=1 / 8), changes.pop("method", "remixmatch"))
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(("name", "value", "off", "on"), CASES)
def test_settings_without_effect_change_nothing_and_others_do(tiny, name, value, off, on):
    config = configured(tiny, off)
    assert unused(config, {name}), name
    assert result(dataclasses.replace(config, **{name: value})) == result(config)
    if on is not None:
        config = configured(tiny, on)
        assert unused(dataclasses.replace(config, **{name: value}), {name}) == []
        assert result(dataclasses.replace(config, **{name: value})) != result(config)


def test_sizes_of_a_wide_resnet_have_no_effect_on_timm_models(tiny):
    config = tiny(network="timm:resnet18")
    assert unused(config, ["scales", "bn_momentum", "width"]) == [
        "--width has no effect with --network timm:resnet18",
        "--scales has no effect with --network timm:resnet18",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_no_warning_about_what_the_user_did_not_give(tiny, method):
    assert unused(with_method(tiny(), method), []) == []


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--method", "uda", "--threshold-decay", "0.5"], "--threshold-decay has no effect with --method uda"),
        (["--method", "uda", "--hard-labels", "--temperature=0.3"], "--temperature has no effect with --hard-labels"),
        (["--method", "fixmatch", "--temperature", "0.3"],
         "--temperature has no effect with --hard-labels, which --method fixmatch sets"),
        (["--no-align", "--marginal", "labels"], "--marginal has no effect with --no-align"),
    ],
)  # fmt: skip
def test_train_warns_in_one_line(tmp_path, capsys, flags, warning):
    main(["train", "digits-40", "--steps-scale", "0.002", *flags, "--out", str(tmp_path / "run"), "--quiet"])
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(f"remixmatch: {warning}") == 1 and sum("no effect" in line for line in lines) == 1


def test_train_in_python_warns(tmp_path, caplog):
    train("digits-40", out=tmp_path / "run", steps=1, method="supervised", mu=3, progress=False)
    assert "--mu has no effect with --method supervised" in caplog.text
