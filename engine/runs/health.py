"""Detection of runs that do not learn: six kinds of failure, each reported once per run, in one line.

The checks are not part of the step. The trainer runs them at evaluations, where all metrics have been read back anyway.
They use means of the metrics, p(y), p~(y) and, less often, the agreement of f_ema with the network. All of these are
equal on all ranks, and none uses test labels.

The thresholds are far from the values of healthy runs that have had time to learn (`Health.late`), and a failure must
last for `HOLD` steps. docs/measurements/faults.md lists the values of healthy and broken runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config.config import Config
from engine.config.methods import uses_some
from kernels.guess import EPSILON
from pipelines.data.cache import take_images

EVERY = 32  # minimum steps between two checks; a mean over fewer is mostly noise
HOLD = 128  # steps that a failure must last; p~(y) itself is a mean over 128 steps

COLLAPSED = 0.5, 0.4  # minimum p~(y) of one class, and minimum excess over its p(y)
RATIO = 10.0  # p(y) / p~(y), or its inverse, of a class that is predicted far too rarely or too often
LOST_CLASSES = 0.2  # fraction of classes that are predicted far too rarely
USED = 0.01  # fraction of pseudo-labels that reach the threshold
INFORMED = 0.04  # confidence, scaled from identical pseudo-labels (0) to certainty (1)
FLAT = 0.95  # loss_x relative to the loss of predicting the labels' frequencies
AGREEMENT = 0.3  # of the network and f_ema, scaled from chance (0) to identical (1): Cohen's kappa

# f_ema and the network are compared on 64 to 256 images, each time after training on 200 times as many. Two passes
# without gradient cost about two thirds of a training pass, so the comparison takes 0.33 % of a run's time.
_LEAST_IMAGES, _MOST_IMAGES, _ROWS_AN_IMAGE = 64, 256, 200


@dataclass(frozen=True)
class Observation:
    """State of a run at one check.

    Attributes:
        step: Steps done.
        p_model: (L,) p~(y), the mean prediction of the last 128 steps, before alignment.
        label_marginal: (L,) p(y).
        agreement: Fraction of training images that the network and f_ema classify alike, and the fraction expected by
            chance; None if not measured.
    """

    step: int
    p_model: Sequence[float]
    label_marginal: Sequence[float]
    agreement: tuple[float, float] | None = None


class Health:
    """Checks of a run that return warnings.

    Args:
        config: Configuration of the run.
        classes: Names of the L classes.
        label_counts: (L,) labeled images per class.
        images_per_step: Images that a step trains on, over all ranks.

    Attributes:
        late: First step at which failures count: the end of the ramp, limited to 1 024 to 16 384 steps, or a quarter of
            the run if that is earlier; but at least HOLD steps, when p~(y) no longer contains its uniform start.
        ema_late: First step at which a distant f_ema counts. It always starts far from the network, so this is five
            times the steps that its decay or its running statistics average over, or three quarters of the run if that
            is earlier; but at least `late`.
        images: Number of images for the comparison of the network and f_ema.
    """

    def __init__(self, config: Config, classes: Sequence[str], label_counts: np.ndarray, images_per_step: int) -> None:
        self.config, self.classes = config, tuple(classes)
        self.labels = int(label_counts.sum())
        frequencies = label_counts / self.labels
        seen = frequencies[frequencies > 0]
        self.chance = float(-(seen * np.log(seen)).sum())  # loss_x of the best constant prediction
        # The limit of p(y): the running average is partly uniform for its first thousands of steps.
        self.p_data = np.asarray(config.class_distribution or frequencies)
        if config.marginal == "uniform":
            self.p_data = np.full(len(frequencies), 1 / len(frequencies))
        self.given = bool(config.class_distribution) or config.marginal == "uniform"
        ramp = config.ramp_kimg * 1024 / config.batch
        self.late = max(min(max(ramp, 1024), 16384, config.steps / 4), HOLD)
        memory = max(1 / max(1 - config.ema_decay, 1e-9), 1 / max(config.bn_momentum, 1e-9))
        self.ema_late = max(self.late, min(5 * memory, config.steps * 3 / 4))
        self.images_per_step = images_per_step
        affordable = config.eval_every * images_per_step // _ROWS_AN_IMAGE
        self.images = min(max(affordable, _LEAST_IMAGES), _MOST_IMAGES)
        if config.bn == "split":  # which needs full groups
            group = config.batch // config.bn_groups
            self.images = max(self.images // group, 1) * group
        self._said: list[str] = []
        self._since: dict[str, int] = {}  # by kind of failure, the first of the consecutive checks that found it
        self._looked = self._compared = 0  # step of the last check, and of the last comparison
        self._sums = dict.fromkeys(("loss_x", "confidence", "guesses_used"), 0.0)  # since the last check
        self._steps = 0  # since the last check

    def state_dict(self) -> dict[str, Any]:
        """Return plain values from which a resumed run continues as if undisturbed."""
        return {
            "said": list(self._said),
            "since": dict(self._since),
            "looked": self._looked,
            "compared": self._compared,
            "sums": dict(self._sums),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._said, self._since = list(state["said"]), dict(state["since"])
        self._looked, self._compared = state["looked"], state["compared"]
        self._sums, self._steps = dict(state["sums"]), state["steps"]

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of the next step."""
        for name in self._sums:
            self._sums[name] += metrics[name]
        self._steps += 1

    def due(self, step: int) -> bool:
        """Return whether it is time for a check after `step` steps."""
        return self._steps > 0 and step - self._looked >= EVERY

    def comparing(self, step: int) -> bool:
        """Return whether the check should compare the network and f_ema: two passes over `images` images."""
        rows = (step - self._compared) * self.images_per_step
        return step >= self.ema_late and "ema" not in self._said and rows >= _ROWS_AN_IMAGE * self.images

    def check(self, seen: Observation) -> list[str]:
        """Check the run, and reset the means over steps.

        Returns:
            A list with one line if there is a failure that has lasted long enough and has not been reported; if there
            are several, for the first kind in `_found`. Otherwise an empty list.
        """
        means = {name: value / self._steps for name, value in self._sums.items()}
        self._sums, self._steps, self._looked = dict.fromkeys(self._sums, 0.0), 0, seen.step
        if seen.agreement is not None:
            self._compared = seen.step
        found = self._found(seen, means) if seen.step >= self.late else {}
        self._since = {kind: self._since.get(kind, seen.step) for kind in found}
        for kind, text in found.items():
            # A single comparison of f_ema is enough: they are rare and use many images.
            lasts = kind == "ema" or seen.step - self._since[kind] >= HOLD
            if not lasts or kind in self._said:
                break
            self._said.append(kind)
            return [f"step {seen.step}: {text}"]
        return []

    def _found(self, seen: Observation, means: Mapping[str, float]) -> dict[str, str]:
        """Return the failures found by this check, by kind, causes before their effects.

        If pseudo-labels collapse, labels are no longer learned. If labels are not learned, pseudo-labels carry no
        information and their marginal is arbitrary. The EMA of such a network cannot be judged.
        """
        found = {"flat": self._flat(means["loss_x"]), "ema": self._ema_far(seen)}
        if self.config.unlabeled:
            p_model = np.asarray(seen.p_model)
            found = {
                "collapse": self._collapse(p_model),
                "flat": found["flat"],
                "unused": self._unused(means["guesses_used"]),
                "prior": self._prior(p_model, np.asarray(seen.label_marginal), means["confidence"]),
                "ratio": self._ratio_stuck(p_model),
                "ema": found["ema"],
            }
        return {kind: text for kind, text in found.items() if text}

    def _collapse(self, p_model: np.ndarray) -> str:
        """Check whether one class dominates the pseudo-labels, or several are nearly missing, unlike in the labels."""
        c, p_data = self.config, self.p_data
        align = "on" if c.align else "off"
        advice = f"check --align ({align}), --w-u {c.w_u:g}, --ramp-kimg {c.ramp_kimg:g} and --lr {c.lr:g}"
        most = int((p_model - p_data).argmax())
        mass, excess = COLLAPSED
        if p_model[most] >= mass and p_model[most] - p_data[most] >= excess:
            return (
                f"pseudo-labels collapsed: the mean prediction of the last 128 steps is {100 * p_model[most]:.0f} % "
                f"class {self.classes[most]}, whose p(y) is {100 * p_data[most]:.0f} %; {advice}"
            )
        lost = np.flatnonzero((self._ratio(p_model) > RATIO) & (p_data >= self._notable))
        # A given p(y) may be wrong for several classes; `_ratio_stuck` reports that.
        if self.given or len(lost) < max(2, LOST_CLASSES * len(p_data)):
            return ""
        names = ", ".join(self.classes[each] for each in lost[:5]) + (", ..." if len(lost) > 5 else "")
        return (
            f"pseudo-labels collapsed: in the mean prediction of the last 128 steps, {len(lost)} of {len(p_data)} "
            f"classes ({names}) have less than a tenth of their p(y); {advice}"
        )

    def _flat(self, loss_x: float) -> str:
        """Check whether labeled images are classified no better than by a constant prediction.

        A loss that stops falling means little: mixup and augmentation keep it above 0, at a floor that depends on the
        method. So loss_x is only compared with chance.
        """
        if self.chance == 0 or loss_x < FLAT * self.chance:
            return ""
        return (
            f"labels are not learned: loss_x is {loss_x:.2f}, and a constant prediction of their frequencies has "
            f"{self.chance:.2f}; check --lr {self.config.lr:g}, --weight-decay {self.config.weight_decay:g}, and "
            "whether the labels match the images: "
            f"remixmatch data info {shlex.quote(self.config.dataset)} --png classes.png"
        )

    def _unused(self, used: float) -> str:
        """Check whether nearly all pseudo-labels are below the threshold, which leaves only labeled images."""
        if not self.config.threshold or used >= USED:
            return ""
        return (
            f"almost no pseudo-labels are used: {100 * used:.1f} % reach --threshold {self.config.threshold:g}; check "
            f"--threshold, --lr {self.config.lr:g}, and whether {self.labels} labels are enough"
        )

    def _prior(self, p_model: np.ndarray, label_marginal: np.ndarray, confidence: float) -> str:
        """Check whether pseudo-labels hardly differ between images.

        If the prediction were p~(y) for every image, alignment would turn it into p(y), and sharpening into normalized
        p(y)^(1/T), whose largest entry would be the logged confidence. If predictions differ, each is more certain of
        some class, and the mean confidence is higher. This check does not apply to hard labels or if only confident
        pseudo-labels count; see `_unused`.
        """
        c = self.config
        if c.hard_labels or uses_some(c):
            return ""
        sharp = (label_marginal if c.align else p_model) ** (1 / c.temperature)
        same = sharp.max() / sharp.sum()
        # If one class has nearly all of p(y), confident pseudo-labels cannot be distinguished from identical ones.
        if same > 0.9 or confidence >= same + INFORMED * (1 - same):
            return ""
        return (
            f"pseudo-labels carry no more information than the class prior: their mean confidence is {confidence:.3f}, "
            f"and identical ones would have {same:.3f}; check --temperature {c.temperature:g}, --w-u {c.w_u:g} and "
            f"--lr {c.lr:g}"
        )

    def _ratio_stuck(self, p_model: np.ndarray) -> str:
        """Check whether alignment fails to bring some class's pseudo-labels to p(y)."""
        p_data, ratio = self.p_data, self._ratio(p_model)
        too_rare = (ratio > RATIO) & (p_data >= self._notable)
        too_often = (ratio < 1 / RATIO) & (p_model >= self._notable)
        limit = too_rare | too_often
        if not self.config.align or not limit.any():
            return ""
        worst = int(np.where(limit, np.abs(np.log(ratio)), -1).argmax())
        advice = (
            "whether --class-distribution, --class-prior or --marginal matches the images"
            if self.given
            else "the labels of this class; if the class frequencies of images and labels differ, set --class-prior"
        )
        return (
            f"distribution alignment does not bring pseudo-labels to p(y): class {self.classes[worst]} has p(y) "
            f"{p_data[worst]:.3f} and p~(y) {p_model[worst]:.3f}, a ratio of {ratio[worst]:.3g}; check {advice}"
        )

    def _ema_far(self, seen: Observation) -> str:
        """Check whether the evaluated EMA model differs too much from the trained network."""
        if seen.agreement is None or seen.step < self.ema_late:
            return ""
        share, by_chance = seen.agreement
        if share >= by_chance + AGREEMENT * (1 - by_chance):
            return ""
        c = self.config
        return (
            f"the evaluated EMA model is far from the network: they agree on {100 * share:.0f} % of {self.images} "
            f"training images ({100 * by_chance:.0f} % expected by chance); check --ema-decay {c.ema_decay:g} and "
            f"--bn-momentum {c.bn_momentum:g}, which may be too slow for --steps {c.steps}"
        )

    def _ratio(self, p_model: np.ndarray) -> np.ndarray:
        """Return alignment's factors of the predictions: (L,), section 3.1 of the paper."""
        return (self.p_data + EPSILON) / (p_model + EPSILON)

    @property
    def _notable(self) -> float:
        """Least class probability, a fifth of a uniform one, at which a ratio is meaningful."""
        return 0.2 / len(self.p_data)


def compared_images(images: np.ndarray, count: int) -> np.ndarray:
    """Return `count` evenly spaced images, with repetitions if N < count: (N, H, W, 3) to (count, H, W, 3)."""
    return take_images(images, np.linspace(0, len(images) - 1, count).astype(np.int64))
