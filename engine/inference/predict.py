"""Classification of images with a trained network."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from engine.errors import UserError, cannot_write
from engine.inference.evaluation import class_logits
from engine.models.wide_resnet import TwoHeadNetwork
from pipelines.data.image_files import describe_left_out, find_files
from pipelines.data.pixels import DecodeError, content, resized, rgb
from pipelines.files import atomic_write

log = logging.getLogger(__name__)

Source: TypeAlias = Path | bytes | Image.Image  # One image: a file, the content of a file, or a decoded image.


def read_image(
    source: Source, side: int, warn: bool = True, name: str = "", note: Callable[[str, str], None] | None = None
) -> np.ndarray:
    """Read an image as input for the network.

    Apply the EXIF orientation, blend transparency with black, convert to RGB, resize the shorter side and crop the
    center. Warn if that changes the size or reduces a 16-bit depth.

    Args:
        source: The image, in any format and mode that PIL reads.
        side: Side of the network's input, in pixels.
        warn: Whether to warn about changes.
        name: What messages call the image, by default its path.
        note: Called with the name and the remark if the range of values is changed, instead of a warning.

    Returns:
        (side, side, 3) uint8.

    Raises:
        UserError: The file is missing or is not an image that can be decoded.
    """
    name = name or str(source)
    try:
        image, changed = rgb(content(source) if isinstance(source, Path) else source)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except (OSError, DecodeError) as error:
        raise UserError(f"{name} cannot be read as an image ({error})") from None
    if note and changed:
        note(name, changed)
    elif warn and changed:
        log.warning(f"{name}: {changed}")
    if warn and image.size != (side, side):
        log.warning(f"{name}: {image.size[0]}x{image.size[1]} pixels, resized to {side}x{side}")
    return resized(image, side)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given files and all image files in the given folders, which are sorted.

    Raises:
        UserError: There is no image file, or a folder cannot be read.
    """
    found: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                files = find_files(path)
                found += [path / name for name in files.images]
                for line in describe_left_out(files):
                    log.warning(f"{path}: {line}")
            else:
                found.append(path)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    if not found:
        raise UserError(
            f"no image file in {', '.join(map(str, paths))}" if paths else "predict needs at least one image"
        )
    return found


def classify(
    network: TwoHeadNetwork,
    sources: Iterable[Source],
    side: int,
    device: torch.device,
    batch: int,
    skip: bool = False,
    warn: bool = False,
    note: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield class probabilities of images, with one decoded image and one batch of resized ones in memory at a time.

    Args:
        network: Network in evaluation mode.
        sources: The images, of any size.
        side: Side of the network's input, in pixels.
        device: Device of the network.
        batch: Number of images in a batch.
        skip: Leave out images that cannot be read, with a warning.
        warn: Whether to warn about images that are changed by reading them.
        note: See `read_image`.

    Yields:
        Index of each image, in order, and its probabilities, (L,) float32.

    Raises:
        UserError: An image cannot be read, and `skip` is not set.
    """

    def read() -> Iterator[tuple[int, np.ndarray]]:
        for number, source in enumerate(sources):
            name = str(source) if isinstance(source, Path) else f"images[{number}]"
            try:
                yield number, read_image(source, side, warn, name, note)
            except UserError as error:
                if not skip:
                    raise
                log.warning(f"{error}; skipped")

    images = read()
    while group := list(itertools.islice(images, batch)):
        numbers, pixels = zip(*group, strict=True)
        yield from zip(numbers, probabilities(network, np.stack(pixels), device), strict=True)


def probabilities(network: TwoHeadNetwork, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Return class probabilities of (N, H, W, 3) uint8 images: (N, L) float32."""
    return np.concatenate([logits.softmax(-1).cpu().numpy() for _, logits in class_logits(network, images, device)])


def ranked(values: np.ndarray, top: int | None) -> list[int]:
    """Return the `top` classes with the largest of (L,) probabilities, the largest first; all classes for None."""
    return np.argsort(-values, kind="stable")[:top].tolist()


def write_csv(
    path: Path, classes: Sequence[str], rows: Iterator[tuple[Path, np.ndarray]], top: int | None = None
) -> int:
    """Write one line per file: its name, the class, and a probability for each class. Return the number of lines.

    If there are none, write no file.

    Args:
        path: File to write.
        classes: Class names.
        rows: Each file and its probabilities, (L,) float32.
        top: Write the best class and its probability, the second best and its, and so on, for this number of classes.

    Raises:
        UserError: The file cannot be written; an existing one is then unchanged.
    """
    first = next(rows, None)
    if first is None:
        return 0
    names, count = [_name_cell(name) for name in classes], 0
    if top is None:
        head = ["class", *names]
    else:
        numbers = ["", *(f"_{number + 1}" for number in range(1, min(top, len(classes))))]
        head = [f"{column}{number}" for number in numbers for column in ("class", "probability")]
    try:
        with atomic_write(path) as file:
            # File names may be invalid UTF-8; their bytes are written unchanged.
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            table = csv.writer(text)
            table.writerow(["file", *head])
            for name, values in itertools.chain([first], rows):
                if top is None:
                    cells = [names[int(values.argmax())], *(f"{value:.6f}" for value in values)]
                else:
                    cells = [cell for best in ranked(values, top) for cell in (names[best], f"{values[best]:.6f}")]
                table.writerow([_path_cell(name), *cells])
                count += 1
            text.detach()
    except OSError as error:
        raise cannot_write(path, error) from error
    return count


# Spreadsheets take cells that begin with these characters for formulas, unless they are numbers.
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


def _path_cell(path: Path) -> str:
    """Return a path for a CSV file: "./=a.png" for "=a.png", which is the same file but not a formula."""
    return f"./{path}" if _FORMULA.match(str(path)) else str(path)


def _name_cell(name: str) -> str:
    """Return a class name for a CSV file: "'=a" for "=a", which spreadsheets take for text.

    A name that already has such apostrophes gets another one, so that removing one restores every name.
    """
    return f"'{name}" if _FORMULA.match(name.lstrip("'")) and not _NUMBER.fullmatch(name) else name
