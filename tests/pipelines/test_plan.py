"""The plan of a step: a pure function, distributed as in the paper, and independent of the number of ranks."""

import dataclasses
import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

import pipelines.plan
from pipelines import ctaugment
from pipelines.plan import PlanSpec, ViewPlan, drawn_images, make_plan, rank_views, stack

SPEC = PlanSpec(batch=16, k=3, labeled_images=40, unlabeled_images=1000, max_shift=2, flip=True)
WEIGHTS = ctaugment.initial_weights()


def arrays(plan):
    """Return all arrays of a plan by name."""
    found = {name: value for name, value in vars(plan).items() if isinstance(value, np.ndarray)}
    return found | {f"views.{name}": value for name, value in vars(plan.views).items()}


def generator(seed, purpose, position):
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, position]))


def slow_bin(weights, uniform, segments=False):
    """Draw one parameter's bin with the formulas of section 3.2.2, given the weights of its existing bins.

    With `segments`, draw a segment between two bins, as in the authors' code.
    """
    raised = [weight + 0.01 for weight in weights]
    kept = [m / max(raised) if m / max(raised) >= 0.8 else 0.0 for m in raised]
    if segments:
        kept = [first + second for first, second in pairwise(kept)]
    edge = 0.0
    for chosen, share in enumerate(kept):
        edge += share / sum(kept)
        if share and uniform < edge:
            return chosen
    return max(chosen for chosen, share in enumerate(kept) if share)


def slow_ops(rng, views, weights, segments=False):
    """Draw transformations, levels, centers and bins (or segments between them) one number at a time."""
    ops, uniform, inside = rng.integers(19, size=(views, 2)), rng.random((views, 2, 2)), rng.random((views, 2, 2))
    levels, bins = np.zeros((views, 2, 2), np.float32), np.full((views, 2, 2), -1)
    for view, stage in np.ndindex(views, 2):
        for parameter, count in enumerate(ctaugment.TRANSFORMATIONS[ops[view, stage]].bins):
            at = view, stage, parameter
            bins[at] = slow_bin(weights[ops[view, stage], parameter, :count].tolist(), uniform[at], segments)
            levels[at] = min(np.float32((bins[at] + inside[at]) / (count - segments)), np.float32(1 - 2**-24))
    return ops, levels, rng.random((views, 2, 2), dtype=np.float32), bins


def slow_code_bins(ops, levels):
    """Return the bins that the authors' code updates for the levels of probes."""
    bins = np.full(levels.shape, -1)
    for view, stage in np.ndindex(ops.shape):
        for parameter, count in enumerate(ctaugment.TRANSFORMATIONS[ops[view, stage]].bins):
            bins[view, stage, parameter] = int(float(levels[view, stage, parameter]) * count * 0.999)
    return bins


def slow_code_effect(op, levels, side):
    """Return a transformation and levels that reproduce the authors' code."""
    name, level, nothing = ctaugment.NAMES[op], float(levels[0]), (ctaugment.IDENTITY, (0, 0))
    if name in ("translate_x", "translate_y", "rescale"):
        return nothing
    if name == "rotate":
        level = Fraction(45 + round((2 * level - 1) * 45), 90)
        first = Fraction(min(math.floor(level * 2**24), 2**24 - 1), 2**24)
        return op, (float(first), float(level - first))
    if name == "cutout":
        pixels = 1 + math.floor(0.499 * side * level)
        if pixels == 1:
            return nothing
        if pixels % 2:
            return op, ((pixels - 1.5) / (0.499 * side), 0)
    return op, levels


def slow_plan(spec, seed, step, weights):
    """Return all arrays of a plan, view by view: reference implementation from the docstring of pipelines.plan."""
    batch, unlabeled_batch = spec.batch, spec.mu * spec.batch
    blocks = [("x_strong", batch)]  # Name and number of views of each.
    blocks += [("x_weak", batch)] if spec.labeled_augment == "both" else []
    labeled_views = len(blocks) * batch
    if spec.unlabeled_images:
        blocks += [] if spec.anchor == "none" else [("u_weak", unlabeled_batch)]
        blocks += [("u", unlabeled_batch)] * spec.k
    blocks += [("x_probe", batch)] if spec.probes else []
    names = [name for name, views in blocks for _ in range(views)]

    def images(purpose, count, drawn):
        places = [divmod(step * drawn + number, count) for number in range(drawn)]
        return np.array([generator(seed, purpose, epoch).permutation(count)[place] for epoch, place in places], int)

    labeled = images(0, spec.labeled_images, batch)
    unlabeled = images(1, spec.unlabeled_images, unlabeled_batch) if spec.unlabeled_images else np.zeros(0, int)
    views, probed = len(names), batch if spec.probes else 0
    not_pooled = ("x_probe",) if spec.anchor == "trained" else ("x_probe", "u_weak")
    pool = sum(name not in not_pooled for name in names)
    weak, mixup = generator(seed, 2, step), generator(seed, 5, step)
    shift = weak.integers(-spec.max_shift, spec.max_shift, (views, 2), np.int32, endpoint=True)
    flip = weak.integers(2, size=views, dtype=np.int32) * spec.flip
    augment = {"u": "strong", "u_weak": spec.anchor_augment, "x_strong": spec.labeled_augment, "x_probe": "weak"}
    if spec.labeled_augment == "both":
        augment |= {"x_strong": "strong", "x_weak": "weak"}
    for view in range(views):
        if augment[names[view]] == "none":
            shift[view], flip[view] = 0, 0
    strong = [view for view in range(views) if augment[names[view]] == "strong"]
    ops, levels = np.zeros((views, 2), np.int32), np.zeros((views, 2, 2), np.float32)
    center = np.zeros((views, 2, 2), np.float32)
    if spec.augment:
        drawn = slow_ops(generator(seed, 3, step), len(strong), weights, spec.ctaugment == "code")
        for view, *numbers in zip(strong, *drawn[:3], strict=True):
            ops[view], levels[view], center[view] = numbers
    probes = slow_ops(generator(seed, 4, step), probed, ctaugment.initial_weights())
    for array, of_probes in zip((ops, levels, center), probes[:3], strict=True):
        array[views - probed :] = of_probes
    probe_bins = probes[3]
    if spec.ctaugment == "code":
        probe_bins = slow_code_bins(*probes[:2])
        for at in np.ndindex(views, 2):
            ops[at], levels[at] = slow_code_effect(ops[at], levels[at], spec.side)
    lam, perm = [1.0] * pool, np.arange(pool)
    if spec.mixup_alpha:
        lam, perm = mixup.beta(spec.mixup_alpha, spec.mixup_alpha, pool), mixup.permutation(pool)
    return {
        "labeled": labeled,
        "unlabeled": unlabeled,
        "lam": np.array([max(value, 1 - value) for value in lam], np.float32),
        "perm": perm,
        "rotations": generator(seed, 6, step).permutation([number % 4 for number in range(unlabeled_batch)]),
        "probe_ops": probes[0],
        "probe_bins": probe_bins,
        "interpolation": generator(seed, 7, step).random((labeled_views, spec.interpolated_classes), dtype=np.float32)
        if spec.interpolated_classes
        else np.zeros((0, 0), np.float32),
        "views.image": np.concatenate([labeled if name.startswith("x") else unlabeled for name, _ in blocks]),
        "views.labeled": np.array([name.startswith("x") for name in names]),
        "views.shift": shift,
        "views.flip": flip,
        "views.ops": ops,
        "views.levels": levels,
        "views.center": center,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(k=1, flip=False),
        dict(augment=False),
        dict(anchor_augment="none"),
        dict(unlabeled_images=0, anchor_augment="none"),
        dict(anchor_augment="strong"),
        dict(labeled_augment="weak"),
        dict(unlabeled_images=0, labeled_augment="none", probes=False),
        dict(anchor="none", augment=False, labeled_augment="weak", probes=False, k=2),
        dict(anchor="guess-only", mu=3, mixup_alpha=0.0, labeled_augment="weak"),
        dict(anchor="guess-only", mu=2, anchor_augment="strong", k=2),
        dict(mu=2, k=2),
        dict(probes=False),
        dict(unlabeled_images=0),
        dict(unlabeled_images=0, augment=False),
        dict(labeled_images=3, unlabeled_images=17, mixup_alpha=0.3),
        dict(batch=1, k=2, labeled_images=1, unlabeled_images=1, max_shift=0),
        dict(ctaugment="code"),
        dict(ctaugment="code", side=7, unlabeled_images=0),
        dict(ctaugment="code", side=96, augment=False),
        dict(labeled_augment="both", anchor="guess-only", mu=3, mixup_alpha=0.0, interpolated_classes=7),
        dict(labeled_augment="both", anchor_augment="none", interpolated_classes=2),
        dict(labeled_augment="both", anchor="none", unlabeled_images=0, interpolated_classes=3),
    ],
)
def test_plan_matches_the_reference_implementation(changes):
    spec = dataclasses.replace(SPEC, **changes)
    chance = np.random.default_rng(0)
    for seed, step in ((0, 0), (0, 1), (2**40 + 1, 70_000)):
        weights = WEIGHTS * chance.uniform(0.6, 1, WEIGHTS.shape)
        made, expected = arrays(make_plan(spec, seed, step, weights)), slow_plan(spec, seed, step, weights)
        assert made.keys() == expected.keys()
        for name, array in expected.items():
            assert made[name].dtype == array.dtype and made[name].shape == array.shape, name
            assert made[name].tobytes() == array.tobytes(), name


def test_no_epoch_is_shuffled_twice(monkeypatch):
    """Six short labeled epochs per step must not evict the long unlabeled one from the cache."""
    drawn = Counter()
    original = pipelines.plan.stream

    def counting(seed, purpose, position):
        drawn[purpose, position] += purpose < 2
        return original(seed, purpose, position)

    monkeypatch.setattr(pipelines.plan, "stream", counting)
    spec = dataclasses.replace(SPEC, batch=64, labeled_images=10, unlabeled_images=500)
    for step in range(20):
        make_plan(spec, 987, step, WEIGHTS)
    epochs = {key: times for key, times in drawn.items() if key[0] < 2}
    assert set(epochs.values()) == {1} and len(epochs) == 20 * 64 // 10 + 20 * 64 // 500 + 1


def test_plan_is_a_pure_function_of_seed_step_and_weights():
    first = arrays(make_plan(SPEC, seed=3, step=70_000, weights=WEIGHTS))
    make_plan(SPEC, seed=3, step=5, weights=WEIGHTS)  # Other draws in between must not matter.
    again = arrays(make_plan(SPEC, seed=3, step=70_000, weights=WEIGHTS))
    assert first.keys() == again.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)


@pytest.mark.parametrize("other", [dict(seed=4, step=9), dict(seed=3, step=10)])
def test_plans_differ_between_seeds_and_steps(other):
    first = arrays(make_plan(SPEC, seed=3, step=9, weights=WEIGHTS))
    second = arrays(make_plan(SPEC, weights=WEIGHTS, **other))
    for name in (
        "lam",
        "perm",
        "rotations",
        "labeled",
        "unlabeled",
        "probe_ops",
        "views.shift",
        "views.flip",
        "views.ops",
    ):
        assert not np.array_equal(first[name], second[name]), name


def test_weights_affect_only_the_levels_of_strong_views():
    weights = WEIGHTS.copy()
    weights[1:, :, 1:] *= 0.1  # Only the first bin of each parameter stays above the threshold.
    first = arrays(make_plan(SPEC, seed=0, step=0, weights=WEIGHTS))
    second = arrays(make_plan(SPEC, seed=0, step=0, weights=weights))
    assert {name for name in first if not np.array_equal(first[name], second[name])} == {"views.levels"}
    probes = SPEC.batch * SPEC.pool_blocks
    np.testing.assert_array_equal(first["views.levels"][probes:], second["views.levels"][probes:])
    strong = second["views.levels"][2 * SPEC.batch : probes]
    bins = ctaugment.BINS[second["views.ops"][2 * SPEC.batch : probes]]
    assert (strong[bins > 0] < 1 / bins[bins > 0]).all()


def test_blocks_of_views():
    plan = make_plan(SPEC, seed=0, step=2, weights=WEIGHTS)
    views, batch = plan.views, SPEC.batch
    assert len(views.image) == batch * (SPEC.k + 3)
    blocks = views.image.reshape(SPEC.k + 3, batch)
    labeled = views.labeled.reshape(SPEC.k + 3, batch)
    for block in (0, SPEC.k + 2):  # x_strong, x_probe
        np.testing.assert_array_equal(blocks[block], plan.labeled)
        assert labeled[block].all()
    for block in range(1, SPEC.k + 2):  # u_weak, u_1 .. u_K
        np.testing.assert_array_equal(blocks[block], plan.unlabeled)
        assert not labeled[block].any()
    ops = views.ops.reshape(SPEC.k + 3, batch, 2)
    assert (ops[1] == ctaugment.IDENTITY).all()
    assert all((ops[block] != ctaugment.IDENTITY).mean() > 0.7 for block in range(SPEC.k + 3) if block != 1)
    np.testing.assert_array_equal(ops[-1], plan.probe_ops)
    assert np.abs(views.shift).max() == SPEC.max_shift
    # Each strong view has its own weak augmentation.
    assert not np.array_equal(views.shift[2 * batch : 3 * batch], views.shift[3 * batch : 4 * batch])


def test_two_blocks_without_unlabeled_data():
    spec = dataclasses.replace(SPEC, unlabeled_images=0)
    plan = make_plan(spec, seed=0, step=0, weights=WEIGHTS)
    assert plan.views.labeled.all() and len(plan.views.image) == 2 * spec.batch
    assert len(plan.lam) == len(plan.perm) == spec.batch and not len(plan.unlabeled)


def test_probes_remain_without_strong_augmentation():
    plan = make_plan(dataclasses.replace(SPEC, augment=False), seed=0, step=0, weights=WEIGHTS)
    pool = SPEC.batch * SPEC.pool_blocks
    assert (plan.views.ops[:pool] == ctaugment.IDENTITY).all()
    assert (plan.views.ops[pool:] != ctaugment.IDENTITY).any()


def test_no_flip_and_no_shift():
    plan = make_plan(dataclasses.replace(SPEC, flip=False, max_shift=0), seed=0, step=0, weights=WEIGHTS)
    assert not plan.views.flip.any() and not plan.views.shift.any()


def test_mixup_coefficients_and_partners():
    lam = np.concatenate([make_plan(SPEC, 0, step, WEIGHTS).lam for step in range(60)])
    assert lam.dtype == np.float32 and lam.min() >= 0.5 and lam.max() <= 1.0
    # max(lam, 1 - lam) folds the density of Beta(a, a) at 1/2: the mean is 1/2 + E|lam - 1/2|.
    reference = np.random.default_rng(0).beta(0.75, 0.75, 400_000)
    assert abs(lam.mean() - np.maximum(reference, 1 - reference).mean()) < 0.01
    plan = make_plan(SPEC, 0, 0, WEIGHTS)
    np.testing.assert_array_equal(np.sort(plan.perm), np.arange(SPEC.batch * (SPEC.k + 2)))


def test_each_rotation_occurs_for_a_quarter_of_the_batch():
    for step in range(5):
        rotations = make_plan(SPEC, 0, step, WEIGHTS).rotations
        np.testing.assert_array_equal(np.bincount(rotations, minlength=4), [4, 4, 4, 4])


@pytest.mark.parametrize(("batch", "images"), [(16, 40), (64, 10), (7, 7), (5, 1437)])
def test_every_image_occurs_once_per_epoch(batch, images):
    steps = 3 * images // batch + 2
    drawn = np.concatenate([drawn_images(1, 0, step, batch, images) for step in range(steps)])
    epochs = drawn[: 3 * images].reshape(3, images)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(images))
    if images > 7:
        assert not np.array_equal(epochs[0], epochs[1])


def test_levels_lie_in_the_drawn_bins():
    plan = make_plan(dataclasses.replace(SPEC, batch=256), 0, 0, WEIGHTS)
    levels = plan.views.levels[-256:]
    exists = plan.probe_bins >= 0
    bins = ctaugment.BINS[plan.probe_ops]
    assert levels.dtype == np.float32 and (levels < 1).all() and (levels >= 0).all()
    position = levels[exists] * bins[exists] - plan.probe_bins[exists]
    assert position.min() > -1e-5 and position.max() < 1 + 1e-5
    assert (levels[~exists] == 0).all()
    assert exists.sum() == (bins > 0).sum()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_split_the_views_of_one_plan(ranks):
    plan = make_plan(SPEC, 0, 3, WEIGHTS)
    shares = [rank_views(SPEC.blocks, SPEC.batch, rank, ranks) for rank in range(ranks)]
    together = np.concatenate(shares)
    np.testing.assert_array_equal(np.sort(together), np.arange(len(plan.views.image)))
    for rank, share in enumerate(shares):
        assert set(share % SPEC.batch) == set(range(rank, SPEC.batch, ranks))
        part = plan.views.select(share)
        assert isinstance(part, ViewPlan)
        np.testing.assert_array_equal(part.image, plan.views.image[share])
        np.testing.assert_array_equal(part.levels, plan.views.levels[share])


def test_stack_concatenates_plans():
    first, second = (make_plan(SPEC, 0, step, WEIGHTS).views for step in (0, 1))
    both = stack([first, second])
    views = len(first.image)
    for name, value in vars(both).items():
        np.testing.assert_array_equal(value[:views], getattr(first, name))
        np.testing.assert_array_equal(value[views:], getattr(second, name))


def test_indivisible_batch_raises():
    with pytest.raises(ValueError, match="cannot be split across 3 ranks"):
        rank_views(4, 16, 0, 3)
