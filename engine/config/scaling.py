"""Length of training: scale everything that is counted in steps, and recognize runs that are too short."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from engine.config.config import Config
from engine.config.presets import PRESETS
from engine.errors import UserError

# Fields that --steps-scale changes.
SCALED = ("steps", "ramp_kimg", "eval_every", "log_every", "checkpoint_every", "ema_decay", "bn_momentum")
MIN_SPANS = 5  # Spans of an average after which its initial value, with a weight of exp(-5), no longer matters.


def check_scale(scale: float) -> None:
    """Raise UserError if steps cannot be scaled by this factor."""
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(f"--steps-scale must be more than 0, got {scale}")


def lengths(config: Config) -> dict[str, Any]:
    """Return the fields that `scaled` changes."""
    return {name: getattr(config, name) for name in SCALED}


def scaled(config: Config, scale: float) -> Config:
    """Scale the number of steps, the ramp, and all intervals that are counted in steps.

    The number of evaluations stays the same, so the median is over as many. The EMA and the running statistics of batch
    norm average over the same share of the training; an EMA over 1 000 steps would still be dominated by the initial
    weights at the end of a short rehearsal. The learning rate stays the same.

    Raises:
        UserError: See `check_scale`.
    """
    check_scale(scale)
    if scale == 1:
        return config
    whole = {name: max(1, int(getattr(config, name) * scale)) for name in SCALED if name.endswith("every")}
    return dataclasses.replace(
        config,
        steps=max(1, round(config.steps * scale)),
        ramp_kimg=config.ramp_kimg * scale,
        # After a given share of the steps, the initial value keeps the same weight in the average.
        ema_decay=config.ema_decay ** (1 / scale),
        bn_momentum=1 - (1 - config.bn_momentum) ** (1 / scale),
        **whole,  # type: ignore[arg-type]
    )


def too_short(config: Config) -> str:
    """Return a warning if a run ends before its ramp, or within a few spans of one of its averages; "" otherwise."""
    reasons = _unfinished(config)
    if not reasons:
        return ""
    fix = "use more --steps, or a shorter --ramp-kimg, --ema-decay and --bn-momentum"
    if preset := PRESETS.get(config.preset):
        scale = config.steps / preset.steps
        # Settings that differ from the preset's have flags, which override the scale.
        kept = {name: value for name, value in lengths(config).items() if value != getattr(preset, name)}
        advised = dataclasses.replace(config, **lengths(scaled(preset, scale)) | kept | {"steps": config.steps})
        if scale < 1 and not _unfinished(advised):
            fix = f"use --steps-scale {scale:.3g} instead of --steps {config.steps} to scale them with the steps"
    return f"the run ends after {config.steps} steps: {', '.join(reasons)}; {fix}"


def ramp_steps(config: Config) -> float:
    """Return the number of steps until the losses on unlabeled images have their full weight; 0 without them."""
    return config.ramp_kimg * 1024 / config.batch if config.unlabeled and (config.w_u or config.w_u1) else 0.0


def _unfinished(config: Config) -> list[str]:
    """Describe what takes longer than the run."""
    reasons = []
    ramp = ramp_steps(config)
    if config.steps < ramp:
        reasons.append(f"before the ramp of the unlabeled losses ({ramp:.0f} steps)")
    for average, weight in (("EMA", 1 - config.ema_decay), ("batch norm statistics", config.bn_momentum)):
        span = 1 / weight if weight > 0 else math.inf
        if config.steps < MIN_SPANS * span:
            reasons.append(f"within {config.steps / span:.2g} spans of the {average} ({span:.0f} steps each)")
    return reasons
