"""Length of training: --steps-scale, and the warning for runs that are too short."""

import dataclasses
import functools

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
    rest = dict(steps=8000, ramp_kimg=64.0, eval_every=400, log_every=100, checkpoint_every=1000)
    assert dataclasses.replace(config, ema_decay=0.999, bn_momentum=0.01, **rest) == preset("fashion-100-small")


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
    other = parsed("digits-40", "--steps-scale", "0.2", begun=begun)
    assert (other.steps, other.ramp_kimg, other.batch) == (500, 0.8, 8), "a different run, which --resume refuses"


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_invalid_scales(scale):
    with pytest.raises(UserError, match=f"^--steps-scale must be more than 0, got {scale}"):
        parsed("digits-40", "--steps-scale", scale)


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
    # The ramp is 64 * 1024 / 32 steps, a span of the EMA 1 / 0.001, and one of batch norm 1 / 0.01.
    assert too_short(dataclasses.replace(small, steps=400)) == (
        "the run ends after 400 steps: before the ramp of the unlabeled losses (2048 steps), "
        "within 0.4 spans of the EMA (1000 steps each), within 4 spans of the batch norm statistics (100 steps each); "
        "use --steps-scale 0.05 instead of --steps 400 to scale them with the steps"
    )
    advised = parsed("fashion-100-small", "--steps-scale", "0.05")
    assert advised.steps == 400 and too_short(advised) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(steps=2047, ema_decay=0.99), "before the ramp of the unlabeled losses (2048 steps)"),
        (dict(steps=2048, ema_decay=0.99), ""),
        (dict(steps=2047, ema_decay=0.99, method="supervised"), ""),
        (dict(steps=2047, ema_decay=0.99, w_u=0.0, w_u1=0.0), ""),
        (dict(steps=5000), ""),
        (dict(steps=4999), "within 5 spans of the EMA (1000 steps each)"),
        (dict(steps=500, ema_decay=0.0, ramp_kimg=0.0), ""),
        (dict(steps=499, ema_decay=0.0, ramp_kimg=0.0), "within 5 spans of the batch norm statistics (100 steps each)"),
        (dict(ema_decay=1.0), "within 0 spans of the EMA (inf steps each)"),
    ],
)
def test_bounds_of_the_warning(changes, said):
    warning = too_short(dataclasses.replace(preset("fashion-100-small"), **changes))
    assert (f": {said}; " in warning) if said else warning == ""


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


@pytest.mark.parametrize("changes", [dict(steps=1), dict(preset="deleted", steps=100), dict(ema_decay=1.0),
                                     dict(steps=600, ema_decay=0.999)])  # fmt: skip
def test_the_fix_of_a_run_that_scaling_cannot_help(changes):
    config = dataclasses.replace(preset("digits-40"), **changes)
    assert too_short(config).endswith("; use more --steps, or a shorter --ramp-kimg, --ema-decay and --bn-momentum")
