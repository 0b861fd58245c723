"""`--ctaugment code`: levels as the authors' code draws them, and views as it makes them, against PIL."""

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
# beside others: where rotate's and cutout's numbers of degrees and pixels begin and end, and both ends
LEVELS = (0.0, 0.0055, 0.0056, 0.0626, 0.063, 0.21, 0.25, 0.4945, 0.5, 0.5056, 0.68, 0.83, 0.9944, 0.9945, BELOW_ONE)
SPEC = PlanSpec(64, 8, 64, 640, max_shift=2, flip=True, ctaugment="code")


def pictures(height, width):
    """Noise, and a smooth picture: (2, height, width, 3) uint8."""
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3))
    y, x = np.mgrid[0 : 255 : height * 1j, 0 : 255 : width * 1j]
    return np.stack([noise, np.stack([x, y, 255 - x], axis=-1)]).astype(np.uint8)


def cases(height, width):
    """Every transformation at every level: one a row, in turn as the first and as the second of its view."""
    rows = [
        (op, image, level, second)
        for op, transformation in enumerate(ctaugment.TRANSFORMATIONS)
        for image in range(2)
        for level in (LEVELS if transformation.bins else LEVELS[:1])
        for second in ((0.0, 0.3, 0.5, 0.7, BELOW_ONE) if transformation.name == "rescale" else (0.0,))
    ]
    op, image, level, second = (np.array(column) for column in zip(*rows, strict=True))
    stage, every = np.arange(len(rows)) % 2, np.arange(len(rows))
    ops, levels = np.full((len(rows), 2), ctaugment.IDENTITY, np.int32), np.zeros((len(rows), 2, 2), np.float32)
    ops[every, stage], levels[every, stage] = op, np.stack([level, second], axis=-1)
    center = np.random.default_rng(1).random((len(rows), 2, 2), dtype=np.float32)
    return image, stage, ops, levels, center


@pytest.mark.parametrize("views", [DaliViews, FusedViews])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (20, 31), (7, 9)])
def test_views_are_those_of_the_authors_code(views, height, width):
    images = pictures(height, width)
    image, stage, ops, levels, center = cases(height, width)
    rows = len(image)
    shift, flip = np.zeros((rows, 2), np.int32), np.zeros(rows, np.int32)
    effects = code_effects(ops, levels, min(height, width))
    assert ops is not effects[0] and levels is not effects[1] and effects[1].min() >= 0 and effects[1].max() < 1
    pipeline = views(images, np.arange(2), None, rows, 0)
    pipeline.submit(pipeline.prepare(ViewPlan(image, np.ones(rows, bool), shift, flip, *effects, center)))
    made = pipeline.collect().numpy()
    pipeline.close()
    for row in range(rows):
        drawn = ops[row, stage[row]], levels[row, stage[row]], center[row, stage[row]]
        expected = np.asarray(transformed(Image.fromarray(images[image[row]]), *drawn, CODE_FUNCTIONS))
        # resampling, whose weights are sums of sines, is none here: all is equal
        np.testing.assert_array_equal(made[row], expected, err_msg=f"{NAMES[drawn[0]]} at {drawn[1]}")


def test_what_the_code_does_as_the_paper_says_stays_as_it_was_drawn():
    _, _, ops, levels, _ = cases(32, 32)
    same = ~np.isin(ops, [NAMES.index(name) for name in CODE_DIFFERS])
    changed_ops, changed_levels = code_effects(ops, levels, 32)
    assert (changed_ops == ops)[same].all() and (changed_levels == levels)[same].all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (96, 96), (255, 130), (256, 256)])
def test_rotations_are_by_whole_degrees_to_the_bit(height, width):
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
    """Weights after many probes, under which bins of every parameter are dropped, single ones and neighbours."""
    return ctaugment.initial_weights() * np.random.default_rng(5).uniform(0.6, 1, (len(NAMES), 2, 17))


def cells(levels, cuts):
    """How many levels lie in each of so many equal parts of [0, 1)."""
    return np.bincount((levels.astype(np.float64) * cuts).astype(int), minlength=cuts)


@pytest.mark.parametrize("name", ["solarize", "posterize"])
def test_levels_are_drawn_from_segments_between_neighbouring_bins(name):
    """Frequencies in halves of segments, against a choice by the description's own words."""
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


def test_probes_are_drawn_from_all_levels_and_move_the_bin_that_the_code_says():
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
        # of all others a bin is moved as well
        assert ((plan.probe_bins >= 0) == (ctaugment.BINS[plan.probe_ops] > 0)).all()
    assert ((found - found.mean()) ** 2 / found.mean()).sum() < 34 + 4 * np.sqrt(68)

    policy, rates = CTAugmentPolicy(lag=1), ctaugment.initial_weights()
    omega = np.linspace(0, 1, SPEC.batch, dtype=np.float32)
    policy.observe(0, plan.probe_ops, plan.probe_bins, omega)
    for row, stage, parameter in np.argwhere(plan.probe_bins >= 0):
        moved = plan.probe_ops[row, stage], parameter, plan.probe_bins[row, stage, parameter]
        rates[moved] = 0.99 * rates[moved] + 0.01 * float(omega[row])
    np.testing.assert_allclose(policy.weights_for(1), rates, rtol=1e-12)
