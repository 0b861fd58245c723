"""Warnings about a configuration that is allowed but probably not intended."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from engine.config.config import Config
from engine.config.methods import METHODS
from engine.config.scaling import too_short
from engine.config.values import flag_of, flag_with_value

_OF_UNLABELED = (
    "k", "mu", "anchor", "guess", "guess_pass", "guess_network", "temperature", "hard_labels", "threshold", "align",
    "class_distribution", "marginal", "marginal_decay", "unlabeled_loss", "w_u", "w_u1", "w_rot", "ramp_kimg", "ramp",
    "anchor_augment",
)  # fmt: skip
_OF_WIDE_RESNET = ("width", "blocks", "scales")

# A setting, the setting that turns it off, and whether a value of the latter does.
_Rule = tuple[str, str, Callable[[Any], bool]]
_RULES: tuple[_Rule, ...] = (
    *((name, "method", lambda method: method == "supervised") for name in _OF_UNLABELED),
    ("threshold_decay", "method", lambda method: method not in ("freematch", "softmatch")),
    ("dash_epoch_kimg", "method", lambda method: method != "dash"),
    ("temperature", "hard_labels", bool),
    ("ramp", "ramp_kimg", lambda length: length == 0),
    *((name, "align", lambda align: not align) for name in ("class_distribution", "marginal", "marginal_decay")),
    ("marginal_decay", "marginal", lambda marginal: marginal != "running"),
    ("marginal_decay", "class_distribution", bool),
    ("anchor_augment", "anchor", lambda anchor: anchor == "none"),
    ("ctaugment", "augment", lambda augment: augment == "none"),
    ("lag", "augment", lambda augment: augment != "ctaugment"),
    *((name, "network", lambda network: network.startswith("timm:")) for name in _OF_WIDE_RESNET),
    ("bn_groups", "bn", lambda bn: bn != "split"),
)


def unused(config: Config, given: Collection[str]) -> list[str]:
    """Return a warning for each given setting that has no effect.

    Args:
        config: The configuration.
        given: Names of the fields that the user gave.
    """
    warnings: dict[str, str] = {}
    for name, cause, turns_off in _RULES:
        value = getattr(config, cause)
        if name not in given or name in warnings or not turns_off(value):
            continue
        # A distribution is given by --class-prior, and may have a thousand numbers.
        reason = "a given p(y)" if cause == "class_distribution" else " ".join(flag_with_value(cause, value))
        if cause not in given and METHODS[config.method].get(cause) == value:
            reason += f", which --method {config.method} sets"
        warnings[name] = f"{flag_of(name)} has no effect with {reason}"
    return list(warnings.values())


def warnings_about(config: Config, given: Collection[str]) -> list[str]:
    """Return all warnings about the configuration of a new run; see `unused`."""
    short = too_short(config)
    return ([short] if short else []) + unused(config, given)
