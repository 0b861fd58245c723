"""Warnings about a configuration that is allowed but probably not intended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from engine.config.config import Config, changes
from engine.config.methods import AVERAGE_THRESHOLDS, METHODS, ablate, with_method
from engine.config.presets import preset
from engine.config.scaling import too_short
from engine.config.values import flag_with_value

_OF_UNLABELED = (
    "k", "mu", "anchor", "guess", "guess_pass", "guess_network", "temperature", "hard_labels", "threshold", "align",
    "class_distribution", "marginal", "marginal_decay", "unlabeled_loss", "w_u", "w_u1", "w_rot", "ramp_kimg", "ramp",
    "imbalance_unlabeled", "m1", "anchor_augment", "bn_stats",
)  # fmt: skip

# Settings, the settings that turn them off, and whether these do.
_Rule = tuple[tuple[str, ...], tuple[str, ...], Callable[[Config], bool]]
_RULES: tuple[_Rule, ...] = (
    (_OF_UNLABELED, ("method",), lambda c: not c.unlabeled),
    (("threshold_decay",), ("method",), lambda c: c.method not in AVERAGE_THRESHOLDS),
    (("dash_epoch_kimg",), ("method",), lambda c: c.method != "dash"),
    (("flex_warmup",), ("threshold",), lambda c: c.threshold == 0),
    (("temperature",), ("hard_labels",), lambda c: c.hard_labels),
    (("class_distribution", "marginal", "marginal_decay"), ("align",), lambda c: not c.align),
    (("marginal_decay",), ("marginal",), lambda c: c.marginal != "running"),
    (("marginal_decay",), ("class_distribution",), lambda c: bool(c.class_distribution)),
    (("unlabeled_loss",), ("w_u",), lambda c: c.w_u == 0),
    (("ramp_kimg", "ramp"), ("w_u", "w_u1"), lambda c: c.w_u == c.w_u1 == 0),
    (("ramp",), ("ramp_kimg",), lambda c: c.ramp_kimg == 0),
    (
        ("imbalance",),
        ("imbalance_labeled", "imbalance_unlabeled"),
        lambda c: c.imbalance_labeled != 0 and c.imbalance_unlabeled != 0,
    ),
    (("anchor_augment",), ("anchor",), lambda c: c.anchor == "none"),
    (("ctaugment",), ("augment",), lambda c: c.augment == "none"),
    (("width", "blocks", "scales"), ("network",), lambda c: bool(c.backbone)),
    (("bn_groups",), ("bn",), lambda c: c.bn != "split"),
    (("bn_stats",), ("w_u1", "w_rot"), lambda c: c.w_u1 == c.w_rot == 0),
)


def unused(config: Config, given: Mapping[str, str]) -> dict[str, str]:
    """Return a warning for each given setting that has no effect, by the name of its field.

    Args:
        config: The configuration.
        given: The fields that the user gave, and what a message calls each of them.
    """
    warnings: dict[str, str] = {}
    for names, causes, turned_off in _RULES:
        if turned_off(config):
            reason = _reason(config, causes, given)
            warnings |= {
                name: f"{given[name]} has no effect with {reason}"
                for name in names
                if name in given and name not in warnings
            }
    return warnings


def _reason(config: Config, causes: tuple[str, ...], given: Mapping[str, str]) -> str:
    if causes == ("class_distribution",):  # It may have a thousand numbers.
        return "a given p(y)"
    words = " and ".join(" ".join(flag_with_value(cause, getattr(config, cause))) for cause in causes)
    of_method = all(METHODS[config.method].get(cause) == getattr(config, cause) for cause in causes)
    by_method = of_method and not any(cause in given for cause in causes)
    return f"{words}, which --method {config.method} sets" if by_method else words


def warnings_about(config: Config, given: Mapping[str, str], ablations: Sequence[str] = ()) -> list[str]:
    """Return all warnings about the configuration of a new run.

    Args:
        config: The configuration.
        given: See `unused`.
        ablations: Names of the ablations that were applied to it.
    """
    short = too_short(config)
    warnings = [short] if short else []
    full = with_method(preset(config.preset), config.method)
    for name in ablations:
        changed = changes(full, ablate(full, name))
        if changed.keys() <= unused(config, dict.fromkeys(changed, "")).keys():
            warnings.append(f"--ablate {name} changes nothing with --method {config.method} and preset {full.preset}")
    return warnings + list(unused(config, given).values())
