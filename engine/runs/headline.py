"""The accuracy that a run reports first: the median over its last 20 evaluations, or that of the last step.

The papers report the median. Until 20 evaluations follow the ramp, it includes evaluations of a model that has hardly
been trained, so the accuracy of the last step is reported first. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from engine.config.config import Config
from engine.config.scaling import ramp_steps

MEDIAN_OF = 20  # evaluations


def median_of_last(accuracies: Sequence[float]) -> float:
    """Return the accuracy that the papers report: the median over the last 20 evaluations, or over all if fewer."""
    return median(accuracies[-MEDIAN_OF:])


@dataclass(frozen=True)
class Evaluations:
    """Numbers of evaluations of a finished run.

    Attributes:
        count: All evaluations.
        after_ramp: Evaluations after the end of the ramp.
    """

    count: int
    after_ramp: int

    @property
    def median_first(self) -> bool:
        """Whether the median is reported first."""
        return self.after_ramp >= MEDIAN_OF

    @property
    def median_name(self) -> str:
        """Name of the median, which says what it is over."""
        if self.count == 1:
            return "the only evaluation"
        known = f"the last {MEDIAN_OF}" if self.count > MEDIAN_OF else f"all {self.count}"
        after = "" if self.median_first else f", {self.after_ramp} after the ramp"
        return f"median of {known} evaluations{after}"


def planned_evaluations(config: Config, steps: int) -> Evaluations:
    """Return the evaluations in the first `steps` steps: every `eval_every` steps, and after the run's last step."""
    regular, ramp = steps // config.eval_every, ramp_steps(config)
    during = min(int(ramp // config.eval_every), regular)
    last = steps == config.steps and steps % config.eval_every > 0
    return Evaluations(regular + last, regular - during + (last and steps > ramp))


def evaluations_of(summary: Mapping[str, Any], config: Config) -> Evaluations:
    """Return the evaluations of a finished run from its summary.json, or from its configuration if that lacks them."""
    if {"evaluations", "evaluations_after_ramp"} <= summary.keys():
        return Evaluations(int(summary["evaluations"]), int(summary["evaluations_after_ramp"]))
    return planned_evaluations(config, config.steps)


def unequal_classes(summary: Mapping[str, Any], config: Config) -> bool:
    """Return whether classes are unequal, in training or in the test set, so that the accuracy does not say enough.

    Args:
        summary: The run's summary.json, or {} for an unfinished run.
        config: Its configuration.
    """
    ratios = config.class_ratios
    apart = abs(summary.get("balanced_accuracy", 0.0) - summary.get("test_accuracy", 0.0))
    return ratios.of_labeled or ratios.of_unlabeled or ("balanced_accuracy" in summary and apart > 1e-6)


def shown_results(evaluations: Evaluations, last: float, middle: float) -> str:
    """Return both results of a run in words, the one that is reported first in front.

    Args:
        evaluations: The run's evaluations.
        last: Accuracy or error after the last step, in percent.
        middle: Its median over the last evaluations.
    """
    at_end = f"{last:.2f} % after the last step"
    if evaluations.count == 1:
        return f"{at_end} ({evaluations.median_name})"
    if evaluations.median_first:
        return f"{middle:.2f} % ({evaluations.median_name}), {at_end}"
    return f"{at_end}, {middle:.2f} % as {evaluations.median_name}"
