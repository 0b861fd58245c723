"""Images that `Model.predict` takes: every form of the same image gives the same probabilities as its file."""

import errno
import io

import numpy as np
import pytest
import torch
from PIL import Image

from engine.api import load
from engine.errors import UserError
from engine.inference import predict

SIZES = [(16, 16), (9, 31), (40, 100), (25, 24), (1, 5)]  # (H, W)


@pytest.fixture(scope="module")
def model(trained):
    return load(trained)


@pytest.fixture(scope="module")
def colors():
    """Images of several sizes with a different pattern in each channel."""
    generator = np.random.default_rng(0)
    return [generator.integers(256, size=(*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def files(colors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for number, image in enumerate(colors):
        Image.fromarray(image).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def of_files(model, files):
    found = np.concatenate([model.predict(path) for path in files])
    assert found.dtype == np.float32 and np.ptp(found, axis=0).max() > 1e-3, "the images must differ"
    return found


def tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)


class OtherArray:
    """An array of another library, which numpy converts."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class BrokenFile(io.BytesIO):
    """An open file on a broken disk."""

    def read(self, size=-1):
        raise OSError(errno.EIO, "Input/output error")


FORMS = {
    "path": lambda image, path: path,
    "text": lambda image, path: str(path),
    "text of numpy": lambda image, path: np.array([str(path)])[0],
    "array without dimensions": lambda image, path: np.array(str(path)),
    "bytes": lambda image, path: path.read_bytes(),
    "bytes of numpy": lambda image, path: np.bytes_(path.read_bytes()),
    "bytearray": lambda image, path: bytearray(path.read_bytes()),
    "buffer": lambda image, path: io.BytesIO(path.read_bytes()),
    "opened": lambda image, path: Image.open(path),
    "PIL": lambda image, path: Image.fromarray(image),
    "array": lambda image, path: image,
    "strided": lambda image, path: np.asfortranarray(image[::-1])[::-1],
    "one of a batch": lambda image, path: image[None],
    "opaque": lambda image, path: np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]),
    "tensor": lambda image, path: tensor(image),
    "batch of tensors": lambda image, path: tensor(image)[None],
    "other library": lambda image, path: OtherArray(image),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_probabilities_of_the_file(model, colors, files, of_files, form):
    given = [FORMS[form](image, path) for image, path in zip(colors, files, strict=True)]
    np.testing.assert_allclose(model.predict(given, batch=2), of_files, atol=1e-6)
    one = FORMS[form](colors[2], files[2])
    np.testing.assert_allclose(model.predict(one), of_files[2:3], atol=1e-6)


def test_mixed_forms_keep_their_order(model, colors, files, of_files):
    folder = files[0].parent
    given = [tensor(colors[3]), folder, Image.fromarray(colors[1]), np.stack([colors[2]] * 2), str(files[0])]
    rows = [3, 0, 1, 2, 3, 4, 1, 2, 2, 0]
    for batch in (1, 3, 256):
        np.testing.assert_allclose(model.predict(given, batch), of_files[rows], atol=1e-6)
    for several in (tuple(given), iter(given), (each for each in given)):
        np.testing.assert_allclose(model.predict(several), of_files[rows], atol=1e-6)
    np.testing.assert_allclose(model.predict(folder), of_files, atol=1e-6)
    for kind in (str, object, np.dtypes.StringDType()):
        paths = np.array([str(path) for path in files], dtype=kind)
        np.testing.assert_allclose(model.predict(paths), of_files, atol=1e-6)
    contents = np.array([path.read_bytes() for path in files])
    np.testing.assert_allclose(model.predict(contents), of_files, atol=1e-6)


def test_images_of_the_networks_size_are_unchanged(model, images, expected):
    assert model.classes == tuple("0123456789") and model.side == 16
    np.testing.assert_allclose(model.predict(images), expected, atol=1e-5)
    np.testing.assert_allclose(model.predict(tensor(images[4])), expected[4:5], atol=1e-5)


def test_gray_images(model, colors):
    """Gray is equal values in all three channels."""
    gray = [image[..., 0] for image in colors]
    rgb = model.predict([np.stack([image] * 3, axis=-1) for image in gray])
    for form in (
        lambda image: image,
        lambda image: image[..., None],
        lambda image: image[None, ..., None],
        Image.fromarray,
        torch.from_numpy,
        lambda image: torch.from_numpy(image)[None],
    ):
        np.testing.assert_allclose(model.predict([form(image) for image in gray]), rgb, atol=1e-6)


def test_transparency_is_composited_on_black(model, colors):
    clear = np.dstack([colors[2], np.zeros(colors[2].shape[:2], np.uint8)])
    black = model.predict(np.zeros_like(colors[2]))
    np.testing.assert_allclose(
        model.predict([clear, Image.fromarray(clear), tensor(clear)]), black.repeat(3, 0), atol=1e-6
    )


def test_the_exif_orientation_is_applied(model, colors, tmp_path):
    """Orientation 6: the camera was rotated, and the image must be rotated clockwise by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "rotated.png"
    Image.fromarray(colors[2]).save(path, exif=exif)
    upright = model.predict(np.rot90(colors[2], -1))
    assert abs(upright - model.predict(colors[2])).max() > 1e-3
    for given in (path, path.read_bytes(), Image.open(path)):
        np.testing.assert_allclose(model.predict(given), upright, atol=1e-6)


def test_the_callers_image_is_not_changed(model, files):
    image = Image.open(files[2]).convert("RGBA")
    before = image.tobytes()
    model.predict(image)
    assert image.mode == "RGBA" and image.size == (100, 40) and image.tobytes() == before


def test_nothing_gives_no_rows(model):
    for nothing in ([], (), iter([]), np.empty((0, 7, 5, 3), np.uint8), torch.empty((0, 3, 7, 5), dtype=torch.uint8)):
        found = model.predict(nothing)
        assert found.shape == (0, 10) and found.dtype == np.float32


def test_one_decoded_image_and_one_batch_are_in_memory(model, colors, monkeypatch):
    """Images of a generator are asked for one by one, and each batch is classified before the next one is read."""
    events, classify = [], predict.probabilities
    monkeypatch.setattr(
        predict, "probabilities", lambda *given: events.append(f"classify {len(given[1])}") or classify(*given)
    )

    def large():
        for number in range(5):
            events.append(f"image {number}")
            yield colors[number]

    model.predict(large(), batch=2)
    assert events == [
        *("image 0", "image 1", "classify 2", "image 2", "image 3", "classify 2", "image 4", "classify 1")
    ]


@pytest.mark.parametrize(
    "given", [None, 3, 0.5, {"a": 1}, {"a.png"}, [1, 2], [["a.png"]], [[[0, 0, 0]]], object(), range(2), [None]]
)
def test_other_types_are_rejected(model, given):
    kind = type(given[0] if isinstance(given, list) else 0 if isinstance(given, range) else given).__name__
    message = rf"a path of an image or a folder, .* PIL image, a uint8 array, a uint8 tensor.*; got {kind}$"
    with pytest.raises(TypeError, match=message):
        model.predict(given)


@pytest.mark.parametrize(
    ("given", "error", "parts"),
    [
        (io.StringIO("text"), TypeError, ["open in binary mode"]),
        (np.zeros((4, 4, 3)), ValueError, ["must be uint8, from 0 to 255, got float64; if they are from 0 to 1, "]),
        (torch.zeros(3, 4, 4), ValueError, ["must be uint8, from 0 to 255, got float32; if they are from 0 to 1, "]),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), ValueError, ["got bfloat16"]),
        (np.zeros((4, 4, 3), np.uint16), ValueError, ["must be uint8, from 0 to 255, got uint16"]),
        (np.zeros((4, 4, 3), int), ValueError, ["got int64"]),
        (np.zeros((4, 4), bool), ValueError, ["got bool"]),
        (np.zeros(5, np.uint8), ValueError, ["an array must be (H, W), ", "got (5,)"]),
        (np.zeros((3, 9, 9), np.uint8), ValueError, ["an array must be (H, W), ", "got (3, 9, 9); for N gray images"]),
        (np.zeros((9, 9, 2), np.uint8), ValueError, ["an array must be (H, W), ", "got (9, 9, 2)"]),
        (np.zeros((1, 1, 9, 9, 3), np.uint8), ValueError, ["an array must be (H, W), ", "got (1, 1, 9, 9, 3)"]),
        (np.zeros((0, 9, 3), np.uint8), ValueError, ["no pixels"]),
        (Image.new("RGB", (9, 0)), ValueError, ["images have no pixels, got (9, 0)"]),
        (
            torch.zeros((2, 9, 9, 3), dtype=torch.uint8),
            ValueError,
            ["a tensor must be (H, W), (C, H, W)", "tensor.numpy()"],
        ),
        ("", ValueError, ["path of an image is empty"]),
        ("a/b.jpg", UserError, ["a/b.jpg: no such file"]),
        ([b"damaged"], UserError, ["images[0] cannot be read as an image (unknown image format)"]),
    ],
)
def test_invalid_images(model, given, error, parts):
    with pytest.raises(error) as raised:
        model.predict(given)
    assert all(part in str(raised.value) for part in parts) and "\n" not in str(raised.value)


def test_an_unreadable_image_is_named(model, colors, files, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"^images\[2\] cannot be read as an image"):
        model.predict([files[0], colors[0], b"damaged"])
    with pytest.raises(UserError, match=r"empty\.jpg cannot be read as an image"):
        model.predict([files[0], tmp_path / "empty.jpg"])
    with pytest.raises(UserError, match="no image file in"):
        (tmp_path / "folder").mkdir()
        model.predict(tmp_path / "folder")


def test_the_number_of_images_in_a_batch_is_an_integer(model, files, of_files):
    np.testing.assert_allclose(model.predict(files, batch=np.int64(2)), of_files, atol=1e-6)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        model.predict(files, batch=0)
    for given, shown in (("3", "'3'"), (2.5, "2.5"), (True, "True"), (None, "None")):
        with pytest.raises(TypeError, match=f"^batch must be an integer, got {shown}$"):
            model.predict(files, batch=given)


def test_open_files_that_cannot_be_read(model, files, tmp_path):
    with open(files[0], "rb") as closed:
        pass
    with pytest.raises(UserError, match="an image file is closed; give its path, or close the file"):
        model.predict(closed)
    with pytest.raises(UserError, match=r"^an open image file cannot be read \(.*Input/output error\)$"):
        model.predict([BrokenFile()])
    with open(files[0], encoding="utf-8") as text, open(tmp_path / "new", "wb") as writable:
        for given in (text, writable):
            with pytest.raises(TypeError, match="must be open in binary mode"):
                model.predict(given)
