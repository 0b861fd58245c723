"""Pixels of one image file, read with PIL, and how images are resized and cropped.

`data prepare` and `predict` share this module, so that the network is trained on the pixels that it later classifies.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from pipelines.files import first_line

LONG = 16  # Aspect ratio from which an image is cropped before it is resized, which bounds the memory.
_NOT_PIXELS = {"EPS", "MPEG"}  # Formats that PIL recognizes, but cannot decode without an outside program.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF files.
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262  # 0 if the smallest value is white.
_PLANAR_CONFIGURATION = 284
_GDAL_NODATA = 42113  # The value of pixels without data.
# Usual values of pixels without data in files that do not declare one. Each number is also meant as float32.
_NO_DATA = (
    *(-9999.0, -99999.0, -32768.0, -32767.0, 65535.0, 1e20, -1e20, -3.4e38, -3.40282e38, -3.402823e38),
    *(float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)),
)
_WHITE = 65535.0  # Also the largest value of 16 bits: only left out from gray images with several other values.
_SIXTEEN_BITS = re.compile(r"(LA|RGB|RGBA|RGBX);16[BLN]")
_SWAPPED = {"B": "L", "L": "B", "N": "B" if np.little_endian else "L"}
_HEIF = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}  # Photographs of many phones.
_BLOCK = 1 << 22  # Values converted at a time.


class DecodeError(ValueError):
    """File that cannot be read as an image."""


@cache
def formats() -> tuple[str, ...]:
    """Return the names of the formats that PIL decodes in this installation, without the help of other programs."""
    Image.init()
    stubs = {name for name, (factory, _) in Image.OPEN.items() if _is_stub(factory)}
    return tuple(name for name in Image.ID if name not in stubs | _NOT_PIXELS)


def _is_stub(factory: Any) -> bool:
    """Return whether PIL only recognizes a format, and leaves decoding to a handler that nothing provides."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


@cache
def suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of files in `formats`."""
    known = {*formats(), "MPO"}  # PIL reads MPO as JPEG.
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def content(path: Path) -> bytes:
    """Return the content of a file. Never opens a pipe, a socket or a device, which could block.

    Raises:
        OSError: The file cannot be read.
        DecodeError: It is empty, or not a regular file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise DecodeError("a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device instead of a file")
    read = path.read_bytes()
    if not read:
        raise DecodeError("the file is empty")
    return read


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, wherever the format stores it; 1 if it is missing, invalid or damaged.

    PIL also finds it in XMP data and in text chunks of PNG files. It turns TIFF files by itself when it loads them.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Damaged metadata raise all kinds of errors; the pixels may be intact.
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def upright(image: Image.Image, turn: int) -> Image.Image:
    """Return an image turned according to its EXIF orientation."""
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def rgb(source: bytes | Image.Image) -> tuple[Image.Image, str]:
    """Decode the first frame of an image file as 8-bit RGB, turned upright.

    Values of more than 8 bits are stretched so that the smallest becomes 0 and the largest 255, over all channels
    together. Transparent pixels are blended with black.

    Args:
        source: Content of the file, or an image that PIL has opened or made.

    Returns:
        The image, and a remark on a lossy change of its value range, or "". Remarks on the same kind of change have
        the same text up to the colon.

    Raises:
        DecodeError: The file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of damaged metadata and of large images.
            if isinstance(source, Image.Image):
                return _decoded(source)
            with Image.open(BytesIO(source), formats=formats()) as image:
                return _decoded(image)
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(_unknown(source if isinstance(source, bytes) else b"")) from None
    except Image.DecompressionBombError:
        raise DecodeError(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, the limit") from None
    except MemoryError:
        raise DecodeError("not enough memory") from None
    except Exception as error:  # Each format has its own errors for damaged files.
        raise DecodeError(first_line(error, 100)) from None


def _unknown(read: bytes) -> str:
    """Return why PIL does not recognize an image file."""
    if read[4:8] == b"ftyp" and read[8:12] in _HEIF:
        return "PIL does not read HEIC; convert it to JPEG or PNG"
    if read[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "PIL does not read this kind of TIFF; save it as RGB, or as gray with up to 32 bits per pixel"
    return "unknown image format"


def dimensions(read: bytes) -> tuple[int, int]:
    """Return width and height according to the header of an image file; (0, 0) if it cannot be read."""
    try:
        with Image.open(BytesIO(read), formats=formats()) as image:
            return image.size
    except Exception:  # Decoding will report it.
        return 0, 0


def jpeg_orientation(read: bytes) -> int:
    """Return the orientation of a JPEG without decoding its pixels."""
    try:
        with Image.open(BytesIO(read), formats=("JPEG",)) as image:
            return orientation(image)
    except Exception:  # Decoding will report it.
        return 1


def _decoded(opened: Image.Image) -> tuple[Image.Image, str]:
    mode, rawmode = opened.mode, _rawmode(opened)
    values = _deep_values(opened, rawmode)
    opened.load()
    turn = orientation(opened)
    if values is None and mode.startswith(("I", "F")):
        values = np.asarray(opened)[..., None]
        if rawmode.startswith("I;32") and not rawmode.endswith("S"):  # PIL's mode I is signed.
            values = values.view(np.uint32)
    image, remark = opened, ""
    if values is not None:
        kind = f"mode {mode}" if values.shape[-1] == 1 else "16 bits per channel"
        # PIL inverts only values of up to 8 bits.
        inverted = values.shape[-1] == 1 and getattr(opened, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        image, remark = _stretched(values, opened.info.get("transparency"), _declared_no_data(opened), kind, inverted)
    if image.mode in ("La", "RGBa"):  # Multiplied by alpha already.
        image = image.convert(image.mode.upper())
    if image.mode != "LAB" and ("A" in image.getbands() or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return upright(image.convert("RGB"), turn), remark


def _rawmode(image: Image.Image) -> str:
    """Return PIL's name for the layout of the file's pixels; "" if it has none, or the image is no longer in a file."""
    if not (tiles := getattr(image, "tile", [])):
        return ""
    arguments = tiles[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _deep_values(image: Image.Image, rawmode: str) -> np.ndarray | None:
    """Return the values of a file with 16 bits in each of several channels: (H, W, 2 to 4) uint16; None for others.

    PIL keeps only the high byte of each value. The low bytes are read as the high bytes of the other byte order.

    Raises:
        DecodeError: PIL cannot read the low bytes in this format.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or len(image.getbands()) == 1:
        return None
    codec, arguments, tags = image.tile[0].codec_name, image.tile[0].args, getattr(image, "tag_v2", {})
    large_ppm = codec.startswith("ppm") and isinstance(arguments, tuple) and arguments[1] > 255
    if large_ppm and codec == "ppm":
        count = 3 * image.width * image.height
        pixels = _whole_file(image)[image.tile[0].offset :][: 2 * count]
        if len(pixels) < 2 * count:
            raise DecodeError("image file is truncated")
        stored = np.frombuffer(pixels, ">u2")
        return stored.reshape(image.height, image.width, 3).astype(np.uint16)
    deep = (
        large_ppm
        or codec == "SGI16"
        or _SIXTEEN_BITS.fullmatch(rawmode)
        or max(tags.get(_BITS_PER_SAMPLE, (1,))) > 8
        or (image.format == "JPEG2000" and _jpeg2000_depth(_whole_file(image)) > 8)
    )
    if not deep:
        return None
    planar = tags.get(_PLANAR_CONFIGURATION) == 2
    if image.format not in ("PNG", "TIFF") or planar or not _SIXTEEN_BITS.fullmatch(rawmode):
        planes = " in separate planes" if planar else ""
        raise DecodeError(
            f"{image.format} file with more than 8 bits per channel{planes}; save it as RGB in a PNG file"
        )
    if rawmode.startswith("LA"):
        stored = _bytes_as(image, "RGBA").astype(np.uint16)
        return stored[..., 0::2] << 8 | stored[..., 1::2]
    other = rawmode[:-1] + _SWAPPED[rawmode[-1]]
    high, low = (_bytes_as(image, layout).astype(np.uint16) for layout in (rawmode, other))
    return (high << 8 | low)[..., : 3 if rawmode.startswith("RGBX") else None]


def _whole_file(image: ImageFile.ImageFile) -> bytes:
    """Return the content of the file of an image that is open but not loaded."""
    assert image.fp is not None
    position = image.fp.tell()
    image.fp.seek(0)
    read = image.fp.read()
    image.fp.seek(position)
    return read


def _bytes_as(image: ImageFile.ImageFile, layout: str) -> np.ndarray:
    """Return the pixels of a file, (H, W, C) uint8, as PIL unpacks them from the given layout."""
    with Image.open(BytesIO(_whole_file(image)), formats=formats()) as again:
        again.tile = [
            tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
            for tile in again.tile
        ]
        return np.asarray(again)


def _jpeg2000_depth(read: bytes) -> int:
    """Return the largest number of bits per channel in the header of the first codestream."""
    start = read.find(b"\xff\x4f\xff\x51")
    channels = int.from_bytes(read[start + 40 : start + 42], "big")
    return max((read[start + 42 + 3 * n] & 0x7F) + 1 for n in range(channels))


def _declared_no_data(image: Image.Image) -> float | None:
    """Return the value of pixels without data that a TIFF declares, as GDAL writes it."""
    try:
        return float(getattr(image, "tag_v2", {})[_GDAL_NODATA].strip("\0 "))
    except (AttributeError, KeyError, ValueError):
        return None


def _stretched(
    values: np.ndarray, transparent: Any, no_data: float | None, kind: str, inverted: bool
) -> tuple[Image.Image, str]:
    """Stretch the finite values of an image to 0 to 255.

    Args:
        values: (H, W, C) integers or floats; the last of two or four channels is alpha, relative to its maximum.
        transparent: Value or color of transparent pixels, as in PIL's `info`; None if there is none.
        no_data: Value of pixels without data, or None if the file declares none.
        kind: Description of the values for the remark.
        inverted: Whether the smallest value is white.

    Returns:
        The image in a mode that PIL converts to RGB, and the remark. Pixels without a value are black.
    """
    alpha = None
    if values.shape[-1] in (2, 4):
        values, alpha = values[..., :-1], values[..., -1]
        alpha = np.rint(alpha * (255.0 / max(int(alpha.max()), 1))).astype(np.uint8)
    elif transparent is not None and np.size(transparent) == values.shape[-1]:
        alpha = np.where((values == np.asarray(transparent)).all(-1), 0, 255).astype(np.uint8)
    valid = np.isfinite(values)
    used = valid if alpha is None or not alpha.any() else valid & (alpha > 0)[..., None]
    low, high = _range(values, used)
    markers: tuple[float, ...] = _NO_DATA if no_data is None else (no_data,)
    if values.dtype.kind == "f":
        markers = tuple(float(values.dtype.type(marker)) for marker in markers)
    for marker in (low, high):
        if marker in markers:
            inside = used & (values != marker)
            least, most = _range(values, inside)
            # An undeclared marker is farther from all other values than these are from each other.
            gap = max(least - marker, marker - most)
            several = least < most and values.shape[-1] == 1
            if no_data is not None or (least <= most and gap > most - least and (several or marker != _WHITE)):
                valid, used, low, high = valid & (values != marker), inside, least, most
    if low > high:
        raise DecodeError("no pixel has a value")
    pixels = np.empty_like(values, np.uint8)
    rows = max(1, _BLOCK // (values.shape[1] * values.shape[2]))
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        block = np.where(np.isposinf(values[part]), high, np.where(valid[part], values[part], low)).astype(np.float64)
        block = (np.clip(block, low, high) - low) * (255.0 / ((high - low) or 1.0))
        pixels[part] = block.round().astype(np.uint8)
    if inverted:
        pixels = np.where(valid | np.isinf(values), 255 - pixels, 0).astype(np.uint8)
    missing = int((~valid).any(-1).sum())
    remark = f"values stretched to 0 to 255: {kind}, {low:g} to {high:g}"
    remark += f", pixels without a value: {missing}" if missing else ""
    gray = pixels.shape[-1] == 1
    image = Image.fromarray(pixels[..., 0] if gray else pixels)
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    return image, remark


def _range(values: np.ndarray, used: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest of the used values; (inf, -inf) if there is none."""
    if not used.any():
        return float("inf"), float("-inf")
    ends = (np.inf, -np.inf) if values.dtype.kind == "f" else (np.iinfo(values.dtype).max, np.iinfo(values.dtype).min)
    return float(values.min(where=used, initial=ends[0])), float(values.max(where=used, initial=ends[1]))


def placed(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return how an image is resized and cropped to a square.

    Args:
        width: Width of the upright image, in pixels.
        height: Its height.
        size: Side of the square.

    Returns:
        Width and height after resizing, floor(x + 0.5) of the exact values; then left and top of the square in it,
        half of what remains, rounded up.
    """
    short = min(width, height)
    sides = (2 * width * size + short) // (2 * short), (2 * height * size + short) // (2 * short)
    return sides, ((sides[0] - size + 1) // 2, (sides[1] - size + 1) // 2)


def resized(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` pixels and center-crop: (size, size, 3) uint8."""
    sides, (left, top) = placed(*image.size, size)
    if max(sides) > LONG * size:
        return np.asarray(_square_of_long(image, size, sides, (left, top)))
    if sides != image.size:
        image = image.resize(sides, Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _square_of_long(image: Image.Image, size: int, sides: tuple[int, int], start: tuple[int, int]) -> Image.Image:
    """Return the same square as `resized` up to rounding, with memory for the square instead of the resized image."""
    box, outer = [], []
    for whole, side, first in zip(image.size, sides, start, strict=True):
        scale = whole / side
        margin = 2 * max(scale, 1.0) + 1  # The cubic filter reads that far outside.
        low, high = first * scale, (first + size) * scale
        outer.append((max(0, int(low - margin)), min(whole, int(high + margin) + 1)))
        box.append((low - outer[-1][0], high - outer[-1][0]))
    (left, right), (top, bottom) = outer
    part = image.crop((left, top, right, bottom))
    return part.resize((size, size), Image.Resampling.BICUBIC, (box[0][0], box[1][0], box[0][1], box[1][1]))
