"""CTAugment's policy: which distortions exist, how bins are sampled, how probes move their weights.

ReMixMatch (ICLR 2020), section 3.2.2. The policy's whole state is one array of bin weights,
`weights: (T, 2, 17) float64`, for T transformations of at most two parameters of at most 17 bins each.
Cells that no parameter owns stay 0 and are never drawn. The image operations themselves are
`kernels/photometric.py`'s and the matrices of `geometric.py`; all follow the one table below.

The authors' code differs from the paper in how levels are drawn and in what five transformations do at a level. What it
does is at the end of this file, as functions of a plan's numbers: levels drawn its way, and levels at which the paper's
transformations do what its own do.
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
    """A distortion and the number of bins of each of its parameters."""

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

# bins of each (transformation, parameter), 0 where it has no such parameter: (T, 2) int64
BINS = np.zeros((len(TRANSFORMATIONS), MAX_PARAMETERS), dtype=np.int64)
for _row, _transformation in enumerate(TRANSFORMATIONS):
    BINS[_row, : len(_transformation.bins)] = _transformation.bins
_BIN_EXISTS = np.arange(MAX_BINS) < BINS[..., None]  # (T, 2, 17) bool
# segments between neighbouring bins, likewise: (T, 2) int64
SEGMENTS = np.maximum(BINS - 1, 0)
_SEGMENT_EXISTS = np.arange(MAX_BINS - 1) < SEGMENTS[..., None]  # (T, 2, 16) bool


def initial_weights() -> np.ndarray:
    """Bin weights at the start: (T, 2, 17) float64, 1 in every bin that exists, 0 elsewhere."""
    return _BIN_EXISTS.astype(np.float64)


def bin_probabilities(weights: np.ndarray, decay: float = DECAY, threshold: float = THRESHOLD) -> np.ndarray:
    """Probability of each bin when a strong view is sampled.

    `m^ = (m + 1 - rho) / max(m + 1 - rho)`, entries below the threshold dropped, then normalised.

    Args:
        weights: (T, 2, 17) float64 bin weights.
        decay: rho.
        threshold: entries of `m^` below it are never drawn.

    Returns:
        (T, 2, 17) float64; rows of existing parameters sum to 1, the others are 0.
    """
    raised = np.where(_BIN_EXISTS, weights + (1.0 - decay), 0.0)
    peak = raised.max(axis=-1, keepdims=True)
    normalised = np.divide(raised, peak, out=np.zeros_like(raised), where=peak > 0)
    return _shares(np.where(normalised >= threshold, normalised, 0.0))


def _shares(weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def bin_edges(probabilities: np.ndarray) -> np.ndarray:
    """Where each bin begins in [0, 1), from its predecessors' probabilities: what `draw_bins` takes.

    Args:
        probabilities: (T, 2, n) float64, see `bin_probabilities` and `segment_probabilities`.

    Returns:
        (n, T, 2) float64, rising along the first axis; inf after the last bin with any probability, and for parameters
        that do not exist.
    """
    cumulative = np.cumsum(np.moveaxis(probabilities, -1, 0), axis=0)
    edges = np.zeros_like(cumulative)
    edges[1:] = cumulative[:-1]
    # the last bin with any probability closes the interval, whatever the rounding of the sum
    edges[edges >= cumulative[-1]] = np.inf
    return edges


def draw_bins(edges: np.ndarray, ops: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Bins by inverting the cumulative distribution of each drawn transformation's parameters.

    Args:
        edges: (n, T, 2) float64, see `bin_edges`.
        ops: (...,) int64, indices into `TRANSFORMATIONS`.
        uniform: (..., 2) float64 in [0, 1), one number a parameter.

    Returns:
        (..., 2) int64 bins; -1 where the transformation has no such parameter.
    """
    # bins come first: numpy compares and adds long rows of draws several times faster than rows of 17 bins
    begun = (uniform >= edges.take(ops, axis=1)).sum(axis=0, dtype=np.int8)
    return np.subtract(begun, 1, dtype=np.int64)


def update_weights(
    weights: np.ndarray, ops: np.ndarray, bins: np.ndarray, omega: np.ndarray, decay: float = DECAY
) -> np.ndarray:
    """Weights after one step's probes: `m_bin <- rho * m_bin + (1 - rho) * w`, for each bin used, in row order.

    Args:
        weights: (T, 2, 17) float64; not changed.
        ops: (B, 2) int64, the probes' transformations.
        bins: (B, 2, 2) int64, their bins, -1 where there is none.
        omega: (B,) float, `w = 1 - 1/2 * sum |f_ema(x_probe) - p|`, in [0, 1].
        decay: rho.

    Returns:
        (T, 2, 17) float64, a new array.
    """
    updated = weights.copy()
    # a bin may be used several times in a step, and the last use counts most: hence the loop, in order. It touches
    # cells through a memoryview, whose elements are Python's numbers and cost a fraction of an array's
    cells = updated.reshape(-1).data
    row, stage, parameter = np.nonzero(bins >= 0)
    used = (MAX_PARAMETERS * ops[row, stage] + parameter) * MAX_BINS + bins[row, stage, parameter]
    gains = (1.0 - decay) * omega[row].astype(np.float64)
    for cell, gain in zip(used.tolist(), gains.tolist(), strict=True):
        cells[cell] = decay * cells[cell] + gain
    return updated


@dataclass
class Probes:
    """One step's probes, waiting for the step in which they may change the weights."""

    step: int
    ops: np.ndarray  # (B, 2) int64
    bins: np.ndarray  # (B, 2, 2) int64
    omega: np.ndarray  # (B,) float32


class CTAugmentPolicy:
    """Bin weights with a fixed delay between a probe and its effect.

    Plans are made ahead of the step that executes them, so the probes of step s first count in the plan of step
    s + lag. The delay is a number of the configuration and not an accident of timing, which is what lets a
    resumed run repeat an undisturbed one bit for bit.

    Args:
        lag: steps from a probe to the first plan that knows it; at least 1.
        learn: with False weights stay uniform for ever: RandAugment over the same transformations.
    """

    def __init__(self, lag: int, learn: bool = True) -> None:
        if lag < 1:
            raise ValueError(f"lag must be at least 1 step, got {lag}")
        self.lag = lag
        self.learn = learn
        self.weights = initial_weights()  # holds every probe that the plan of the next step may know
        self.waiting: list[Probes] = []  # younger ones, oldest first
        self._after: list[np.ndarray] = []  # weights after each of these and all before it: each is applied once

    def weights_for(self, step: int) -> np.ndarray:
        """Bin weights for the plan of `step`: every probe of steps up to `step - lag`, none later.

        Changes nothing, so plans may be made ahead and, after a restart, made again.

        Returns:
            (T, 2, 17) float64; must not be changed.
        """
        known = sum(probes.step <= step - self.lag for probes in self.waiting)
        return self._after[known - 1] if known else self.weights

    def observe(self, step: int, ops: np.ndarray, bins: np.ndarray, omega: np.ndarray) -> None:
        """Hands in the probes of a finished step; steps come in order, none left out.

        Args:
            step: the step that ran them.
            ops: (B, 2) int64.
            bins: (B, 2, 2) int64, -1 where there is none.
            omega: (B,) float32.
        """
        if not self.learn:
            return
        self._wait(Probes(step, ops, bins, omega))
        self.weights = self.weights_for(step + 1)
        while self.waiting and self.waiting[0].step <= step + 1 - self.lag:
            del self.waiting[0], self._after[0]

    def _wait(self, probes: Probes) -> None:
        newest = self._after[-1] if self._after else self.weights
        self.waiting.append(probes)
        self._after.append(update_weights(newest, probes.ops, probes.bins, probes.omega))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed policy needs, as arrays and integers."""
        return {"weights": self.weights, "waiting": [vars(probes) for probes in self.waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.weights, self.waiting, self._after = state["weights"], [], []
        for probes in state["waiting"]:
            self._wait(Probes(**probes))


def describe(ops: Iterable[int], levels: np.ndarray) -> str:
    """Names and levels of one view's transformations, for a caption: `rotate 0.71, blur 0.20`."""
    parts = []
    for op, op_levels in zip(ops, levels, strict=True):
        shown = " ".join(f"{level:.2f}" for level in op_levels[: len(TRANSFORMATIONS[op].bins)])
        parts.append(f"{NAMES[op]} {shown}".rstrip())
    return ", ".join(parts)


# ---------------------------------------------------------------- as in the authors' code
_ROTATE, _CUTOUT = NAMES.index("rotate"), NAMES.index("cutout")
_UNMOVING = np.array([name in ("rescale", "translate_x", "translate_y") for name in NAMES])


def _whole_degrees() -> np.ndarray:
    """Levels of rotate at -45, -44, ..., 45 degrees: (91, 2) float32 in [0, 1), whose sums are exact to 2^-48."""
    level = np.arange(91) / 90
    first = np.minimum(np.floor(level * 2**24), 2**24 - 1) / 2**24
    return np.stack([first, level - first], axis=-1).astype(np.float32)


_WHOLE_DEGREES = _whole_degrees()


def segment_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Probability of each segment between neighbouring bins, from which the authors' code draws: the sum of both bins'.

    Args:
        probabilities: (T, 2, 17) float64, see `bin_probabilities`.

    Returns:
        (T, 2, 16) float64; rows of existing parameters sum to 1, the others are 0.
    """
    return _shares(np.where(_SEGMENT_EXISTS, probabilities[..., 1:] + probabilities[..., :-1], 0.0))


def code_probe_bins(ops: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Bins that the authors' code updates for a probe's levels, which it draws from all of [0, 1).

    Args:
        ops: (..., 2) int64, indices into `TRANSFORMATIONS`.
        levels: (..., 2, 2) float32 in [0, 1).

    Returns:
        (..., 2, 2) int64; -1 where the transformation has no such parameter.
    """
    bins = BINS.take(ops, axis=0)
    return np.where(bins > 0, (levels.astype(np.float64) * bins * 0.999).astype(np.int64), -1)


def code_effects(ops: np.ndarray, levels: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Transformations of the paper that do what those of the authors' code do at the given levels.

    Of those that differ, the code

    - translates by (2 v - 1) * 0.3 pixels, which leaves every pixel the nearest to its place;
    - rescales what is left when 0.25 v pixels are cut off each side, for which PIL takes the whole image;
    - rotates by (2 v - 1) * 45 degrees, rounded to whole ones;
    - cuts out 2 floor(s / 2) pixels along each axis where the paper has s = 1 + floor(0.499 v side): for 1, none.

    Args:
        ops: (V, 2) int, indices into `TRANSFORMATIONS`.
        levels: (V, 2, 2) float32 in [0, 1).
        side: min(H, W) of the images.

    Returns:
        Both again, new arrays. What leaves the image as it is has become the identity, which costs a view nothing. The
        second level of rotate is what single precision cannot hold of the first.
    """
    ops, levels = ops.copy(), levels.copy()
    flat, of_flat = ops.reshape(-1), levels.reshape(-1, MAX_PARAMETERS)
    rotated, cut = np.flatnonzero(flat == _ROTATE), np.flatnonzero(flat == _CUTOUT)
    degrees = np.rint((2.0 * of_flat[rotated, 0].astype(np.float64) - 1.0) * 45.0).astype(np.int64)
    of_flat[rotated] = _WHOLE_DEGREES.take(degrees + 45, axis=0)

    scale = 0.499 * side
    pixels = 1.0 + np.floor(scale * of_flat[cut, 0].astype(np.float64))
    odd = pixels % 2 == 1
    of_flat[cut[odd], 0] = np.maximum(pixels[odd] - 1.5, 0.0) / scale  # the middle of the levels of one pixel less
    flat[cut[pixels == 1]] = IDENTITY

    flat[_UNMOVING.take(flat)] = IDENTITY
    of_flat[flat == IDENTITY] = 0.0
    return ops, levels
