"""Pixels of single files: orientation, ranges, resizing, and the same image for training and `predict`."""

import contextlib
import itertools
import os
import socket
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.images import photographs
from engine.errors import UserError
from engine.inference.predict import read_image
from pipelines.data import decode as decoding
from pipelines.data.decode import decode
from pipelines.data.pixels import DecodeError, formats, placed, resized, rgb, suffixes
from tests.pipelines.data.image_makers import CARRIERS, exif, png16, ppm16, saved, tiff16, tiff_gray, upright
from tests.processes import ROOT

# Documented bounds: inside, within three pixels of the border, and on average.
INSIDE, BORDER, MEAN = 8, 13, 0.5
SATURATED = 30  # Between black and white neighbors in an enlarged image.
JPEG = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def both(folder, contents, size):
    """Write files, and yield the name, the image of training and the image of `predict`, (size, size, 3) int."""
    paths = []
    for name, content in contents.items():
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    for path, (_, trained) in zip(paths, decode(paths, size, threads=2), strict=True):
        assert not isinstance(trained, str), (path.name, trained)
        yield path.name, trained.astype(int), read_image(path, size, warn=False).astype(int)


def photo(width, height, kind="smooth", seed=0):
    """Return an image of which no two corners look alike."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    if kind == "checks":
        return Image.fromarray(
            np.repeat(np.uint8(((x * 39).astype(int) + (y * 39).astype(int)) % 2 * 255)[..., None], 3, 2)
        )
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    pixels = 120 + 80 * np.sin(5 * x[..., None] + 3 * y[..., None] + phase)
    pixels[: height // 3, : width // 3] = (250, 20, 20)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_orientation_is_applied_wherever_it_is_stored(tmp_path, carrier):
    suffix, options = CARRIERS[carrier]
    wide, tall = np.asarray(photo(25, 18)), np.asarray(photo(18, 25, seed=1))
    # Encoders of compressed TIFF and AVIF refuse invalid values.
    values = range(1, 9) if carrier in ("TIFF deflated", "AVIF") else range(10)
    shapes = {"wide": wide, "tall": tall}
    contents = {
        f"{shape}-{o}{suffix}": saved(Image.fromarray(stored), suffix, **options(o))
        for (shape, stored), o in itertools.product(shapes.items(), values)
    }
    for name, trained, predicted in both(tmp_path, contents, 18):
        shape, _, orientation = name.split(".")[0].partition("-")
        turned = upright(shapes[shape], int(orientation)).astype(int)
        # The sides of 25 and 18 pixels are kept; of the longer one, (7 + 1) / 2 pixels are cut off at the start.
        expected = turned[4:22] if turned.shape[0] > 18 else turned[:, 4:22]
        np.testing.assert_array_equal(trained, predicted, err_msg=name)
        difference = np.abs(predicted - expected)
        assert difference.max() == 0 or (suffix in (".jpg", ".avif") and difference.mean() < 8), name


def test_damaged_metadata_do_not_make_an_image_unreadable(tmp_path):
    damaged = (b"nothing", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff")
    contents = {
        f"{number}{suffix}": saved(photo(20, 20), suffix, exif=b"Exif\0\0" + damage)
        for suffix in (".jpg", ".png", ".webp")
        for number, damage in enumerate(damaged)
    }
    for name, trained, predicted in both(tmp_path, contents, 20):
        np.testing.assert_array_equal(trained, predicted, err_msg=name)
        intact = read_image(saved(photo(20, 20), Path(name).suffix), 20, warn=False)
        np.testing.assert_array_equal(predicted, intact, err_msg=name)


def test_training_and_predict_see_the_same_pixels_in_every_format_and_mode(tmp_path):
    contents = {
        "deep.png": png16(np.asarray(photo(37, 26)).astype(np.uint16) * 16),
        "deep.tif": tiff16(np.asarray(photo(37, 26)).astype(np.uint16) * 16),
        "deep.ppm": ppm16(np.asarray(photo(37, 26)).astype(np.uint16) * 16),
    }
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "F"):
        image = photo(37, 26).convert("L") if mode in ("I;16", "I", "F") else photo(37, 26)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 200)
        else:
            image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
        for suffix in suffixes():
            with contextlib.suppress(Exception):  # PIL writes most formats in some modes only.
                contents[f"{mode.replace(';', '')}{suffix}"] = saved(image, suffix)
    assert len(contents) > 120 and len({Path(name).suffix for name in contents}) > 25
    for name, trained, predicted in both(tmp_path, contents, 16):
        assert np.abs(trained - predicted).max() <= (BORDER if Path(name).suffix in JPEG else 0), name


SIZES = [
    (90, 60), (60, 90), (1280, 1024), (194, 128), (192, 128), (640, 480), (20, 27), (31, 47), (1, 1), (2, 3), (1, 16),
    (160, 10), (333, 77), (500, 375), (32, 512), (17, 300), (1, 400), (3000, 2),
]  # fmt: skip


@pytest.mark.parametrize("size", [32, 50])
def test_training_and_predict_see_the_same_jpegs_up_to_the_documented_bound(tmp_path, size):
    originals = list(photographs().values())
    contents = {}
    for number, ((width, height), kind) in enumerate(itertools.product(SIZES, ("photograph", "checks"))):
        image = photo(width, height, kind)
        if kind == "photograph":
            image = originals[number // 2 % len(originals)].resize((width, height))
        options = {"exif": exif(number % 8 + 1), "subsampling": number % 3, "progressive": number % 5 == 0}
        contents[f"{kind}-{width}x{height}.jpg"] = saved(image, ".jpg", quality=90, **options)
    for name, trained, predicted in both(tmp_path, contents, size):
        difference = np.abs(trained - predicted)
        if name.startswith("checks"):  # Also if columns were half a pixel apart, this would be over 100.
            assert difference.max() <= SATURATED and difference.mean() < 6, name
            continue
        assert difference.max() <= BORDER and difference[3:-3, 3:-3].max() <= INSIDE, name
        assert difference.mean() <= MEAN or min(map(int, name[11:-4].split("x"))) < 4, name


def test_the_bound_is_documented():
    page = (ROOT / "docs" / "own-images.md").read_text(encoding="utf-8")
    for text in map(" ".join, (page.split(), decoding.__doc__.split())):
        for words in (
            f"at most {INSIDE} of 255",
            f"{BORDER} within three pixels",
            f"{MEAN} on average",
            f"to {SATURATED} in",
        ):
            assert words in text, words
    assert "Images of more than 178956970 pixels are left out" in " ".join(page.split())


def test_the_longer_side_is_rounded_half_up_and_the_square_is_in_the_middle():
    assert placed(1280, 1024, 50) == ((63, 50), (7, 0))  # 62.5
    assert placed(1024, 1280, 50) == ((50, 63), (0, 7))
    assert placed(194, 128, 32) == ((49, 32), (9, 0))  # 48.5
    assert placed(192, 128, 32) == ((48, 32), (8, 0))
    assert placed(1000, 667, 8) == ((12, 8), (2, 0))  # 11.99
    assert placed(1, 1, 8) == ((8, 8), (0, 0))
    assert placed(100_000, 3, 32) == ((1_066_667, 32), (533_318, 0))  # 1066666.67
    assert placed(3, 2**31, 2) == ((2, 1431655765), (0, 715827882))


def test_the_shorter_side_is_resized_and_the_center_cropped():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    wide = resized(Image.fromarray(image), 20)
    assert (wide[:, 2:-2] == 200).all() and wide.shape == (20, 20, 3)
    tall = resized(Image.fromarray(image.transpose(1, 0, 2)), 20)
    np.testing.assert_array_equal(tall, wide.transpose(1, 0, 2))


@pytest.mark.parametrize(("width", "height", "size"), [(3000, 5, 32), (7, 1000, 16), (900, 50, 32), (2000, 100, 24)])
def test_long_images_give_the_same_square_with_memory_for_the_square_alone(monkeypatch, width, height, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    sides = [max(size, round(side * size / min(width, height))) for side in (width, height)]
    left, top = ((side - size + 1) // 2 for side in sides)
    whole = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))[top : top + size, left : left + size]
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *rest: made.append(self.size) or resize(self, *rest))
    square = resized(image, size)
    assert np.abs(square.astype(int) - whole).max() <= 1
    # Every pixel of the square depends on four pixels, or four times the scale if the image is reduced.
    assert made and all(side <= (size + 8) * max(1, min(width, height) / size) for side in made[0])


def test_images_of_extreme_shape_can_be_resized():
    line = np.zeros((1, 100_000, 3), np.uint8)
    line[:, 50_000:] = 255
    square = resized(Image.fromarray(line), 256)
    assert square.shape == (256, 256, 3) and square[0, 0, 0] == 0 and square[0, -1, 0] == 255


def content_of(values):
    """Return (H, W) float32 as a TIFF file."""
    return saved(Image.fromarray(np.asarray(values, np.float32)), ".tif")


def gray(content):
    """Return the first channel of a decoded image, which must be gray, and the remark."""
    image, remark = rgb(content)
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist(), remark


def test_finite_values_are_stretched():
    nan, inf = np.nan, np.inf
    said = "values stretched to 0 to 255: mode F, "
    assert gray(content_of([[0.5, 1, 1.5]])) == ([[0, 128, 255]], said + "0.5 to 1.5")
    assert gray(content_of([[0.5, nan, 1.5]])) == ([[0, 0, 255]], said + "0.5 to 1.5, pixels without a value: 1")
    assert gray(content_of([[-inf, 2, 3, inf]])) == ([[0, 0, 255, 255]], said + "2 to 3, pixels without a value: 2")
    ends = np.finfo(np.float32).min, np.finfo(np.float32).max
    for marker in (-9999, -32768, -32767, 65535, 1e20, -1e20, -3.4e38, -3.40282e38, -3.402823e38, *ends):
        assert gray(content_of([[marker, 2, 3, 4]]))[0] == [[0, 0, 128, 255]], marker
    assert gray(content_of([[-9999, 2, 20_000]]))[0] == [[0, 85, 255]], "-9999 is one of the values"
    assert gray(content_of([[7, 7, 7]])) == ([[0, 0, 0]], said + "7 to 7")
    assert gray(content_of([[1e-30, 2e-30, 3e-30]]))[0] == [[0, 128, 255]]
    assert gray(content_of([[-3e38, 0, 3e38]]))[0] == [[0, 128, 255]]
    with pytest.raises(DecodeError, match="no pixel has a value"):
        rgb(content_of([[nan, inf, -inf]]))


def test_a_declared_value_of_pixels_without_data_is_left_out():
    values = np.array([[0, 1, 2, 4]], np.float32)
    content = saved(Image.fromarray(values), ".tif", tiffinfo={42113: "0"})
    assert gray(content)[0] == [[0, 0, 85, 255]]


@pytest.mark.parametrize(
    ("kind", "marker", "others", "expected"),
    [
        ("int16", -32767, (-1, 32767), [[0, 127, 255]]),
        ("int16", -32768, (-1, 32767), [[0, 127, 255]]),
        ("uint16", 65535, (0, 40_000), [[255, 0, 156]]),
        ("uint16", 65535, (0, 0), [[255, 0, 0]]),
    ],
)
def test_usual_marks_of_missing_data_in_integers_are_left_out_if_they_are_far_away(kind, marker, others, expected):
    assert gray(tiff_gray([marker, 2, 3, 4], kind))[0] == [[0, 0, 128, 255]]
    assert gray(tiff_gray([marker, *others], kind))[0] == expected


def test_white_is_no_mark_of_missing_data_in_colors():
    image, _ = rgb(png16(np.array([[[65535, 65535, 65535], [100, 0, 300]]], np.uint16)))
    assert np.asarray(image)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("kind", "order"), [("uint8", "<"), ("uint8", ">"), ("uint16", "<"), ("float32", "<"), ("float32", ">")]
)
def test_the_smallest_value_of_a_tiff_may_be_white(kind, order):
    values = [0, 51, 255]
    for photometric, expected in ((1, [[0, 51, 255]]), (0, [[255, 204, 0]])):
        assert gray(tiff_gray(values, kind, order, photometric))[0] == expected
    if kind == "float32":
        values = [np.nan, 51, 0, 255, -np.inf, np.inf, -9999]
        expected = [[0, 204, 255, 0, 255, 0, 0]]
        assert gray(tiff_gray(values, kind, order, 0))[0] == expected, "pixels without a value are black"


def test_integers_of_every_depth_are_stretched():
    small = np.array([[1000, 2000, 3000]])
    for image, suffix in itertools.product(
        (Image.fromarray(small.astype(np.uint16)), Image.fromarray(small.astype(np.int32))), (".png", ".tif", ".pgm")
    ):
        if image.mode == "I;16" or suffix == ".tif":
            assert gray(saved(image, suffix))[0] == [[0, 128, 255]], (image.mode, suffix)
    assert gray(saved(Image.fromarray(small.astype(np.uint16)), ".jp2"))[0] == [[0, 128, 255]]
    # PIL reads unsigned 32-bit integers as signed ones.
    large = np.array([[0, 2**31, 2**32 - 2]], np.uint32)
    signed = saved(Image.fromarray(large.view(np.int32)), ".tif")
    declared = signed.replace(bytes.fromhex("5301 0300 0100 0000 0200"), bytes.fromhex("5301 0300 0100 0000 0100"))
    assert declared != signed and gray(declared)[0] == [[0, 128, 255]]
    assert gray(signed)[0] == [[255, 0, 255]]


def test_channels_of_sixteen_bits_are_stretched_together():
    y, x = np.mgrid[:20, :30]
    low = np.stack([16 * x, 16 * y + 100, 8 * x + y], -1).astype(np.uint16)  # 0 to 464.
    expected = np.rint(low * (255 / 464)).astype(np.uint8)
    files = [png16(low), tiff16(low), tiff16(low, ">"), ppm16(low), ppm16(low, 511)]
    for number, content in enumerate(files):
        image, remark = rgb(content)
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=str(number))
        assert remark == "values stretched to 0 to 255: 16 bits per channel, 0 to 464"
    opaque, half = np.full((20, 30, 1), 65535, np.uint16), np.where(x < 15, 0, 4095).astype(np.uint16)[..., None]
    for content in (png16(np.dstack([low, opaque])), tiff16(np.dstack([low, opaque]))):
        np.testing.assert_array_equal(np.asarray(rgb(content)[0]), expected)
    # Transparent pixels are black, and do not count: the values of the others are 100 to 464.
    seen = np.rint((low[:, 15:].astype(int) - 100) * (255 / 364))
    pixels = np.asarray(rgb(png16(np.dstack([low, half])))[0])
    assert (pixels[:, :15] == 0).all()
    np.testing.assert_array_equal(pixels[:, 15:], seen)
    one = low[..., :1]
    np.testing.assert_array_equal(np.asarray(rgb(png16(np.dstack([one, opaque])))[0])[..., 0], expected[..., 0])


def test_colors_of_more_than_eight_bits_that_pil_reduces_are_left_out():
    low = np.arange(20 * 30 * 3, dtype=np.uint16).reshape(20, 30, 3)
    with pytest.raises(DecodeError, match=r"TIFF file with more than 8 bits per channel in separate planes; save it"):
        rgb(tiff16(low, planar=True))
    sgi = saved(photo(20, 20), ".sgi", bpc=2)
    with pytest.raises(DecodeError, match=r"SGI file with more than 8 bits per channel; save it as RGB in a PNG file"):
        rgb(sgi)
    text = b"P3 2 1 4095 " + b" ".join(b"%d" % value for value in (0, 1, 2, 3, 4, 4095))
    with pytest.raises(DecodeError, match="PPM file with more than 8 bits"):
        rgb(text)
    plain = saved(photo(20, 20), ".j2k")
    at = plain.index(b"\xff\x51") + 40  # Of the first channel's depth, 8 bits less 1.
    assert plain[at] == 7
    with pytest.raises(DecodeError, match="JPEG2000 file with more than 8 bits"):
        rgb(plain[:at] + b"\x0b" + plain[at + 1 :])


def test_damaged_and_unknown_files_are_named_by_their_kind():
    low = np.arange(20 * 30 * 3, dtype=np.uint16).reshape(20, 30, 3)
    for content in (ppm16(low)[:500], png16(low)[:200]):
        with pytest.raises(DecodeError, match="image file is truncated"):
            rgb(content)
    # Tag 258, the bits per pixel: 24 instead of 8, which no reader knows for gray.
    gray = saved(photo(20, 20).convert("L"), ".tif")
    strange = gray.replace(bytes.fromhex("0201 0300 0100 0000 0800"), bytes.fromhex("0201 0300 0100 0000 1800"))
    with pytest.raises(DecodeError, match="PIL does not read this kind of TIFF; save it as RGB, or as gray"):
        rgb(strange)


def test_images_that_pil_has_opened_are_read_like_files(tmp_path):
    low = np.arange(20 * 30 * 3, dtype=np.uint16).reshape(20, 30, 3)
    path = tmp_path / "deep.png"
    path.write_bytes(png16(low))
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(rgb(image)[0]), np.asarray(rgb(path.read_bytes())[0]))
    assert rgb(photo(9, 9))[1] == ""


def test_too_many_pixels_are_refused_in_every_format_with_one_reason(tmp_path):
    png = saved(photo(20, 20), ".png")
    wide = png[:16] + (65_500).to_bytes(4, "big") * 2 + png[24:]  # Also needs another checksum.
    wide = wide[:29] + zlib.crc32(wide[12:29]).to_bytes(4, "big") + wide[33:]
    jpeg = saved(photo(20, 20), ".jpg")
    frame = jpeg.index(b"\xff\xc0") + 5
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "c.bmp")]
    bmp = saved(photo(20, 20), ".bmp")
    contents = wide, jpeg[:frame] + b"\xff\xdc\xff\xdc" + jpeg[frame + 4 :], bmp[:18] + b"\xdc\xff\0\0" * 2 + bmp[26:]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name} .*\(more than 178956970 pixels, the limit\)"):
            read_image(path, 8)
    assert [reason for _, reason in decode(paths, 8)] == ["more than 178956970 pixels, the limit"] * 3


def test_pipes_sockets_and_folders_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Names of sockets are short.
    os.mkfifo("pipe.png")
    Path("folder.png").mkdir()
    paths = [Path(name) for name in ("pipe.png", "socket.png", "zero.png", "folder.png", "empty.png", "no.png")]
    paths[2].symlink_to("/dev/zero")
    paths[4].touch()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        special, reasons = (
            "a pipe, socket or device instead of a file",
            dict(decode([path.absolute() for path in paths], 8)),
        )
        assert list(reasons.values()) == [*[special] * 3, "a folder", "the file is empty", "No such file or directory"]
        for path in paths[:3]:
            with pytest.raises(UserError, match=rf"{path} cannot be read as an image \({special}\)"):
                read_image(path, 8)


def test_formats_that_need_other_programs_are_not_read():
    assert not {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG"} & set(formats())
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".mpg"} & suffixes()
    assert {
        ".jpg",
        ".jfif",
        ".jpe",
        ".png",
        ".webp",
        ".avif",
        ".jp2",
        ".pgm",
        ".pnm",
        ".tga",
        ".ico",
        ".mpo",
    } <= suffixes()
    with pytest.raises(DecodeError, match="unknown image format"):
        rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_errors_are_one_line():
    for content in (b"", b"GIF89a", os.urandom(100)):
        with pytest.raises(DecodeError) as error:
            rgb(content)
        assert "\n" not in str(error.value) and str(error.value) and "object at" not in str(error.value)
