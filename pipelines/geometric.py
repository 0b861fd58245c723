"""Geometric transformations: from a plan's levels to matrices, on the host, the same for every backend.

ReMixMatch (ICLR 2020), section 3.2.2. Rotation, shears and translations are affine maps of the nearest pixel, and
differ in their matrix alone. The other transformations are `kernels/photometric.py`'s, and take levels as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.photometric import PHOTOMETRIC
from pipelines import ctaugment

Matrix = Callable[[np.ndarray, int, int], np.ndarray]
GEOMETRIC: dict[str, Matrix] = {}


def geometric(matrix: Matrix) -> Matrix:
    """Registers a function of (level (n,) float64 in [-1, 1], H, W) to PIL's AFFINE coefficients, (n, 6).

    Output (x, y) comes from input (a x + b y + c, d x + e y + f); outside is black.
    """
    GEOMETRIC[matrix.__name__] = matrix
    return matrix


def _rows(level: np.ndarray, *coefficients: float | np.ndarray) -> np.ndarray:
    rows = np.empty((len(level), 6))
    for column, coefficient in enumerate(coefficients):
        rows[:, column] = coefficient
    return rows


def _fixed(rows: np.ndarray) -> np.ndarray:
    """Coefficients as PIL rounds them for maps that rotate or shear: steps and the first centre to 2^-16.

    In single precision all of it is exact for images of up to 256 pixels; positions as DALI adds them, up to 128.
    """
    rows = rows.reshape(-1, 2, 3)
    first = rows[:, :, 2] + 0.5 * (rows[:, :, 0] + rows[:, :, 1])
    rows = np.floor(65536 * rows + 0.5) / 65536
    rows[:, :, 2] = np.floor(65536 * first + 0.5) / 65536 - 0.5 * (rows[:, :, 0] + rows[:, :, 1])
    return rows.reshape(-1, 6)


@geometric
def rotate(level: np.ndarray, height: int, width: int) -> np.ndarray:
    """Up to 45 degrees about the centre, counterclockwise for positive angles."""
    cos, sin = np.cos(np.deg2rad(45.0 * level)), np.sin(np.deg2rad(45.0 * level))
    x, y = width / 2.0, height / 2.0
    return _fixed(_rows(level, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


@geometric
def shear_x(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _fixed(_rows(level, 1.0, 0.3 * level, 0.0, 0.0, 1.0, 0.0))


@geometric
def shear_y(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _fixed(_rows(level, 1.0, 0.0, 0.0, 0.3 * level, 1.0, 0.0))


@geometric
def translate_x(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _rows(level, 1.0, 0.0, 0.3 * level * width, 0.0, 1.0, 0.0)


@geometric
def translate_y(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _rows(level, 1.0, 0.0, 0.0, 0.0, 1.0, 0.3 * level * height)


NAMES = ctaugment.NAMES
assert sorted([*GEOMETRIC, *PHOTOMETRIC, "identity"]) == sorted(NAMES)
_UNMOVED = np.array([1, 0, 0, 0, 1, 0], np.float32)
IS_GEOMETRIC = np.array([name in GEOMETRIC for name in NAMES])


def op_parameters(ops: np.ndarray, levels: np.ndarray, centre: np.ndarray, height: int, width: int) -> np.ndarray:
    """Numbers of both transformations of V views of H x W images.

    Args:
        ops: (V, 2) int, indices into `ctaugment.TRANSFORMATIONS`.
        levels: (V, 2, 2) float32 in [0, 1). The level of a geometric operation is the sum of both, see
            `ctaugment.code_effects`.
        centre: (V, 2, 2) float32 in [0, 1).
        height: H.
        width: W.

    Returns:
        (V, 2, 6) float32. Of a photometric operation: its number, level, second level, cutout's centre (y, x), nothing.
        Of a geometric one, and of the identity, PIL's AFFINE coefficients.
    """
    numbers = np.zeros((*ops.shape, 6), dtype=np.float32)
    numbers[..., 0], numbers[..., 1:3], numbers[..., 3:5] = ops, levels, centre
    # places in a flat list cost less than masks of two dimensions
    flat, level, into = ops.reshape(-1), levels.reshape(-1, 2), numbers.reshape(-1, 6)
    into[np.flatnonzero(flat == ctaugment.IDENTITY)] = _UNMOVED
    for name, function in GEOMETRIC.items():
        chosen = np.flatnonzero(flat == NAMES.index(name))
        if len(chosen):
            into[chosen] = function(2.0 * level[chosen].astype(np.float64).sum(axis=1) - 1.0, height, width)
    return numbers
