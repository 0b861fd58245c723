"""Methods with targets of their own, by name."""

from __future__ import annotations

from engine.config.config import Config
from engine.method.adamatch import AdaMatchTargets
from engine.method.adaptive_targets import DashTargets, FlexMatchTargets, FreeMatchTargets, SoftMatchTargets
from engine.method.targets import Targets

# All other methods use `Targets`.
TARGETS: dict[str, type[Targets]] = {
    "flexmatch": FlexMatchTargets,
    "dash": DashTargets,
    "freematch": FreeMatchTargets,
    "adamatch": AdaMatchTargets,
    "softmatch": SoftMatchTargets,
}


def targets_class(method: str) -> type[Targets]:
    """Return the class that makes the targets of a method."""
    return TARGETS.get(method, Targets)


def make_targets(config: Config, classes: int, unlabeled_images: int = 0) -> Targets:
    """Make the targets of the configured method; see `Targets` for the arguments."""
    return targets_class(config.method)(config, classes, unlabeled_images)
