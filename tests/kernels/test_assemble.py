"""`assemble_batch`: the float64 formula, the reference implementation, the kernel and the operator agree."""

from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.assemble import assemble_batch, assemble_batch_reference, launch_assemble_batch

MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)
_T = torch.Tensor
Problem = tuple[_T, _T, _T, _T, _T, _T, _T]  # All arguments except the dtype.
# Maximum error of rounding to nearest: half a unit in the last place of the result's dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Error of the float32 arithmetic on gray levels, divided by 60: a few times 255 / 60 * 2**-24.
ARITHMETIC = 1.5e-6


@pytest.fixture(params=["reference", "triton"])
def implementation(request, interpreter):
    """Return the reference implementation, or the Triton kernel in the interpreter."""
    if request.param == "reference":
        return assemble_batch_reference
    return partial(interpreter, launch_assemble_batch)


def problem(samples, height, width=None, pool=7, device="cpu") -> Problem:
    """Draw arguments with every rotation, some lam of 1 or 0.5, and some samples that are their own partner."""
    width = width or height
    generator = torch.Generator().manual_seed(1000 * height + samples)
    views = torch.randint(256, (pool, height, width, 3), dtype=torch.uint8, generator=generator)
    source, partner = torch.randint(pool, (2, samples), generator=generator)
    lam = torch.rand(samples, generator=generator)
    lam[2::5] = 1.0
    lam[3::5] = 0.5
    partner[4::7] = source[4::7]
    rotations = torch.arange(samples) % 4 if width == height else torch.arange(samples) % 2 * 2
    mean, std = torch.tensor((MEAN, STD), device=device)
    views, lam, rotations = views.to(device), lam.to(device), rotations.to(device)
    return views, source.to(device), partner.to(device), lam, rotations, mean, std


def assemble_in_float64(views, source, partner, lam, rotations, mean, std):
    """Compute (N, H, W, 3) sample by sample with the formula and `numpy.rot90`."""
    views, mean, std = views.double().numpy(), mean.double().numpy(), std.double().numpy()
    samples = []
    for i, j, weight, k in zip(source, partner, lam.double(), rotations, strict=True):
        mixed = float(weight) * (views[i] - mean) / std + (1 - float(weight)) * (views[j] - mean) / std
        samples.append(np.rot90(mixed, int(k)))
    return np.stack(samples)


def assert_assembled(batch, case, dtype, rounding=1.0):
    """Compare with float64, with a tolerance of `rounding` times the error of rounding to nearest."""
    views, source = case[:2]
    assert batch.shape == (len(source), 3, *views.shape[1:3]) and batch.dtype == dtype
    height, width = views.shape[1:3]
    assert batch.stride() == (3 * height * width, 1, 3 * width, 3)
    np.testing.assert_allclose(
        batch.permute(0, 2, 3, 1).double().numpy(),
        assemble_in_float64(*case),
        rtol=1.001 * rounding * ROUNDING[dtype],
        atol=ARITHMETIC,
    )


SIZES = ((1, 5), (3, 13), (5, 29), (16, 21), (28, 10), (32, 37), (37, 8), (96, 4), (224, 2))  # (side, samples)


@pytest.mark.parametrize(
    ("side", "samples", "dtype"),
    [(*size, torch.float32) for size in SIZES]
    + [(*size, dtype) for size in (SIZES[2], SIZES[4]) for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_formula(implementation, side, samples, dtype):
    case = problem(samples, side)
    # The interpreter truncates to bfloat16. A GPU rounds to nearest: see test_compile_ahead.
    truncates = dtype is torch.bfloat16 and implementation is not assemble_batch_reference
    assert_assembled(implementation(*case, dtype), case, dtype, rounding=2.0 if truncates else 1.0)


@pytest.mark.parametrize("rotation", range(4))
def test_unmixed_sample_equals_its_source(implementation, rotation):
    """With lam = 1, or with itself as partner, a sample is exactly its source."""
    views, source, _, lam, _, _, _ = problem(12, 8)
    rotations, mean, std = torch.full((12,), rotation), torch.zeros(3), torch.ones(3)
    for partner, weight in ((source.flip(0).contiguous(), torch.ones(12)), (source, lam)):
        batch = implementation(views, source, partner, weight, rotations, mean, std, torch.float32)
        expected = torch.rot90(views[source], rotation, dims=(1, 2)).permute(0, 3, 1, 2).float()
        if implementation is not assemble_batch_reference:
            assert torch.equal(batch, expected)
        else:
            torch.testing.assert_close(batch, expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (17, 5)])
def test_rotation_by_180_degrees_of_rectangular_images(implementation, height, width):
    case = problem(6, height, width)
    assert case[4].unique().tolist() == [0, 2]
    assert_assembled(implementation(*case, torch.float32), case, torch.float32)


def test_rotation_by_90_degrees_of_rectangular_images(interpreter):
    """A CPU raises an error. The kernel cannot, and rotates by 0 or 180 degrees to stay inside the image."""
    views, source, partner, lam, _, mean, std = problem(4, 4, 6)
    rotations = torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="rotations by 90 degrees require square images, got 4 x 6"):
        assemble_batch(views, source, partner, lam, rotations, mean, std, torch.float32)
    batch = interpreter(launch_assemble_batch, views, source, partner, lam, rotations, mean, std, torch.float32)
    expected = (views, source, partner, lam, torch.tensor([0, 0, 2, 2]), mean, std)
    assert_assembled(batch, expected, torch.float32)


@pytest.mark.parametrize("index", [-1, 7])
def test_index_out_of_range(index):
    views, source, partner, lam, rotations, mean, std = problem(4, 5, pool=7)
    wrong = torch.full((4,), index)
    for i, j in ((wrong, partner), (source, wrong)):
        with pytest.raises(IndexError):
            assemble_batch(views, i, j, lam, rotations, mean, std, torch.float32)


def test_operator_is_the_reference_on_a_cpu():
    case = problem(9, 16)
    assert torch.equal(assemble_batch(*case, torch.bfloat16), assemble_batch_reference(*case, torch.bfloat16))


@pytest.mark.parametrize("width", [8, 6])
def test_operator_registration(width):
    case = problem(5, 8, width)
    torch.library.opcheck(torch.ops.remixmatch.assemble_batch.default, (*case, torch.bfloat16))


@pytest.mark.parametrize("width", [8, 6])
def test_compiled(width):
    case = problem(9, 8, width)
    compiled = torch.compile(assemble_batch, fullgraph=True, backend="aot_eager")(*case, torch.float32)
    eager = assemble_batch(*case, torch.float32)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert compiled.stride() == eager.stride()


def test_traced_for_a_gpu():
    """torch.compile traces the operator with fake CUDA tensors."""
    with FakeTensorMode():
        views = torch.empty(7, 16, 16, 3, dtype=torch.uint8, device="cuda")
        indices = torch.empty(9, dtype=torch.int64, device="cuda")
        lam, mean = torch.empty(9, device="cuda"), torch.empty(3, device="cuda")
        batch = assemble_batch(views, indices, indices, lam, indices, mean, mean, torch.bfloat16)
    assert batch.shape == (9, 3, 16, 16) and batch.stride() == (768, 1, 48, 3)
    assert batch.dtype == torch.bfloat16 and batch.device.type == "cuda"


NAMES = ("views", "source", "partner", "lam", "rotations", "mean", "std")


@pytest.mark.parametrize(("height", "width"), [(5, 5), (32, 32), (4, 12)])
def test_channels_after_the_third_are_zero(implementation, height, width):
    case = problem(9, height, width)
    padded = implementation(*case, torch.float32, 8)
    assert padded.shape == (9, 8, height, width) and padded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(padded[:, :3], implementation(*case, torch.float32)) and not padded[:, 3:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": torch.zeros(7, 5, 5, 4, dtype=torch.uint8)}, r"views must be .*, got \(7, 5, 5, 4\)"),
        ({"views": torch.zeros(0, 5, 5, 3, dtype=torch.uint8)}, r"not empty, got \(0, 5, 5, 3\)"),
        ({"views": torch.zeros(7, 5, 5, 3)}, "views must be uint8 and contiguous, got torch.float32"),
        ({"views": torch.zeros(7, 3, 5, 5, dtype=torch.uint8).permute(0, 2, 3, 1)}, "with strides"),
        ({"source": torch.zeros(0, dtype=torch.int64)}, r"source must be \(N >= 1,\), got \(0,\)"),
        ({"source": torch.zeros(4, dtype=torch.int32)}, "source must be .* torch.int64 .* torch.int32"),
        ({"partner": torch.zeros(5, dtype=torch.int64)}, r"partner must be \(4,\) .* got \(5,\)"),
        ({"lam": torch.zeros(4, dtype=torch.float64)}, "lam must be .* torch.float32 .* torch.float64"),
        ({"lam": torch.zeros(8)[::2]}, r"lam must be .* contiguous, .* with strides \(2,\)"),
        ({"rotations": torch.zeros(4)}, "rotations must be .* torch.int64"),
        ({"mean": torch.zeros(1)}, r"mean must be \(3,\) .* got \(1,\)"),
        ({"std": torch.zeros(3, device="meta")}, "std must be on cpu like views, got meta"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"channels": 4}, "channels must be 3 or 8, got 4"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(NAMES, problem(4, 5), strict=True)) | {"dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        assemble_batch(**(arguments | change))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("side", "samples"), [(1, 5), (5, 2000), (28, 100), (32, 768), (96, 100), (224, 16)])
def test_gpu(side, samples, dtype):
    case = problem(samples, side, pool=50)
    batch = assemble_batch(*problem(samples, side, pool=50, device="cuda"), dtype).cpu()
    assert_assembled(batch, case, dtype)
    reference = assemble_batch(*case, dtype)
    # The reference's float32 value may be on the other side of a tie: the results then differ by two roundings.
    torch.testing.assert_close(batch, reference, rtol=2.002 * ROUNDING[dtype], atol=ARITHMETIC)


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
def test_gpu_offset_beyond_int32():
    """The last of 15 000 views of 224 x 224 starts beyond 2**31 bytes, and so does its result."""
    views = torch.zeros(15_000, 224, 224, 3, dtype=torch.uint8, device="cuda")
    views[-1] = torch.arange(224, device="cuda").reshape(224, 1, 1)
    source = torch.arange(15_000, device="cuda")
    lam, rotations = torch.ones(15_000, device="cuda"), torch.zeros(15_000, dtype=torch.int64, device="cuda")
    mean, std = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    batch = assemble_batch(views, source, source, lam, rotations, mean, std, torch.bfloat16)
    assert torch.equal(batch[-1].float(), views[-1].permute(2, 0, 1).float())
    assert not batch[:-1].any()


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
def test_gpu_compiled():
    case = problem(64, 32, device="cuda")
    compiled = torch.compile(assemble_batch, fullgraph=True)(*case, torch.bfloat16)
    torch.testing.assert_close(compiled, assemble_batch(*case, torch.bfloat16), rtol=0, atol=0)
    assert compiled.is_contiguous(memory_format=torch.channels_last)
