"""Views against numpy and PIL, and the queue behavior of the pipelines."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import ctaugment, dali, geometric
from pipelines.dali import DaliViews
from pipelines.fused import FusedViews
from pipelines.plan import PlanSpec, ViewPlan, make_plan
from pipelines.reference_ctaugment import pil_views, weak
from pipelines.views import Views, plain_views

SIDE, SHIFT, IMAGES = 32, 4, 24
GEOMETRIC = [ctaugment.NAMES.index(name) for name in geometric.GEOMETRIC]


@cache
def photos(images: int, height: int, width: int, seed: int) -> np.ndarray:
    """Return smooth colors with some grain: (images, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    wave = rng.uniform(-9, 9, (images, 1, 1, 3, 2))
    phase = rng.uniform(0, 7, (images, 1, 1, 3))
    smooth = 127 + 110 * np.sin(wave[..., 0] * y[:, :, None] + wave[..., 1] * x[:, :, None] + phase)
    grain = rng.normal(0, 8, (images, height, width, 3))
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def labeled_set() -> np.ndarray:
    return photos(IMAGES, SIDE, SIDE, 0)


def unlabeled_set() -> np.ndarray:
    return photos(2 * IMAGES, SIDE, SIDE, 1)


def plan(step: int = 0, k: int = 5, batch: int = 64, augment: bool = True) -> ViewPlan:
    """Return the plan of the batch * (k + 3) views of a training step."""
    spec = PlanSpec(batch, k, IMAGES, 2 * IMAGES, max_shift=SHIFT, flip=True, augment=augment)
    return make_plan(spec, seed=7, step=step, weights=ctaugment.initial_weights()).views


def sources(views: ViewPlan) -> np.ndarray:
    """Return the source image of each view."""
    images = unlabeled_set()[views.image]
    images[views.labeled] = labeled_set()[views.image[views.labeled]]
    return images


both = pytest.mark.parametrize("kind", [DaliViews, FusedViews])


# Stored order differs from the plan's: the labeled images come last, in reverse.
INDICES = np.arange(3 * IMAGES)[: -(IMAGES + 1) : -1], np.arange(2 * IMAGES)


@cache
def all_images() -> np.ndarray:
    return np.concatenate([unlabeled_set(), labeled_set()[::-1]])


def make(count: int, kind=DaliViews, **options) -> Views:
    return kind(all_images(), *INDICES, count, SHIFT, **options)


def run(views: ViewPlan, kind=DaliViews, **options) -> np.ndarray:
    pipeline = make(len(views.image), kind, **options)
    pipeline.submit(pipeline.prepare(views))
    made = pipeline.collect().cpu().numpy()
    pipeline.close()
    return made


def test_weak_augmentation_is_pad_crop_flip():
    views = plan()
    views = replace(views, ops=np.zeros_like(views.ops))
    made = run(views)
    around = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    for view, padded in enumerate(np.pad(sources(views), around, mode="reflect")):
        top, left = SHIFT - views.shift[view]
        expected = padded[top : top + SIDE, left : left + SIDE]
        np.testing.assert_array_equal(made[view], expected[:, ::-1] if views.flip[view] else expected)
    assert {-SHIFT, 0, SHIFT} <= {*views.shift.ravel().tolist()} and {*views.flip.tolist()} == {0, 1}


def test_shift_moves_the_image_down_and_right_before_the_flip():
    image = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    image[0, 3, 2] = 255
    views = plan(batch=1, k=1).select(np.array([0, 0]))
    views = replace(
        views,
        image=np.zeros(2, np.int64),
        ops=np.zeros((2, 2), np.int32),
        shift=np.array([[1, 3], [1, 3]], np.int32),
        flip=np.array([0, 1], np.int32),
    )
    pipeline = DaliViews(image, np.zeros(1, np.int64), None, 2, 3)
    pipeline.submit(pipeline.prepare(views))
    made = pipeline.collect()
    assert made[0, 4, 5].tolist() == [255] * 3
    assert made[1, 4, 7 - 5].tolist() == [255] * 3
    assert made[0, 4, 1].tolist() == [255] * 3, "uncovered pixels are filled by reflection"


@pytest.mark.parametrize("height, width", [(16, 24), (9, 7)])
def test_weak_augmentation_of_any_size_with_the_largest_shift(height, width):
    images, largest = photos(4, height, width, 3), min(height, width) - 1
    rng = np.random.default_rng(0)
    views = plan(batch=8, k=1)
    count = len(views.image)
    views = replace(
        views,
        image=np.arange(count) % 4,
        labeled=np.ones(count, bool),
        shift=rng.integers(-largest, largest + 1, (count, 2)).astype(np.int32),
        ops=np.zeros_like(views.ops),
    )
    pipeline = DaliViews(images, np.arange(4), None, count, largest)
    pipeline.submit(pipeline.prepare(views))
    made = pipeline.collect().numpy()
    for view in range(count):
        np.testing.assert_array_equal(made[view], weak(images[view % 4], views.shift[view], views.flip[view]))


def test_random_plan_matches_pil():
    views = plan()
    made, images = run(views), sources(views)
    assert made.shape == (512, SIDE, SIDE, 3) and made.dtype == np.uint8
    expected = pil_views(images, views)
    difference = np.abs(made.astype(int) - expected).max(axis=-1)
    rescaled = (views.ops == ctaugment.NAMES.index("rescale")).any(axis=1)
    assert not difference[~rescaled].any()
    assert (difference[rescaled] > 0).mean() < 1e-3
    assert np.median(difference, axis=(1, 2)).max() == 0


@pytest.mark.parametrize("count", [1, 3, 130])
def test_views_do_not_depend_on_the_rest_of_the_batch(count):
    views = plan()
    some = np.random.default_rng(count).permutation(len(views.image))[:count]
    np.testing.assert_array_equal(run(views.select(some)), run(views)[some])


def test_views_do_not_depend_on_threads_and_prefetch():
    plans = [plan(step, batch=32) for step in range(6)]
    made = {}
    for threads, prefetch in ((1, 1), (2, 2), (4, 3)):
        pipeline = make(len(plans[0].image), threads=threads, prefetch=prefetch)
        batches = []
        for step, views in enumerate(plans):
            pipeline.submit(pipeline.prepare(views))
            if step >= prefetch - 1:
                batches.append(pipeline.collect())
        batches += [pipeline.collect() for _ in range(prefetch - 1)]
        pipeline.close()
        made[threads] = torch.stack(batches)
    assert torch.equal(made[1], made[2]) and torch.equal(made[1], made[4])
    assert not torch.equal(made[1][0], made[1][1])


def test_batches_come_in_order_and_own_their_memory():
    plans = [plan(step, batch=16) for step in range(8)]
    alone = [run(views) for views in plans]
    pipeline = make(len(plans[0].image))
    kept = []
    pipeline.submit(pipeline.prepare(plans[0]))
    for views in plans[1:]:
        pipeline.submit(pipeline.prepare(views))
        kept.append(pipeline.collect())
    kept.append(pipeline.collect())
    pipeline.close()
    del pipeline
    for batch, expected in zip(kept, alone, strict=True):
        np.testing.assert_array_equal(batch.numpy(), expected)


def test_submit_is_asynchronous(monkeypatch):
    """Block the views until `submit` has returned: a synchronous pipeline would hang."""
    views = plan(batch=16)
    expected = run(views)
    pipeline = make(len(views.image))
    started, returned = threading.Event(), threading.Event()
    photometric = dali._apply_photometric

    def held(images, parameters):
        started.set()
        assert returned.wait(120), "submit has not returned"
        return photometric(images, parameters)

    monkeypatch.setattr(dali, "_apply_photometric", held)
    pipeline.submit(pipeline.prepare(views))
    assert started.wait(120), "work starts before `collect`"
    returned.set()
    np.testing.assert_array_equal(pipeline.collect().numpy(), expected)
    pipeline.close()


@both
def test_misuse_of_the_queue_raises(kind):
    views = plan(batch=2, k=1)
    pipeline = make(len(views.image), kind, prefetch=2)
    with pytest.raises(RuntimeError, match="no batch is pending; submit one first"):
        pipeline.collect()
    pipeline.submit(pipeline.prepare(views))
    pipeline.submit(pipeline.prepare(views))
    with pytest.raises(RuntimeError, match="2 batches are already pending; collect one first"):
        pipeline.submit(pipeline.prepare(views))
    assert torch.equal(pipeline.collect(), pipeline.collect())
    pipeline.submit(pipeline.prepare(views))
    pipeline.close()
    pipeline.close()
    with pytest.raises(RuntimeError, match="closed"):
        pipeline.submit(pipeline.prepare(views))


@both
def test_invalid_plans_raise_and_leave_the_pipeline_usable(kind):
    views = plan(batch=2, k=1)
    count = len(views.image)
    pipeline = make(count, kind)
    with pytest.raises(ValueError, match=f"expected a plan of {count} views, got 3"):
        pipeline.submit(pipeline.prepare(views.select(np.arange(3))))
    with pytest.raises(ValueError, match="at most max_shift = 4 pixels, got 5"):
        pipeline.submit(pipeline.prepare(replace(views, shift=np.full((count, 2), -5, np.int32))))
    pipeline.submit(pipeline.prepare(views))
    np.testing.assert_array_equal(pipeline.collect().numpy(), run(views, kind))


@both
@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "uint8"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8)}, "grayscale"),
        ({"images": np.zeros((2, 8, 8), np.uint8)}, r"\(N, H, W, 3\)"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "N > 0"),
        ({"unlabeled": np.array([0, 2])}, "must be indices from 0 to 1"),
        ({"labeled": np.array([-1])}, "must be indices from 0 to 1"),
        ({"max_shift": 8}, "from 0 to 7"),
        ({"max_shift": -1}, "max_shift"),
        ({"batch_size": 0}, "batch_size"),
        ({"prefetch": 0}, "prefetch"),
    ],
)
def test_invalid_arguments_raise_a_one_line_error(kind, change, message):
    both = np.arange(2)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    arguments = {"images": images, "labeled": both, "unlabeled": both, "batch_size": 4, "max_shift": 2} | change
    with pytest.raises(ValueError, match=message) as error:
        kind(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.hardware
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_views_match_cpu_views():
    views = plan()
    pipeline = make(len(views.image), FusedViews, device="gpu")
    pipeline.submit(pipeline.prepare(views))
    made = pipeline.collect()
    assert made.is_cuda
    difference = np.abs(made.cpu().numpy().astype(int) - run(views)).max(axis=-1)
    affine = np.isin(views.ops, GEOMETRIC).any(axis=1)
    assert difference[~affine].max() <= 2, "one level per transformation"
    assert (difference[affine] > 2).mean() < 0.01


def mapped(path) -> int:
    """Return the resident bytes of a file in this process."""
    text = Path("/proc/self/smaps").read_text()
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    return sum(1024 * int(re.search(r"^Rss: +(\d+)", part, re.MULTILINE)[1]) for part in parts if str(path) in part)


@pytest.mark.parametrize(("kind", "options"), [(DaliViews, {}), (FusedViews, {"resident": False})])
def test_large_memory_maps_do_not_stay_resident(tmp_path, monkeypatch, kind, options):
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((5000, 64, 64, 3), np.uint8))
    images, left = np.load(path, mmap_mode="c"), {}
    for most in (2**30, 2**20):
        monkeypatch.setattr("pipelines.views._MAPPED_BYTES", most)
        pipeline = kind(images, np.arange(5000), None, 100, 4, **options)
        for first in range(0, 5000, 100):
            pipeline.prepare(replace(plain_views(100), image=np.arange(first, first + 100)))
        left[most] = mapped(path)
        pipeline.close()
    assert left[2**30] > 0.9 * images.nbytes and left[2**20] < 0.1 * images.nbytes
