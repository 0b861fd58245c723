"""Every transformation against PIL, with one batch per image size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from kernels import photometric
from pipelines import ctaugment, geometric, reference_ctaugment
from pipelines.dali import DaliViews
from pipelines.fused import FusedViews
from pipelines.plan import ViewPlan
from pipelines.views import Views

NAMES = ctaugment.NAMES
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
LEVELS = (0.0, 0.03, 0.21, 0.25, 0.4999, 0.5, 0.68, 0.83, 0.97, BELOW_ONE)
CORNERS = ((0.0, 0.0), (BELOW_ONE, BELOW_ONE), (0.0, BELOW_ONE), (BELOW_ONE, 0.5), (0.5, 0.5))
SIDES = ((16, 16), (32, 32), (96, 96), (20, 31))


@cache
def sample_images(height: int, width: int) -> np.ndarray:
    """Return easy and hard images: (8, height, width, 3) uint8."""
    rng = np.random.default_rng(height + width)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    gradient = np.stack([255 * x, 255 * y, 255 * (1 - x * y)], axis=-1)
    grain = gradient * 0.6 + 50 + rng.normal(0, 12, gradient.shape)
    waves = 127 + 110 * np.sin(np.stack([9 * x + 4 * y, 5 * y * x, 3 - 8 * y], axis=-1))
    text = Image.new("RGB", (width, height), (210, 180, 40))
    ImageDraw.Draw(text).text((1, 0), "Rx7\ngQ", fill=(20, 40, 160))
    noise = rng.integers(0, 256, gradient.shape)
    dull = rng.integers(100, 121, gradient.shape)
    constant = np.broadcast_to([7, 128, 255], gradient.shape)
    two_valued = np.where((x + y > 0.8)[..., None], [200, 30, 90], [10, 30, 91])
    kinds = [gradient, grain, waves, np.asarray(text), noise, dull, constant, two_valued]
    return np.clip(np.stack([np.asarray(kind, dtype=np.float64) for kind in kinds]), 0, 255).astype(np.uint8)


@dataclass
class Compared:
    """Views with each transformation, from the pipeline and from PIL."""

    names: np.ndarray  # (V,) of str
    level: np.ndarray  # (V, 2) float32
    source: np.ndarray  # (V, H, W, 3) uint8
    made: np.ndarray  # (V, H, W, 3) uint8
    expected: np.ndarray  # (V, H, W, 3) uint8

    def difference(self, name: str) -> np.ndarray:
        views = self.names == name
        return np.abs(self.made[views].astype(int) - self.expected[views])


@cache
def compared(height: int, width: int, device: str = "cpu", kind: type[Views] = DaliViews) -> Compared:
    """Apply every transformation at every level to every image, as the first transformation of a view."""
    images = sample_images(height, width)
    levels = LEVELS if height < 96 else LEVELS[::3]
    cases = []
    for op, transformation in enumerate(ctaugment.TRANSFORMATIONS):
        seconds: tuple = (0.0,)
        centers: tuple = CORNERS[-1:]
        if transformation.name == "rescale":
            seconds = tuple(index / 6 + 0.01 for index in range(6))
        if transformation.name == "cutout":
            centers = CORNERS
        for image in range(len(images)):
            for level in levels if transformation.bins else levels[:1]:
                cases += [(op, image, level, second, center) for second in seconds for center in centers]
    ops, image, level, second, center = (np.array(column) for column in zip(*cases, strict=True))
    count = len(cases)
    both, center = np.stack([level, second], axis=-1).astype(np.float32), center.astype(np.float32)
    options: Any = {} if kind is DaliViews else {"device": device}
    pipeline = kind(images, np.arange(len(images)), None, count, 0, **options)
    pipeline.submit(
        pipeline.prepare(
            ViewPlan(
                image=image,
                labeled=np.ones(count, dtype=bool),
                shift=np.zeros((count, 2), dtype=np.int32),
                flip=np.zeros(count, dtype=np.int32),
                ops=np.stack([ops, np.full(count, ctaugment.IDENTITY)], axis=-1).astype(np.int32),
                levels=np.stack([both, np.zeros_like(both)], axis=1),
                center=np.stack([center, center], axis=1).astype(np.float32),
            )
        )
    )
    made = pipeline.collect().cpu().numpy()
    pipeline.close()
    expected = np.stack(
        [
            np.asarray(reference_ctaugment.transformed(Image.fromarray(images[which]), op, op_levels, op_center))
            for op, which, op_levels, op_center in zip(ops, image, both, center, strict=True)
        ]
    )
    return Compared(np.array(NAMES)[ops], both, images[image], made, expected)


def test_every_transformation_is_implemented_once():
    assert sorted([*geometric.GEOMETRIC, *photometric.PHOTOMETRIC, "identity"]) == sorted(NAMES)
    assert set(reference_ctaugment.FUNCTIONS) == set(NAMES)


@pytest.mark.parametrize("height, width", SIDES)
@pytest.mark.parametrize("name", ["identity", *photometric.PHOTOMETRIC])
def test_photometric_transformations_match_pil(name, height, width):
    difference = compared(height, width).difference(name)
    assert difference.size and difference.max() <= 1
    # The arithmetic follows PIL exactly. Only rescale, whose weights are sums of sines, may differ by a level.
    assert (difference > 0).mean() <= (0.001 if name == "rescale" else 0.0)


@pytest.mark.parametrize("height, width", SIDES)
@pytest.mark.parametrize("name", geometric.GEOMETRIC)
def test_geometric_transformations_match_pil(name, height, width):
    everything = compared(height, width)
    assert everything.difference(name).size and not everything.difference(name).any()
    at_rest = (everything.names == name) & (everything.level[:, 0] == 0.5)
    np.testing.assert_array_equal(everything.made[at_rest], everything.source[at_rest])


def assert_geometric_views_match_pil(kind: type[Views], height: int, width: int, each: int, seed: int) -> None:
    """Check `each` views per geometric transformation, followed by another one, on noise: every pixel tells."""
    rng = np.random.default_rng(seed)
    ops = np.array([NAMES.index(name) for name in geometric.GEOMETRIC] * each, np.int32)
    count = len(ops)
    levels = np.zeros((count, 2, 2), np.float32)
    levels[:, :, 0] = rng.random((count, 2), dtype=np.float32)
    # Translations by about half a pixel, and the ends of the range.
    most = 0.3 * np.where(ops == NAMES.index("translate_x"), width, height)
    halves = np.float32(((np.floor(most * rng.random(count)) + 0.5) / most + 1) / 2).clip(0, BELOW_ONE)
    # PIL adds positions in float64: from exactly half a pixel, they may pass from one pixel to the next.
    exact = np.abs((2 * halves.astype(np.float64) - 1) * most % 1 - 0.5) < 1e-9
    levels[: count // 2, 0, 0] = np.where(exact, 0.5, halves)[: count // 2]
    levels[:10, 0, 0] = np.repeat([0.0, BELOW_ONE], 5)
    views = ViewPlan(
        image=np.arange(count) % 3,
        labeled=np.ones(count, dtype=bool),
        shift=np.zeros((count, 2), dtype=np.int32),
        flip=np.zeros(count, dtype=np.int32),
        ops=np.stack([ops, rng.permutation(ops)], axis=-1),
        levels=levels,
        center=np.zeros((count, 2, 2), np.float32),
    )
    images = rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    pipeline = kind(images, np.arange(3), None, count, 0)
    pipeline.submit(pipeline.prepare(views))
    made = pipeline.collect().numpy()
    pipeline.close()
    expected = reference_ctaugment.pil_views(images[views.image], views)
    for view in range(count):
        stages = [(NAMES[op], level[0]) for op, level in zip(views.ops[view], levels[view], strict=True)]
        np.testing.assert_array_equal(made[view], expected[view], err_msg=str(stages))


ALL_SIDES = ((28, 28), (33, 33), (64, 64), (97, 97), (128, 128), (129, 20), (97, 256), (224, 224), (256, 256))


@pytest.mark.parametrize("kind", [DaliViews, FusedViews])
@pytest.mark.parametrize("height, width", ALL_SIDES)
def test_geometric_views_of_every_size_match_pil(height, width, kind):
    assert_geometric_views_match_pil(kind, height, width, 8 if kind is DaliViews or width < 200 else 4, seed=width)


@pytest.mark.long
@pytest.mark.parametrize("kind", [DaliViews, FusedViews])
@pytest.mark.parametrize("height, width", [*ALL_SIDES, (1, 1), (3, 200), (160, 161), (181, 181), (255, 130)])
def test_many_geometric_views_match_pil(height, width, kind):
    for seed in range(5):
        assert_geometric_views_match_pil(kind, height, width, 40, seed)


@pytest.mark.parametrize("name", ["autocontrast", "blur", "equalize", "invert", "smooth", "rescale"])
def test_level_zero_changes_nothing(name):
    everything = compared(32, 32)
    views = (everything.names == name) & (everything.level[:, 0] == 0)
    np.testing.assert_array_equal(everything.made[views], everything.source[views])


def test_filters_do_not_change_the_border():
    everything = compared(32, 32)
    for name, border in (("blur", 2), ("smooth", 1), ("sharpness", 1)):
        views = everything.names == name
        same = everything.made[views] == everything.source[views]
        for edge in (same[:, :border], same[:, -border:], same[:, :, :border], same[:, :, -border:]):
            assert edge.all()
        assert not same.all()


def test_all_six_filters_of_rescale_are_used():
    everything = compared(32, 32)
    views = (everything.names == "rescale") & (everything.level[:, 0] == np.float32(0.68))
    made = [everything.made[views & ((6 * everything.level[:, 1]).astype(int) == index)] for index in range(6)]
    assert np.array_equal(made[0], made[1]), "NEAREST and BOX are the same when enlarging"
    assert all(not np.array_equal(made[first], made[first + 1]) for first in range(1, 5))


@pytest.mark.parametrize("side", [1, 2, 4])
def test_images_smaller_than_a_filter(side):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8))
    level, second, center = torch.full((3, 1, 1, 1), 0.75), torch.full((3,), 0.875), torch.full((3, 2), 0.5)
    given = photometric.OpLevels(level, second, center)
    for name in photometric.PHOTOMETRIC:
        op = NAMES.index(name)
        made = photometric.apply(name, images, given).numpy().astype(int)
        for view in range(3):
            image = Image.fromarray(images[view].numpy())
            expected = reference_ctaugment.transformed(image, op, (0.75, 0.875), (0.5, 0.5))
            assert np.abs(made[view] - np.asarray(expected)).max() <= 1, name


@pytest.mark.gpu
@pytest.mark.hardware
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_gpu_views_match_pil(name):
    difference = compared(32, 32, "gpu", FusedViews).difference(name)
    assert difference.max() <= (0 if name in geometric.GEOMETRIC else 1)
