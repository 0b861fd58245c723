"""Exports, loaded by their own runtimes: probabilities, every step of preprocessing, metadata, equal bytes."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL
import pytest
import safetensors.torch
import torch
from PIL import Image

from engine.api import load
from engine.commands import main as cli
from engine.config.presets import preset
from engine.errors import UserError
from engine.inference import export
from engine.inference.resize import Resize
from engine.inference.trained import Trained
from engine.models.build import make_network
from engine.models.wide_resnet import TwoHeadNetwork
from pipelines import files

ROOT, CPU = Path(__file__).parents[3], torch.device("cpu")
BATCHES = (1, 2, 9)
PROGRAMS = ("torch", "onnx")
# (H, W), for a side of 16: smaller and larger, both orientations, extreme, and with half a pixel at the longer side
# (49 * 16 / 32 = 24.5 and 25.5, rounded up to 25 and 26).
SIZES = [(16, 16), (5, 7), (1, 1), (1, 40), (40, 100), (17, 16), (15, 33), (200, 301), (480, 640)]
TIES = [(32, 49), (49, 32), (32, 51), (64, 98)]
# Older versions of Pillow resize these in the other order, which rounds differently.
TALL = [(100, 40), (81, 40), (640, 199), (300, 20)] if int(PIL.__version__.partition(".")[0]) >= 13 else []


def write(trained, to, folder, *flags):
    path = folder / f"model{export.SUFFIXES[to]}"
    cli.main(["export", str(trained), "--to", to, "--out", str(path), *flags])
    return path


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The run's model in every format."""
    folder = tmp_path_factory.mktemp("exported")
    return {to: write(trained, to, folder) for to in export.SUFFIXES}


@pytest.fixture(scope="module")
def exported_with_resize(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with-resize")
    return {to: write(trained, to, folder, "--with-resize") for to in PROGRAMS}


def runtime(path):
    """Return a function from (N, H, W, 3) uint8 to (N, L) float32 that runs an exported file."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: session.run(["probabilities"], {"images": images})[0]
    model = torch.export.load(path).module() if path.suffix == ".pt2" else export.load_safetensors(path)[0]
    return lambda images: model(torch.from_numpy(images)).detach().numpy()


@pytest.mark.parametrize("to", export.SUFFIXES)
def test_exports_take_any_batch_size(exported, images, expected, to):
    run = runtime(exported[to])
    for rows in BATCHES:
        found = run(images[:rows])
        np.testing.assert_allclose(found, expected[:rows], atol=1e-5)
        assert found.dtype == np.float32


def test_safetensors_name_classes_and_sides(exported):
    _, classes, sides = export.load_safetensors(exported["safetensors"])
    assert classes == tuple("0123456789") and sides == (16, 16)


class ChannelMeans(TwoHeadNetwork):
    """The logits are the means of the three normalized channels."""

    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images, track=True):
        return images.mean((2, 3)) * self.scale, images[:, 0, :1, 0]


class Pixels(ChannelMeans):
    """The probabilities are pixel + 1 over the sum of all (pixel + 1)."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def forward(self, images, track=True):
        return torch.log(images + 1).flatten(1) * self.scale[0], images[:, 0, :1, 0]


def trained_model(made, side, **changes):
    config = dataclasses.replace(preset("digits-40"), **changes)
    return Trained(config, ("a", "b", "c"), (side, side), made.eval(), CPU, 7)


@pytest.mark.parametrize("to", PROGRAMS)
def test_programs_normalize_each_channel(tmp_path, to):
    """(12 - 10) / 2 = 1, (28 - 20) / 4 = 2 and (54 - 30) / 8 = 3, then softmax."""
    path = tmp_path / f"model{export.SUFFIXES[to]}"
    export.export(trained_model(ChannelMeans(), 4), to, path)
    image = np.broadcast_to(np.array([12, 28, 54], np.uint8), (1, 4, 4, 3)).copy()
    total = math.e + math.e**2 + math.e**3
    by_hand = [[math.e / total, math.e**2 / total, math.e**3 / total]]
    np.testing.assert_allclose(runtime(path)(image), by_hand, atol=1e-6)
    metadata = export.read_metadata(path)
    assert json.loads(metadata["mean"]) == [10, 20, 30] and json.loads(metadata["std"]) == [2, 4, 8]


@pytest.mark.parametrize(
    ("network", "mean", "std"),
    [
        ("wide-resnet", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
        # ImageNet's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225), times 255.
        ("timm:resnet10t", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ],
)
def test_rebuilt_networks_are_normalized_as_in_training(tmp_path, network, mean, std):
    if network != "wide-resnet":
        pytest.importorskip("timm", reason="needs timm")
    made = make_network(dataclasses.replace(preset("digits-40"), network=network, width=16), 3, CPU, (16, 16))
    path = tmp_path / "model.safetensors"
    export.export(trained_model(made, 16, network=network, width=16), "safetensors", path)
    image = np.random.default_rng(0).integers(256, size=(2, 16, 16, 3), dtype=np.uint8)
    pixels = (image - np.array(mean)) / np.array(std)
    with torch.no_grad():
        logits = made(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))[0].numpy()
    by_hand = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(runtime(path)(image), by_hand, atol=1e-5)
    metadata = export.read_metadata(path)
    assert json.loads(metadata["mean"]) == pytest.approx(mean) and json.loads(metadata["std"]) == pytest.approx(std)


def resized_by_pillow(image, side):
    """Resize by the documented rule, with Pillow's own filter."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    tall, wide = (math.floor(length * side / shorter + 0.5) for length in (height, width))
    top, left = (math.floor((length - side + 1) / 2) for length in (tall, wide))
    made = Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC)
    return np.asarray(made)[top : top + side, left : left + side].astype(float)


def noise(size, count=1):
    return np.random.default_rng(sum(size)).integers(256, size=(count, *size, 3), dtype=np.uint8)


def assert_same_pixels(found, expected):
    """Rounding of the filter's shares may move few values by one level."""
    difference = np.abs(found - expected)
    assert difference.max() < 1.1 and (difference > 0.5).mean() < 0.002


@pytest.mark.parametrize("size", SIZES + TIES + TALL, ids=lambda size: f"{size[1]}x{size[0]}")
def test_resizing_gives_pillows_pixels(size):
    checkers = np.indices((1, *size, 3)).sum(0) // 2 % 2 * 255
    images = np.concatenate([noise(size, 2), noise(size) // 128 * 255, checkers.astype(np.uint8)])
    found = Resize(16)(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy()
    assert_same_pixels(found, np.stack([resized_by_pillow(image, 16) for image in images]))


@pytest.mark.parametrize("to", PROGRAMS)
def test_programs_with_resize_give_pillows_pixels(tmp_path, to):
    path = tmp_path / f"model{export.SUFFIXES[to]}"
    export.export(trained_model(Pixels(), 16), to, path, resize=True)
    run = runtime(path)
    for size in SIZES + TIES + TALL:
        images = noise(size, 2)
        expected = np.stack([resized_by_pillow(image, 16) for image in images])
        for rows in (1, 2):
            probabilities = run(images[:rows]).reshape(rows, 3, 16, 16).transpose(0, 2, 3, 1)
            total = (expected[:rows] + 1).sum((1, 2, 3), keepdims=True)
            assert_same_pixels(probabilities * total - 1, expected[:rows])


@pytest.mark.parametrize("to", PROGRAMS)
def test_programs_with_resize_agree_with_predict(trained, exported_with_resize, images, expected, to):
    model, run = load(trained), runtime(exported_with_resize[to])
    np.testing.assert_allclose(run(images), expected, atol=1e-5)
    for size in SIZES + TIES + TALL:
        np.testing.assert_allclose(run(noise(size, 2)), model.predict(noise(size, 2)), atol=1e-5)


def test_safetensors_do_not_resize(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        write(trained, "safetensors", tmp_path, "--with-resize")
    said = "--with-resize needs --to torch or onnx: a safetensors file has parameters, but no program"
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("resize", [False, True])
def test_onnx_names_the_dimensions(exported, exported_with_resize, resize):
    model = onnx.load((exported_with_resize if resize else exported)["onnx"])
    onnx.checker.check_model(model, full_check=True)
    (images,), (probabilities,) = model.graph.input, model.graph.output
    found = [[d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim] for each in (images, probabilities)]
    assert found == [["batch", *(("height", "width") if resize else (16, 16)), 3], ["batch", 10]]


def check_metadata(path, step, resize):
    metadata = export.read_metadata(path)
    assert json.loads(metadata["classes"]) == list("0123456789") and json.loads(metadata["sides"]) == [16, 16]
    assert metadata["preset"] == "digits-40" and json.loads(metadata["config"])["width"] == 16
    assert (metadata["run"], metadata["step"]) == ("digits-40 seed 0", str(step))
    assert metadata["remixmatch-engine"] == version("remixmatch-engine") and len(metadata["parameters_sha256"]) == 64
    assert json.loads(metadata["mean"]) == json.loads(metadata["std"]) == [127.5] * 3
    assert metadata["input"] == f"images: (batch, {'height, width' if resize else '16, 16'}, 3) uint8, RGB"
    assert metadata["output"] == "probabilities: (batch, 10) float32"
    assert metadata["resize"] == (
        f"{'done by the model' if resize else 'to be done by the caller'}: resize the shorter side to 16 pixels and "
        "the longer one in proportion, floor(x + 0.5), with Pillow's antialiased bicubic filter; then crop the center, "
        "16x16"
    )
    assert "(pixel - mean) / std" in metadata["normalization"]
    return metadata["parameters_sha256"]


def test_exports_contain_metadata(exported, exported_with_resize):
    digests = {check_metadata(path, 30, False) for path in exported.values()}
    tensors = sorted(safetensors.torch.load_file(exported["safetensors"]).items())
    content = b"".join(name.encode() + value.numpy().tobytes() for name, value in tensors)
    assert digests == {hashlib.sha256(content).hexdigest()}
    assert digests == {check_metadata(path, 30, True) for path in exported_with_resize.values()}


def test_exports_of_two_processes_are_equal_and_name_no_paths(trained, exported, tmp_path):
    """The other process has another hash seed and another working folder, and replaces existing files."""
    again = {to: tmp_path / path.name for to, path in exported.items()}
    for path in again.values():
        path.write_text("what was there")
    code = "import sys; from engine.commands.main import main; [main(line.split()) for line in sys.stdin]"
    lines = [f"export {trained} --to {to} --out {path.name}" for to, path in again.items()]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=environment, input="\n".join(lines), text=True, check=True, timeout=300)
    for to, path in exported.items():
        content = path.read_bytes()
        assert again[to].read_bytes() == content, to
        assert os.fsencode(ROOT) not in content and b".py" not in content, to
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in again.values())


@pytest.mark.parametrize("to", export.SUFFIXES)
def test_an_export_to_a_full_disk_leaves_the_existing_file(trained, tmp_path, monkeypatch, to, capsys):
    path, write = tmp_path / f"mine{export.SUFFIXES[to]}", files._File.write
    path.write_text("what was there")

    def full_disk(self, data):
        if self.tell() + len(data) > 10_000:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(files._File, "write", full_disk)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(trained), "--to", to, "--out", str(path)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and last == f"remixmatch: cannot write {path} (No space left on device)"
    assert path.read_text() == "what was there" and [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": "[16"}, "is damaged"),
        ({"sides": "16"}, "is damaged"),
        ({"classes": '["a", "b"]'}, "is damaged"),
        ({"classes": "3"}, "is damaged"),
        ({"config": "{"}, "model.safetensors"),
    ],
)
def test_damaged_metadata_of_safetensors_is_one_line(exported, tmp_path, changes, message):
    path = tmp_path / "model.safetensors"
    metadata = export.read_metadata(exported["safetensors"])
    safetensors.torch.save_file(safetensors.torch.load_file(exported["safetensors"]), path, metadata | changes)
    with pytest.raises(UserError, match=message) as raised:
        export.load_safetensors(path)
    assert "\n" not in str(raised.value)


def test_export_errors(trained, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="cannot be read"):
        export.load_safetensors(tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="was not written by remixmatch export"):
        export.load_safetensors(trained / "ema.safetensors")
    with pytest.raises(SystemExit):
        cli.main(["export", str(trained), "--out", str(tmp_path / "no" / "model.safetensors")])
    assert "cannot write " in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(SystemExit):
        cli.main(["export", str(trained), "--to", "onnx"])
    assert "pip install 'remixmatch-engine[onnx]'" in capsys.readouterr().err
