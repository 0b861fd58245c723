"""docs/surprises.md: each behavior of other software that has no other test or script, without this project's code.

A failure means that a release has changed it. Then change the page, and what the code does about it.
"""

import io
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.pages import ROOT, TEXTS

PAGE = "docs/surprises.md"


def test_every_surprise_names_a_version_and_links_to_evidence():
    entries = re.findall(r"^(\d+)\. (.+(?:\n   .+)*)", TEXTS[PAGE], re.MULTILINE)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1)) and len(entries) >= 20
    for _, entry in entries:
        assert re.search(r"^[\w ]+\d\.\d", entry), f"no version: {entry}"
        assert re.search(r"\]\((\.\./(tests|findings|bench)/|measurements/|protocol|results|views|gpus)", entry), entry
    named = set(re.findall(r"\[`(test_\w+)`\]\(\.\./tests/test_surprises\.py\)", TEXTS[PAGE]))
    here = {name for name in globals() if name.startswith("test_")}
    assert named == here - {"test_every_surprise_names_a_version_and_links_to_evidence"}
    for name, path in re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", TEXTS[PAGE]):
        assert f"def {name}(" in (ROOT / path).read_text(), name


def test_seeds_wrap_at_32_bits():
    """Of torch's generator on a CPU."""
    drawn = [torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (1, 2**32 + 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_cudnn_times_ten_plans():
    """In a new process, since the engine changes the limit."""
    assert python("import torch; print(torch.backends.cudnn.benchmark_limit)") == "10\n"


def test_cudnn_flags_turn_cudnn_off():
    assert torch.backends.cudnn.enabled
    with torch.backends.cudnn.flags(benchmark=True):
        assert not torch.backends.cudnn.enabled


def test_loading_an_optimizer_replaces_its_options():
    def adam(**options):
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **options)

    captured = adam(capturable=True, foreach=True)
    captured.load_state_dict(adam().state_dict())
    (group,) = captured.param_groups
    assert group["capturable"] is False and group["foreach"] is None


def test_static_graph_fails_after_a_pass_without_synchronization(tmp_path):
    code = f"""
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2), static_graph=True)
try:
    with network.no_sync():
        network(torch.ones(1, 2)).sum().backward()
    network(torch.ones(1, 2)).sum().backward()
except RuntimeError as error:
    print(error)
"""
    assert "INTERNAL ASSERT FAILED" in python(code)


@pytest.mark.parametrize(
    "statement",
    ["torch.use_deterministic_algorithms(True)", "torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])"],
)
def test_eager_code_imports_the_compiler(statement):
    loaded = "print('torch._inductor' in sys.modules or 'torch._dynamo' in sys.modules)"
    assert python(f"import sys, torch; {loaded}; {statement}; {loaded}").split() == ["False", "True"]


def test_torchrun_reads_abbreviated_flags_of_the_program():
    command = [sys.executable, "-m", "torch.distributed.run", "-m", "json.tool", "--log", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "ambiguous option: --log" in done.stderr


def test_translations_pass_from_one_pixel_to_the_next():
    row = np.arange(160, dtype=np.uint8)
    image = Image.fromarray(np.stack([row, row]))
    shift = 0.28125 * 0.3 * 160
    assert shift == 13.499999999999998
    moved = np.asarray(image.transform(image.size, Image.Transform.AFFINE, (1, 0, shift, 0, 1, 0)))[0].astype(int)
    assert (moved - row)[:6].tolist() == [13, 13, 13, 14, 14, 14]


@pytest.mark.parametrize(("side", "same"), [(8, True), (15, True), (28, False)])
def test_equalize_leaves_small_images_alone(side, same):
    image = Image.fromarray(np.random.default_rng(0).integers(100, 140, (side, side), dtype=np.uint8))
    assert (ImageOps.equalize(image).tobytes() == image.tobytes()) == same


def test_colors_of_16_bits_lose_their_low_bytes():
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    values = np.array([[[0x0300, 0x03FF, 0x0400], [0x04FF, 0x0512, 0x0534]]]).astype(">u2")
    parts = {b"IHDR": struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(b"\0" + values.tobytes())}
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in {**parts, b"IEND": b""}.items())
    image = Image.open(io.BytesIO(png))
    assert image.mode == "RGB" and np.asarray(image).ravel().tolist() == [3, 3, 4, 4, 5, 5]


def test_three_libraries_round_the_longer_side_in_three_ways():
    from nvidia.dali import fn, pipeline_def
    from torchvision.transforms import v2

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def resized(shorter):
        return fn.resize(fn.external_source(name="image", layout="HWC"), resize_shorter=shorter)

    widths = []
    for height, width, shorter in ((20, 50, 5), (10, 25, 3)):  # 12.5 and 7.5 pixels.
        pipeline = resized(shorter)
        pipeline.feed_input("image", np.zeros((1, height, width, 3), np.uint8))
        (made,) = pipeline.run()
        image = Image.new("RGB", (width, height))
        widths.append(
            (made.at(0).shape[1], ImageOps.cover(image, (shorter, shorter)).width, v2.Resize(shorter)(image).width)
        )
    assert widths == [(13, 12, 12), (8, 8, 7)]


def test_resizing_keeps_the_exact_scale():
    """DALI crops part of a pixel without `subpixel_scale=False`, which resizes the whole image to whole pixels."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def resized(exact):
        image = fn.external_source(name="image", layout="HWC")
        cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}
        return fn.resize(image, resize_shorter=100, subpixel_scale=exact, **cubic)

    image = np.random.default_rng(0).integers(0, 256, (99, 150, 3), dtype=np.uint8)
    differences = []
    for exact in (True, False):
        pipeline = resized(exact)
        pipeline.feed_input("image", image[None])
        (made,) = pipeline.run()
        made = np.asarray(made.at(0)).astype(int)
        expected = Image.fromarray(image).resize(made.shape[1::-1], Image.Resampling.BICUBIC)
        differences.append(np.abs(made - np.asarray(expected))[4:-4, 4:-4].max())
    assert differences == [64, 15]


def test_safetensors_write_metadata_in_any_order():
    code = "import safetensors.numpy as s; print(s.save({}, {str(i): 'x' for i in range(9)}))"
    assert len({python(code) for _ in range(3)}) > 1


def python(code):
    """Run a program and return its output."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
