"""Batch layout: which view every input of the network is made from, and in which order the inputs come.

This is integer index arithmetic. `BatchLayout` holds what is fixed for a run and is computed once; `rank_plan` adds
the random numbers of one step. B is the number of labeled images per step over all ranks, K the number of strong
views, R the number of ranks, and b = B / R.

Views. The plan of a step (`pipelines/plan.py`) numbers the views of the global batch block by block. A block has one
view of each of B images, so view `block * B + i` shows labeled or unlabeled image i:

    block      0          1        2     3           K + 1   K + 2
    view       x_strong   u_weak   u_1   u_2   ...   u_K     x_probe
    in pool    labeled    |------- unlabeled --------|       no

Blocks 0 to K + 1 are the mixup pool (section 3.3 of the paper). A view may be mixed with any view of the pool, also
with those of other ranks' images. A view is a pure function of the plan and the images, so with R > 1 every rank makes
the views of its own b images and, once more, the partner of each of its pool views: ranks exchange no pixels.

Inputs. These are the inputs of a rank with one micro-batch, from first to last:

    number       made from                forward pass                   used for
    b (K + 2)    its pool views, mixed    train_model                    loss_x, loss_u
    b            u_1                      train_model, the same pass     loss_u1
    b            u_1, rotated             train_model, the same pass     loss_rot
    b            u_weak                   guess_model, without gradient  pseudo-labels
    b            x_probe                  ema_model, without gradient    CTAugment's omega

Other methods omit what they do not use. A loss term of weight 0 has no inputs, and a method whose augmentation learns
nothing has no probes. Without unlabeled data only x_strong and x_probe are left. u_weak may be outside the pool, as in
FixMatch, or absent, as in MixMatch, where pseudo-labels come from u_1, ..., u_K. With mu unlabeled images per labeled
image, every unlabeled block above stands for mu blocks of B.

With `guess_pass = "joint"` u_weak is in the training pass, after its other inputs, which needs no other order. With
`guess_pass = "trained"` pseudo-labels are made from the pool's own logits, and no inputs are added.

AdaMatch trains on two views of every labeled image: a block x_weak follows x_strong in the plan and in the pool. Its
rule for pseudo-labels also needs predictions of labeled images, so x_weak precedes u_weak among the guess's inputs.

Gradient accumulation. The global batch is split into M micro-batches, where M is a multiple of R. Micro-batch m has the
images m, m + M, m + 2 M, ... of every block and is trained by rank m mod R. So rank r has the images r, r + R, ...
whatever M is. The inputs of a rank with two micro-batches are, with || between two forward passes:

    pool | u_1 | rotated u_1 || pool | u_1 | rotated u_1 || u_weak || u_weak || x_probe || x_probe

Batch norm over groups (`bn = "split"`). Inputs that follow one another share statistics, so the order of the inputs
defines the groups. The authors' code runs the pool in K + 2 passes, each of which mixes labeled and unlabeled views.
Here the images are split into G parts, where part j has the images i = G t + j for t = 0, 1, ... The views of a part
form K + 2 groups: the view of image i in block v of the pool is in group (v + t) mod (K + 2). A group then has exactly
one view of each of its B / G images, and the views cycle through the blocks. With B / G >= K + 2 every group contains
labeled views.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.plan import GlobalPlan, PlanSpec, rank_views


@dataclass(frozen=True)
class BatchLayout:
    """The indices of one rank's views, inputs and targets; all int64 unless stated otherwise.

    Shapes: V views and P pool views in the global batch, U = mu B unlabeled images, N inputs of this rank, n inputs
    per training pass (one micro-batch). A view index is a position in the plan, a pool index a position in the plan's
    mixup pool. A position is an index into the views that the rank makes in a step, see `step_views`.

    Attributes:
        spec: What the plans are drawn for.
        ranks: R.
        accumulation_steps: M / R, the number of micro-batches over which a rank accumulates gradients.
        views: (V / R,) view indices of this rank's images.
        images: (B / R,) image indices of this rank, by micro-batch.
        pool: (P / R,) pool indices that this rank trains on, by micro-batch.
        guess_order: (g, U) positions of the logits of the g views that an image's pseudo-label is made from, in the
            logits of all ranks, concatenated rank by rank. g is 1 with an anchor. Empty without unlabeled data.
        labeled_order: (B,) positions of the labeled images' logits, likewise, for rules that use them. Empty otherwise.
        guess_inputs: Number of inputs of this rank that are predicted for `guess_order` and `labeled_order` alone.
        probe_order: (B,) positions of the probes' logits, likewise. Empty without probes.
        pool_views: (P,) view index of each pool view.
        pool_target_index: (P,) target of each pool view, as an index into [labels (B); pseudo-labels (U)].
        target_index: (n M / R,) target of each training input, likewise. u_1 has the target of its image.
        source: (N,) position of the view that each input is made from, the same in every step.
        mixed_index: (P / R,) positions of the views in `pool` among the inputs.
        rotated_index: (U / R,) positions of the rotated u_1 among the inputs. Empty without the rotation task.
        rotation_index: (U / R,) position of each rotated u_1 in the plan's `rotations`.
        labeled_index: (n_x,) positions of the labeled views among the inputs of a micro-batch's training pass.
        interpolation_index: (n_x M / R,) position of each of them in the plan's `interpolation`. Empty without it.
        class_weights: (3, n) float32, weight of each input in the means loss_x, loss_u and loss_u1.
        rotation_weights: (n,) float32, weight of each input in the mean loss_rot.
        carries_images: Whether the plan of a step says which unlabeled images it has.
    """

    spec: PlanSpec
    ranks: int
    accumulation_steps: int
    views: np.ndarray
    images: np.ndarray
    pool: np.ndarray
    guess_order: np.ndarray
    labeled_order: np.ndarray
    guess_inputs: int
    probe_order: np.ndarray
    pool_views: np.ndarray
    pool_target_index: np.ndarray
    target_index: np.ndarray
    source: np.ndarray
    mixed_index: np.ndarray
    rotated_index: np.ndarray
    rotation_index: np.ndarray
    labeled_index: np.ndarray
    interpolation_index: np.ndarray
    class_weights: np.ndarray
    rotation_weights: np.ndarray
    carries_images: bool

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
        carries_images: bool = False,
        labeled_guess: bool = False,
        trained_guess: bool = False,
    ) -> BatchLayout:
        """Lay out the batch of one rank.

        Args:
            spec: What the plans are drawn for.
            bn_groups: G, number of parts that the images are split into; a multiple of `micro_batches` that divides B.
            rank: r.
            ranks: R.
            micro_batches: M, a multiple of `ranks`.
            unmixed: Whether to train on u_1 unmixed.
            rotated: Whether to train on the rotated u_1.
            mean_guess: Whether pseudo-labels are made from all unlabeled views of the pool instead of u_weak alone.
            carries_images: Whether the plan of a step says which unlabeled images it has.
            labeled_guess: Whether the rule for pseudo-labels uses predictions of the labeled images: of x_weak, or of
                x_strong if there is no x_weak.
            trained_guess: Whether pseudo-labels are made from the logits of the pool in the training pass.
        """
        batch, blocks = spec.batch, spec.pool_blocks
        labeled_blocks, labeled_views = spec.labeled_blocks, batch * spec.labeled_blocks.stop
        per_group, accumulation_steps = batch // bn_groups, micro_batches // ranks

        def images_of(some_rank: int) -> np.ndarray:
            """Return the images of a rank: its micro-batches m = r, r + R, ..., each the parts j = m, m + M, ..."""
            own = np.arange(some_rank, micro_batches, ranks)
            parts = (own[:, None] + np.arange(0, bn_groups, micro_batches)).reshape(-1, 1)
            return (parts + bn_groups * np.arange(per_group)).reshape(-1)

        def views_of(some_rank: int, some_blocks: np.ndarray) -> np.ndarray:
            """Return a rank's view indices in some blocks, one line per micro-batch: (M / R, len(blocks) * B / M)."""
            own = images_of(some_rank).reshape(accumulation_steps, 1, -1)
            return (own + batch * some_blocks[:, None]).reshape(accumulation_steps, -1)

        def order_of(some_blocks: np.ndarray) -> np.ndarray:
            """Return where the views of ascending blocks are in all ranks' concatenated `views_of`."""
            return np.argsort(np.concatenate([views_of(r, some_blocks).reshape(-1) for r in range(ranks)]))

        def pool_of(some_rank: int) -> np.ndarray:
            """Return a rank's pool indices, one line per micro-batch: (M / R, P / M)."""
            own = images_of(some_rank).reshape(-1, 1, per_group)
            block = (np.arange(blocks)[:, None] - own // bn_groups) % blocks  # (G / R, pool blocks, B / G)
            return (block * batch + own).reshape(accumulation_steps, -1)

        images, pool = images_of(rank), pool_of(rank)

        views = rank_views(spec.blocks, batch, rank, ranks)
        position = np.full(batch * spec.blocks, -1)  # Of the rank's own views.
        position[views] = np.arange(len(views))

        # Blocks of the views that pseudo-labels are made from, of u_1, and of the probes.
        unlabeled = np.arange(spec.mu) if spec.unlabeled_images else np.arange(0)
        guess_blocks = np.array(spec.anchor_blocks, dtype=np.int64)
        if mean_guess:
            guess_blocks = spec.pool_views[labeled_blocks.stop :]
        if labeled_guess and len(guess_blocks):
            guess_blocks = np.insert(guess_blocks, 0, labeled_blocks[-1])
        u1_blocks = spec.strong_blocks.start + unlabeled
        probe_blocks = np.arange(spec.blocks)[spec.strong_blocks.stop :]

        # The training inputs, one line per micro-batch.
        pool_views = (spec.pool_views[:, None] * batch + np.arange(batch)).reshape(-1)  # (P,)
        u1 = views_of(rank, u1_blocks)
        extra_terms = []  # Loss terms of the inputs that follow the pool: 2 is u_1, 3 the rotated u_1.
        if unmixed:
            extra_terms.append(2)
        if rotated:
            extra_terms.append(3)
        trained = np.concatenate([pool_views[pool], *(u1 for _ in extra_terms)], axis=1)
        positions = np.arange(trained.size).reshape(accumulation_steps, -1)

        # Of each pool view, negative for the labeled ones.
        unlabeled_block = np.arange(batch * blocks) // batch - labeled_blocks.stop
        first_target = batch * np.where(unlabeled_block < 0, 0, 1 + unlabeled_block % spec.mu)
        pool_target_index = np.arange(batch * blocks) % batch + first_target
        u1_target_index = views_of(rank, 1 + unlabeled)  # Pseudo-labels follow the B labels.
        target_index = np.concatenate([pool_target_index[pool], *(u1_target_index for _ in extra_terms)], axis=1)

        # The loss term that each training input counts in, the same in every micro-batch: x, u, u_1, rotated u_1.
        of_pool = np.where(pool[0] < labeled_views, 0, 1)
        term = np.concatenate([of_pool, np.repeat(extra_terms, u1.shape[1])]).astype(np.int64)
        labeled_index = np.flatnonzero(term == 0)
        interpolation_index = pool[:, labeled_index].reshape(-1)
        counts = np.bincount(term, minlength=4)
        weights = ((term == np.arange(4)[:, None]) / np.maximum(counts, 1)[:, None]).astype(np.float32)
        guessed = np.arange(0) if trained_guess else guess_blocks
        forward_only = [views_of(rank, some_blocks).reshape(-1) for some_blocks in (guessed, probe_blocks)]
        first_rotated = trained.shape[1] - (u1.shape[1] if rotated else 0)
        rotation_index = u1_target_index - batch
        guess_order, labeled_order = np.empty((0, 0), np.int64), np.empty(0, np.int64)
        if len(guess_blocks):
            if trained_guess:
                in_pool = np.argsort(np.concatenate([pool_of(r).reshape(-1) for r in range(ranks)]))  # (P,)
                blocks_in_pool = np.searchsorted(spec.pool_views, guess_blocks)
                order = in_pool.reshape(blocks, batch)[blocks_in_pool]
            else:
                order = order_of(guess_blocks)
            order = order.reshape(-1, batch)
            if labeled_guess:
                labeled_order, order = order[0], order[1:]
            guess_order = order.reshape(-1, batch * len(unlabeled))
        return cls(
            spec=spec,
            ranks=ranks,
            accumulation_steps=accumulation_steps,
            views=views,
            images=images,
            pool=pool.reshape(-1),
            guess_order=guess_order,
            labeled_order=labeled_order,
            guess_inputs=len(forward_only[0]),
            probe_order=order_of(probe_blocks),
            pool_views=pool_views,
            pool_target_index=pool_target_index,
            target_index=target_index.reshape(-1),
            source=position[np.concatenate([trained.reshape(-1), *forward_only])],
            mixed_index=positions[:, : pool.shape[1]].reshape(-1),
            rotated_index=positions[:, first_rotated:].reshape(-1),
            rotation_index=rotation_index.reshape(-1) if rotated else rotation_index[:0].reshape(-1),
            labeled_index=labeled_index,
            interpolation_index=interpolation_index if spec.interpolated_classes else interpolation_index[:0],
            class_weights=weights[:3],
            rotation_weights=weights[3],
            carries_images=carries_images,
        )

    @property
    def makes_partners(self) -> bool:
        """Whether the rank makes the partners of its pool views: on one rank, they are among its own views."""
        return self.ranks > 1 and self.spec.mixup_alpha > 0

    @property
    def view_count(self) -> int:
        """Number of views that the rank makes in a step."""
        return len(self.views) + self.makes_partners * len(self.pool)

    def step_views(self, plan: GlobalPlan) -> np.ndarray:
        """Return the view indices that the rank makes in a step: (view_count,) int64, its own views, then partners."""
        if not self.makes_partners:
            return self.views
        return np.concatenate([self.views, self.pool_views[plan.perm[self.pool]]])


@dataclass(frozen=True)
class RankPlan:
    """The plan of one step for the inputs of one rank, in the order of the module docstring.

    Shapes and positions are those of `BatchLayout`.

    Attributes:
        source: (N,) int64, position of the view that each input is made from.
        partner: (N,) int64, position of the view mixed into it; outside the pool `source` itself.
        lam: (N,) float32, mixup weight of `source`; 1 outside the pool.
        rotations: (N,) int64, rotation in units of 90 degrees.
        target_index: (n M / R,) int64, target of each training input, an index into [labels (B); pseudo-labels (U)].
        partner_target_index: (n M / R,) int64, target of its partner; outside the pool its own.
        images: (U,) int64, positions of the unlabeled images of the global batch in the unlabeled set; empty unless the
            layout carries them.
        labels: (B,) int64, classes of the labeled images of the global batch.
        interpolation: (n_x M / R, L) float32, weights of the random logit interpolation for the labeled training
            inputs; (0, 0) without it.
    """

    source: np.ndarray
    partner: np.ndarray
    lam: np.ndarray
    rotations: np.ndarray
    target_index: np.ndarray
    partner_target_index: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    interpolation: np.ndarray


def rank_plan(layout: BatchLayout, plan: GlobalPlan, labels: np.ndarray) -> RankPlan:
    """Translate the plan of a global batch into the plan of one rank.

    Args:
        layout: The rank's layout.
        plan: The plan of the step.
        labels: (B,) int64, classes of `plan.labeled`.
    """
    perm = plan.perm[layout.pool]
    # Outside the pool, and without mixup, an input is its own partner.
    partner, rotations = layout.source.copy(), np.zeros_like(layout.source)
    if layout.makes_partners:
        partner[layout.mixed_index] = np.arange(len(layout.views), layout.view_count)
    elif layout.ranks == 1:
        partner[layout.mixed_index] = layout.pool_views[perm]
    lam = np.ones(len(layout.source), np.float32)
    lam[layout.mixed_index] = plan.lam[layout.pool]
    partner_target_index = layout.target_index.copy()
    partner_target_index[layout.mixed_index] = layout.pool_target_index[perm]
    rotations[layout.rotated_index] = plan.rotations[layout.rotation_index]
    return RankPlan(
        source=layout.source,
        partner=partner,
        lam=lam,
        rotations=rotations,
        target_index=layout.target_index,
        partner_target_index=partner_target_index,
        images=plan.unlabeled if layout.carries_images else plan.unlabeled[:0],
        labels=labels,
        interpolation=plan.interpolation[layout.interpolation_index],
    )
