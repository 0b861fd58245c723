"""Which rows a rank trains, and in which order: index arithmetic only, fixed for a run.

The views of a plan, and the mixup pool (section 3.3) which they begin with, are blocks of B rows each:

    block     0          1        2     3           K + 1   K + 2
    views     x_strong   u_weak   u_1   u_2   ...   u_K     x_probe
    pool      labeled    |-- unlabeled: K + 1 blocks ---|

The network's input of a rank with b = B / R images, from the first row to the last, in one micro-batch:

    rows         show              pass through               for
    b (K + 2)    pool, mixed up    train_model, one pass      loss_x, loss_u
    b            u_1               the same pass              loss_u1
    b            u_1, rotated      the same pass              loss_rot
    b            u_weak            guess_model, no gradient   the guess
    b            x_probe           ema_model, no gradient     CTAugment's omega

Parts that a method does not have are left out: without unlabeled data the pool is x_strong alone, and x_probe follows
it; a term of weight 0 has no rows; where nothing learns from probes, there are none. Other methods move u_weak out of
the pool, or have none and guess of u_1 ... u_K, see `pipelines/plan.py`. With mu unlabeled images for a labeled one,
every unlabeled block above is mu blocks of B, one after another.

With gradient accumulation, a step's images are cut into M micro-batches, R of them at least: micro-batch m has images
m, m + M, ... of every block, and is trained on rank m mod R, which so has images r, r + R, ... The first three parts
are then there once for each of a rank's micro-batches, one micro-batch after another, and so is the fourth:

    pool | u_1 | rotated u_1 || pool | u_1 | rotated u_1 || ... || u_weak || u_weak || ... || x_probe

For batch norm over groups (`bn = "split"`) consecutive rows share statistics, so order is what makes the groups. The
paper's code interleaves: each of its K + 2 passes over the pool holds labeled and unlabeled rows alike. Here image
i = G * t + j of pool block v goes to group (j, (v + t) mod (K + 2)): a Latin square, so that a group has one view of
each of its images, and labeled rows whenever it has at least K + 2 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.plan import GlobalPlan, PlanSpec, rank_views


@dataclass(frozen=True)
class BatchLayout:
    """Row numbers of one rank, all int64. P = B * pool blocks, U = mu B, n rows are trained in a micro-batch.

    Attributes:
        spec: what the plans are drawn for.
        ranks: R.
        accumulation_steps: M / R, micro-batches that a rank accumulates gradients over.
        views: (V / R,) global view rows whose pixels this rank makes.
        images: (B / R,) positions in the batch that are this rank's, micro-batch by micro-batch.
        pool: (P / R,) global pool rows that it trains, micro-batch by micro-batch.
        gathered: (V,) where each global view row lies once the ranks' views are gathered rank by rank.
        guess_order: (g, U) where the logits of each of an image's g views that are guessed of lie, once those of the
            ranks are gathered rank by rank; g is 1 for an anchor. Empty without unlabeled data.
        probe_order: (B,) the same for the probes; empty without any.
        pool_source: (P,) the gathered view row of each global pool row.
        pool_target_index: (P,) for each global pool row, its row in [labels (B); guesses (U)].
        target_index: (n M / R,) the same for each trained network row; u_1 has its image's.
        source: (N,) gathered view row that each network row shows (module docstring); the same in every step.
        mixed_index: (P / R,) network rows in which the rows of `pool` are.
        rotated_index: (U / R,) network rows of the rotated u_1; none without the rotation task.
        rotations: (U / R,) which of the plan's rotations they have.
        class_weights: (3, n) float32, shares of a micro-batch's rows in the means loss_x, loss_u and loss_u1.
        rotation_weights: (n,) float32, likewise in loss_rot.
    """

    spec: PlanSpec
    ranks: int
    accumulation_steps: int
    views: np.ndarray
    images: np.ndarray
    pool: np.ndarray
    gathered: np.ndarray
    guess_order: np.ndarray
    probe_order: np.ndarray
    pool_source: np.ndarray
    pool_target_index: np.ndarray
    target_index: np.ndarray
    source: np.ndarray
    mixed_index: np.ndarray
    rotated_index: np.ndarray
    rotations: np.ndarray
    class_weights: np.ndarray
    rotation_weights: np.ndarray

    @classmethod
    def for_rank(
        cls,
        spec: PlanSpec,
        bn_groups: int,
        rank: int,
        ranks: int,
        micro_batches: int,
        unmixed: bool = True,
        rotated: bool = True,
        mean_guess: bool = False,
    ) -> BatchLayout:
        """Lays out one rank's rows.

        Args:
            spec: what the plans are drawn for.
            bn_groups: G, parts into which each block of B rows is cut; a multiple of `micro_batches`, divides B.
            rank: r.
            ranks: R.
            micro_batches: M, a multiple of `ranks`.
            unmixed: whether u_1 is trained as it is, too.
            rotated: whether the rotated u_1 is.
            mean_guess: the label is guessed of all unlabeled views of the pool, and not of u_weak.
        """
        batch, blocks = spec.batch, spec.pool_blocks
        per_group, accumulation_steps = batch // bn_groups, micro_batches // ranks

        def images_of(some_rank: int) -> np.ndarray:
            """The micro-batches m = r, r + R, ..., each the groups j = m, m + M, ..., each of images j, j + G, ..."""
            own = np.arange(some_rank, micro_batches, ranks)
            groups = (own[:, None] + np.arange(0, bn_groups, micro_batches)).reshape(-1, 1)
            return (groups + bn_groups * np.arange(per_group)).reshape(-1)

        def rows_of(some_rank: int, some_blocks: np.ndarray) -> np.ndarray:
            """Rows of blocks of B, micro-batch by micro-batch: (M / R, rows)."""
            own = images_of(some_rank).reshape(accumulation_steps, 1, -1)
            return (own + batch * some_blocks[:, None]).reshape(accumulation_steps, -1)

        def order(some_blocks: np.ndarray) -> np.ndarray:
            """Where each row of the blocks lies among all ranks' `rows_of`: (blocks * B,)."""
            lying = np.concatenate([rows_of(r, some_blocks).reshape(-1) for r in range(ranks)])
            return np.argsort(lying)  # the blocks ascend

        images = images_of(rank)
        t = images.reshape(-1, 1, per_group) // bn_groups  # (G / R, 1, per_group)
        block = (np.arange(blocks)[:, None] - t) % blocks  # (G / R, pool blocks, per_group)
        pool = (block * batch + images.reshape(-1, 1, per_group)).reshape(accumulation_steps, -1)

        gathered = np.empty(batch * spec.blocks, dtype=np.int64)
        gathered[np.concatenate([rank_views(spec.blocks, batch, r, ranks) for r in range(ranks)])] = np.arange(
            batch * spec.blocks
        )

        # blocks of views: those that labels are guessed of, u_1's, and the probes'
        unlabeled = np.arange(spec.mu) if spec.unlabeled_images else np.arange(0)
        of_guess = spec.pool_views[1:] if mean_guess else np.array(spec.anchor_blocks, dtype=np.int64)
        of_u1 = spec.strong_blocks.start + unlabeled
        of_probes = np.arange(spec.blocks)[spec.strong_blocks.stop :]

        # the network's rows: one micro-batch a line, then what is only passed forward
        views = (spec.pool_views[:, None] * batch + np.arange(batch)).reshape(-1)  # of each pool row
        u1 = rows_of(rank, of_u1)
        of_extra = []  # the terms of what follows the pool
        if unmixed:
            of_extra.append(2)
        if rotated:
            of_extra.append(3)
        trained = np.concatenate([views[pool], *(u1 for _ in of_extra)], axis=1)
        place = np.arange(trained.size).reshape(accumulation_steps, -1)

        number = np.arange(batch * blocks) // batch - 1  # of the unlabeled block, -1 for the labeled
        pool_target_index = np.arange(batch * blocks) % batch + batch * np.where(number < 0, 0, 1 + number % spec.mu)
        guess_of_u1 = rows_of(rank, 1 + unlabeled)
        target_index = np.concatenate([pool_target_index[pool], *(guess_of_u1 for _ in of_extra)], axis=1)

        # what a trained row counts for, the same in every micro-batch: x, u, u_1, rotated u_1
        term = np.concatenate([np.where(pool[0] < batch, 0, 1), np.repeat(of_extra, u1.shape[1])]).astype(np.int64)
        counts = np.bincount(term, minlength=4)
        shares = ((term == np.arange(4)[:, None]) / np.maximum(counts, 1)[:, None]).astype(np.float32)
        forwarded = [rows_of(rank, some_blocks).reshape(-1) for some_blocks in (of_guess, of_probes)]
        first_rotated = trained.shape[1] - (u1.shape[1] if rotated else 0)
        turned = guess_of_u1 - batch
        guess_order = np.empty((0, 0), np.int64)
        if len(of_guess):
            guess_order = order(of_guess).reshape(-1, batch * len(unlabeled))
        return cls(
            spec=spec,
            ranks=ranks,
            accumulation_steps=accumulation_steps,
            views=rank_views(spec.blocks, batch, rank, ranks),
            images=images,
            pool=pool.reshape(-1),
            gathered=gathered,
            guess_order=guess_order,
            probe_order=order(of_probes),
            pool_source=gathered[views],
            pool_target_index=pool_target_index,
            target_index=target_index.reshape(-1),
            source=gathered[np.concatenate([trained.reshape(-1), *forwarded])],
            mixed_index=place[:, : pool.shape[1]].reshape(-1),
            rotated_index=place[:, first_rotated:].reshape(-1),
            rotations=turned.reshape(-1) if rotated else turned[:0].reshape(-1),
            class_weights=shares[:3],
            rotation_weights=shares[3],
        )


@dataclass(frozen=True)
class RankPlan:
    """One step's numbers as the device takes them, in the network's row order (module docstring); N rows.

    Attributes:
        source: (N,) int64, gathered view row that each network row shows.
        partner: (N,) int64, the row mixed into it.
        lam: (N,) float32, share of `source`; 1 outside the pool.
        rotations: (N,) int64, multiples of 90 degrees.
        target_index: (n M / R,) int64, each trained row's index in [labels (B); pseudo-labels (mu B)].
        partner_target_index: (n M / R,) int64, its partner's; outside the pool its own.
        labels: (B,) int64, classes of the labeled images of the global batch.
    """

    source: np.ndarray
    partner: np.ndarray
    lam: np.ndarray
    rotations: np.ndarray
    target_index: np.ndarray
    partner_target_index: np.ndarray
    labels: np.ndarray


def rank_plan(layout: BatchLayout, plan: GlobalPlan, labels: np.ndarray) -> RankPlan:
    """Turns a plan into the numbers that one rank's step reads.

    Args:
        layout: the rank's rows.
        plan: the step's plan.
        labels: (B,) int64, classes of `plan.labeled`.
    """
    perm = plan.perm[layout.pool]
    # outside the pool a row is its own partner
    partner, lam, rotations = (
        layout.source.copy(),
        np.ones(len(layout.source), np.float32),
        np.zeros_like(layout.source),
    )
    partner[layout.mixed_index], lam[layout.mixed_index] = layout.pool_source[perm], plan.lam[layout.pool]
    partner_target_index = layout.target_index.copy()
    partner_target_index[layout.mixed_index] = layout.pool_target_index[perm]
    rotations[layout.rotated_index] = plan.rotations[layout.rotations]
    return RankPlan(
        source=layout.source,
        partner=partner,
        lam=lam,
        rotations=rotations,
        target_index=layout.target_index,
        partner_target_index=partner_target_index,
        labels=labels,
    )
