"""Length of training: samples per step, everything that is counted in steps, and runs that are too short."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from engine.config.config import Config
from engine.config.methods import AVERAGE_THRESHOLDS, DASH_WARM_UP, dash_epoch_steps, with_method
from engine.config.presets import PRESETS
from engine.config.values import flag_of, shown
from engine.errors import UserError

# Fields that --steps-scale changes.
SCALED = (
    "steps", "ramp_kimg", "dash_epoch_kimg", "eval_every", "log_every", "checkpoint_every", "ema_decay",
    "threshold_decay", "bn_momentum",
)  # fmt: skip
FRACTIONS = ("ema_decay", "threshold_decay", "bn_momentum")  # Those that are from 0 to 1.
MAX_SCALE = 1_000_000
MIN_SPANS = 5  # Spans of an average after which its initial value, with a weight of exp(-5), no longer matters.


def trained_samples(config: Config) -> int:
    """Return the number of samples the network trains on per step; a loss term of weight 0 adds none."""
    labeled = 2 if config.labeled_augment == "both" else 1
    if not config.unlabeled:
        return config.batch * labeled
    passes = config.k + sum([config.anchor == "trained", config.w_u1 > 0, config.w_rot > 0])
    return config.batch * (labeled + config.mu * passes)


def check_scale(scale: float) -> None:
    """Raise UserError if steps cannot be scaled by this factor."""
    if not scale > 0:
        raise UserError(f"--steps-scale must be more than 0, got {scale}")
    if scale > MAX_SCALE:
        raise UserError(f"--steps-scale must be at most {MAX_SCALE}, got {scale}")


def lengths(config: Config) -> dict[str, Any]:
    """Return the fields that `scaled` changes."""
    return {name: getattr(config, name) for name in SCALED}


def scaled(config: Config, scale: float) -> Config:
    """Scale the number of steps, the ramp, and all intervals that are counted in steps.

    The number of evaluations stays the same, so the median is over as many. The EMA, the thresholds of FreeMatch and
    SoftMatch, and the running statistics of batch norm average over the same share of the training; an EMA over 1 000
    steps would still be dominated by the initial weights at the end of a short rehearsal. The learning rate stays the
    same.

    Raises:
        UserError: See `check_scale`; or a value is not allowed even without the scale.
    """
    check_scale(scale)
    if scale == 1:
        return config
    for name in SCALED:
        most = 1 if name in FRACTIONS else 2**63
        if not 0 <= getattr(config, name) <= most:
            raise UserError(
                f"{flag_of(name)} must be from 0 to {most} to be scaled, got {shown(getattr(config, name))}"
            )
    whole = {name: max(1, int(getattr(config, name) * scale)) for name in SCALED if name.endswith("every")}
    return dataclasses.replace(
        config,
        steps=max(1, round(config.steps * scale)),
        ramp_kimg=config.ramp_kimg * scale,
        dash_epoch_kimg=config.dash_epoch_kimg * scale,
        # After a given share of the steps, the initial value keeps the same weight in the average.
        ema_decay=config.ema_decay ** (1 / scale),
        threshold_decay=config.threshold_decay ** (1 / scale),
        bn_momentum=1 - (1 - config.bn_momentum) ** (1 / scale),
        **whole,  # type: ignore[arg-type]
    )


def too_short(config: Config) -> str:
    """Return a warning if a run ends before its ramp or warm-up, or within a few spans of an average; "" otherwise."""
    needed = _unfinished(config)
    if not needed:
        return ""
    most = max(needed.values())
    fix = f"use at least --steps {math.ceil(most)}" if most < math.inf else "change these flags"
    preset = PRESETS.get(config.preset)
    if preset and (scale := config.steps / preset.steps) < 1:
        preset = with_method(preset, config.method)
        # Settings that differ from those of the preset and the method have flags, which override the scale.
        kept = {name: value for name, value in lengths(config).items() if value != getattr(preset, name)}
        advised = dataclasses.replace(config, **lengths(scaled(preset, scale)) | kept | {"steps": config.steps})
        if not _unfinished(advised):
            fix = f"use --steps-scale {scale:.3g} instead of --steps {config.steps}, which scales these, too"
        elif kept.keys() == {"steps"}:
            fix = f"use --steps-scale instead of --steps, which scales these, too; or {fix.removeprefix('use ')}"
    *others, last = [f"{name} (--{flag}: {_counted(count)})" for (name, flag), count in needed.items()]
    listed = f"{', '.join(others)} and {last}" if others else last
    few = f"{_counted(config.steps)} {'is' if config.steps == 1 else 'are'}"
    return f"{few} too few for {listed}; {fix}"


def _counted(steps: float) -> str:
    if steps == math.inf:
        return "no number of steps is enough"
    return "1 step" if math.ceil(steps) == 1 else f"{math.ceil(steps)} steps"


def ramp_steps(config: Config) -> float:
    """Return the number of steps until the losses on unlabeled images have their full weight; 0 without them."""
    return config.ramp_kimg * 1024 / config.batch if config.unlabeled and (config.w_u or config.w_u1) else 0.0


def _unfinished(config: Config) -> dict[tuple[str, str], float]:
    """Return what takes longer than the run, with its flag, and the steps that it takes."""
    needed = {("the ramp", "ramp-kimg"): ramp_steps(config)}
    averages = {("the EMA", "ema-decay"): 1 - config.ema_decay, ("batch norm", "bn-momentum"): config.bn_momentum}
    if config.method in AVERAGE_THRESHOLDS:
        averages["the thresholds", "threshold-decay"] = 1 - config.threshold_decay
    needed |= {name: MIN_SPANS / weight if weight > 0 else math.inf for name, weight in averages.items()}
    if config.method == "dash":
        needed["the warm-up", "dash-epoch-kimg"] = DASH_WARM_UP * dash_epoch_steps(config)
    return {name: count for name, count in needed.items() if config.steps < count}
