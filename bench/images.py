"""Images that need no download: parts of real photographs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image


def photographs() -> dict[str, Image.Image]:
    """The two photographs that come with scikit-learn, 640x427, by name."""
    package = find_spec("sklearn")  # without importing it, which takes a second
    assert package is not None and package.origin is not None, "scikit-learn is required"
    folder = Path(package.origin).parent / "datasets" / "images"
    return {name: Image.open(folder / f"{name}.jpg").convert("RGB") for name in ("china", "flower")}


def crops(photograph: Image.Image, count: int, width: int, height: int, seed: int = 0) -> Iterator[Image.Image]:
    """Random parts of a photograph, from two fifths of its size to all of it, half of them mirrored.

    Args:
        photograph: RGB.
        count: how many.
        width: of the images, to which the parts are resized, in pixels.
        height: likewise.
        seed: of the parts.
    """
    chance = np.random.default_rng(seed)
    for _ in range(count):
        scale = chance.uniform(0.4, 1) * min(photograph.width / width, photograph.height / height)
        sides = scale * width, scale * height
        left, top = (chance.uniform(0, whole - side) for whole, side in zip(photograph.size, sides, strict=True))
        box = (left, top, left + sides[0], top + sides[1])
        made = photograph.resize((width, height), Image.Resampling.BICUBIC, box)
        yield made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else made
