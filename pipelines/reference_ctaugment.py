"""CTAugment with PIL, one image at a time: reference implementation for tests, baseline for benchmarks.

ReMixMatch (ICLR 2020), section 3.2.2. One function per transformation maps an RGB image and a level in [0, 1) to an RGB
image. The five transformations that differ in the authors' code also have a version that follows that code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipelines import ctaugment
from pipelines.plan import ViewPlan

GRAY = (127, 127, 127)
# In the order of rescale's second level.
FILTERS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def _signed(level: float) -> float:
    """Map a level in [0, 1) to [-1, 1)."""
    return 2.0 * level - 1.0


def _factor(level: float) -> float:
    """Return the factor for ImageEnhance, from 0.1 to 2."""
    return 0.1 + 1.9 * level


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Sample output (x, y) at input (a x + b y + c, d x + e y + f): nearest neighbor, black outside."""
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


def cutout(image: Image.Image, level: float, center: Sequence[float]) -> Image.Image:
    """Paste a gray square centered at pixel (floor(cy H), floor(cx W)), clipped at the border; center is (cy, cx)."""
    width, height = image.size
    side = 1 + math.floor(0.499 * level * min(height, width))
    top = math.floor(center[0] * height) - side // 2
    left = math.floor(center[1] * width) - side // 2
    image = image.copy()
    image.paste(GRAY, (left, top, left + side, top + side))
    return image


def equalize(image: Image.Image, level: float) -> Image.Image:
    return Image.blend(image, ImageOps.equalize(image), level)


def invert(image: Image.Image, level: float) -> Image.Image:
    return Image.blend(image, ImageOps.invert(image), level)


def posterize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.posterize(image, 1 + math.floor(7.999 * level))


def rescale(image: Image.Image, level: float, chosen: float) -> Image.Image:
    """Center-crop to (1 - 0.5 v) of each side and resize back with one of PIL's filters."""
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


def code_cutout(image: Image.Image, level: float, center: Sequence[float]) -> Image.Image:
    """Paste a gray square of even side, clipped at the border."""
    width, height = image.size
    half = (1 + math.floor(0.499 * level * min(height, width))) // 2
    y, x = math.floor(center[0] * height), math.floor(center[1] * width)
    pixels = np.array(image)
    pixels[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = GRAY
    return Image.fromarray(pixels)


def code_rescale(image: Image.Image, level: float, chosen: float) -> Image.Image:
    """Crop `level / 4` pixels from each side and resize back; PIL rounds the crop to the whole image."""
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


CODE_DIFFERS = ("cutout", "rescale", "rotate", "translate_x", "translate_y")
CODE_FUNCTIONS = FUNCTIONS | {name: globals()[f"code_{name}"] for name in CODE_DIFFERS}


def transformed(
    image: Image.Image,
    op: int,
    levels: Sequence[float],
    center: Sequence[float],
    functions: dict[str, Callable[..., Image.Image]] = FUNCTIONS,
) -> Image.Image:
    """Apply one transformation: `op` indexes `ctaugment.TRANSFORMATIONS`; see FUNCTIONS and CODE_FUNCTIONS."""
    name = ctaugment.NAMES[op]
    arguments: list[Any] = [float(level) for level in levels[: len(ctaugment.TRANSFORMATIONS[op].bins)]]
    if name == "cutout":
        arguments.append(center)
    return functions[name](image, *arguments)


def weak(image: np.ndarray, shift: Sequence[int], flip: int) -> np.ndarray:
    """Translate by (dy, dx), down and to the right, with reflect padding; then mirror if `flip` is 1."""
    height, width, _ = image.shape
    dy, dx = int(shift[0]), int(shift[1])
    padded = np.pad(image, ((abs(dy), abs(dy)), (abs(dx), abs(dx)), (0, 0)), mode="reflect")
    top, left = abs(dy) - dy, abs(dx) - dx
    moved = padded[top : top + height, left : left + width]
    return moved[:, ::-1] if flip else moved


def pil_views(images: np.ndarray, views: ViewPlan) -> np.ndarray:
    """Make the views of a plan, one at a time.

    Args:
        images: (V, H, W, 3) uint8, the image of each view.
        views: The plan.

    Returns:
        (V, H, W, 3) uint8.
    """
    made = []
    for image, shift, flip, *operations in zip(
        images, views.shift, views.flip, views.ops, views.levels, views.center, strict=True
    ):
        view = Image.fromarray(np.ascontiguousarray(weak(image, shift, flip)))
        for op, levels, center in zip(*operations, strict=True):
            view = transformed(view, int(op), levels, center)
        made.append(np.asarray(view))
    return np.stack(made)
