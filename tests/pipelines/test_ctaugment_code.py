"""`--ctaugment code`: levels and views as in the authors' code, compared with PIL."""

import numpy as np
import pytest
from PIL import Image

from pipelines import ctaugment, geometric
from pipelines.ctaugment import CTAugmentPolicy, code_effects
from pipelines.dali import DaliViews
from pipelines.fused import FusedViews
from pipelines.plan import PlanSpec, ViewPlan, make_plan
from pipelines.reference_ctaugment import CODE_DIFFERS, CODE_FUNCTIONS, transformed

NAMES = ctaugment.NAMES
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
# Include both ends, and levels near which the degrees of rotate or the pixels of cutout change.
LEVELS = (0.0, 0.0055, 0.0056, 0.0626, 0.063, 0.21, 0.25, 0.4945, 0.5, 0.5056, 0.68, 0.83, 0.9944, 0.9945, BELOW_ONE)
SPEC = PlanSpec(64, 8, 64, 640, max_shift=2, flip=True, ctaugment="code")


def sample_images(height, width):
    """Return noise and a smooth image: (2, height, width, 3) uint8."""
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3))
    y, x = np.mgrid[0 : 255 : height * 1j, 0 : 255 : width * 1j]
    return np.stack([noise, np.stack([x, y, 255 - x], axis=-1)]).astype(np.uint8)


def cases(height, width):
    """Return every transformation at every level, alternately as the first and the second of a view."""
    table = [
        (op, image, level, second)
        for op, transformation in enumerate(ctaugment.TRANSFORMATIONS)
        for image in range(2)
        for level in (LEVELS if transformation.bins else LEVELS[:1])
        for second in ((0.0, 0.3, 0.5, 0.7, BELOW_ONE) if transformation.name == "rescale" else (0.0,))
    ]
    op, image, level, second = (np.array(column) for column in zip(*table, strict=True))
    stage, every = np.arange(len(table)) % 2, np.arange(len(table))
    ops, levels = np.full((len(table), 2), ctaugment.IDENTITY, np.int32), np.zeros((len(table), 2, 2), np.float32)
    ops[every, stage], levels[every, stage] = op, np.stack([level, second], axis=-1)
    center = np.random.default_rng(1).random((len(table), 2, 2), dtype=np.float32)
    return image, stage, ops, levels, center


@pytest.mark.parametrize("views", [DaliViews, FusedViews])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (20, 31), (7, 9)])
def test_views_match_the_authors_code(views, height, width):
    images = sample_images(height, width)
    image, stage, ops, levels, center = cases(height, width)
    count = len(image)
    shift, flip = np.zeros((count, 2), np.int32), np.zeros(count, np.int32)
    effects = code_effects(ops, levels, min(height, width))
    assert ops is not effects[0] and levels is not effects[1] and effects[1].min() >= 0 and effects[1].max() < 1
    pipeline = views(images, np.arange(2), None, count, 0)
    pipeline.submit(pipeline.prepare(ViewPlan(image, np.ones(count, bool), shift, flip, *effects, center)))
    made = pipeline.collect().numpy()
    pipeline.close()
    for view in range(count):
        drawn = ops[view, stage[view]], levels[view, stage[view]], center[view, stage[view]]
        expected = np.asarray(transformed(Image.fromarray(images[image[view]]), *drawn, CODE_FUNCTIONS))
        # All values are equal because nothing is resampled here.
        np.testing.assert_array_equal(made[view], expected, err_msg=f"{NAMES[drawn[0]]} at {drawn[1]}")


def test_transformations_that_agree_with_the_paper_are_unchanged():
    _, _, ops, levels, _ = cases(32, 32)
    same = ~np.isin(ops, [NAMES.index(name) for name in CODE_DIFFERS])
    changed_ops, changed_levels = code_effects(ops, levels, 32)
    assert (changed_ops == ops)[same].all() and (changed_levels == levels)[same].all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (96, 96), (255, 130), (256, 256)])
def test_rotations_by_whole_degrees_are_exact(height, width):
    level = np.linspace(0, BELOW_ONE, 2000, dtype=np.float32)
    levels, ops = np.zeros((len(level), 2, 2), np.float32), np.full((len(level), 2), ctaugment.IDENTITY)
    ops[:, 0], levels[:, 0, 0] = NAMES.index("rotate"), level
    numbers = geometric.op_parameters(
        *code_effects(ops, levels, min(height, width)), np.zeros_like(levels), height, width
    )
    degrees = np.array([int(np.round((2 * float(each) - 1) * 45)) for each in level])
    assert set(degrees) == set(range(-45, 46))
    expected = geometric.rotate(degrees / 45.0, height, width).astype(np.float32)
    np.testing.assert_array_equal(numbers[:, 0], expected)


def learned():
    """Return weights as after many probes: each parameter has dropped bins, both isolated and neighboring."""
    return ctaugment.initial_weights() * np.random.default_rng(5).uniform(0.6, 1, (len(NAMES), 2, 17))


def cells(levels, cuts):
    """Return the number of levels in each of `cuts` equal parts of [0, 1)."""
    return np.bincount((levels.astype(np.float64) * cuts).astype(int), minlength=cuts)


@pytest.mark.parametrize("name", ["solarize", "posterize"])
def test_levels_are_drawn_from_segments_between_neighboring_bins(name):
    """Compare frequencies in halves of segments with the definition."""
    op, weights = NAMES.index(name), learned()
    bins = ctaugment.TRANSFORMATIONS[op].bins[0]
    strong = slice(2 * SPEC.batch, 10 * SPEC.batch)
    drawn = []
    for step in range(120):
        views = make_plan(SPEC, 3, step, weights).views
        drawn.append(views.levels[strong][views.ops[strong] == op, 0])
    drawn = np.concatenate(drawn)
    raised = weights[op, 0, :bins] + 0.01
    p = np.where(raised / raised.max() >= 0.8, raised / raised.max(), 0)
    segments = p[1:] + p[:-1]
    expected = np.repeat(segments / segments.sum(), 2) / 2
    found = cells(drawn, 2 * (bins - 1))
    assert (p == 0).any()
    assert not found[expected == 0].any()
    likely = expected > 0
    chi2 = ((found - len(drawn) * expected)[likely] ** 2 / (len(drawn) * expected)[likely]).sum()
    assert len(drawn) > 5000 and chi2 < likely.sum() + 4 * np.sqrt(2 * likely.sum())


def test_probes_draw_from_all_levels_and_update_the_authors_bins():
    found = np.zeros(34, int)
    for step in range(150):
        plan = make_plan(SPEC, 3, step, learned())
        pool = SPEC.batch * SPEC.pool_blocks
        ops, levels = plan.views.ops[pool:], plan.views.levels[pool:]
        found += cells(levels[ops == NAMES.index("solarize"), 0], 34)
        kept = ~np.isin(plan.probe_ops, [NAMES.index(name) for name in CODE_DIFFERS])
        assert (ops == plan.probe_ops)[kept].all()
        for at in zip(*np.nonzero(kept), strict=True):
            for parameter, bins in enumerate(ctaugment.TRANSFORMATIONS[ops[at]].bins):
                assert plan.probe_bins[at][parameter] == int(float(levels[at][parameter]) * bins * 0.999)
        # The other transformations also have a bin to update.
        assert ((plan.probe_bins >= 0) == (ctaugment.BINS[plan.probe_ops] > 0)).all()
    assert ((found - found.mean()) ** 2 / found.mean()).sum() < 34 + 4 * np.sqrt(68)

    policy, rates = CTAugmentPolicy(lag=1), ctaugment.initial_weights()
    omega = np.linspace(0, 1, SPEC.batch, dtype=np.float32)
    policy.observe(0, plan.probe_ops, plan.probe_bins, omega)
    for probe, stage, parameter in np.argwhere(plan.probe_bins >= 0):
        used = plan.probe_ops[probe, stage], parameter, plan.probe_bins[probe, stage, parameter]
        rates[used] = 0.99 * rates[used] + 0.01 * float(omega[probe])
    np.testing.assert_allclose(policy.weights_for(1), rates, rtol=1e-12)
