"""Length of training: --steps-scale, and the warning for runs that are too short."""

import dataclasses
import functools
import math
import re

import pytest

from engine.commands.train import _parse, _set_up
from engine.config.presets import PRESETS, preset
from engine.config.scaling import scaled, too_short
from engine.errors import UserError
from tests.pages import commands


def parsed(*flags, begun=None):
    return _parse(flags, begun).config


def test_steps_scale_changes_everything_that_is_counted_in_steps():
    config = parsed("fashion-100-small", "--steps-scale", "0.25")
    lengths = (config.steps, config.ramp_kimg, config.eval_every, config.log_every, config.checkpoint_every)
    assert lengths == (2000, 16.0, 100, 25, 250)
    # (0.999^4, 1 - 0.99^4)
    assert config.ema_decay == pytest.approx(0.996005996001, abs=1e-12)
    assert config.bn_momentum == pytest.approx(0.03940399, abs=1e-12)
    assert config.threshold_decay == pytest.approx(0.96059601, abs=1e-12)  # 0.99^4
    assert config.dash_epoch_kimg == 1.0
    rest = dict(steps=8000, ramp_kimg=64.0, eval_every=400, log_every=100, checkpoint_every=1000, dash_epoch_kimg=4.0)
    averages = dict(ema_decay=0.999, threshold_decay=0.99, bn_momentum=0.01)
    assert dataclasses.replace(config, **averages, **rest) == preset("fashion-100-small")


def test_flags_override_the_scale_which_applies_to_the_method_and_ablations():
    config = parsed("digits-40", "--steps-scale", "0.1", "--steps", "600", "--eval-every", "7", "--batch", "8")
    assert (config.steps, config.eval_every, config.batch, config.ramp_kimg) == (600, 7, 8, 0.4)
    config = parsed("digits-40", "--ablate", "no-ema", "--method", "fixmatch", "--steps-scale", "0.1")
    assert (config.ema_decay, config.ramp_kimg, config.threshold, config.steps) == (0.0, 0.0, 0.95, 250)


def test_resuming_with_the_same_flags_gives_the_same_run():
    begun = parsed("digits-40", "--steps-scale", "0.1", "--batch", "8")
    assert parsed("digits-40", "--steps-scale", "0.1", "--batch", "8", begun=begun) == begun
    assert parsed("digits-40", "--steps-scale", "0.1", begun=begun) == begun
    assert parsed("digits-40", begun=begun) == begun
    of_method = ("digits-40", "--steps-scale", "0.1", "--method", "adamatch", "--batch", "8")
    begun_with_method = parsed(*of_method)
    assert parsed(*of_method, begun=begun_with_method) == begun_with_method
    assert parsed(*of_method[:3], begun=begun_with_method) == begun_with_method
    other = parsed("digits-40", "--steps-scale", "0.2", begun=begun)
    assert (other.steps, other.ramp_kimg, other.batch) == (500, 0.8, 8), "a different run, which --resume refuses"


@pytest.mark.parametrize(
    ("scale", "bound"),
    [("0", "more than 0"), ("-1", "more than 0"), ("nan", "more than 0"), ("inf", "at most 1000000"),
     ("1e+308", "at most 1000000")],
)  # fmt: skip
def test_invalid_scales(scale, bound):
    with pytest.raises(UserError, match=f"^--steps-scale must be {bound}, got {re.escape(scale)}"):
        parsed("digits-40", "--steps-scale", scale)


def test_the_smallest_and_the_largest_scale():
    config = parsed("digits-40", "--steps-scale", "5e-324")
    assert (config.steps, config.eval_every, config.ema_decay, config.bn_momentum) == (1, 1, 0, 1)
    assert parsed("digits-40", "--steps-scale", "1e6").steps == 2_500_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=10**400), "--steps must be from 0 to 9223372036854775808 to be scaled, got 1000"),
        (dict(bn_momentum=2.0), "--bn-momentum must be from 0 to 1 to be scaled, got 2.0"),
        (dict(ema_decay=-0.5), "--ema-decay must be from 0 to 1 to be scaled, got -0.5"),
        (dict(ramp_kimg=math.inf), "--ramp-kimg must be from 0 to"),
    ],
)
def test_values_that_cannot_be_scaled(changes, message):
    with pytest.raises(UserError) as caught:
        scaled(dataclasses.replace(preset("digits-40"), **changes), 0.3)
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 200


def test_presets_are_long_enough_at_any_scale():
    for config in PRESETS.values():
        assert too_short(config) == "" and too_short(scaled(config, 0.01)) == ""


def test_the_recipe_for_a_cpu_is_long_enough():
    (recipe,) = [words for words in commands() if "--steps-scale" in words and "folder" in words]
    config = parsed(*recipe[2:])
    assert too_short(config) == "" and config.steps == round(65_536 * 0.04) and config.width >= 16
    assert config.ramp_kimg * 1024 / config.batch == 512, "a fifth of the steps"


def test_short_runs_are_described_with_their_numbers_and_the_fix():
    small = preset("fashion-100-small")
    # The ramp is 64 * 1024 / 32 steps; 5 spans of the EMA are 5 / 0.001, and of batch norm 5 / 0.01.
    assert too_short(dataclasses.replace(small, steps=400)) == (
        "400 steps are too few for the ramp (--ramp-kimg: 2048 steps), the EMA (--ema-decay: 5000 steps) and batch "
        "norm (--bn-momentum: 500 steps); use --steps-scale 0.05 instead of --steps 400, which scales these, too"
    )
    advised = parsed("fashion-100-small", "--steps-scale", "0.05")
    assert advised.steps == 400 and too_short(advised) == ""


@pytest.mark.parametrize("method", ["fixmatch", "adamatch"])
def test_what_a_method_sets_does_not_count_as_a_flag_in_the_advice(method):
    warning = too_short(parsed("digits-40", "--method", method, "--steps", "100"))
    assert warning.endswith("; use --steps-scale 0.04 instead of --steps 100, which scales these, too")
    assert too_short(parsed("digits-40", "--method", method, "--steps-scale", "0.04")) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(steps=2047, ema_decay=0.99), "the ramp (--ramp-kimg: 2048 steps)"),
        (dict(steps=2048, ema_decay=0.99), ""),
        (dict(steps=2047, ema_decay=0.99, method="supervised"), ""),
        (dict(steps=2047, ema_decay=0.99, w_u=0.0, w_u1=0.0), ""),
        (dict(steps=5000), ""),
        (dict(steps=4999), "the EMA (--ema-decay: 5000 steps)"),
        (dict(steps=500, ema_decay=0.0, ramp_kimg=0.0), ""),
        (dict(steps=499, ema_decay=0.0, ramp_kimg=0.0), "batch norm (--bn-momentum: 500 steps)"),
        (dict(ema_decay=1.0), "the EMA (--ema-decay: no number of steps is enough)"),
        # An epoch of 4 kimg is 128 steps.
        (dict(steps=1279, ema_decay=0.0, ramp_kimg=0.0, method="dash"), "the warm-up (--dash-epoch-kimg: 1280 steps)"),
        (dict(steps=1280, ema_decay=0.0, ramp_kimg=0.0, method="dash"), ""),
        (dict(steps=5000, threshold_decay=1 - 2**-11, method="softmatch"),
         "the thresholds (--threshold-decay: 10240 steps)"),
        (dict(steps=5000, threshold_decay=1 - 2**-11), ""),
    ],
)  # fmt: skip
def test_bounds_of_the_warning(changes, said):
    warning = too_short(dataclasses.replace(preset("fashion-100-small"), **changes))
    assert (f"are too few for {said}; " in warning) if said else warning == ""


def test_only_one_of_the_processes_that_set_up_a_run_warns(tmp_path, caplog, monkeypatch):
    argv = ["digits-40", "--steps", "2", "--gpus", "2", "--device", "cpu", "--out", str(tmp_path / "run")]
    parse = functools.partial(_parse, argv)
    _set_up(parse, parse(), False)
    assert caplog.messages == [], "the launcher"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    _set_up(parse, parse(), False)
    assert len(caplog.messages) == 1, "a rank"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    parse = functools.partial(_parse, [*argv, "--gpus", "1"])
    _set_up(parse, parse(), False)
    assert len(caplog.messages) == 2, "a single process"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(steps=1),
            "1 step is too few for the ramp (--ramp-kimg: 256 steps), the EMA (--ema-decay: 500 steps) and batch norm "
            "(--bn-momentum: 250 steps); use --steps-scale instead of --steps, which scales these, too; or at least "
            "--steps 500",
        ),
        (dict(preset="deleted", steps=100), "; use at least --steps 500"),
        (dict(ema_decay=1.0), "(--ema-decay: no number of steps is enough); change these flags"),
        (dict(ema_decay=1.0, steps=10**12), "(--ema-decay: no number of steps is enough); change these flags"),
        (dict(steps=600, ema_decay=0.999), "600 steps are too few for the EMA (--ema-decay: 5000 steps); use at least"),
    ],
)
def test_the_fix_of_a_run_that_scaling_cannot_help(changes, message):
    assert message in too_short(dataclasses.replace(preset("digits-40"), **changes))
