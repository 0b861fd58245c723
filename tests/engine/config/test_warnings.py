"""Warnings about settings without effect."""

import dataclasses
import json

import pytest
import torch

from engine.api import train
from engine.commands.train import _parse, _set_up
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
    "ramp_kimg": 0.0, "ramp": "cosine", "anchor_augment": "none", "bn_stats": "pool",
}  # fmt: skip
# A setting, a value, what turns the setting off, and what leaves it on.
CASES = [
    *((name, value, {"method": "supervised"}, {}) for name, value in OF_UNLABELED.items()),
    ("guess_pass", "trained", {"method": "supervised"}, {"mixup_alpha": 0.0}),
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
    ("flex_warmup", False, {"method": "flexmatch", "threshold": 0.0}, {"method": "flexmatch", "mu": 1}),
    ("unlabeled_loss", "l2", {"w_u": 0.0}, {}),
    ("ramp_kimg", 0.5, {"w_u": 0.0, "w_u1": 0.0}, {"w_u": 0.0}),
    ("bn_stats", "pool", {"w_u1": 0.0, "w_rot": 0.0}, {"w_u1": 0.0}),
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
    assert unused(config, {name: "it"}).keys() == {name}
    assert result(dataclasses.replace(config, **{name: value})) == result(config)
    config = configured(tiny, on)
    assert unused(dataclasses.replace(config, **{name: value}), {name: "it"}) == {}
    assert result(dataclasses.replace(config, **{name: value})) != result(config)


def test_settings_without_effect_on_the_data_and_on_timm_models(tiny):
    both = tiny(imbalance_labeled=5.0, imbalance_unlabeled=2.0)
    assert dataclasses.replace(both, imbalance=9.0).class_ratios == both.class_ratios
    assert unused(both, {"imbalance": "--imbalance"}) == {
        "imbalance": "--imbalance has no effect with --imbalance-labeled 5.0 and --imbalance-unlabeled 2.0"
    }
    assert unused(dataclasses.replace(both, imbalance_labeled=0.0), {"imbalance": "--imbalance"}) == {}
    given = {"scales": "--scales", "bn_momentum": "--bn-momentum", "width": "width in --config a.yaml"}
    assert unused(tiny(network="timm:resnet18"), given) == {
        "width": "width in --config a.yaml has no effect with --network timm:resnet18",
        "scales": "--scales has no effect with --network timm:resnet18",
    }


@pytest.mark.parametrize("method", METHODS)
def test_no_warning_about_what_the_user_did_not_give(tiny, method):
    assert unused(with_method(tiny(), method), {}) == {}


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--method", "uda", "--threshold-decay", "0.5"], "--threshold-decay has no effect with --method uda"),
        (["--method", "uda", "--hard-labels", "--temperature=0.3"], "--temperature has no effect with --hard-labels"),
        (["--method", "fixmatch", "--temperature", "0.3"],
         "--temperature has no effect with --hard-labels, which --method fixmatch sets"),
        (["--method", "supervised", "--no-hard-labels"], "--no-hard-labels has no effect with --method supervised"),
        (["--no-align", "--marginal", "labels"], "--marginal has no effect with --no-align"),
        (["--method", "mixmatch", "--class-prior", "PRIOR"],
         "--class-prior has no effect with --no-align, which --method mixmatch sets"),
        (["--config", "FILE", "--no-align"], "marginal in --config FILE has no effect with --no-align"),
        (["--method", "fixmatch", "--ablate", "no-rotation"],
         "--ablate no-rotation changes nothing with --method fixmatch and preset digits-40"),
        (["--ablate", "k=2"], "--ablate k=2 changes nothing with --method remixmatch and preset digits-40"),
        (["--method", "supervised", "--ablate", "k=4"],
         "--ablate k=4 changes nothing with --method supervised and preset digits-40"),
    ],
)  # fmt: skip
def test_train_warns_in_one_line(tmp_path, caplog, flags, warning):
    prior, file = tmp_path / "prior.json", tmp_path / "file.yaml"
    prior.write_text(json.dumps({str(digit): 0.1 for digit in range(10)}))
    file.write_text("marginal: labels\nk: 2\n")  # K is the preset's, so it is not given.
    names = {"PRIOR": str(prior), "FILE": str(file)}
    argv = ["digits-40", *(names.get(flag, flag) for flag in flags)]
    _set_up(lambda begun=None: _parse(argv, begun), _parse(argv), resume=False)
    assert [record.getMessage() for record in caplog.records] == [warning.replace("FILE", str(file))]


def test_train_in_python_warns(tmp_path, caplog):
    train("digits-40", out=tmp_path / "run", steps=1, method="supervised", mu=3, ablate="k=4", progress=False)
    assert "--mu has no effect with --method supervised" in caplog.text
    assert "--ablate k=4 changes nothing with --method supervised and preset digits-40" in caplog.text
