"""Batch layout: each pool view is trained once, groups interleave, and ranks share the groups."""

import dataclasses

import numpy as np
import pytest

from engine.method.batch_layout import BatchLayout, rank_plan
from pipelines.ctaugment import initial_weights
from pipelines.plan import PlanSpec, make_plan

SPEC = PlanSpec(batch=24, k=2, labeled_images=40, unlabeled_images=100, max_shift=2, flip=False)


@pytest.mark.parametrize(
    ("groups", "ranks", "parts"),
    [(1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 2), (4, 2, 2), (4, 2, 4), (4, 1, 2), (6, 3, 3), (6, 3, 6)],
)
def test_ranks_together_train_every_pool_view_once(groups, ranks, parts):
    shares = [BatchLayout.for_rank(SPEC, groups, rank, ranks, parts) for rank in range(ranks)]
    pool = np.concatenate([share.pool for share in shares])
    np.testing.assert_array_equal(np.sort(pool), np.arange(24 * 4))
    for rank, share in enumerate(shares):
        assert set(share.images) == set(range(rank, 24, ranks))
        assert set(share.pool % 24) == set(share.images)
        assert share.accumulation_steps == parts // ranks
        # Each input counts in one of the means over x, u, u_1 and rotated u_1, whose weights sum to 1.
        weights = np.concatenate([share.class_weights, share.rotation_weights[None]])
        own = 24 // parts
        for term, count in zip(weights, (own, 3 * own, own, own), strict=True):
            np.testing.assert_allclose(term[term > 0], 1 / count, rtol=1e-6)
            assert (term > 0).sum() == count
        assert ((weights > 0).sum(0) == 1).all()
        for part in share.pool.reshape(share.accumulation_steps, -1):
            np.testing.assert_array_equal(weights[0, : len(part)] > 0, part < 24)
            np.testing.assert_array_equal(weights[1, : len(part)] > 0, part >= 24)
        assert (weights[2, -2 * own : -own] > 0).all() and (weights[3, -own:] > 0).all()


@pytest.mark.parametrize(("groups", "ranks"), [(1, 1), (2, 1), (2, 2), (4, 2), (6, 1)])
def test_each_group_interleaves_labeled_and_unlabeled_views(groups, ranks):
    size = 24 // groups
    for rank in range(ranks):
        pool = BatchLayout.for_rank(SPEC, groups, rank, ranks, ranks).pool.reshape(-1, size)
        for group in pool:
            assert len(set(group % 24)) == size, "one view of each image"
            assert len(set(group % 24 % groups)) == 1, "images of one part of the batch"
            counts = np.bincount(group // 24, minlength=4)
            assert counts.min() >= size // 4, "all blocks of the pool"


def test_groups_do_not_depend_on_the_number_of_ranks():
    def groups(ranks):
        pools = [BatchLayout.for_rank(SPEC, 4, rank, ranks, ranks).pool.reshape(-1, 6) for rank in range(ranks)]
        return {tuple(group) for group in np.concatenate(pools)}

    assert groups(1) == groups(2) == groups(4)


@pytest.mark.parametrize(("groups", "parts"), [(2, 2), (4, 4), (8, 4)])
def test_micro_batches_do_not_depend_on_the_number_of_ranks(groups, parts):
    spec, expected = dataclasses.replace(SPEC, batch=32), {}
    plan = make_plan(spec, seed=0, step=0, weights=initial_weights())
    for ranks in (1, 2, parts):
        for rank in range(ranks):
            share = BatchLayout.for_rank(spec, groups, rank, ranks, parts)
            views = share.step_views(plan)
            step = rank_plan(share, plan, np.zeros(32, np.int64))
            trained = views[step.source[: -2 * len(share.images)]].reshape(share.accumulation_steps, -1)
            pairs = zip(
                share.pool.reshape(share.accumulation_steps, -1),
                share.images.reshape(share.accumulation_steps, -1),
                strict=True,
            )
            for part, (pool, images) in zip(range(rank, parts, ranks), pairs, strict=True):
                arrays = (share.class_weights, share.rotation_weights, trained[part // ranks], pool, images)
                for array, first in zip(arrays, expected.setdefault(part, arrays), strict=True):
                    np.testing.assert_array_equal(array, first)
    assert sorted(expected) == list(range(parts))


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 4)])
def test_inputs_follow_the_plan(ranks, parts):
    """Map the positions of inputs through the rank's views back to the plan."""
    plan = make_plan(SPEC, seed=0, step=0, weights=initial_weights())
    labels = np.arange(24) % 10
    parts = max(parts, ranks)
    shares = [BatchLayout.for_rank(SPEC, parts, rank, ranks, parts) for rank in range(ranks)]
    known = np.concatenate([np.arange(24), 100 + np.arange(24)])  # Stands for [labels; pseudo-labels].
    for share in shares:
        step = rank_plan(share, plan, labels)
        views = share.step_views(plan)
        source, partner = views[step.source], views[step.partner]
        trained = np.split(np.arange(len(share.pool) + 2 * len(share.images)), share.accumulation_steps)
        passed = slice(len(share.pool) + 2 * len(share.images), None)
        pools, images = np.split(share.pool, share.accumulation_steps), np.split(share.images, share.accumulation_steps)
        for inputs, pool, own in zip(trained, pools, images, strict=True):
            mixed, first, rotated = np.split(inputs, [len(pool), len(pool) + len(own)])
            np.testing.assert_array_equal(source[mixed], pool)
            np.testing.assert_array_equal(partner[mixed], plan.perm[pool])
            np.testing.assert_array_equal(step.lam[mixed], plan.lam[pool])
            np.testing.assert_array_equal(source[first], own + 2 * 24)
            np.testing.assert_array_equal(source[rotated], own + 2 * 24)
            np.testing.assert_array_equal(step.rotations[rotated], plan.rotations[own])
            assert not step.rotations[mixed].any() and not step.rotations[first].any()
            unmixed = np.concatenate([first, rotated])
            np.testing.assert_array_equal(partner[unmixed], source[unmixed])
            assert (step.lam[unmixed] == 1).all()
            # All K + 1 views of an image share its target, and so do u_1 and its rotation.
            for shown, target in (
                (pool, step.target_index[mixed]), (plan.perm[pool], step.partner_target_index[mixed]),
                (own + 2 * 24, step.target_index[first]), (own + 2 * 24, step.partner_target_index[first]),
                (own + 2 * 24, step.target_index[rotated]), (own + 2 * 24, step.partner_target_index[rotated]),
            ):  # fmt: skip
                np.testing.assert_array_equal(known[target], np.where(shown < 24, shown, 100 + shown % 24))
        expected = np.concatenate([share.images + block * 24 for block in (1, 4)])  # u_weak and x_probe.
        np.testing.assert_array_equal(source[passed], expected)
        np.testing.assert_array_equal(partner[passed], expected)
        assert (step.lam[passed] == 1).all() and not step.rotations[passed].any()
    order = np.concatenate([share.images for share in shares])
    np.testing.assert_array_equal(order[shares[0].guess_order], np.arange(24)[None])
    np.testing.assert_array_equal(order[shares[0].probe_order], np.arange(24))


def test_supervised_inputs_are_the_labeled_pool_and_the_probes():
    spec = PlanSpec(batch=8, k=2, labeled_images=40, unlabeled_images=0, max_shift=2, flip=False)
    plan = make_plan(spec, 0, 0, initial_weights())
    layout = BatchLayout.for_rank(spec, 1, 0, 1, 1)
    step = rank_plan(layout, plan, np.zeros(8, np.int64))
    np.testing.assert_array_equal(step.source, np.arange(16))
    assert step.target_index.max() < 8 and not step.rotations.any()
    np.testing.assert_array_equal(layout.class_weights[0], np.full(8, 1 / 8, np.float32))
    assert not layout.class_weights[1:].any() and not layout.rotation_weights.any()


METHODS = {
    "fixmatch": (dict(anchor="guess-only", mu=3, k=1, mixup_alpha=0.0), dict(unmixed=False, rotated=False)),
    "two strong views": (dict(anchor="guess-only", mu=2, k=2), dict(unmixed=False, rotated=False)),
    "mixmatch": (dict(anchor="none", k=2, probes=False), dict(unmixed=False, rotated=False, mean_guess=True)),
    "mean guess": (dict(k=2), dict(mean_guess=True)),
    "mu": (dict(mu=2), dict()),
    "no u_1": (dict(), dict(unmixed=False)),
    "no rotation": (dict(), dict(rotated=False)),
    "adamatch": (
        dict(anchor="guess-only", mu=3, k=1, mixup_alpha=0.0, labeled_augment="both", interpolated_classes=5),
        dict(unmixed=False, rotated=False, labeled_guess=True),
    ),
    "labeled guess": (dict(k=2, labeled_augment="weak", interpolated_classes=4), dict(labeled_guess=True)),
    "both, mean guess": (dict(k=2, labeled_augment="both"), dict(mean_guess=True, labeled_guess=True)),
    "pi-model": (
        dict(anchor="none", k=3, mu=2, mixup_alpha=0.0, probes=False),
        dict(unmixed=False, rotated=False, mean_guess=True, trained_guess=True),
    ),
    "trained anchor": (dict(mixup_alpha=0.0, mu=2), dict(trained_guess=True)),
    "trained, labeled": (
        dict(mixup_alpha=0.0, labeled_augment="both"),
        dict(trained_guess=True, labeled_guess=True, unmixed=False),
    ),
}


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("name", METHODS)
def test_inputs_and_targets_of_other_methods(name, ranks, parts):
    """Identify every view, target and pseudo-label by (block, image)."""
    changes, options = METHODS[name]
    spec = dataclasses.replace(SPEC, **changes)
    plan = make_plan(spec, seed=0, step=0, weights=initial_weights())
    batch, unlabeled = spec.batch, spec.mu * spec.batch
    anchor = [] if spec.anchor == "none" else ["u_weak"]
    labeled = ["x", "x_weak"] if spec.labeled_augment == "both" else ["x"]
    views = [(block, i) for block in labeled for i in range(batch)]
    views += [(block, i) for block in anchor + [f"u_{k + 1}" for k in range(spec.k)] for i in range(unlabeled)]
    views += [("probe", i) for i in range(batch)] if spec.probes else []
    pool = [view for view in views if view[0] != "probe" and (view[0] != "u_weak" or spec.anchor == "trained")]
    known = [("x", i) for i in range(batch)] + [("u", i) for i in range(unlabeled)]
    of_pool = [("x" if block in labeled else "u", i) for block, i in pool]
    of_guess = [v for v in views if v[0] == "u_weak"]
    if options.get("mean_guess"):
        of_guess = [v for v in pool if v[0] not in labeled]
    of_labeled = [v for v in views if v[0] == labeled[-1]] if options.get("labeled_guess") else []

    shares = [BatchLayout.for_rank(spec, parts, rank, ranks, parts, **options) for rank in range(ranks)]
    trained, guessed, probed = [], [], []
    for share in shares:
        step = rank_plan(share, plan, np.zeros(batch, np.int64))
        count = len(share.target_index)
        own_guesses = share.guess_inputs
        assert own_guesses == (0 if options.get("trained_guess") else (len(of_guess) + len(of_labeled)) // ranks)
        made = [views[index] for index in share.step_views(plan)]
        shown = [made[position] for position in step.source]
        if options.get("trained_guess"):
            if share.accumulation_steps > 1:
                return  # One pass per rank is required.
            guessed += shown[: len(share.pool)]
        else:
            guessed += shown[count : count + own_guesses]
        probed += shown[count + own_guesses :]
        for i, index in zip(share.mixed_index, share.pool, strict=True):
            partner = plan.perm[index]
            assert shown[i] == pool[index] and made[step.partner[i]] == pool[partner]
            assert (
                known[step.target_index[i]] == of_pool[index]
                and known[step.partner_target_index[i]] == of_pool[partner]
            )
            trained.append(pool[index])
        terms = np.concatenate([share.class_weights, share.rotation_weights[None]])
        micro_batches = np.arange(count).reshape(share.accumulation_steps, -1)
        for weights, term in zip(terms, ("x", "u", "u_1", "rotated"), strict=True):
            for micro_batch in micro_batches:
                counted = micro_batch[weights > 0]
                images = [shown[i][1] for i in counted]
                if term in ("x", "u"):
                    assert all((shown[i][0] in labeled) == (term == "x") and i in share.mixed_index for i in counted)
                    if term == "x":
                        np.testing.assert_array_equal(np.flatnonzero(weights), share.labeled_index)
                elif options.get("unmixed" if term == "u_1" else "rotated", True):
                    assert {shown[i][0] for i in counted} == {"u_1"} and len(images) == unlabeled // parts
                    assert all(known[step.target_index[i]] == ("u", shown[i][1]) for i in counted)
                    rotations = plan.rotations[images] if term == "rotated" else np.zeros(len(images))
                    np.testing.assert_array_equal(step.rotations[counted], rotations)
                else:
                    assert not len(counted)
                if len(counted):
                    np.testing.assert_allclose(weights[weights > 0], 1 / len(counted), rtol=1e-6)
        # The pseudo-labels of a micro-batch are those of its own images.
        for part in range(share.accumulation_steps):
            size = own_guesses // share.accumulation_steps
            of_part = shown[count + part * size : count + (part + 1) * size]
            own = {known[target] for target in step.target_index.reshape(share.accumulation_steps, -1)[part]}
            if own_guesses:
                own_images = {("x" if view in of_labeled else "u", view[1]) for view in of_part}
                assert own_images == {each for each in own if each[0] == "u" or of_labeled}
        if spec.interpolated_classes:
            of_rank = share.labeled_index + np.arange(share.accumulation_steps)[:, None] * (count // len(micro_batches))
            weights_of = dict(zip(pool, plan.interpolation, strict=False))  # The labeled views are first.
            expected = [weights_of[shown[i]] for i in of_rank.reshape(-1)]
            np.testing.assert_array_equal(step.interpolation, expected)
        else:
            assert step.interpolation.shape == (0, 0)
    assert sorted(trained) == sorted(pool)
    ordered = [[guessed[i] for i in of_view] for of_view in shares[0].guess_order]
    assert [view for of_view in ordered for view in of_view] == of_guess
    assert all([image for _, image in of_view] == list(range(unlabeled)) for of_view in ordered)
    assert [guessed[i] for i in shares[0].labeled_order] == of_labeled
    assert [probed[i] for i in shares[0].probe_order] == [v for v in views if v[0] == "probe"]


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 2), (2, 2), (2, 4), (8, 8)])
@pytest.mark.parametrize("name", ["remixmatch", *METHODS])
def test_number_of_views_is_constant(name, ranks, parts):
    """A captured step has static shapes; without mixup, and on one rank, no partner is made."""
    changes, options = METHODS.get(name, ({}, {}))
    spec = dataclasses.replace(SPEC, **changes)
    for rank in range(ranks):
        layout = BatchLayout.for_rank(spec, parts, rank, ranks, parts, **options)
        own = spec.blocks * 24 // ranks
        partners = spec.pool_blocks * 24 // ranks if ranks > 1 and spec.mixup_alpha else 0
        for step in range(3):
            plan = make_plan(spec, seed=0, step=step, weights=initial_weights())
            assert len(layout.step_views(plan)) == layout.view_count == own + partners
