"""JPEGs decoded and resized by DALI: which files it gets, and what it does with them.

DALI gets only plain files whose headers are in order. It does not interpret metadata: orientation and size are
determined in the same way as for `predict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.pixels import LONG, jpeg_orientation, placed, upright

BATCH = 64  # Images per DALI batch.
_SAMPLING = ({0x11}, {0x11, 0x12, 0x14, 0x21, 0x22, 0x41, 0x42})  # Of one and of the first of three channels.


@dataclass(frozen=True)
class Jpeg:
    """File for DALI.

    Attributes:
        content: The file.
        width: Width in pixels, before it is turned.
        height: Height in pixels, before it is turned.
        turn: EXIF orientation, 1 to 8.
    """

    content: bytes
    width: int
    height: int
    turn: int


def plain_jpeg(content: bytes) -> Jpeg | None:
    """Return a JPEG if DALI and PIL decode it to the same pixels: 8 bits, gray or YCbCr, complete, not very long.

    All segments before the image data must be well formed. PIL decodes all other files.
    """
    if not content.startswith(b"\xff\xd8") or b"\xff\xd9" not in content[-64:]:
        return None
    at, frame, metadata = 2, None, False
    while at + 4 <= len(content):
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        segment = content[at + 4 : at + 2 + length]
        if content[at] != 0xFF or len(segment) != length - 2:
            return None
        if marker == 0xDA:  # Start of scan; the image data follows.
            if frame is None or not segment or len(segment) != 4 + 2 * segment[0]:
                return None
            size = int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big")
            return Jpeg(content, *size, jpeg_orientation(content) if metadata else 1)
        if marker in (0xC0, 0xC1, 0xC2):  # Start of frame: baseline, extended or progressive.
            if frame is not None or not _plain_frame(segment):
                return None
            frame = segment
        elif not _plain_segment(marker, segment):
            return None
        metadata |= marker == 0xE1
        at += 2 + length
    return None


def _plain_frame(segment: bytes) -> bool:
    """Return whether a frame has a usual size, depth and sampling."""
    if len(segment) < 6 or segment[0] != 8 or segment[5] not in (1, 3) or len(segment) != 6 + 3 * segment[5]:
        return False
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    if min(height, width) == 0 or max(height, width) > LONG * min(height, width):
        return False
    if height * width > 2 * (Image.MAX_IMAGE_PIXELS or height * width):  # Beyond PIL's limit.
        return False
    names, sampling, tables = segment[6::3], segment[7::3], segment[8::3]
    return (
        len(set(names)) == len(names)
        and bytes(names) != b"RGB"  # Colors without conversion.
        and sampling[0] in _SAMPLING[len(names) > 1]
        and set(sampling[1:]) <= {0x11}
        and max(tables) < 4
    )


def _plain_segment(marker: int, segment: bytes) -> bool:
    """Return whether a segment before the image data is well formed and may occur in a plain JPEG."""
    if marker == 0xC4:
        return _huffman_tables(segment)
    if marker == 0xDB:
        return _quantization_tables(segment)
    if marker == 0xDD:  # Restart interval.
        return len(segment) == 2
    if marker == 0xEE and segment.startswith(b"Adobe"):
        return len(segment) == 12 and segment[11] == 1  # YCbCr.
    return 0xE0 <= marker <= 0xEF or marker == 0xFE  # Application data or a comment.


def _huffman_tables(segment: bytes) -> bool:
    while segment:
        codes = sum(segment[1:17])
        if len(segment) < 17 + codes or segment[0] & 0xEC or not 0 < codes <= 256:
            return False
        # A code of n bits takes 2^-n of the whole.
        if sum(count << (16 - bits) for bits, count in enumerate(segment[1:17], 1)) > 1 << 16:
            return False
        segment = segment[17 + codes :]
    return True


def _quantization_tables(segment: bytes) -> bool:
    while segment:
        size = 1 + 64 * (1 + (segment[0] >> 4))
        if segment[0] & 0xEC or len(segment) < size:
            return False
        segment = segment[size:]
    return True


def decoded_and_resized(files: Any, sides: Any, start: Any, size: int, device: str) -> Any:
    """Add DALI nodes that decode JPEGs and resize them to one size; for the body of a pipeline definition.

    Args:
        files: Node with the bytes of one JPEG per sample.
        sides: Height and width after resizing; constants, or a node with (2,) float32 per sample.
        start: First row and column of the square in it; constants, or a node with (2,) int32 per sample.
        size: Side of the square in pixels.
        device: "cpu" or "gpu".

    Returns:
        Node with the images, (size, size, 3) uint8, not turned.
    """
    from nvidia.dali import fn, types

    images = fn.decoders.image(
        files, device="mixed" if device == "gpu" else "cpu", output_type=types.RGB, adjust_orientation=False
    )
    images = fn.resize(images, size=sides, interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.slice(images, start=start, shape=[size, size], axes=[0, 1])


class JpegDecoder:
    """Decodes, resizes, crops and turns batches of JPEGs with DALI.

    Args:
        size: Side of the images in pixels.
        threads: Number of DALI's threads.
        device: "cpu" or "gpu".
    """

    def __init__(self, size: int, threads: int, device: str) -> None:
        self._size, self._threads, self._device = size, threads, device
        self._pipeline: Any = None

    def __call__(self, files: Sequence[Jpeg]) -> list[np.ndarray | None]:
        """Return up to BATCH images, (size, size, 3) uint8; None for those that DALI cannot decode."""
        if not files:
            return []
        self._pipeline = self._pipeline or self._build()
        sides, starts = zip(*(self._placed(file) for file in files), strict=True)
        try:
            (made,) = self._pipeline.run(
                files=[np.frombuffer(file.content, np.uint8) for file in files],
                sides=[np.array(pair, np.float32) for pair in sides],
                starts=[np.array(pair, np.int32) for pair in starts],
            )
        except RuntimeError:
            self._pipeline = None  # Unusable after an error.
            if len(files) == 1:
                return [None]
            middle = len(files) // 2
            return self(files[:middle]) + self(files[middle:])
        images = np.asarray(made.as_cpu().as_tensor())
        return [
            np.asarray(upright(Image.fromarray(image), file.turn)) if file.turn != 1 else image
            for image, file in zip(images, files, strict=True)
        ]

    def _placed(self, file: Jpeg) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return height and width after resizing, and first row and column of the square, before turning."""
        swapped = file.turn >= 5
        width, height = (file.height, file.width) if swapped else (file.width, file.height)
        sides, (left, top) = placed(width, height, self._size)
        left = sides[0] - self._size - left if file.turn in (2, 3, 6, 7) else left
        top = sides[1] - self._size - top if file.turn in (3, 4, 7, 8) else top
        return (sides, (left, top)) if swapped else (sides[::-1], (top, left))

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        device_id = 0 if self._device == "gpu" else None

        @pipeline_def(batch_size=BATCH, num_threads=self._threads, device_id=device_id, prefetch_queue_depth=1)
        def graph() -> Any:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            sides = fn.external_source(name="sides", dtype=types.FLOAT, ndim=1)
            starts = fn.external_source(name="starts", dtype=types.INT32, ndim=1)
            return decoded_and_resized(files, sides, starts, self._size, self._device)

        pipeline = graph()
        pipeline.build()
        return pipeline
