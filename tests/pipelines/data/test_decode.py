"""Decoding of all kinds of image files, compared with PIL."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data import decode as decoding
from pipelines.data import decode_worker
from pipelines.data.decode import DecodingProcess, decode
from pipelines.data.jpegs import BATCH, JpegDecoder, plain_jpeg
from pipelines.data.pixels import resized, rgb
from tests.pipelines.data.image_makers import exif
from tests.processes import ROOT


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


@pytest.fixture
def dying(monkeypatch):
    """Use a process that dies, instead of decoding, at images with a certain color in the corner."""
    monkeypatch.setattr(decoding, "_WORKER", "tests.pipelines.data.dying_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def colored(folder, number, color, suffix=".jpg"):
    return saved(
        folder, f"{number:03}{suffix}", Image.new("RGB", (24, 18), color), **{"quality": 95} if suffix == ".jpg" else {}
    )


DALI_DIES, BOTH_DIE, EXITS = (0, 200, 0), (0, 0, 200), (200, 0, 0)  # See `dying_worker`.


def test_a_file_that_ends_the_process_is_found_and_the_others_are_decoded(tmp_path, dying):
    colors = {3: DALI_DIES, 70: BOTH_DIE, 72: EXITS}
    files = [colored(tmp_path, n, colors.get(n, (n, n, n))) for n in range(130)]
    files[129] = colored(tmp_path, 129, BOTH_DIE, ".png")
    notes = {}
    images = dict(decode(files, 16, threads=2, note=notes.__setitem__))
    assert list(images) == list(range(130))
    bad = {n: image for n, image in images.items() if isinstance(image, str)}
    assert bad == dict.fromkeys((70, 129), "decoding it ended the process (SIGSEGV)")
    by_pil = "decoded by PIL, since DALI's decoder ended the process: "
    assert notes == {3: by_pil + "SIGKILL", 72: by_pil + "exit code 3"}
    for n in set(images) - set(bad):
        assert np.abs(images[n].astype(int) - colors.get(n, (n, n, n))).max() <= 3, n


def test_a_process_serves_several_calls_until_it_is_ended(tmp_path):
    files = [colored(tmp_path, n, (n, n, n)) for n in range(3)]
    with DecodingProcess() as process:
        first = dict(decode(files, 16, process=process))
        number = process._process.pid
        again = dict(decode(files[::-1], 16, process=process))
        assert process._process.pid == number
        next(decode(files, 16, process=process))  # Abandoned, with images in the pipe.
        assert len(dict(decode(files, 8, process=process))) == 3
    np.testing.assert_array_equal(first[0], again[2])
    assert process._process is None


def test_a_process_that_does_not_start_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_WORKER", "pipelines.no_such_module")
    with pytest.raises(RuntimeError, match=r"the process that decodes images does not start \(exit code 1\)"):
        list(decode([colored(tmp_path, 0, (1, 2, 3))], 8))


def test_an_error_in_the_process_is_raised_here(tmp_path):
    with pytest.raises(ValueError, match="max_workers"):
        list(decode([colored(tmp_path, 0, (1, 2, 3))], 8, threads=-1))


def test_the_process_ends_with_the_one_that_started_it(tmp_path):
    files = [colored(tmp_path, n, (n, n, n), ".png") for n in range(200)]
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom pipelines.data.decode import DecodingProcess, decode\n"
        "process = DecodingProcess()\nnext(decode([Path(sys.argv[1])] * 10**5, 64, process=process))\n"
        "results = decode([Path(sys.argv[1])] * 10**5, 64, process=process)\nnext(results)\n"
        "print(process._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, files[0]], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the decoding process goes on")


def read(folder, count, size):
    """Return files that have been read: JPEGs of a size."""
    path = saved(folder, f"{size[0]}.jpg", Image.new("RGB", size, (9, 9, 9)))
    return [decode_worker._read(path, False) for _ in range(count)]


def test_batches_are_bounded_by_bytes(tmp_path):
    def lengths(files, size, memory):
        return [len(batch) for batch in decode_worker._batches(iter(files), size, BATCH, memory)]

    small, large = read(tmp_path, 200, (20, 20)), read(tmp_path, 5, (1000, 800))
    assert lengths(small, 8, 10**9) == [64, 64, 64, 8]
    # An image of 1000 x 800 pixels needs 2.4 million bytes, and its file some thousand.
    assert lengths(large + small[:3], 8, 5_000_000) == [2, 2, 4]
    assert lengths(large, 8, 1) == [1] * 5
    # PIL needs more per pixel, and large squares count as well.
    path = saved(tmp_path, "a.png", Image.new("RGB", (1000, 800)))
    assert decode_worker._read(path, False).memory > 8 * 800_000
    assert lengths(small[:5], 1000, 2 * 3 * 1000**2 + 10_000) == [2, 2, 1]


def test_images_do_not_depend_on_the_files_around_them(tmp_path):
    files = [saved(tmp_path, f"{n}.jpg", photo(50, 40, n), quality=90) for n in range(5)]
    with DecodingProcess() as process:
        alone = [dict(decode([path], 24, process=process))[0] for path in files]
        content = files[2].read_bytes()
        scan = content.index(b"\xff\xda")
        files[2].write_bytes(content[: scan + 5] + b"\x63" + content[scan + 6 :])  # A channel that does not exist.
        assert plain_jpeg(files[2].read_bytes()) and JpegDecoder(24, 1, "cpu")([plain_jpeg(files[2].read_bytes())]) == [
            None
        ]
        together = dict(decode(files, 24, process=process))
    assert "broken" in together[2]
    for n in (0, 1, 3, 4):
        np.testing.assert_array_equal(alone[n], together[n])


def segments(content):
    """Return the offsets of the marker segments before the image data of a JPEG, by marker; the last of each kind."""
    places, at = {}, 2
    while True:
        places[content[at + 1]] = at
        if content[at + 1] == 0xDA:
            return places
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")


def test_only_plain_jpegs_are_for_dali(tmp_path):
    def jpeg(image, **options):
        return saved(tmp_path, "a.jpg", image, **options).read_bytes()

    image = photo(40, 30)
    plain = jpeg(image)
    place = segments(plain)
    frame, huffman, quantization, scan = place[0xC0], place[0xC4], place[0xDB], place[0xDA]

    def changed(at, *values, base=plain):
        return base[:at] + bytes(values) + base[at + len(values) :]

    accepted = plain_jpeg(plain)
    assert (accepted.width, accepted.height, accepted.turn) == (40, 30, 1)
    for options in ({"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"optimize": True}, {"comment": "x"},
                    {"exif": exif(6)}, {"restart_marker_blocks": 2}):  # fmt: skip
        assert plain_jpeg(jpeg(image, **options)), options
    assert plain_jpeg(jpeg(image.convert("L"))) and plain_jpeg(jpeg(image, exif=exif(6))).turn == 6
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
    assert plain_jpeg(plain[:2] + adobe + b"\1" + plain[2:])
    refused = {
        "CMYK": jpeg(image.convert("CMYK")),
        "RGB by Adobe's marker": plain[:2] + adobe + b"\0" + plain[2:],
        "RGB by its names": jpeg(image, keep_rgb=True),
        "too long": jpeg(photo(400, 20)),
        "cut": plain[:-200],
        "no image data": plain[:scan],
        "trailing data": plain + bytes(100),
        "PNG": saved(tmp_path, "a.png", image).read_bytes(),
        "no height": changed(frame + 5, 0, 0),
        "no width": changed(frame + 7, 0, 0),
        "12 bits": changed(frame + 4, 12),
        "arithmetic coding": changed(frame + 1, 0xC9),
        "lossless": changed(frame + 1, 0xC3),
        "sampling 0": changed(frame + 11, 0x00),
        "sampling 3x1": changed(frame + 11, 0x31),
        "sampling of the second channel": changed(frame + 14, 0x21),
        "two channels of one name": changed(frame + 13, 1),
        "quantization table 7": changed(frame + 12, 7),
        "length of the frame": changed(frame + 3, 16),
        "two frames": plain[:frame] + plain[frame : frame + 19] + plain[frame:],
        "too many codes of one bit": changed(huffman + 5, 3),
        "too many values of a table": changed(huffman + 20, 255),
        "number of a Huffman table": changed(huffman + 4, 0x0F),
        "number of a quantization table": changed(quantization + 4, 0x09),
        "length of a quantization table": changed(quantization + 3, 66),
        "length beyond the file": changed(quantization + 2, 0xFF, 0xFF),
        "length 0": changed(quantization + 2, 0, 0),
        "no marker": changed(quantization, 0),
        "restart marker": plain[:2] + b"\xff\xd0" + plain[2:],
        "length of the scan": changed(scan + 3, 13),
    }
    # Too large for PIL, though the sides are allowed.
    refused["sides"] = changed(frame + 5, 0xFF, 0xDC, 0xFF, 0xDC)
    for what, content in refused.items():
        assert plain_jpeg(content) is None, what
