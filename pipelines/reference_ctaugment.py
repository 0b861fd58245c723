"""CTAugment's views made one at a time with PIL: oracle of the DALI graph's tests and yardstick of its speed.

ReMixMatch (ICLR 2020), section 3.2.2. Written as one would without any thought of batches: one function a
transformation, from an RGB image and its level to an RGB image. Levels are fractions in [0, 1). The five that are
different in the authors' code are there a second time, as that has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipelines import ctaugment

GREY = (127, 127, 127)
# the order in which rescale's second level counts them
FILTERS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def _signed(level: float) -> float:
    """A level in [0, 1) as a fraction in [-1, 1)."""
    return 2.0 * level - 1.0


def _factor(level: float) -> float:
    """ImageEnhance's factor, from 0.1 to 2."""
    return 0.1 + 1.9 * level


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Nearest neighbour, black outside; output (x, y) comes from input (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


def identity(image: Image.Image) -> Image.Image:
    return image


def autocontrast(image: Image.Image, level: float) -> Image.Image:
    return Image.blend(image, ImageOps.autocontrast(image), level)


def blur(image: Image.Image, level: float) -> Image.Image:
    return Image.blend(image, image.filter(ImageFilter.BLUR), level)


def brightness(image: Image.Image, level: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_factor(level))


def color(image: Image.Image, level: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_factor(level))


def contrast(image: Image.Image, level: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_factor(level))


def cutout(image: Image.Image, level: float, centre: Sequence[float]) -> Image.Image:
    """Grey square about pixel (floor(cy H), floor(cx W)), clipped at the border; centre is (cy, cx)."""
    width, height = image.size
    side = 1 + math.floor(0.499 * level * min(height, width))
    top = math.floor(centre[0] * height) - side // 2
    left = math.floor(centre[1] * width) - side // 2
    image = image.copy()
    image.paste(GREY, (left, top, left + side, top + side))
    return image


def equalize(image: Image.Image, level: float) -> Image.Image:
    return Image.blend(image, ImageOps.equalize(image), level)


def invert(image: Image.Image, level: float) -> Image.Image:
    return Image.blend(image, ImageOps.invert(image), level)


def posterize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.posterize(image, 1 + math.floor(7.999 * level))


def rescale(image: Image.Image, level: float, chosen: float) -> Image.Image:
    """Centre crop of side (1 - 0.5 v) of the image, resized back with one of PIL's filters."""
    width, height = image.size
    x, y = 0.25 * level * width, 0.25 * level * height
    box = (x, y, width - x, height - y)
    return image.resize(image.size, FILTERS[math.floor(len(FILTERS) * chosen)], box=box)


def rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(_signed(level) * 45.0)


def sharpness(image: Image.Image, level: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_factor(level))


def shear_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1, _signed(level) * 0.3, 0, 0, 1, 0)


def shear_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1, 0, 0, _signed(level) * 0.3, 1, 0)


def smooth(image: Image.Image, level: float) -> Image.Image:
    return Image.blend(image, image.filter(ImageFilter.SMOOTH), level)


def solarize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(image, math.floor(255.999 * level))


def translate_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1, 0, _signed(level) * 0.3 * image.width, 0, 1, 0)


def translate_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, _signed(level) * 0.3 * image.height)


FUNCTIONS: dict[str, Callable[..., Image.Image]] = {name: globals()[name] for name in ctaugment.NAMES}


def code_cutout(image: Image.Image, level: float, centre: Sequence[float]) -> Image.Image:
    """As many grey pixels before the centre's as from it on, clipped at the border."""
    width, height = image.size
    half = (1 + math.floor(0.499 * level * min(height, width))) // 2
    y, x = math.floor(centre[0] * height), math.floor(centre[1] * width)
    pixels = np.array(image)
    pixels[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = GREY
    return Image.fromarray(pixels)


def code_rescale(image: Image.Image, level: float, chosen: float) -> Image.Image:
    """A quarter of `level` pixels less on each side, as PIL crops that; all filters, whatever their order, agree."""
    width, height = image.size
    margin = 0.25 * level
    cropped = image.crop((margin, margin, width - margin, height - margin))  # type: ignore[arg-type]
    return cropped.resize(image.size, FILTERS[math.floor(5.99 * chosen)])


def code_rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(int(np.round(_signed(level) * 45)))


def code_translate_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1, 0, _signed(level) * 0.3, 0, 1, 0)


def code_translate_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, _signed(level) * 0.3)


OF_CODE = ("cutout", "rescale", "rotate", "translate_x", "translate_y")  # which differ there
CODE_FUNCTIONS = FUNCTIONS | {name: globals()[f"code_{name}"] for name in OF_CODE}


def transformed(
    image: Image.Image,
    op: int,
    levels: Sequence[float],
    centre: Sequence[float],
    functions: dict[str, Callable[..., Image.Image]] = FUNCTIONS,
) -> Image.Image:
    """One transformation, by its index in `ctaugment.TRANSFORMATIONS`, of the paper or of `CODE_FUNCTIONS`."""
    name = ctaugment.NAMES[op]
    arguments: list[Any] = [float(level) for level in levels[: len(ctaugment.TRANSFORMATIONS[op].bins)]]
    if name == "cutout":
        arguments.append(centre)
    return functions[name](image, *arguments)


def weak(image: np.ndarray, shift: Sequence[int], flip: int) -> np.ndarray:
    """A translation by (dy, dx), down and to the right, reflected at the border, then the mirror image."""
    height, width, _ = image.shape
    dy, dx = int(shift[0]), int(shift[1])
    padded = np.pad(image, ((abs(dy), abs(dy)), (abs(dx), abs(dx)), (0, 0)), mode="reflect")
    top, left = abs(dy) - dy, abs(dx) - dx
    moved = padded[top : top + height, left : left + width]
    return moved[:, ::-1] if flip else moved


def pil_view(
    image: np.ndarray,
    shift: Sequence[int],
    flip: int,
    ops: Sequence[int],
    levels: np.ndarray,
    centre: np.ndarray,
) -> np.ndarray:
    """One row of a `ViewPlan`.

    Args:
        image: (H, W, 3) uint8.
        shift: (dy, dx) in pixels, each less than the side.
        flip: 1 mirrors the image.
        ops: (2,) int, indices into `ctaugment.TRANSFORMATIONS`, applied left to right.
        levels: (2, 2) float in [0, 1).
        centre: (2, 2) float in [0, 1), cutout's centre (y, x).

    Returns:
        (H, W, 3) uint8.
    """
    view = Image.fromarray(np.ascontiguousarray(weak(image, shift, flip)))
    for op, op_levels, op_centre in zip(ops, levels, centre, strict=True):
        view = transformed(view, int(op), op_levels, op_centre)
    return np.asarray(view)
