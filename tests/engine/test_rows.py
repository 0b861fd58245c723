"""Index arithmetic: every row trained once, groups that interleave, ranks that share the groups."""

import numpy as np
import pytest

from engine.rows import arrange, step_plan
from pipelines.ctaugment import initial_weights
from pipelines.plan import PlanSpec, make_plan

SPEC = PlanSpec(batch=24, k=2, labeled_images=40, unlabeled_images=100, max_shift=2, flip=False)


@pytest.mark.parametrize(("groups", "ranks"), [(1, 1), (2, 1), (2, 2), (4, 2), (6, 3)])
def test_ranks_together_train_every_pool_row_once(groups, ranks):
    shares = [arrange(SPEC, groups, rank, ranks) for rank in range(ranks)]
    pool = np.concatenate([share.pool for share in shares])
    np.testing.assert_array_equal(np.sort(pool), np.arange(24 * 4))
    for rank, share in enumerate(shares):
        assert set(share.images) == set(range(rank, 24, ranks))
        assert set(share.pool % 24) == set(share.images)
        assert len(share.labeled) == 24 // ranks and len(share.unlabeled) == 3 * 24 // ranks
        assert (share.pool[share.labeled] < 24).all() and (share.pool[share.unlabeled] >= 24).all()


@pytest.mark.parametrize(("groups", "ranks"), [(1, 1), (2, 1), (2, 2), (4, 2), (6, 1)])
def test_each_group_interleaves_labeled_and_unlabeled_rows(groups, ranks):
    size = 24 // groups
    for rank in range(ranks):
        pool = arrange(SPEC, groups, rank, ranks).pool.reshape(-1, size)
        for group in pool:
            assert len(set(group % 24)) == size, "one view of each image"
            assert len(set(group % 24 % groups)) == 1, "images of one part of the batch"
            counts = np.bincount(group // 24, minlength=4)
            assert counts.min() >= size // 4, "every block of views, labeled rows among them"


def test_two_ranks_form_the_groups_of_one():
    def groups(ranks):
        rows = [arrange(SPEC, 4, rank, ranks).pool.reshape(-1, 6) for rank in range(ranks)]
        return {tuple(group) for group in np.concatenate(rows)}

    assert groups(1) == groups(2) == groups(4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_network_rows_show_what_the_plan_says(ranks):
    """Follows row numbers through gathered views back to the plan."""
    plan = make_plan(SPEC, seed=0, step=0, weights=initial_weights())
    labels = np.arange(24) % 10
    shares = [arrange(SPEC, ranks, rank, ranks) for rank in range(ranks)]
    gathered = np.concatenate([share.views for share in shares])  # the global view row at each gathered place
    known = np.concatenate([np.arange(24), 100 + np.arange(24)])  # stands for [labels; guesses]
    for share in shares:
        step = step_plan(share, plan, labels)
        source, partner = gathered[step.source], gathered[step.partner]
        n, p = len(share.images), len(share.pool)
        np.testing.assert_array_equal(source[:p], share.pool)
        np.testing.assert_array_equal(partner[:p], plan.perm[share.pool])
        np.testing.assert_array_equal(step.lam[:p], plan.lam[share.pool])
        np.testing.assert_array_equal(step.lam[p:], np.ones(4 * n))
        np.testing.assert_array_equal(source[p:], partner[p:])
        expected = np.concatenate([share.images + block * 24 for block in (2, 2, 1, 4)])  # u_1, u_1, u_weak, probe
        np.testing.assert_array_equal(source[p:], expected)
        np.testing.assert_array_equal(step.turns[p + n : p + 2 * n], plan.turns[share.images])
        assert not step.turns[: p + n].any() and not step.turns[p + 2 * n :].any()
        # all K + 1 views of an image share its one target
        for rows, target in ((share.pool, step.target), (plan.perm[share.pool], step.partner_target)):
            np.testing.assert_array_equal(known[target], np.where(rows < 24, rows, 100 + rows % 24))
    order = np.concatenate([share.images for share in shares])
    np.testing.assert_array_equal(order[shares[0].guess_order], np.arange(24))


def test_supervised_rows_are_the_labeled_pool_and_the_probes():
    spec = PlanSpec(batch=8, k=2, labeled_images=40, unlabeled_images=0, max_shift=2, flip=False)
    plan = make_plan(spec, 0, 0, initial_weights())
    rows = arrange(spec, 1, 0, 1)
    step = step_plan(rows, plan, np.zeros(8, np.int64))
    np.testing.assert_array_equal(step.source, np.arange(16))
    assert len(rows.unlabeled) == 0 and step.target.max() < 8 and not step.turns.any()
