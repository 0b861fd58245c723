"""Decoding of all kinds of image files, compared with PIL."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data.decode import DecodeError, decode, resized, rgb


def photo(width=90, height=60, seed=0):
    """Return a smooth image with a red top left corner."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    pixels = 120 + 100 * np.sin(5 * x[..., None] + 3 * y[..., None] + phase)
    pixels[: height // 4, : width // 4] = (250, 20, 20)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(folder, name, image, **options):
    path = folder / name
    image.save(path, **options)
    return path


def decoded(files, size):
    images = dict(decode(files, size, threads=2))
    assert list(images) == list(range(len(files)))
    return list(images.values())


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_jpegs_match_pil_up_to_rounding(tmp_path):
    # Reduced, enlarged, and by factors that do not give a whole number of pixels.
    sizes = [(90, 60), (60, 90), (33, 200), (64, 64), (640, 480), (20, 27), (31, 47), (33, 50)]
    files = [saved(tmp_path, f"{n}.jpg", photo(*size, n), quality=95) for n, size in enumerate(sizes)]
    for path, image in zip(files, decoded(files, 32), strict=True):
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        expected = resized(Image.open(path).convert("RGB"), 32)
        difference = np.abs(image.astype(int) - expected)
        assert difference.mean() < 0.5 and np.quantile(difference, 0.99) <= 3, path


@pytest.mark.gpu
@pytest.mark.hardware
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_decoding_matches_the_cpu_within_a_few_gray_levels(tmp_path):
    sizes = [(90, 60), (640, 480), (20, 27)]
    files = [saved(tmp_path, f"{n}.jpg", photo(*size, n), quality=95) for n, size in enumerate(sizes)]
    for (_, one), (_, other) in zip(decode(files, 32), decode(files, 32, device="gpu"), strict=True):
        assert np.abs(one.astype(int) - other).mean() < 3


def test_the_shorter_side_is_resized_and_the_center_cropped():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    wide = resized(Image.fromarray(image), 20)
    assert (wide[:, 2:-2] == 200).all() and wide.shape == (20, 20, 3)
    tall = resized(Image.fromarray(image.transpose(1, 0, 2)), 20)
    np.testing.assert_array_equal(tall, wide.transpose(1, 0, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    path = saved(tmp_path, "rotated.jpg", photo(64, 64), exif=exif(orientation), quality=95)
    (image,) = decoded([path], 64)
    corners = {"tl": image[:12, :12], "tr": image[:12, -12:], "br": image[-12:, -12:], "bl": image[-12:, :12]}
    reddest = max(corners, key=lambda name: (corners[name] @ np.array([1.0, -1, -1])).mean())
    assert reddest == {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]


def test_other_formats_and_modes_become_rgb(tmp_path):
    base = photo(48, 48)
    expected = np.asarray(base).astype(int)
    cases = {
        "a.png": (base, {}, 0), "b.webp": (base, {"lossless": True}, 0), "c.bmp": (base, {}, 0),
        "palette.gif": (base.quantize(256), {}, 30), "palette.png": (base.quantize(256), {}, 30),
        "cmyk.jpg": (base.convert("CMYK"), {"quality": 95}, 30), "tif.tiff": (base, {}, 0),
        "mit Leerzeichen und Ümlaut é 猫.jpg": (base, {"quality": 95}, 30),
        "UPPER.JPG": (base, {"quality": 95, "format": "JPEG"}, 30),
    }  # fmt: skip
    files = [saved(tmp_path, name, image, **options) for name, (image, options, _) in cases.items()]
    for (name, (_, _, tolerance)), image in zip(cases.items(), decoded(files, 48), strict=True):
        assert not isinstance(image, str), (name, image)
        assert np.abs(image.astype(int) - expected).mean() <= tolerance / 3, name


def test_grayscale_16_bit_and_transparent_images(tmp_path):
    gray = np.linspace(0, 255, 32 * 32).reshape(32, 32)
    clear = np.dstack([np.full((32, 32, 3), 200, np.uint8), np.where(gray < 128, 0, 255).astype(np.uint8)])
    files = [
        saved(tmp_path, "gray.png", Image.fromarray(gray.astype(np.uint8))),
        saved(tmp_path, "gray.jpg", Image.fromarray(gray.astype(np.uint8)), quality=95),
        saved(tmp_path, "deep.png", Image.fromarray((1000 + gray * 100).astype(np.uint16))),
        saved(tmp_path, "clear.png", Image.fromarray(clear)),
    ]
    one, jpeg, deep, transparent = decoded(files, 32)
    for image, tolerance in ((one, 0), (jpeg, 4), (deep, 1)):
        assert (np.abs(image.astype(int) - np.trunc(gray)[..., None]) <= tolerance).mean() > 0.98
    assert (transparent[:15] == 0).all() and (transparent[17:] == 200).all()
    assert "stretched" in rgb(files[2].read_bytes())[1] and rgb(files[0].read_bytes())[1] == ""


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    path = saved(tmp_path, "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    (image,) = decoded([path], 16)
    assert (image == (255, 0, 0)).all()


def test_unreadable_files_are_reported_and_the_others_decoded(tmp_path):
    files = [saved(tmp_path, f"{n:03}.jpg", photo(50, 40, n), quality=90) for n in range(70)]
    whole = files[0].read_bytes()
    files[3].write_bytes(whole[: len(whole) // 2])
    files[10].write_bytes(b"")
    files[20].write_text("no image")
    files[66].write_bytes(whole[:20] + bytes(len(whole) - 22) + whole[-2:])  # Starts and ends like a JPEG.
    files[69].unlink()
    files[5].rename(tmp_path / "kept")
    Image.open(tmp_path / "kept").save(files[5], format="PNG")  # Misleading suffix.
    images = decoded(files, 16)
    bad = {n: text for n, text in enumerate(images) if isinstance(text, str)}
    assert set(bad) == {3, 10, 20, 66, 69} and all(text and "\n" not in text for text in bad.values())
    assert "truncated" in bad[3].lower() and bad[10] == "the file is empty" and bad[69] == "No such file or directory"
    np.testing.assert_array_equal(images[0], decoded([files[0]], 16)[0])


def test_images_keep_the_order_of_files_across_batches(tmp_path):
    files = [saved(tmp_path, f"{n:03}.png", Image.new("RGB", (9, 9), (n, 2 * n % 256, 7))) for n in range(130)]
    assert [image[4, 4].tolist() for image in decoded(files, 8)] == [[n, 2 * n % 256, 7] for n in range(130)]
    assert list(decode([], 8)) == []


def test_errors_are_one_line():
    for content in (b"", b"GIF89a", os.urandom(100)):
        with pytest.raises(DecodeError) as error:
            rgb(content)
        assert "\n" not in str(error.value) and str(error.value) and "object at" not in str(error.value)
    buffer = io.BytesIO()
    photo().save(buffer, "PNG")
    assert rgb(buffer.getvalue())[0].mode == "RGB"
