"""Fused views against DALI's, and the same queue behavior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import test_views
import torch
from test_views import photos, plan

from pipelines.dali import DaliViews
from pipelines.fused import FusedViews
from pipelines.plan import ViewPlan


def make(count: int, **options):
    return test_views.make(count, FusedViews, **options)


def run(views: ViewPlan, kind=FusedViews) -> np.ndarray:
    return test_views.run(views, kind)


@pytest.mark.parametrize("augment", [False, True])
def test_fused_views_match_dali(augment):
    views = plan(batch=32, augment=augment)
    made, expected = run(views), run(views, DaliViews)
    assert made.shape == expected.shape and made.dtype == np.uint8
    np.testing.assert_array_equal(made, expected)


def test_rectangular_images_without_unlabeled_data_and_the_largest_shift():
    images, views = photos(4, 9, 7, 3), plan(batch=8, k=1)
    count = len(views.image)
    shift = np.random.default_rng(0).integers(-6, 7, (count, 2)).astype(np.int32)
    views = replace(views, image=np.arange(count) % 4, labeled=np.ones(count, bool), shift=shift)
    made = []
    for kind in (FusedViews, DaliViews):
        pipeline = kind(images, np.arange(4), None, count, 6)
        pipeline.submit(pipeline.prepare(views))
        made.append(pipeline.collect().numpy())
        pipeline.close()
    np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.parametrize("count", [1, 3, 50])
def test_views_do_not_depend_on_the_rest_of_the_batch(count):
    views = plan(batch=16)
    some = np.random.default_rng(count).permutation(len(views.image))[:count]
    np.testing.assert_array_equal(run(views.select(some)), run(views)[some])


def assert_in_order(plans: list[ViewPlan], prefetch: int, device: str, resident: bool = True) -> None:
    """Check that batches kept long after they were collected equal those made from each plan alone."""
    pipeline = make(len(plans[0].image), prefetch=prefetch, device=device, resident=resident)
    kept = []
    for step, views in enumerate(plans):
        pipeline.submit(pipeline.prepare(views))
        if step >= prefetch - 1:
            kept.append(pipeline.collect())
    kept += [pipeline.collect() for _ in range(prefetch - 1)]
    pipeline.close()
    del pipeline
    for batch, views in zip(kept, plans, strict=True):
        assert batch.device.type == ("cuda" if device == "gpu" else "cpu") and batch.is_contiguous()
        assert_near(batch.cpu().numpy(), run(views))


def assert_near(made: np.ndarray, expected: np.ndarray) -> None:
    """Allow differences of rescale, whose weights are sums of sines, in a few pixels."""
    assert (made != expected).mean() < 1e-4


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_come_in_order_and_own_their_memory(prefetch, resident):
    assert_in_order([plan(step, batch=2, k=2) for step in range(6)], prefetch, "cpu", resident)


def test_images_that_are_too_large_raise_a_one_line_error():
    with pytest.raises(ValueError, match="up to 256x256 pixels, got 257x8") as error:
        FusedViews(np.zeros((2, 257, 8, 3), np.uint8), np.arange(2), None, 4, 2)
    assert "\n" not in str(error.value)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_gpu_batches_match_cpu_batches(prefetch, resident):
    assert_in_order([plan(step, batch=16) for step in range(3 * prefetch + 2)], prefetch, "gpu", resident)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_gpu_views_are_safe_to_use_on_the_current_stream(own_stream):
    """Use each batch late, on a busy stream: it must be complete and not be overwritten by later batches."""
    plans = [plan(step, batch=64) for step in range(6)]
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    pipeline = make(len(plans[0].image), prefetch=2, device="gpu")
    copies = []
    with torch.cuda.stream(stream):
        for views in plans:
            pipeline.submit(pipeline.prepare(views))
            torch.cuda._sleep(20_000_000)  # Cycles: about 10 ms, during which the host runs ahead.
            copies.append(pipeline.collect().clone())  # Releases the batch itself.
    pipeline.close()
    stream.synchronize()
    for copy, views in zip(copies, plans, strict=True):
        assert_near(copy.cpu().numpy(), run(views))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("resident", [True, False])
def test_gpu_views_do_not_synchronize(resident):
    views = plan(batch=64)
    pipeline = make(len(views.image), prefetch=2, device="gpu", resident=resident)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            pipeline.submit(pipeline.prepare(views))
            pipeline.collect()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pipeline.close()
