"""Parameters of transformations, compared with scalar arithmetic."""

import math

import numpy as np
import pytest

from pipelines import geometric
from pipelines.ctaugment import NAMES


def matrix(name, level, height, width):
    """Return PIL's AFFINE coefficients: output (x, y) is sampled at input (a x + b y + c, d x + e y + f)."""
    v = 2 * level - 1
    if name.startswith("translate"):
        # Every pixel's position is the center of a pixel plus the shift, of which PIL takes the floor.
        shift = math.floor(0.3 * v * (width if name == "translate_x" else height) + 0.5)
        return [1, 0, shift * (name == "translate_x"), 0, 1, shift * (name == "translate_y")]
    a, b, c, d, e, f = 1.0, 0.3 * v * (name == "shear_x"), 0.0, 0.3 * v * (name == "shear_y"), 1.0, 0.0
    if name == "rotate":
        cos, sin, x, y = math.cos(math.radians(45 * v)), math.sin(math.radians(45 * v)), width / 2, height / 2
        a, b, c, d, e, f = cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
    lines = []
    for along_x, along_y, start in ((a, b, c), (d, e, f)):
        # PIL advances in multiples of 2^-16 from the center of the first pixel.
        first = math.floor(65536 * (start + 0.5 * (along_x + along_y)) + 0.5) / 65536
        steps = [math.floor(65536 * step + 0.5) / 65536 for step in (along_x, along_y)]
        lines += [*steps, first - 0.5 * sum(steps)]
    return lines


@pytest.mark.parametrize(("count", "height", "width"), [(300, 32, 32), (40, 17, 48), (1, 8, 8)])
def test_op_parameters_match_scalar_arithmetic(count, height, width):
    rng = np.random.default_rng(count)
    ops = rng.integers(len(NAMES), size=(count, 2)).astype(np.int32)
    levels, center = (rng.random((count, 2, 2), dtype=np.float32) for _ in range(2))
    moving = np.isin(ops, [NAMES.index(name) for name in geometric.GEOMETRIC])
    levels[moving, 1] *= 2**-24  # The part of the level that float32 cannot represent.
    made = geometric.op_parameters(ops, levels, center, height, width)
    assert made.dtype == np.float32 and made.shape == (count, 2, 6)
    for at in np.ndindex(count, 2):
        name = NAMES[ops[at]]
        expected = [ops[at], *levels[at], *center[at], 0]
        if name == "identity":
            expected = [1, 0, 0, 0, 1, 0]
        elif name in geometric.GEOMETRIC:
            expected = matrix(name, float(levels[at][0]) + float(levels[at][1]), height, width)
        np.testing.assert_array_equal(made[at], np.array(expected, np.float32), err_msg=name)
