"""Tells a run that does not learn, while it goes on: six kinds of failure, each said once a run, in one line.

Nothing here is a part of the step. The trainer looks at evaluations, where all metrics have been read back anyway: at
means of the metrics, p(y), p~(y), and now and then at how far f_ema is from the network. All of these are equal
on all ranks, and no test label is among them.

Thresholds are far from what healthy runs show once they have had time to learn (`Health.late`), and something has to be
seen for `HOLD` steps. Which values healthy and broken runs have is in docs/measurements/faults.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config.config import Config
from kernels.guess import EPSILON
from pipelines.cache import take_images

EVERY = 32  # steps between two looks, at least: a mean over fewer is mostly noise
HOLD = 128  # steps over which all looks must see the same; p~(y) itself is the mean of so many

COLLAPSED = 0.5, 0.4  # p~(y) of one class, and how much more that is than its p(y)
RATIO = 10.0  # p(y) / p~(y), or its inverse, of a class that is hardly guessed, or too much
LOST_CLASSES = 0.2  # share of all classes that are hardly guessed
USED = 0.01  # share of guesses that reach the threshold
INFORMED = 0.04  # confidence between that of equal guesses (0) and certainty (1)
FLAT = 0.95  # loss_x as a share of what guessing by the labels' frequencies costs
AGREEMENT = 0.3  # of the network and f_ema, between that of chance (0) and that of equals (1): Cohen's kappa

# f_ema and the network are compared on 64 to 256 images, after 200 times as many rows were trained: two passes without
# gradient cost about a third of the trained rows' three, so the comparison takes 0.33 % of a run's time
_LEAST_IMAGES, _MOST_IMAGES, _ROWS_AN_IMAGE = 64, 256, 200


@dataclass(frozen=True)
class Observation:
    """What is seen of a run at one moment.

    Attributes:
        step: steps done.
        p_model: (L,) p~(y), the mean guess of the last 128 steps, before alignment.
        label_marginal: (L,) p(y).
        agreement: share of training images that the network and f_ema classify alike, and what it would be by chance;
            None where it was not measured.
    """

    step: int
    p_model: Sequence[float]
    label_marginal: Sequence[float]
    agreement: tuple[float, float] | None = None


class Health:
    """Turns what is seen of a run into warnings.

    Args:
        config: of the run.
        classes: names of the L classes.
        label_counts: (L,) labeled images of every class.
        images_per_step: rows of a step that are trained, over all ranks.

    Attributes:
        late: the first step at which a failure counts: the end of the ramp, but between 1 024 and 16 384 steps; a
            quarter of the run is late anyway, once p~(y) has forgotten that it started uniform.
        ema_late: likewise of f_ema, which is far from the network at first whatever happens: five times the steps that
            its decay or its running statistics average over. At three quarters of a run it is late anyway.
        images: how many the network and f_ema are compared on.
    """

    def __init__(self, config: Config, classes: Sequence[str], label_counts: np.ndarray, images_per_step: int) -> None:
        self.config, self.classes = config, tuple(classes)
        frequencies = label_counts / label_counts.sum()
        seen = frequencies[frequencies > 0]
        self.chance = float(-(seen * np.log(seen)).sum())  # loss_x of the best constant guess
        # where p(y) goes: the running one is partly uniform for its first thousands of steps
        self.p_data = np.asarray(config.class_distribution or frequencies)
        ramp = config.ramp_kimg * 1024 / config.batch
        self.late = max(min(max(ramp, 1024), 16384, config.steps / 4), HOLD)
        memory = max(1 / max(1 - config.ema_decay, 1e-9), 1 / max(config.bn_momentum, 1e-9))
        self.ema_late = max(self.late, min(5 * memory, config.steps * 3 / 4))
        self.images_per_step = images_per_step
        affordable = config.eval_every * images_per_step // _ROWS_AN_IMAGE
        self.images = min(max(affordable, _LEAST_IMAGES), _MOST_IMAGES)
        if config.bn == "split":  # whose groups have to be full
            group = config.batch // config.bn_groups
            self.images = max(self.images // group, 1) * group
        self._said: list[str] = []
        self._since: dict[str, int] = {}  # the first look of those in a row that saw a kind of failure
        self._looked = self._compared = 0  # the last step at which
        self._sums = dict.fromkeys(("loss_x", "confidence", "guesses_used"), 0.0)  # over the steps since the last look
        self._steps = 0  # of which there are so many

    def state_dict(self) -> dict[str, Any]:
        """Plain values, with which a resumed run goes on as if undisturbed."""
        return {
            "said": list(self._said),
            "since": dict(self._since),
            "looked": self._looked,
            "compared": self._compared,
            "sums": dict(self._sums),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._said, self._since = list(state["said"]), dict(state["since"])
        self._looked, self._compared = state["looked"], state["compared"]
        self._sums, self._steps = dict(state["sums"]), state["steps"]

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of the next step."""
        for name in self._sums:
            self._sums[name] += metrics[name]
        self._steps += 1

    def due(self, step: int) -> bool:
        """Whether it is time for another look, `step` steps done."""
        return self._steps > 0 and step - self._looked >= EVERY

    def comparing(self, step: int) -> bool:
        """Whether the network and f_ema should be compared for it, which takes two passes over `images` images."""
        rows = (step - self._compared) * self.images_per_step
        return step >= self.ema_late and "ema" not in self._said and rows >= _ROWS_AN_IMAGE * self.images

    def check(self, seen: Observation) -> list[str]:
        """Looks at the run, and forgets the steps that were added before.

        Returns:
            A line for the kind of failure that is there, if it has been for long enough and was not said before; of
            several kinds for the first of `_found`. Otherwise none.
        """
        means = {name: value / self._steps for name, value in self._sums.items()}
        self._sums, self._steps, self._looked = dict.fromkeys(self._sums, 0.0), 0, seen.step
        if seen.agreement is not None:
            self._compared = seen.step
        found = self._found(seen, means) if seen.step >= self.late else {}
        self._since = {kind: self._since.get(kind, seen.step) for kind in found}
        for kind, text in found.items():
            # one comparison of f_ema is enough: they are rare, and of many images
            lasts = kind == "ema" or seen.step - self._since[kind] >= HOLD
            if not lasts or kind in self._said:
                break
            self._said.append(kind)
            return [f"step {seen.step}: {text}"]
        return []

    def _found(self, seen: Observation, means: Mapping[str, float]) -> dict[str, str]:
        """What is wrong at this look, by its kind, causes before their results.

        Where guesses collapse, labels are not learned any more; where labels are not learned, guesses say nothing and
        their marginals are arbitrary; and the EMA of a network that is in any such trouble says nothing about itself.
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
        """Whether most guesses are of one class, or several classes are hardly guessed, and labels say otherwise."""
        c, p_data = self.config, self.p_data
        align = "on" if c.align else "off"
        advice = f"look at --align ({align}), --w-u {c.w_u:g}, --ramp-kimg {c.ramp_kimg:g} and --lr {c.lr:g}"
        most = int((p_model - p_data).argmax())
        mass, excess = COLLAPSED
        if p_model[most] >= mass and p_model[most] - p_data[most] >= excess:
            return (
                f"guesses collapse: {p_model[most]:.0%} of the mean guess of the last 128 steps is class "
                f"{self.classes[most]}, whose share p(y) is {p_data[most]:.0%}; {advice}"
            )
        lost = np.flatnonzero((self._ratio(p_model) > RATIO) & (p_data >= self._notable))
        # a given p(y) may be wrong in several classes: that is for `_ratio_stuck`
        if c.class_distribution or len(lost) < max(2, LOST_CLASSES * len(p_data)):
            return ""
        names = ", ".join(self.classes[each] for each in lost[:5]) + (", ..." if len(lost) > 5 else "")
        return (
            f"guesses collapse: {len(lost)} of {len(p_data)} classes ({names}) have less than a tenth of their share "
            f"p(y) in the mean guess of the last 128 steps; {advice}"
        )

    def _flat(self, loss_x: float) -> str:
        """Whether labeled images are classified no better than by a constant.

        That a loss no longer falls says little: mixup and augmentation leave it above 0, at a floor that differs
        between methods. So it is compared with chance alone.
        """
        if self.chance == 0 or loss_x < FLAT * self.chance:
            return ""
        return (
            f"the labels are not learned: loss_x is {loss_x:.2f}, and a constant guess of their frequencies costs "
            f"{self.chance:.2f}; look at --lr {self.config.lr:g}, --weight-decay {self.config.weight_decay:g}, and "
            "whether images have their own labels (remixmatch data info --png)"
        )

    def _unused(self, used: float) -> str:
        """Whether nearly all guesses are below the threshold, so that the run is one on labeled images alone."""
        if not self.config.threshold or used >= USED:
            return ""
        return (
            f"hardly a guess is used: {used:.1%} of them reach --threshold {self.config.threshold:g}; look at that, "
            f"--lr {self.config.lr:g} and --labels {self.config.labels}"
        )

    def _prior(self, p_model: np.ndarray, label_marginal: np.ndarray, confidence: float) -> str:
        """Whether guesses hardly differ from image to image.

        If every image had the guess p~(y), alignment would turn it into p(y), and sharpening that into p(y)^(1/T),
        normalised. The largest entry of this is the confidence that would be logged. Where guesses differ, each is more
        certain of some class, and the mean of their largest entries lies above it. That says nothing where labels are
        hard, or where only confident guesses count: see `_unused`.
        """
        c = self.config
        if c.hard_labels or c.threshold:
            return ""
        sharp = (label_marginal if c.align else p_model) ** (1 / c.temperature)
        same = sharp.max() / sharp.sum()
        # where one class has nearly everything, equal guesses and certain ones look alike
        if same > 0.9 or confidence >= same + INFORMED * (1 - same):
            return ""
        return (
            f"guesses say no more than the prior: their mean confidence is {confidence:.3f}, and {same:.3f} if all "
            f"images had the same; look at --temperature {c.temperature:g}, --w-u {c.w_u:g} and --lr {c.lr:g}"
        )

    def _ratio_stuck(self, p_model: np.ndarray) -> str:
        """Whether alignment has pulled at some class for long, and its guesses do not come to p(y)."""
        p_data, ratio = self.p_data, self._ratio(p_model)
        too_rare = (ratio > RATIO) & (p_data >= self._notable)
        too_often = (ratio < 1 / RATIO) & (p_model >= self._notable)
        limit = too_rare | too_often
        if not self.config.align or not limit.any():
            return ""
        worst = int(np.where(limit, np.abs(np.log(ratio)), -1).argmax())
        advice = (
            "the given --class-distribution or --class-prior, which the images may not have"
            if self.config.class_distribution
            else "the labels of this class; if images have other frequencies than labels, --class-prior says which"
        )
        return (
            f"distribution alignment does not bring the guesses to p(y): class {self.classes[worst]} has p(y) "
            f"{p_data[worst]:.3f} and p~(y) {p_model[worst]:.3f}, a ratio of {ratio[worst]:.3g}; look at {advice}"
        )

    def _ema_far(self, seen: Observation) -> str:
        """Whether what is evaluated is another network than what learns."""
        if seen.agreement is None or seen.step < self.ema_late:
            return ""
        share, by_chance = seen.agreement
        if share >= by_chance + AGREEMENT * (1 - by_chance):
            return ""
        c = self.config
        return (
            f"the EMA model, which is what counts, is far from the network: they agree on {share:.0%} of {self.images} "
            f"training images, {by_chance:.0%} by chance; look at --ema-decay {c.ema_decay:g} and --bn-momentum "
            f"{c.bn_momentum:g}, which may be too slow for --steps {c.steps}"
        )

    def _ratio(self, p_model: np.ndarray) -> np.ndarray:
        """(L,) by which alignment multiplies guesses: section 3.1 of the paper."""
        return (self.p_data + EPSILON) / (p_model + EPSILON)

    @property
    def _notable(self) -> float:
        """A class of a smaller share, a fifth of an equal one, is guessed too rarely for its ratio to mean much."""
        return 0.2 / len(self.p_data)


def compared_images(images: np.ndarray, count: int) -> np.ndarray:
    """So many images, evenly spaced, some more than once where there are fewer: (N, H, W, 3) to (count, H, W, 3)."""
    return take_images(images, np.linspace(0, len(images) - 1, count).astype(np.int64))
