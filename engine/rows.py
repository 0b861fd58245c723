"""Which rows a rank trains, and in which order: index arithmetic only, fixed for a run.

The network's input batch of one rank is, in rows:

    mixup pool | u_1 | rotated u_1 | u_weak (guess) | x_probe (CTAugment)

of which the first three are trained in one pass. With R ranks, rank r takes images r, r + R, ... of every block.

For batch norm over groups (`bn = "split"`) consecutive rows share statistics, so order is what makes the groups. The
paper's code interleaves: each of its K + 2 passes over the pool holds labeled and unlabeled rows alike. Here image
i = G * t + j of view block v goes to group (j, (v + t) mod (K + 2)): a Latin square, so that a group has one view of
each of its images, and labeled rows whenever it has at least K + 2 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.plan import Plan, PlanSpec, rank_rows


@dataclass(frozen=True)
class Rows:
    """Row numbers of one rank. P = B * pool blocks; a trailing r marks a rank's share, all int64.

    Attributes:
        spec: what the plans are drawn for.
        ranks: R.
        views: (V / R,) global view rows whose pixels this rank makes.
        images: (B / R,) positions in the batch that are this rank's, in the network's order.
        pool: (P / R,) global pool rows that it trains, in the network's order.
        gathered: (V,) where each global view row lies once the ranks' views are gathered rank by rank.
        guess_order: (B,) where each image's guess lies once the ranks' guesses are gathered rank by rank.
        pool_target: (P,) for each global pool row, its row in [labels (B); guesses (B)].
        labeled: (B / R,) places of labeled rows within `pool`.
        unlabeled: places of unlabeled rows within `pool`.
    """

    spec: PlanSpec
    ranks: int
    views: np.ndarray
    images: np.ndarray
    pool: np.ndarray
    gathered: np.ndarray
    guess_order: np.ndarray
    pool_target: np.ndarray
    labeled: np.ndarray
    unlabeled: np.ndarray


def arrange(spec: PlanSpec, bn_groups: int, rank: int, ranks: int) -> Rows:
    """Lays out one rank's rows.

    Args:
        spec: what the plans are drawn for.
        bn_groups: G, parts into which each block of B rows is cut; a multiple of `ranks`, divides B.
        rank: r.
        ranks: R.
    """
    batch, blocks = spec.batch, spec.pool_blocks
    per_group = batch // bn_groups

    def images_of(some_rank: int) -> np.ndarray:
        """Group by group, the groups j = r, r + R, ... of images j, j + G, ..."""
        groups = np.arange(some_rank, bn_groups, ranks)
        return (groups[:, None] + bn_groups * np.arange(per_group)).reshape(-1)

    images = images_of(rank)
    t = images.reshape(-1, 1, per_group) // bn_groups  # (G / R, 1, n)
    block = (np.arange(blocks)[:, None] - t) % blocks  # (G / R, pool blocks, n)
    pool = (block * batch + images.reshape(-1, 1, per_group)).reshape(-1)

    gathered = np.empty(batch * spec.blocks, dtype=np.int64)
    gathered[np.concatenate([rank_rows(spec.blocks, batch, r, ranks) for r in range(ranks)])] = np.arange(
        batch * spec.blocks
    )
    guess_order = np.empty(batch, dtype=np.int64)
    guess_order[np.concatenate([images_of(r) for r in range(ranks)])] = np.arange(batch)

    pool_rows = np.arange(batch * blocks)
    return Rows(
        spec=spec,
        ranks=ranks,
        views=rank_rows(spec.blocks, batch, rank, ranks),
        images=images,
        pool=pool,
        gathered=gathered,
        guess_order=guess_order,
        pool_target=pool_rows % batch + batch * (pool_rows >= batch),
        labeled=np.flatnonzero(pool < batch),
        unlabeled=np.flatnonzero(pool >= batch),
    )


@dataclass(frozen=True)
class StepPlan:
    """One step's numbers as the device takes them, in the network's row order (module docstring); N rows.

    Attributes:
        source: (N,) int64, gathered view row that each network row shows.
        partner: (N,) int64, the row mixed into it.
        lam: (N,) float32, share of `source`; 1 outside the pool.
        turns: (N,) int64, quarter turns.
        target: (P / R,) int64, each pool row's row in [labels (B); guesses (B)].
        partner_target: (P / R,) int64, its partner's.
        labels: (B,) int64, classes of the labeled images of the global batch.
    """

    source: np.ndarray
    partner: np.ndarray
    lam: np.ndarray
    turns: np.ndarray
    target: np.ndarray
    partner_target: np.ndarray
    labels: np.ndarray


def step_plan(rows: Rows, plan: Plan, labels: np.ndarray) -> StepPlan:
    """Turns a plan into the numbers that one rank's step reads.

    Args:
        rows: the rank's rows.
        plan: the step's plan.
        labels: (B,) int64, classes of `plan.labeled`.
    """
    batch, images = rows.spec.batch, rows.images
    probes = images + batch * rows.spec.pool_blocks
    if rows.spec.unlabeled_images:
        weak, first = images + batch, images + 2 * batch
        single = np.concatenate([first, first, weak, probes])
        turns = np.concatenate([np.zeros_like(first), plan.turns[images], np.zeros(2 * len(images), np.int64)])
    else:
        single, turns = probes, np.zeros(len(probes), np.int64)
    partner = plan.perm[rows.pool]
    return StepPlan(
        source=rows.gathered[np.concatenate([rows.pool, single])],
        partner=rows.gathered[np.concatenate([partner, single])],
        lam=np.concatenate([plan.lam[rows.pool], np.ones(len(single), np.float32)]),
        turns=np.concatenate([np.zeros_like(rows.pool), turns]),
        target=rows.pool_target[rows.pool],
        partner_target=rows.pool_target[partner],
        labels=labels,
    )
