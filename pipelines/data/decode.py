"""Decoding of image files to uint8 images of one size, on all cores: DALI for plain JPEGs, PIL for the rest.

Every image is rotated according to its EXIF data, resized so that its shorter side has the requested size, and
center-cropped. DALI and PIL both resize with an antialiased cubic filter and agree within rounding; on a CPU they
decode JPEGs with the same library. On a GPU, DALI uses the hardware decoder if there is one, whose values may differ by
a few gray levels. PIL handles what DALI does not: the first frame of GIFs, palettes, transparency (composited on
black), 16 bits per channel (stretched to 8), CMYK, and files with a misleading suffix.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.files import first_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
BATCH = 64  # Images per DALI batch.


class DecodeError(ValueError):
    """File that cannot be read as an image."""


def image_files(folder: Path) -> list[str]:
    """Return the relative paths of all files below a folder with an image suffix, sorted, without hidden ones.

    Raises:
        OSError: The folder or a subfolder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    files = []
    for path, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(path, folder)
        images = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        files += [os.path.normpath(os.path.join(inside, name)) for name in images]
    return sorted(files)


def rgb(content: bytes | Image.Image) -> tuple[Image.Image, str]:
    """Decode the first frame of an image file as 8-bit RGB, with its EXIF orientation applied.

    Args:
        content: Content of the file, or an image that PIL has opened or made.

    Returns:
        The image, and a description of a lossy change of its value range, or "".

    Raises:
        DecodeError: The file cannot be read.
    """
    try:
        with nullcontext(content) if isinstance(content, Image.Image) else Image.open(BytesIO(content)) as opened:
            mode = opened.mode
            image = ImageOps.exif_transpose(opened)
            image.load()
    except UnidentifiedImageError:
        raise DecodeError("unknown image format") from None
    except Exception as error:  # Each format has its own errors for damaged files.
        raise DecodeError(first_line(error, 100)) from None
    changed = ""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255.0 / max(high - low, 1e-12))).round().astype(np.uint8))
        changed = f"mode {mode}, values {low:g} to {high:g} stretched to 0 to 255"
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB"), changed


def resized(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` pixels and center-crop: (size, size, 3) uint8."""
    width, height = image.size
    scale = size / min(width, height)
    sides = max(size, round(width * scale)), max(size, round(height * scale))
    if sides != image.size:
        image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (sides[0] - size + 1) // 2, (sides[1] - size + 1) // 2  # Rounded as in DALI.
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode(
    files: Sequence[Path], size: int, threads: int = 0, device: str = "cpu"
) -> Iterator[tuple[int, np.ndarray | str]]:
    """Decode files in batches, in order.

    Args:
        files: Image files in formats that PIL supports.
        size: Side of the images in pixels.
        threads: Number of threads; 0 for one per core.
        device: "cpu", or "gpu" to decode and resize JPEGs on the first GPU.

    Yields:
        Index of each file, and its image, (size, size, 3) uint8, or the reason why it cannot be read.
    """
    threads = threads or len(os.sched_getaffinity(0))
    jpegs = _Jpegs(size, threads, device)
    with ThreadPoolExecutor(threads) as pool:
        batches = [range(first, min(first + BATCH, len(files))) for first in range(0, len(files), BATCH)]
        read = [pool.submit(_read, files, batches[0])] if batches else []
        for number, batch in enumerate(batches):
            contents = read.pop().result()
            if number + 1 < len(batches):
                read.append(pool.submit(_read, files, batches[number + 1]))
            quick = [i for i, content in enumerate(contents) if isinstance(content, bytes) and _plain_jpeg(content)]
            made: dict[int, np.ndarray | str] = dict(zip(quick, jpegs([contents[i] for i in quick]), strict=True))
            slow = [i for i in range(len(contents)) if isinstance(made.get(i, ""), str)]
            made |= zip(slow, pool.map(lambda i, c=contents: _by_pil(c[i], size), slow), strict=True)
            for i, place in enumerate(batch):
                yield place, made[i]


def _read(files: Sequence[Path], batch: range) -> list[bytes | str]:
    return [_content(files[place]) for place in batch]


def _content(path: Path) -> bytes | str:
    try:
        return path.read_bytes() or "the file is empty"
    except OSError as error:
        return error.strerror or type(error).__name__


def _by_pil(content: bytes | str, size: int) -> np.ndarray | str:
    if isinstance(content, str):
        return content
    try:
        return resized(rgb(content)[0], size)
    except DecodeError as error:
        return str(error)


def _plain_jpeg(content: bytes) -> bool:
    """Return whether this is a complete 8-bit JPEG with one or three channels; PIL decodes all others."""
    if not content.startswith(b"\xff\xd8") or b"\xff\xd9" not in content[-64:]:
        return False
    at = 2
    while at + 9 < len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # Start of frame.
            return content[at + 4] == 8 and content[at + 9] in (1, 3)
        at += 2 + length
    return False


def decoded_and_resized(files: Any, size: int, device: str) -> Any:
    """Add DALI nodes that decode JPEGs and resize them to one size; for the body of a pipeline definition.

    Args:
        files: Node with the bytes of one JPEG per sample.
        size: Side of the images in pixels.
        device: "cpu" or "gpu".

    Returns:
        Node with the images, (size, size, 3) uint8.
    """
    from nvidia.dali import fn, types

    images = fn.decoders.image(files, device="mixed" if device == "gpu" else "cpu", output_type=types.RGB)
    images = fn.resize(
        images,
        size=[size, size],
        mode="not_smaller",
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        subpixel_scale=False,  # Maps the whole image to whole pixels, as PIL does.
    )
    return fn.crop(images, crop=(size, size), crop_pos_x=0.5, crop_pos_y=0.5)


class _Jpegs:
    """Decodes, rotates and resizes batches of JPEGs with DALI.

    Args:
        size: Side of the images in pixels.
        threads: Number of DALI's threads.
        device: "cpu" or "gpu".
    """

    def __init__(self, size: int, threads: int, device: str) -> None:
        self._size, self._threads, self._gpu = size, threads, device == "gpu"
        self._pipeline: Any = None

    def __call__(self, contents: Sequence[bytes | str]) -> list[np.ndarray | str]:
        """Return images, (size, size, 3) uint8, or "" for every file of the batch if one cannot be decoded."""
        if not contents:
            return []
        self._pipeline = self._pipeline or self._build()
        batch = [np.frombuffer(content, np.uint8) for content in contents]  # type: ignore[arg-type]
        try:
            (made,) = self._pipeline.run(files=batch)
        except RuntimeError:
            self._pipeline = None  # Unusable after an error.
            return [""] * len(contents)
        return list(np.asarray(made.as_cpu().as_tensor()))

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        device_id = 0 if self._gpu else None

        @pipeline_def(batch_size=BATCH, num_threads=self._threads, device_id=device_id, prefetch_queue_depth=1)
        def graph() -> Any:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            return decoded_and_resized(files, self._size, "gpu" if self._gpu else "cpu")

        pipeline = graph()
        pipeline.build()
        return pipeline
