"""Classification of image files with a trained network."""

from __future__ import annotations

import csv
import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError, cannot_write
from engine.inference.evaluation import class_logits
from engine.models.wide_resnet import TwoHeadNetwork
from pipelines.data.decode import DecodeError, image_files, resized, rgb
from pipelines.files import atomic_write

log = logging.getLogger(__name__)


def read_image(path: Path, side: int, warn: bool = True) -> np.ndarray:
    """Read an image file as input for the network.

    Apply the EXIF orientation, blend transparency with black, convert to RGB, resize the shorter side and crop the
    center. Warn if that changes the size or reduces a 16-bit depth.

    Args:
        path: File in any format that PIL reads.
        side: Side of the network's input, in pixels.
        warn: Whether to warn about changes.

    Returns:
        (side, side, 3) uint8.

    Raises:
        UserError: The file is missing or is not an image that can be decoded.
    """
    try:
        image, changed = rgb(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, DecodeError) as error:
        raise UserError(f"{path} cannot be read as an image ({error})") from None
    if warn and changed:
        log.warning(f"{path}: {changed}")
    if warn and image.size != (side, side):
        log.warning(f"{path}: {image.size[0]}x{image.size[1]} pixels, resized to {side}x{side}")
    return resized(image, side)


def find_images(paths: Sequence[Path]) -> tuple[list[Path], bool]:
    """Return the given files and all image files in the given folders, sorted, and whether a folder was given.

    Raises:
        UserError: There is no image file, or a folder cannot be read.
    """
    found: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                found += [path / name for name in image_files(path)]
            else:
                found.append(path)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    if not found:
        raise UserError(
            f"no image file in {', '.join(map(str, paths))}" if paths else "predict needs at least one image"
        )
    return found, any(path.is_dir() for path in paths)


def classify(
    network: TwoHeadNetwork, files: Sequence[Path], side: int, device: torch.device, batch: int
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield class probabilities of image files, with one batch in memory at a time.

    Yields:
        Each readable file, in order, with (L,) float32. Unreadable files cause a warning.
    """
    few = len(files) <= batch  # no warning per file about sizes if there are many files
    for first in range(0, len(files), batch):
        read: list[tuple[Path, np.ndarray]] = []
        for path in files[first : first + batch]:
            try:
                read.append((path, read_image(path, side, warn=few)))
            except UserError as error:
                log.warning(f"{error}; skipped")
        if read:
            found = probabilities(network, np.stack([image for _, image in read]), device)
            yield from zip([path for path, _ in read], found, strict=True)


def probabilities(network: TwoHeadNetwork, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Return class probabilities of (N, H, W, 3) uint8 images: (N, L) float32."""
    return np.concatenate([logits.softmax(-1).cpu().numpy() for _, logits in class_logits(network, images, device)])


def write_csv(path: Path, classes: Sequence[str], rows: Iterator[tuple[Path, np.ndarray]]) -> int:
    """Write one line per file: its name, the class, and a probability for each class. Return the number of lines.

    If there are none, write no file.

    Raises:
        UserError: The file cannot be written; an existing one is then unchanged.
    """
    first = next(rows, None)
    if first is None:
        return 0
    count = 0
    try:
        with atomic_write(path) as file:
            # File names may be invalid UTF-8; their bytes are written unchanged.
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            table = csv.writer(text)
            table.writerow(["file", "class", *classes])
            for name, values in itertools.chain([first], rows):
                table.writerow([name, classes[int(values.argmax())], *(f"{value:.6f}" for value in values)])
                count += 1
            text.detach()
    except OSError as error:
        raise cannot_write(path, error) from error
    return count
