"""Classifying image files with a trained network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from engine.errors import UserError
from engine.evaluation import class_logits
from engine.network import Classifier


def read_image(path: Path, height: int, width: int, warn: Callable[[str], None]) -> np.ndarray:
    """Reads an image as the network takes it.

    Turns it as its EXIF data says, lays transparency on black, makes it RGB and resizes it; says so where that
    changes the size or drops 16-bit depth.

    Args:
        path: of any format that PIL reads.
        height: of the network's images, in pixels.
        width: likewise.
        warn: called with one line a change.

    Returns:
        (height, width, 3) uint8.

    Raises:
        UserError: missing, or not an image that can be decoded.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error or type(error).__name__})") from None
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        scaled = (values - low) * (255.0 / max(high - low, 1e-12))
        image = Image.fromarray(scaled.round().astype(np.uint8))
        warn(f"{path}: mode {opened.mode}, values {low:g} to {high:g} stretched to 0 to 255")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert("RGB")
    if image.size != (width, height):
        warn(f"{path}: {image.size[0]}x{image.size[1]} pixels, resized to {width}x{height}")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def probabilities(network: Classifier, images: Sequence[np.ndarray], device: torch.device) -> list[list[float]]:
    """Class probabilities of (H, W, 3) uint8 images, one list of L for each."""
    passes = class_logits(network, np.stack(images), device)
    return [row for _, logits in passes for row in logits.softmax(-1).tolist()]
