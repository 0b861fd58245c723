"""Images that need no download: random crops of real photographs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image


def photographs() -> dict[str, Image.Image]:
    """Return the two 640x427 photographs that ship with scikit-learn, by name."""
    package = find_spec("sklearn")  # Importing it would take a second.
    assert package is not None and package.origin is not None, "scikit-learn is required"
    folder = Path(package.origin).parent / "datasets" / "images"
    return {name: Image.open(folder / f"{name}.jpg").convert("RGB") for name in ("china", "flower")}


def crops(photograph: Image.Image, count: int, width: int, height: int, seed: int = 0) -> Iterator[Image.Image]:
    """Yield random crops of a photograph, resized and flipped horizontally with probability 0.5.

    A crop spans 0.4 to 1.0 times the largest box of the requested aspect ratio.

    Args:
        photograph: RGB image.
        count: Number of crops.
        width: Width of the resized crops in pixels.
        height: Height of the resized crops in pixels.
        seed: Seed of the crops and flips.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scale = rng.uniform(0.4, 1) * min(photograph.width / width, photograph.height / height)
        sides = scale * width, scale * height
        left, top = (rng.uniform(0, whole - side) for whole, side in zip(photograph.size, sides, strict=True))
        box = (left, top, left + sides[0], top + sides[1])
        crop = photograph.resize((width, height), Image.Resampling.BICUBIC, box)
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop
