"""Geometric transformations: affine matrices from levels, computed on the host for every backend.

ReMixMatch (ICLR 2020), section 3.2.2. Rotation, shears and translations are affine maps with nearest-neighbor sampling
that differ only in their matrix. The other transformations, in `kernels/photometric.py`, take levels directly.

PIL's positions are multiples of 2^-16, so every matrix is exact in float32 for images of up to 256 pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.photometric import PHOTOMETRIC
from pipelines import ctaugment

PIXEL = np.dtype("V3")  # Lets numpy move the three bytes of a pixel at once.
Matrix = Callable[[np.ndarray, int, int], np.ndarray]
GEOMETRIC: dict[str, Matrix] = {}


def geometric(matrix: Matrix) -> Matrix:
    """Register a function from (level (n,) float64 in [-1, 1], H, W) to PIL's AFFINE coefficients, (n, 6).

    Output (x, y) is sampled at input (a x + b y + c, d x + e y + f); pixels outside the input are black.
    """
    GEOMETRIC[matrix.__name__] = matrix
    return matrix


def _matrices(level: np.ndarray, *coefficients: float | np.ndarray) -> np.ndarray:
    matrices = np.empty((len(level), 6))
    for column, coefficient in enumerate(coefficients):
        matrices[:, column] = coefficient
    return matrices


def _fixed_point(matrices: np.ndarray) -> np.ndarray:
    """Round the steps and the position of the first pixel's center to multiples of 2^-16, as PIL 13 does."""
    matrices = matrices.reshape(-1, 2, 3)
    first = matrices[:, :, 2] + 0.5 * (matrices[:, :, 0] + matrices[:, :, 1])
    matrices = np.floor(65536 * matrices + 0.5) / 65536
    matrices[:, :, 2] = np.floor(65536 * first + 0.5) / 65536 - 0.5 * (matrices[:, :, 0] + matrices[:, :, 1])
    return matrices.reshape(-1, 6)


@geometric
def rotate(level: np.ndarray, height: int, width: int) -> np.ndarray:
    """Rotate by up to 45 degrees about the center, counterclockwise for positive angles."""
    cos, sin = np.cos(np.deg2rad(45.0 * level)), np.sin(np.deg2rad(45.0 * level))
    x, y = width / 2.0, height / 2.0
    return _fixed_point(_matrices(level, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


@geometric
def shear_x(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _fixed_point(_matrices(level, 1.0, 0.3 * level, 0.0, 0.0, 1.0, 0.0))


@geometric
def shear_y(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _fixed_point(_matrices(level, 1.0, 0.0, 0.0, 0.3 * level, 1.0, 0.0))


@geometric
def translate_x(level: np.ndarray, height: int, width: int) -> np.ndarray:
    """Translate by up to 30 % of the width, in whole pixels: the pixel that contains a position is sampled."""
    return _matrices(level, 1.0, 0.0, np.floor(0.3 * level * width + 0.5), 0.0, 1.0, 0.0)


@geometric
def translate_y(level: np.ndarray, height: int, width: int) -> np.ndarray:
    return _matrices(level, 1.0, 0.0, 0.0, 0.0, 1.0, np.floor(0.3 * level * height + 0.5))


NAMES = ctaugment.NAMES
assert sorted([*GEOMETRIC, *PHOTOMETRIC, "identity"]) == sorted(NAMES)
IDENTITY_MATRIX = np.array([1, 0, 0, 0, 1, 0], np.float32)
IS_GEOMETRIC = np.array([name in GEOMETRIC for name in NAMES])


def op_parameters(ops: np.ndarray, levels: np.ndarray, center: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the parameters of both transformations of V views of H x W images.

    Args:
        ops: (V, 2) int, indices into `ctaugment.TRANSFORMATIONS`.
        levels: (V, 2, 2) float32 in [0, 1). The level of a geometric transformation is the sum of its two entries; see
            `ctaugment.code_effects`.
        center: (V, 2, 2) float32 in [0, 1), center (y, x) of cutout.
        height: H.
        width: W.

    Returns:
        (V, 2, 6) float32. For photometric transformations: index, level, second level, center (y, x) of cutout, and 0.
        For geometric ones and the identity: PIL's AFFINE coefficients.
    """
    parameters = np.zeros((*ops.shape, 6), dtype=np.float32)
    parameters[..., 0], parameters[..., 1:3], parameters[..., 3:5] = ops, levels, center
    # Indices into flat arrays are faster than two-dimensional masks.
    flat_ops, flat_levels, flat_parameters = ops.reshape(-1), levels.reshape(-1, 2), parameters.reshape(-1, 6)
    flat_parameters[np.flatnonzero(flat_ops == ctaugment.IDENTITY)] = IDENTITY_MATRIX
    for name, function in GEOMETRIC.items():
        chosen = np.flatnonzero(flat_ops == NAMES.index(name))
        if len(chosen):
            level = 2.0 * flat_levels[chosen].astype(np.float64).sum(axis=1) - 1.0
            flat_parameters[chosen] = function(level, height, width)
    return parameters


def warp(images: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Sample images at PIL's positions, in integers: nearest neighbor, black outside.

    Args:
        images: (n, H, W, 3) uint8, sides of up to 256 pixels.
        coefficients: (n, 6) float32 from `op_parameters`.

    Returns:
        (n, H, W, 3) uint8.
    """
    count, height, width, _ = images.shape
    # Twice the centers of the pixels, and coefficients in units of 2^-17, which are integers.
    y, x = np.arange(1, 2 * height, 2, dtype=np.int32)[:, None], np.arange(1, 2 * width, 2, dtype=np.int32)
    units = (coefficients.astype(np.float64) * 2**17).astype(np.int32)
    warped = np.empty_like(images)
    # A black frame stands for all positions outside the image.
    framed = np.zeros((height + 2, width + 2), PIXEL)
    for image in range(count):
        framed[1:-1, 1:-1] = images[image].view(PIXEL)[..., 0]
        a, b, c, d, e, f = units[image]
        column = np.clip(((a >> 1) * x + c + (b >> 1) * y) >> 17, -1, width)
        row = np.clip(((d >> 1) * x + f + (e >> 1) * y) >> 17, -1, height)
        np.take(framed, (row + 1) * (width + 2) + column + 1, out=warped[image].view(PIXEL)[..., 0], mode="clip")
    return warped
