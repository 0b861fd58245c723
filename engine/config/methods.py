"""Methods and ablations: named sets of configuration fields. One training step implements all of them.

A preset defines data, network and length; a method is applied on top of it, and flags on top of the method. All methods
share one network, optimizer, EMA and protocol (Oliver et al. 2018), whatever their own papers used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from engine.config.config import Config
from engine.config.values import flag_of, flag_with_value
from engine.errors import UserError, unknown

MIXMATCH_SVHN_W_U = 250.0  # Weight of the L2 loss on SVHN; 75 elsewhere.
# Oliver et al. weigh the squared difference of two predictions with 20; its gradient passes through one of them. As in
# the paper it passes through both here, which is twice the gradient; and the squared difference of two predictions is 4
# times their mean squared difference from the mean of both.
PI_MODEL_W_U = 20.0 / 2 * 4
ADAMATCH_RAMP = 0.5  # Length of the ramp as a share of the preset's steps (AdaMatch, section 3.3).
_NO_MIXUP = dict(mixup_alpha=0.0, ramp_kimg=0.0)
_ONE_TERM = dict(align=False, w_u1=0.0, w_rot=0.0)  # A single loss term on unlabeled images.
_CONSISTENCY = dict(temperature=1.0, ramp="gaussian", mixup_alpha=0.0, augment="none", labeled_augment="weak")

# MixMatch: arXiv 1905.02249, with the weight of the L2 loss for CIFAR-10. FixMatch: arXiv 2001.07685. UDA:
# arXiv 1904.12848, with the temperature, threshold and mu of the comparison by FixMatch's authors, and without training
# signal annealing. Pseudo-labeling: Lee 2013, as in Oliver et al. 2018. FlexMatch: arXiv 2110.08263. Dash:
# arXiv 2109.00650. FreeMatch: arXiv 2205.07246, with the fairness weight of the authors' configurations. SoftMatch:
# arXiv 2301.10921. These four are FixMatch with other thresholds or weights, see engine/method/adaptive_targets.py.
# Pi model: arXiv 1610.02242, and Mean Teacher: arXiv 1703.01780, with the papers' ramp and the weights of Oliver et al.
# (arXiv 1804.09170), who trained this network. AdaMatch: arXiv 2106.04732, with the constants of the authors' code for
# semi-supervised learning.
_FIXMATCH = dict(
    k=1,
    mu=7,
    anchor="guess-only",
    hard_labels=True,
    threshold=0.95,
    w_u=1.0,
    labeled_augment="weak",
    **_ONE_TERM,
    **_NO_MIXUP,
)
METHODS: dict[str, dict[str, Any]] = {
    "remixmatch": {},
    "mixmatch": dict(
        k=2,
        anchor="none",
        guess="mean",
        unlabeled_loss="l2",
        w_u=75.0,
        augment="none",
        labeled_augment="weak",
        **_ONE_TERM,
    ),
    "fixmatch": _FIXMATCH,
    "uda": dict(
        k=1,
        mu=7,
        anchor="guess-only",
        temperature=0.4,
        threshold=0.8,
        unlabeled_loss="kl",
        w_u=1.0,
        augment="randaugment",
        labeled_augment="weak",
        **_ONE_TERM,
        **_NO_MIXUP,
    ),
    "pseudo-label": dict(
        k=1,
        anchor="none",
        guess="mean",
        hard_labels=True,
        threshold=0.95,
        w_u=1.0,
        augment="none",
        labeled_augment="weak",
        mixup_alpha=0.0,
        **_ONE_TERM,
    ),
    "flexmatch": _FIXMATCH,
    "dash": {**_FIXMATCH, "hard_labels": False, "threshold": 0.0},
    "freematch": {**_FIXMATCH, "threshold": 0.0, "w_fair": 0.001},
    "softmatch": {**_FIXMATCH, "threshold": 0.0},
    "pi-model": dict(
        k=2,
        anchor="none",
        guess="mean",
        guess_pass="trained",
        unlabeled_loss="l2",
        w_u=PI_MODEL_W_U,
        **_CONSISTENCY,
        **_ONE_TERM,
    ),
    "mean-teacher": dict(
        k=1,
        anchor="guess-only",
        guess_network="ema",
        unlabeled_loss="l2",
        w_u=8.0,
        **_CONSISTENCY,
        **_ONE_TERM,
    ),
    "adamatch": dict(
        k=1,
        mu=3,
        anchor="guess-only",
        hard_labels=True,
        threshold=0.9,
        interpolate_logits=True,
        w_u=1.0,
        ramp="cosine",
        mixup_alpha=0.0,
        labeled_augment="both",
        align=True,
        w_u1=0.0,
        w_rot=0.0,
    ),
    "supervised": {},
}

# Epochs of Dash before unlabeled images are used, and between two decays of its threshold.
DASH_WARM_UP, DASH_STAGE = 10, 9

# Settings that a method computes itself or depends on, so that any other value contradicts it.
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "dash": ("threshold", "hard_labels", "unlabeled_loss"),
    "freematch": ("threshold", "unlabeled_loss"),
    "softmatch": ("threshold", "align", "unlabeled_loss"),
    "pi-model": ("anchor", "guess", "guess_pass", "guess_network", "temperature", "hard_labels", "unlabeled_loss"),
    "mean-teacher": ("guess_network", "temperature", "hard_labels", "unlabeled_loss"),
}
# Settings that only one method has.
ONLY_FOR: dict[str, str] = {"flex_warmup": "flexmatch", "w_fair": "freematch"}
# Methods whose thresholds or weights are running averages, with --threshold-decay.
AVERAGE_THRESHOLDS = ("freematch", "softmatch")

# Section 4.3 of the paper, with settings from the scripts of the authors' code. The last six are ours: two more
# components, the authors' code where it differs from the paper, and pseudo-labels from the training pass.
ABLATIONS: dict[str, dict[str, Any]] = {
    "k=1": dict(k=1),
    "k=2": dict(k=2),
    "k=4": dict(k=4),
    "k=8": dict(k=8),
    "k=16": dict(k=16),
    "no-rotation": dict(w_rot=0.0),
    "no-premixup": dict(w_u1=0.0),
    "no-alignment": dict(align=False),
    "l2": dict(unlabeled_loss="l2", w_u=75.0),
    "no-strong": dict(augment="none"),
    "no-weak": dict(anchor_augment="strong"),
    "randaugment": dict(augment="randaugment"),
    "weak-only": dict(augment="none", guess="mean"),
    "mean-guess": dict(guess="mean"),
    "no-mixup": dict(mixup_alpha=0.0),
    "no-ema": dict(ema_decay=0.0),
    "bn-split": dict(bn="split"),
    "bn-stats-pool": dict(bn_stats="pool"),
    "ctaugment-code": dict(ctaugment="code"),
    "joint-guess": dict(guess_pass="joint"),
}


def with_method(config: Config, method: str) -> Config:
    """Return a configuration of ReMixMatch with the settings of another method.

    Raises:
        UserError: Unknown method; the message suggests the nearest names.
    """
    changes = dict(_named(METHODS, method, "method"))
    if method == "mixmatch" and config.dataset.startswith("svhn"):
        changes["w_u"] = MIXMATCH_SVHN_W_U
    if method == "adamatch":
        changes["ramp_kimg"] = ADAMATCH_RAMP * config.steps * config.batch / 1024
    return dataclasses.replace(config, method=method, **changes)  # type: ignore[arg-type]


def keep_ramp_steps(config: Config, batch: int) -> Config:
    """Give AdaMatch's ramp as many steps as it had with another batch size; other methods count theirs in images.

    Args:
        config: The configuration, whose batch size has changed.
        batch: The batch size before.
    """
    if config.method != "adamatch" or not 1 <= config.batch < 2**63:  # `validate` rejects any other size.
        return config
    return dataclasses.replace(config, ramp_kimg=config.ramp_kimg * config.batch / batch)


def contradiction(config: Config) -> str:
    """Return what is wrong with a setting that the method determines, or that only another method has; "" if nothing.

    The method must be a known one.
    """
    own = with_method(Config(), config.method)
    for name in OWN_SETTINGS.get(config.method, ()):
        if (value := getattr(config, name)) != getattr(own, name):
            words = " ".join(flag_with_value(name, value))
            return f"--method {config.method} sets its own {flag_of(name)}; leave out {words}"
    for name, method in ONLY_FOR.items():
        if config.method != method and (value := getattr(config, name)) != getattr(Config(), name):
            return f"{' '.join(flag_with_value(name, value))} requires --method {method}, got {config.method}"
    return ""


def uses_some(config: Config) -> bool:
    """Return whether pseudo-labels have weights, so that a step may use only some of them."""
    return config.threshold > 0 or "threshold" in OWN_SETTINGS.get(config.method, ())


def dash_epoch_steps(config: Config) -> int:
    """Return the number of steps of an epoch of Dash."""
    return max(1, round(config.dash_epoch_kimg * 1024 / config.batch))


def ablate(config: Config, *names: str) -> Config:
    """Return a configuration with the named ablations applied.

    Raises:
        UserError: An unknown ablation (the message suggests the nearest names), or two that contradict each other.
    """
    changes: dict[str, Any] = {}
    for name in names:
        for field, value in _named(ABLATIONS, name, "ablation").items():
            if changes.get(field, value) != value:
                raise UserError(f"--ablate {' '.join(names)}: {field} cannot be both {changes[field]} and {value}")
            changes[field] = value
    return dataclasses.replace(config, **changes)


def check_ablations(names: Collection[str], config: Config, given: Collection[str]) -> None:
    """Raise UserError if settings that the user gave undo ablations, whose first setting is what they change.

    Further settings of an ablation, such as the weight of another loss, may be given.

    Args:
        names: The ablations.
        config: The configuration with both applied.
        given: Names of the fields that the user gave.
    """
    for name in names:
        field, value = next(iter(ABLATIONS[name].items()))
        if field in given and (own := getattr(config, field)) != value:
            words, others = (" ".join(flag_with_value(field, each)) for each in (value, own))
            raise UserError(f"--ablate {name} sets {words}; leave out {others}")


def _named(known: Mapping[str, dict[str, Any]], name: str, kind: str) -> dict[str, Any]:
    if name in known:
        return known[name]
    raise unknown(kind, name, known)
