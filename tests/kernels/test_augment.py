"""`augment_views`: PIL, the reference implementation, the kernel and the operator agree on every view."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.augment import CODES, MAX_SIDE, OPS, augment_views, augment_views_reference, launch_augment_views
from kernels.photometric import PHOTOMETRIC
from pipelines import ctaugment, geometric
from pipelines.plan import ViewPlan
from pipelines.reference_ctaugment import CODE_FUNCTIONS, pil_views, transformed

NAMES = ctaugment.NAMES
CODE = np.array([CODES.get(name, CODES["affine"]) for name in NAMES], dtype=np.int32)
RESCALE = NAMES.index("rescale")
GEOMETRIC = [NAMES.index(name) for name in geometric.GEOMETRIC]
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
SIZES = ((16, 16), (32, 32), (20, 31), (96, 96))
LARGE = ((128, 128), (224, 224), (256, 256), (255, 130))


@cache
def make_images(height: int, width: int) -> np.ndarray:
    """Return easy and hard test images: (6, height, width, 3) uint8."""
    rng = np.random.default_rng(height + width)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = 127 + 110 * np.sin(np.stack([9 * x + 4 * y, 5 * y * x, 3 - 8 * y], axis=-1))
    grain = 0.6 * waves + rng.normal(0, 12, waves.shape)
    noise = rng.integers(0, 256, waves.shape)
    dull = rng.integers(100, 121, waves.shape)
    constant = np.broadcast_to([7, 128, 255], waves.shape)
    two_valued = np.where((x + y > 0.8)[..., None], [200, 30, 90], [10, 30, 91])
    return np.clip(np.stack([waves, grain, noise, dull, constant, two_valued]), 0, 255).astype(np.uint8)


def plan(height: int, width: int, levels: tuple[float, ...], seed: int = 0) -> ViewPlan:
    """Return a plan with every transformation at every level, and every filter of rescale, once in each stage."""
    rng = np.random.default_rng(seed)
    cases = [
        (op, level, second)
        for op, transformation in enumerate(ctaugment.TRANSFORMATIONS)
        for level in (levels if transformation.bins else levels[:1])
        for second in ([(index + 0.5) / 6 for index in range(6)] if op == RESCALE else [0.0])
    ]
    ops, *both = (np.array(column) for column in zip(*cases, strict=True))
    both, count = np.stack(both, axis=-1).astype(np.float32), len(ops)
    other = rng.permutation(count)
    largest = min(height, width, 5) - 1
    return ViewPlan(
        image=rng.integers(6, size=count),
        labeled=np.ones(count, dtype=bool),
        shift=rng.integers(-largest, largest + 1, (count, 2)).astype(np.int32),
        flip=rng.integers(2, size=count).astype(np.int32),
        ops=np.stack([ops, ops[other]], axis=-1).astype(np.int32),
        levels=np.stack([both, both[other]], axis=1),
        center=np.minimum(rng.random((count, 2, 2), dtype=np.float32), np.float32(BELOW_ONE)),
    )


def only_stage(views: ViewPlan, stage: int) -> ViewPlan:
    """Return the plan with the operations of one stage only."""
    ops = np.full_like(views.ops, ctaugment.IDENTITY)
    ops[:, stage] = views.ops[:, stage]
    return ViewPlan(**(vars(views) | {"ops": ops}))


def problem(height: int, width: int, views: ViewPlan, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Return the arguments of `augment_views`."""
    arrays = (
        make_images(height, width),
        views.image,
        views.shift,
        views.flip,
        CODE[views.ops],
        geometric.op_parameters(views.ops, views.levels, views.center, height, width),
    )
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


def make_pil_views(height: int, width: int, views: ViewPlan) -> np.ndarray:
    return pil_views(make_images(height, width)[views.image], views)


def assert_matches_reference(made: torch.Tensor, case: tuple[torch.Tensor, ...]) -> None:
    """Compare bytes. For rescale, whose weights are sums of sines, a few pixels may differ by one level."""
    reference = augment_views_reference(*(tensor.cpu() for tensor in case))
    assert made.shape == reference.shape and made.dtype == torch.uint8
    exact = (case[4].cpu() != CODES["rescale"]).all(dim=1)
    assert torch.equal(made[exact], reference[exact])
    difference = (made[~exact].int() - reference[~exact].int()).abs()
    assert (difference > 0).float().mean() <= 0.005
    # An operation after rescale may amplify a difference of one level.
    last = (case[4].cpu()[~exact, 1] == CODES["rescale"]) & (case[4].cpu()[~exact, 0] != CODES["rescale"])
    assert (difference[last] <= 1).all()


def test_every_transformation_has_a_code():
    assert set(OPS) == {*PHOTOMETRIC, "affine"}
    assert set(NAMES) == {*PHOTOMETRIC, *geometric.GEOMETRIC, "identity"}


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("height", "width"), SIZES + LARGE)
def test_reference_matches_pil(height, width, stage):
    levels = (0.0, 0.21, 0.5, 0.83, BELOW_ONE) if height < 96 else (0.3, 0.97) if height == 96 else (0.83,)
    views = only_stage(plan(height, width, levels), stage)
    made = augment_views_reference(*problem(height, width, views)).numpy()
    difference = np.abs(made.astype(int) - make_pil_views(height, width, views))
    ops = views.ops[:, stage]
    affine, rescaled = np.isin(ops, GEOMETRIC), ops == RESCALE
    assert not difference[~affine & ~rescaled].any()
    assert difference[rescaled].max() <= 1 and (difference[rescaled] > 0).mean() <= 0.005
    assert (difference[affine] > 0).mean() <= 0.001


def test_reference_of_two_transformations_matches_pil():
    views = plan(32, 32, (0.1, 0.37, 0.5, 0.9))
    made = augment_views_reference(*problem(32, 32, views)).numpy()
    assert (made != make_pil_views(32, 32, views)).mean() < 1e-3


@pytest.mark.parametrize(
    ("height", "width", "levels"),
    [(16, 16, (0.4, BELOW_ONE)), (32, 32, (0.77,)), (20, 31, (0.6,)), (5, 7, (0.0, 0.3)), (2, 1, (0.9,))],
)
def test_kernel_matches_reference(interpreter, height, width, levels):
    case = problem(height, width, plan(height, width, levels))
    assert_matches_reference(interpreter(launch_augment_views, *case), case)


@pytest.mark.parametrize(("height", "width", "levels"), [(16, 16, (0.0, 0.13, 0.31, 0.77, BELOW_ONE)), (9, 14, (0.6,))])
def test_kernel_matches_the_authors_code(interpreter, height, width, levels):
    drawn = only_stage(plan(height, width, levels), 0)
    ops, effects = ctaugment.code_effects(drawn.ops, drawn.levels, min(height, width))
    views = dataclasses.replace(drawn, ops=ops, levels=effects, shift=0 * drawn.shift, flip=0 * drawn.flip)
    case = problem(height, width, views)
    made = interpreter(launch_augment_views, *case).numpy()
    for view, (op, levels, center) in enumerate(
        zip(drawn.ops[:, 0], drawn.levels[:, 0], drawn.center[:, 0], strict=True)
    ):
        image = Image.fromarray(make_images(height, width)[drawn.image[view]])
        expected = np.asarray(transformed(image, op, levels, center, CODE_FUNCTIONS))
        np.testing.assert_array_equal(made[view], expected, err_msg=f"{NAMES[op]} {levels}")


@pytest.mark.parametrize("side", [96, MAX_SIDE])
def test_kernel_matches_reference_at_large_sizes(interpreter, side):
    """Every path of the kernel once: filters, curves, a mean, resampling and affine maps."""
    views = plan(side, side, (0.7,))
    pairs = [("blur", "equalize"), ("rotate", "sharpness"), ("contrast", "rescale"), ("identity", "cutout")]
    views = views.select(np.array([int((views.ops[:, 0] == NAMES.index(first)).argmax()) for first, _ in pairs]))
    views.ops[:, 1] = [NAMES.index(second) for _, second in pairs]
    views.levels[:, 1] = 0.9
    case = problem(side, side, views)
    assert_matches_reference(interpreter(launch_augment_views, *case), case)


@pytest.mark.parametrize("stage", [0, 1])
def test_kernel_with_one_operation(interpreter, stage):
    """One operation or none, in either stage: the kernel skips the buffers that it does not need."""
    views = only_stage(plan(6, 5, (0.8,)), stage)
    case = problem(6, 5, views)
    assert_matches_reference(interpreter(launch_augment_views, *case), case)


def test_kernel_ignores_unknown_operations(interpreter):
    images, image, shift, flip, ops, parameters = problem(6, 5, plan(6, 5, (0.8,)).select(np.arange(4)))
    ops[:, 0] = torch.tensor([-1, len(OPS), 2**30, -(2**30)])
    with pytest.raises(ValueError, match="ops must be from 0 to 13, got -1073741824 to 1073741824"):
        augment_views(images, image, shift, flip, ops, parameters)
    made = interpreter(launch_augment_views, images, image, shift, flip, ops, parameters)
    ops[:, 0], parameters[:, 0] = CODES["affine"], torch.tensor([1.0, 0, 0, 0, 1, 0])
    assert_matches_reference(made, (images, image, shift, flip, ops, parameters))


@pytest.mark.parametrize("index", [-7, 6])
def test_index_out_of_range(index):
    images, image, *rest = problem(6, 5, plan(6, 5, (0.8,)))
    with pytest.raises(IndexError):
        augment_views(images, torch.full_like(image, index), *rest)


def test_operator_is_the_reference_on_a_cpu():
    case = problem(16, 16, plan(16, 16, (0.6,)))
    assert torch.equal(augment_views(*case), augment_views_reference(*case))


def test_operator_registration():
    case = problem(16, 16, plan(16, 16, (0.6,)))
    torch.library.opcheck(torch.ops.remixmatch.augment_views.default, case)


def test_traced_for_a_gpu():
    with FakeTensorMode():
        images = torch.empty(7, 16, 12, 3, dtype=torch.uint8, device="cuda")
        image = torch.empty(9, dtype=torch.int64, device="cuda")
        pairs, flip = torch.empty(2, 9, 2, dtype=torch.int32, device="cuda"), image.int()
        parameters = torch.empty(9, 2, 6, device="cuda")
        views = augment_views(images, image, pairs[0], flip, pairs[1], parameters)
    assert views.shape == (9, 16, 12, 3) and views.dtype == torch.uint8 and views.device.type == "cuda"


ARGUMENTS = ("images", "image", "shift", "flip", "ops", "parameters")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(7, 5, 5, 4, dtype=torch.uint8)}, r"images must be .*, got \(7, 5, 5, 4\)"),
        ({"images": torch.zeros(0, 5, 5, 3, dtype=torch.uint8)}, r"not empty, got \(0, 5, 5, 3\)"),
        ({"images": torch.zeros(2, 8, 257, 3, dtype=torch.uint8)}, r"at most 256 x 256 pixels, got \(8, 257\)"),
        ({"images": torch.zeros(7, 6, 5, 3)}, "images must be uint8 and contiguous, got torch.float32"),
        ({"image": torch.zeros(0, dtype=torch.int64)}, r"image must be \(V >= 1,\), got \(0,\)"),
        ({"image": torch.zeros(4, dtype=torch.int32)}, "image must be .* torch.int64 .* torch.int32"),
        ({"shift": torch.zeros(4, 2, dtype=torch.int64)}, "shift must be .* torch.int32 .* torch.int64"),
        (
            {"shift": torch.full((4, 2), 5, dtype=torch.int32)},
            r"smaller than the image \(6, 5\), got up to 5",
        ),
        ({"flip": torch.zeros(4, dtype=torch.bool)}, "flip must be .* torch.int32 .* torch.bool"),
        ({"ops": torch.zeros(4, 3, dtype=torch.int32)}, r"ops must be \(4, 2\) .* got \(4, 3\)"),
        ({"parameters": torch.zeros(4, 2, 6, dtype=torch.float64)}, "parameters must be .* torch.float64"),
        ({"parameters": torch.zeros(4, 6, 2).mT}, "parameters must be .* contiguous, .* with strides"),
        ({"parameters": torch.zeros(4, 2, 6, device="meta")}, "parameters must be on cpu like images, got meta"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(ARGUMENTS, problem(6, 5, plan(6, 5, (0.8,)).select(np.arange(4))), strict=True))
    with pytest.raises(ValueError, match=message):
        augment_views(**(arguments | change))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("height", "width"), [*SIZES, *LARGE, (5, 7), (2, 1), (96, 17)])
def test_gpu(height, width, seed):
    levels = (0.0, 0.03, 0.21, 0.25, 0.4999, 0.5, 0.68, 0.83, 0.97, BELOW_ONE)
    views = plan(height, width, levels, seed)
    case = problem(height, width, views, "cuda")
    made = augment_views(*case)
    assert_matches_reference(made.cpu(), case)
    for _ in range(20):
        # Threads pass the image to each other: a race would occasionally change the result.
        assert torch.equal(augment_views(*case), made)


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
def test_gpu_offset_beyond_int32():
    """The last of 80 000 images of 96 x 96 starts beyond 2**31 bytes."""
    images = torch.zeros(80_000, 96, 96, 3, dtype=torch.uint8, device="cuda")
    images[-1] = torch.arange(96, device="cuda").reshape(96, 1, 1)
    _, _, shift, flip, ops, parameters = problem(96, 96, plan(96, 96, (0.5,)).select(np.zeros(2, int)), "cuda")
    ops[:], parameters[:] = CODES["affine"], torch.tensor([1.0, 0, 0, 0, 1, 0], device="cuda")
    image = torch.tensor([79_999, 0], device="cuda")
    views = augment_views(images, image, torch.zeros_like(shift), flip, ops, parameters)
    assert torch.equal(views[0], images[-1]) and not views[1].any()
