"""Compile every kernel without a GPU, for all supported GPUs: no warnings or register spills, wide loads and stores."""

import re

import pytest
import torch
import triton
from packaging import version

from bench.step.issue import (
    KernelLaunch,
    Layer,
    compile_launch,
    disassemble,
    record,
    record_convolution,
    resources,
)
from kernels import assemble, augment, convolution, guess
from kernels.assemble import launch_assemble_batch
from kernels.augment import launch_augment_views
from kernels.convolution import Shape, tilings
from kernels.guess import launch_guess_labels

pytestmark = pytest.mark.filterwarnings("error")
ARCHITECTURES = (80, 90, 100)


@pytest.fixture(autouse=True)
def every_warning():
    """Let Triton repeat the warnings that it gives once per process."""
    if hasattr(triton._utils, "warn_once"):  # Since 3.9.
        triton._utils.warn_once.cache_clear()


def assert_no_spill(compiled, launch, title, capsys, most=0):
    """Check that at most `most` registers are spilled, print a line, and return register count and machine code."""
    usage, code = resources(compiled.asm["cubin"]), disassemble(compiled.asm["cubin"])
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    with capsys.disabled():
        print(
            f"\n{title}: {usage['registers']} registers x {launch.options['num_warps']} warps, {spills} spills, "
            f"{compiled.metadata.shared} bytes shared",
            end="",
        )
    assert usage["spilled_bytes"] <= 4 * most and spills <= most
    return usage["registers"], code


def record_guess(batch: int, classes: int) -> KernelLaunch:
    logits, history = torch.zeros(batch, classes, dtype=torch.bfloat16), torch.zeros(128, classes)
    return record(launch_guess_labels, logits, history, torch.tensor(0), torch.zeros(classes), 0.5)


def record_assemble(side: int, dtype: torch.dtype, channels: int = 3) -> KernelLaunch:
    indices, views = torch.zeros(2, dtype=torch.int64), torch.zeros(2, side, side, 3, dtype=torch.uint8)
    tensors = (views, indices, indices, torch.zeros(2), indices, torch.zeros(3), torch.ones(3))
    return record(launch_assemble_batch, *tensors, dtype, channels)


def record_augment(height: int, width: int) -> KernelLaunch:
    images, index = torch.zeros(2, height, width, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    flip, pairs = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    return record(launch_augment_views, images, index, pairs, flip, pairs, torch.zeros(2, 2, 6))


@pytest.mark.parametrize(
    ("batch", "classes", "architecture"),
    [(64, classes, architecture) for classes in (10, 1000) for architecture in ARCHITECTURES] + [(64, 100, 90)],
)
def test_guess(batch, classes, architecture, capsys):
    launch = record_guess(batch, classes)
    compiled = compile_launch(launch, architecture)
    assert_no_spill(compiled, launch, f"guess {batch} x {classes} bfloat16, sm_{architecture}", capsys)
    ptx = compiled.asm["ptx"]
    # Histories with 100 and 1000 classes are read 128 bits at a time. 10 floats are not a multiple of 128 bits.
    assert ("ld.global.v4.b32" in ptx) == (classes > 10)
    assert ("atom.global.gpu.acq_rel.add" in ptx) == (launch.grid != (1,)) == (classes == 1000)


@pytest.mark.parametrize(
    ("side", "dtype", "architecture"),
    [(side, torch.bfloat16, architecture) for side in (32, 96) for architecture in ARCHITECTURES]
    + [(224, torch.bfloat16, 90), (32, torch.float32, 90)],
    ids=str,
)
def test_assemble(side, dtype, architecture, capsys):
    launch = record_assemble(side, dtype)
    compiled = compile_launch(launch, architecture)
    title = f"assemble {side} x {side} {str(dtype).removeprefix('torch.')}, sm_{architecture}"
    registers, code = assert_no_spill(compiled, launch, title, capsys)
    # With 96 registers, a multiprocessor (65 536 registers) runs 640 threads, which have 20 KB of loads in flight. An
    # H200 needs 16 KB: 2.15 TB/s of reads (and as much of writes), 132 multiprocessors, a latency of about 1 us.
    assert registers <= 96
    assert len(re.findall(r"LDG\.E\.128\b", code)) == 2  # Source and partner of an unrotated sample.
    assert "STG.E.128" in code and not re.search(r"STG\.E(?!\.128)", code)  # All stores are wide.
    if dtype is torch.bfloat16:
        assert "cvt.rn.bf16x2.f32" in compiled.asm["ptx"]  # Rounds to nearest.


def test_assemble_with_eight_channels(capsys):
    launch = record_assemble(32, torch.bfloat16, channels=8)
    registers, code = assert_no_spill(compile_launch(launch, 90), launch, "assemble, 8 channels", capsys)
    assert registers <= 96 and "STG.E.128" in code


@pytest.mark.parametrize(
    ("height", "width", "architecture"),
    [(side, side, architecture) for side in (32, 96) for architecture in ARCHITECTURES]
    # A compilation takes seconds, so larger sides are compiled for one architecture each.
    + [(20, 31, 90), (128, 128, 80), (224, 224, 90), (256, 256, 100)],
)
def test_augment(height, width, architecture, capsys):
    launch = record_augment(height, width)
    compiled = compile_launch(launch, architecture)
    title = f"augment {height} x {width}, sm_{architecture}"
    # Older compilers spill a few values outside the loops over pixels.
    most = 0 if version.parse(triton.__version__) >= version.parse("3.9") else 24
    registers, _ = assert_no_spill(compiled, launch, title, capsys, most)
    # Six views of 32 x 32 fit on a multiprocessor, so all 704 views of a step are resident on an H200's 132.
    assert registers * 32 * launch.options["num_warps"] * (6 if height == 32 else 3) <= 65_536
    # Like PIL, the kernel rounds after the product and after the sum.
    assert "fma.rn" not in compiled.asm["ptx"]


LAYERS = {  # The training pass of the paper's step, K = 8 and B = 64.
    "32-32": Layer(Shape(768, 32, 32, 32, 32, 3, 1), residual=True),
    "16-32": Layer(Shape(768, 16, 32, 32, 32, 3, 1)),
    "16-32, 1x1": Layer(Shape(768, 16, 32, 32, 32, 1, 1), statistics=False),
    "32-64, stride 2": Layer(Shape(768, 32, 32, 32, 64, 3, 2)),
    "64-64": Layer(Shape(768, 64, 16, 16, 64, 3, 1), residual=True),
    "64-128, stride 2": Layer(Shape(768, 64, 16, 16, 128, 3, 2)),
    "128-128": Layer(Shape(768, 128, 8, 8, 128, 3, 1), residual=True),
    "256-256": Layer(Shape(512, 256, 12, 12, 256, 3, 1), residual=True),
}


@pytest.mark.parametrize("which", ["forward", "input_grad", "input_grad alone", "weight_grad"])
@pytest.mark.parametrize(
    ("layer", "architecture"),
    [
        # A compilation takes many seconds, so the others are for `make test-long`.
        pytest.param(layer, architecture, marks=() if (layer, architecture) == ("32-32", 90) else pytest.mark.long)
        for layer in LAYERS
        for architecture in ARCHITECTURES
    ],
)
def test_convolution(layer, architecture, which, capsys):
    """The input gradient alone adds no other gradients."""
    one, (which, *alone) = LAYERS[layer], which.split()
    found = tilings(one.shape, which, architecture)
    assert found
    for tiling in found:
        launch = record_convolution(Layer(one.shape, statistics=False) if alone else one, which, tiling)
        compiled = compile_launch(launch, architecture)
        title = f"{which} {layer} {tiling}, sm_{architecture}"
        registers, code = assert_no_spill(compiled, launch, title, capsys)
        assert registers * 32 * launch.options["num_warps"] <= 65_536
        assert compiled.metadata.shared <= {80: 163, 90: 227, 100: 227}[architecture] * 1024
        if architecture == 90 and one.shape.taps == 3:
            assert "HGMMA" in code
        assert "LDG.E.128" in code or "LDGSTS.E.BYPASS.128" in code  # Activations are loaded 16 bytes at a time.


def test_every_launch_chooses_whether_to_fuse_multiplication_and_addition():
    """Triton 3.10 changes the default, which would change results."""
    launches = [record_guess(64, 10), record_assemble(32, torch.bfloat16), record_augment(32, 32)]
    for layer in LAYERS.values():
        for which in ("forward", "input_grad", "weight_grad"):
            launches.append(record_convolution(layer, which, tilings(layer.shape, which, 90)[0]))
    names = {launch.kernel.__name__ for launch in launches}
    defined = {name for module in (assemble, augment, convolution, guess) for name in vars(module)}
    assert names == {name for name in defined if name.endswith("_kernel")}
    for launch in launches:
        fused = launch.kernel.__name__ != "_augment_kernel"  # It rounds like PIL.
        assert launch.options["enable_fp_fusion"] is fused, launch.kernel.__name__
