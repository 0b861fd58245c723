"""Presets: named configurations. Each lists what differs from the defaults of `Config`, which are the paper's."""

from __future__ import annotations

import dataclasses
import difflib

from engine.config import Config
from engine.errors import UserError

# small batches, since what separates look-alikes is alignment at work over many steps; running statistics and the
# EMA are quicker than the paper's, whose runs are hundreds of times longer
_DIGITS = Config(
    dataset="digits",
    batch=16,
    k=2,
    steps=2500,
    ramp_kimg=4.0,
    max_shift=2,
    flip=False,
    blocks=1,
    width=16,
    bn_momentum=0.02,
    ema_decay=0.99,
    lag=16,
    view_steps=8,
    prefetch=1,
    eval_every=50,
    log_every=20,
    checkpoint_every=250,
)


def _preset(base: Config, **changes: object) -> Config:
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


_CHANGED: dict[str, Config] = {
    "digits-40": _preset(_DIGITS, labels=40),
    "digits-10": _preset(_DIGITS, labels=10, steps=1500),
    "digits-40-supervised": _preset(_DIGITS, labels=40, method="supervised"),
}
PRESETS: dict[str, Config] = {name: dataclasses.replace(config, preset=name) for name, config in _CHANGED.items()}


def preset(name: str) -> Config:
    """The preset of that name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
    raise UserError(f"unknown preset '{name}'; {hint}")
