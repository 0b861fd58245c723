"""CTAugment policy: the transformations, how their bins are sampled, and how probes update bin weights.

ReMixMatch (ICLR 2020), section 3.2.2. The state of the policy is one array of bin weights,
`weights: (T, 2, 17) float64`: T transformations with at most two parameters of at most 17 bins each. Unused entries
stay 0 and are never drawn. The image operations are in `kernels/photometric.py` and `geometric.py`; all follow the
table below.

The authors' code differs from the paper in how levels are drawn and in the effect of five transformations. The end of
this file reproduces it: levels drawn as in that code, and the levels at which the paper's transformations have the
same effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_PARAMETERS = 2
MAX_BINS = 17
THRESHOLD = 0.8
DECAY = 0.99


@dataclass(frozen=True)
class Transformation:
    """An image transformation and the number of bins of each of its parameters."""

    name: str
    bins: tuple[int, ...]


TRANSFORMATIONS: tuple[Transformation, ...] = (
    Transformation("identity", ()),
    Transformation("autocontrast", (17,)),
    Transformation("blur", (17,)),
    Transformation("brightness", (17,)),
    Transformation("color", (17,)),
    Transformation("contrast", (17,)),
    Transformation("cutout", (17,)),
    Transformation("equalize", (17,)),
    Transformation("invert", (17,)),
    Transformation("posterize", (8,)),
    Transformation("rescale", (17, 6)),
    Transformation("rotate", (17,)),
    Transformation("sharpness", (17,)),
    Transformation("shear_x", (17,)),
    Transformation("shear_y", (17,)),
    Transformation("smooth", (17,)),
    Transformation("solarize", (17,)),
    Transformation("translate_x", (17,)),
    Transformation("translate_y", (17,)),
)
NAMES: tuple[str, ...] = tuple(t.name for t in TRANSFORMATIONS)
IDENTITY = NAMES.index("identity")

# Number of bins of each (transformation, parameter), 0 without such a parameter: (T, 2) int64.
BINS = np.zeros((len(TRANSFORMATIONS), MAX_PARAMETERS), dtype=np.int64)
for _op, _transformation in enumerate(TRANSFORMATIONS):
    BINS[_op, : len(_transformation.bins)] = _transformation.bins
_BIN_EXISTS = np.arange(MAX_BINS) < BINS[..., None]  # (T, 2, 17) bool
# Number of segments between neighboring bins: (T, 2) int64.
SEGMENTS = np.maximum(BINS - 1, 0)
_SEGMENT_EXISTS = np.arange(MAX_BINS - 1) < SEGMENTS[..., None]  # (T, 2, 16) bool


def initial_weights() -> np.ndarray:
    """Return the initial bin weights: (T, 2, 17) float64, 1 for existing bins and 0 elsewhere."""
    return _BIN_EXISTS.astype(np.float64)


def bin_probabilities(weights: np.ndarray, decay: float = DECAY, threshold: float = THRESHOLD) -> np.ndarray:
    """Return the probability of each bin when sampling a strong view.

    `m^ = (m + 1 - rho) / max(m + 1 - rho)`; entries below the threshold are set to 0, the rest normalized.

    Args:
        weights: (T, 2, 17) float64 bin weights.
        decay: rho.
        threshold: Entries of `m^` below this value are never drawn.

    Returns:
        (T, 2, 17) float64; sums to 1 over the bins of each existing parameter, 0 elsewhere.
    """
    raised = np.where(_BIN_EXISTS, weights + (1.0 - decay), 0.0)
    peak = raised.max(axis=-1, keepdims=True)
    scaled = np.divide(raised, peak, out=np.zeros_like(raised), where=peak > 0)
    return _normalized(np.where(scaled >= threshold, scaled, 0.0))


def _normalized(weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def bin_edges(probabilities: np.ndarray) -> np.ndarray:
    """Return the lower edge of each bin in the cumulative distribution, for `draw_bins`.

    Args:
        probabilities: (T, 2, n) float64 from `bin_probabilities` or `segment_probabilities`.

    Returns:
        (n, T, 2) float64, ascending along the first axis; inf after the last bin of nonzero probability, and for
        parameters that do not exist.
    """
    cumulative = np.cumsum(np.moveaxis(probabilities, -1, 0), axis=0)
    edges = np.zeros_like(cumulative)
    edges[1:] = cumulative[:-1]
    # Even if the sum is rounded down, the last bin of nonzero probability extends to 1.
    edges[edges >= cumulative[-1]] = np.inf
    return edges


def draw_bins(edges: np.ndarray, ops: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Draw bins by inverting the cumulative distribution of each parameter.

    Args:
        edges: (n, T, 2) float64 from `bin_edges`.
        ops: (...,) int64, indices into `TRANSFORMATIONS`.
        uniform: (..., 2) float64 in [0, 1), one number per parameter.

    Returns:
        (..., 2) int64 bins; -1 if the transformation has no such parameter.
    """
    # Bins are the first axis: numpy compares and sums a few long arrays several times faster than many short ones.
    reached = (uniform >= edges.take(ops, axis=1)).sum(axis=0, dtype=np.int8)
    return np.subtract(reached, 1, dtype=np.int64)


def update_weights(
    weights: np.ndarray, ops: np.ndarray, bins: np.ndarray, omega: np.ndarray, decay: float = DECAY
) -> np.ndarray:
    """Return the weights after one step's probes: `m_bin <- rho * m_bin + (1 - rho) * w` for each bin used, in order.

    Args:
        weights: (T, 2, 17) float64; not modified.
        ops: (B, 2) int64, transformations of the probes.
        bins: (B, 2, 2) int64, their bins; -1 if there is none.
        omega: (B,) float, `w = 1 - 1/2 * sum |f_ema(x_probe) - p|`, in [0, 1].
        decay: rho.

    Returns:
        (T, 2, 17) float64, a new array.
    """
    updated = weights.copy()
    # The loop keeps the order of the probes: a bin may be used several times in a step, and its last use counts most.
    # Indexing a memoryview yields Python numbers, at a fraction of the cost of indexing an array.
    cells = updated.reshape(-1).data
    probe, stage, parameter = np.nonzero(bins >= 0)
    used = (MAX_PARAMETERS * ops[probe, stage] + parameter) * MAX_BINS + bins[probe, stage, parameter]
    gains = (1.0 - decay) * omega[probe].astype(np.float64)
    for cell, gain in zip(used.tolist(), gains.tolist(), strict=True):
        cells[cell] = decay * cells[cell] + gain
    return updated


@dataclass
class Probes:
    """Probes of one step, pending until they may change the weights."""

    step: int
    ops: np.ndarray  # (B, 2) int64
    bins: np.ndarray  # (B, 2, 2) int64
    omega: np.ndarray  # (B,) float32


class CTAugmentPolicy:
    """Bin weights with a fixed delay between a probe and its effect.

    Plans are made ahead of the steps that use them, so the probes of step s first affect the plan of step s + lag. The
    delay is configured and does not depend on timing: a resumed run is bit-identical to an uninterrupted one.

    Args:
        lag: Steps from a probe to the first plan that it affects; at least 1.
        learn: If False, weights stay uniform: RandAugment over the same transformations.
    """

    def __init__(self, lag: int, learn: bool = True) -> None:
        if lag < 1:
            raise ValueError(f"lag must be at least 1 step, got {lag}")
        self.lag = lag
        self.learn = learn
        self.weights = initial_weights()  # Includes every probe that may affect the plan of the next step.
        self.waiting: list[Probes] = []  # Later probes, oldest first.
        self._after: list[np.ndarray] = []  # Weights after each of `waiting`, so that each is applied only once.

    def weights_for(self, step: int) -> np.ndarray:
        """Return the bin weights for the plan of `step`, which include the probes of all steps up to `step - lag`.

        Has no side effects, so plans can be made ahead of time and made again after a restart.

        Returns:
            (T, 2, 17) float64; must not be modified.
        """
        known = sum(probes.step <= step - self.lag for probes in self.waiting)
        return self._after[known - 1] if known else self.weights

    def observe(self, step: int, ops: np.ndarray, bins: np.ndarray, omega: np.ndarray) -> None:
        """Record the probes of a finished step. Must be called for every step, in order.

        Args:
            step: Step that ran the probes.
            ops: (B, 2) int64.
            bins: (B, 2, 2) int64, -1 if there is none.
            omega: (B,) float32.
        """
        if not self.learn:
            return
        self._enqueue(Probes(step, ops, bins, omega))
        self.weights = self.weights_for(step + 1)
        while self.waiting and self.waiting[0].step <= step + 1 - self.lag:
            del self.waiting[0], self._after[0]

    def _enqueue(self, probes: Probes) -> None:
        newest = self._after[-1] if self._after else self.weights
        self.waiting.append(probes)
        self._after.append(update_weights(newest, probes.ops, probes.bins, probes.omega))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the policy as arrays and integers."""
        return {"weights": self.weights, "waiting": [vars(probes) for probes in self.waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.weights, self.waiting, self._after = state["weights"], [], []
        for probes in state["waiting"]:
            self._enqueue(Probes(**probes))


def describe(ops: Iterable[int], levels: np.ndarray) -> str:
    """Return the names and levels of a view's transformations for a caption: `rotate 0.71, blur 0.20`."""
    parts = []
    for op, op_levels in zip(ops, levels, strict=True):
        shown = " ".join(f"{level:.2f}" for level in op_levels[: len(TRANSFORMATIONS[op].bins)])
        parts.append(f"{NAMES[op]} {shown}".rstrip())
    return ", ".join(parts)


# ---------------------------------------------------------------- The authors' code
_ROTATE, _CUTOUT = NAMES.index("rotate"), NAMES.index("cutout")
_NO_EFFECT = np.array([name in ("rescale", "translate_x", "translate_y") for name in NAMES])


def _whole_degrees() -> np.ndarray:
    """Return the levels of rotate for -45, -44, ..., 45 degrees: (91, 2) float32 in [0, 1), sums exact to 2^-48."""
    level = np.arange(91) / 90
    first = np.minimum(np.floor(level * 2**24), 2**24 - 1) / 2**24
    return np.stack([first, level - first], axis=-1).astype(np.float32)


_WHOLE_DEGREES = _whole_degrees()


def segment_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Return the probability of each segment between neighboring bins, from which the authors' code draws levels.

    It is proportional to the sum of the probabilities of both bins.

    Args:
        probabilities: (T, 2, 17) float64 from `bin_probabilities`.

    Returns:
        (T, 2, 16) float64; sums to 1 over the segments of each existing parameter, 0 elsewhere.
    """
    return _normalized(np.where(_SEGMENT_EXISTS, probabilities[..., 1:] + probabilities[..., :-1], 0.0))


def code_probe_bins(ops: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the bins that the authors' code updates, given the levels of the probes, which it draws from [0, 1).

    Args:
        ops: (..., 2) int64, indices into `TRANSFORMATIONS`.
        levels: (..., 2, 2) float32 in [0, 1).

    Returns:
        (..., 2, 2) int64; -1 if the transformation has no such parameter.
    """
    bins = BINS.take(ops, axis=0)
    return np.where(bins > 0, (levels.astype(np.float64) * bins * 0.999).astype(np.int64), -1)


def code_effects(ops: np.ndarray, levels: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return transformations and levels at which the paper's definitions reproduce the authors' code.

    The code differs from the paper in five transformations:

    - translate_x and translate_y shift by (2 v - 1) * 0.3 pixels: no effect with nearest-neighbor sampling;
    - rescale crops 0.25 v pixels from each side, which PIL rounds to the whole image: no effect;
    - rotate rounds (2 v - 1) * 45 to whole degrees;
    - cutout's side is 2 floor(s / 2) pixels instead of s = 1 + floor(0.499 v side): no effect for s = 1.

    Args:
        ops: (V, 2) int, indices into `TRANSFORMATIONS`.
        levels: (V, 2, 2) float32 in [0, 1).
        side: min(H, W) of the images.

    Returns:
        New ops and levels. Transformations without effect become the identity, which costs nothing. The second level of
        rotate is the remainder that float32 cannot represent in the first.
    """
    ops, levels = ops.copy(), levels.copy()
    flat_ops, flat_levels = ops.reshape(-1), levels.reshape(-1, MAX_PARAMETERS)
    rotated, cut = np.flatnonzero(flat_ops == _ROTATE), np.flatnonzero(flat_ops == _CUTOUT)
    degrees = np.rint((2.0 * flat_levels[rotated, 0].astype(np.float64) - 1.0) * 45.0).astype(np.int64)
    flat_levels[rotated] = _WHOLE_DEGREES.take(degrees + 45, axis=0)

    scale = 0.499 * side
    pixels = 1.0 + np.floor(scale * flat_levels[cut, 0].astype(np.float64))
    odd = pixels % 2 == 1
    # The middle of the levels at which the side is one pixel shorter.
    flat_levels[cut[odd], 0] = np.maximum(pixels[odd] - 1.5, 0.0) / scale
    flat_ops[cut[pixels == 1]] = IDENTITY

    flat_ops[_NO_EFFECT.take(flat_ops)] = IDENTITY
    flat_levels[flat_ops == IDENTITY] = 0.0
    return ops, levels
