"""Image files for tests: orientation in every place where formats store it, and depths that PIL does not write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_text(**texts):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    return info


def raw_profile(orientation):
    """Return EXIF data as the text chunk that ImageMagick writes."""
    content = exif(orientation).tobytes()
    return png_text(**{"Raw profile type exif": f"\nexif\n{len(content):8}\n{content.hex()}\n"})


# How each carrier of an orientation is saved: suffix, and the options of `Image.save`.
CARRIERS = {
    "JPEG EXIF": (".jpg", lambda o: {"exif": exif(o), "quality": 95, "subsampling": 0}),
    "JPEG XMP": (".jpg", lambda o: {"xmp": XMP.format(o).encode(), "quality": 95, "subsampling": 0}),
    "PNG EXIF": (".png", lambda o: {"exif": exif(o)}),
    "PNG XMP": (".png", lambda o: {"pnginfo": png_text(**{"XML:com.adobe.xmp": XMP.format(o)})}),
    "PNG text": (".png", lambda o: {"pnginfo": raw_profile(o)}),
    "WebP EXIF": (".webp", lambda o: {"exif": exif(o), "lossless": True}),
    "WebP XMP": (".webp", lambda o: {"xmp": XMP.format(o).encode(), "lossless": True}),
    "TIFF": (".tif", lambda o: {"tiffinfo": {274: o}}),
    "TIFF deflated": (".tif", lambda o: {"tiffinfo": {274: o}, "compression": "tiff_adobe_deflate"}),
    "AVIF": (".avif", lambda o: {"exif": exif(o), "quality": 100}),
}


def upright(pixels, orientation):
    """Turn (H, W, C) pixels as the EXIF standard defines: where the stored first row and column are to be seen."""
    row_then_column = {
        2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }  # fmt: skip
    first_row, first_column = row_then_column.get(orientation, ("top", "left"))
    if first_row in ("left", "right"):  # Rows are stored columns.
        pixels = pixels.transpose(1, 0, 2)
        first_row, first_column = first_column, first_row
    pixels = pixels[::-1] if first_row == "bottom" else pixels
    return pixels[:, ::-1] if first_column == "right" else pixels


def png16(pixels):
    """Return a PNG file with 16 bits per channel, of (H, W, 1 to 4) uint16."""
    height, width, channels = pixels.shape

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    # Filter 2 of the PNG specification: the difference of each byte from the one above.
    raw = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(height, -1)
    filtered = np.diff(raw, axis=0, prepend=np.zeros_like(raw[:1]))
    rows = zlib.compress(b"".join(b"\2" + row.tobytes() for row in filtered))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff16(pixels, order="<", planar=False):
    """Return an uncompressed TIFF file with 16 bits per channel, of (H, W, 3 or 4) uint16."""
    height, width, channels = pixels.shape
    stored = pixels.transpose(2, 0, 1) if planar else pixels
    content = np.ascontiguousarray(stored, f"{order}u2").tobytes()
    plane = len(content) // channels
    counts, offsets = ([plane] * channels, range(8, 8 + len(content), plane)) if planar else ([len(content)], [8])
    extra = b""
    end = 8 + len(content)

    def values(numbers, kind):
        """Return the field for numbers of 2 (H) or 4 bytes (I): themselves, or the offset at which they follow."""
        nonlocal extra
        packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(packed) <= 4:
            return packed.ljust(4, b"\0")
        extra += packed
        return struct.pack(f"{order}I", end + len(extra) - len(packed))

    tags = [
        (256, 3, [width]), (257, 3, [height]), (258, 3, [16] * channels), (259, 3, [1]), (262, 3, [2]),
        (273, 4, list(offsets)), (277, 3, [channels]), (278, 3, [height]), (279, 4, counts),
        (284, 3, [2 if planar else 1]), *([(338, 3, [2])] if channels == 4 else []),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, len(numbers)) + values(numbers, "H" if kind == 3 else "I")
        for tag, kind, numbers in tags
    )
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, end + len(extra))
    return head + content + extra + directory


def ppm16(pixels, maximum=65535):
    """Return a binary PPM file of (H, W, 3) uint16."""
    height, width, _ = pixels.shape
    return b"P6\n%d %d\n%d\n" % (width, height, maximum) + pixels.astype(">u2").tobytes()


def saved(image, suffix, **options):
    """Return the content of an image file in the format that the suffix stands for."""
    content = io.BytesIO()
    Image.init()
    image.save(content, Image.registered_extensions()[suffix], **options)
    return content.getvalue()


def tiff_gray(values, kind, order="<", photometric=1):
    """Return an uncompressed TIFF file with one line of gray pixels of a numpy type.

    Args:
        values: The values.
        kind: Name of their type.
        order: Byte order, "<" or ">".
        photometric: 1 if the smallest value is black, 0 if it is white.
    """
    content = np.array(values, kind).astype(np.dtype(kind).newbyteorder(order)).tobytes()
    sample = {"u": 1, "i": 2, "f": 3}[np.dtype(kind).kind]
    tags = {
        256: len(values), 257: 1, 258: 8 * np.dtype(kind).itemsize, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1,
        279: len(content), 339: sample,
    }  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    return start + content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
