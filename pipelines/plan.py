"""The plan: every random number of one training step, as plain arrays, from (seed, step, CTAugment weights).

Numbers come from counter-based Philox streams keyed by seed and purpose and positioned at the step, so no generator
state is ever kept: step 70 000 can be planned without the 69 999 before it, on any number of ranks, and twice alike.

Views are rows of one list. With B labeled and mu B unlabeled images and K strong views they are, in blocks:

    x_strong | u_weak | u_1 | ... | u_K | x_probe

The first K + 2 blocks are the mixup pool (ReMixMatch, algorithm 1), the last one feeds CTAugment, and is there where
CTAugment learns. Methods without augmentation anchoring have no u_weak; others do not train it, so that it is not in
the pool. Without unlabeled data (`unlabeled_images=0`) the blocks are x_strong and x_probe. A block of mu B unlabeled
images is mu blocks of B, one after another, so that all blocks are shared by the ranks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from pipelines import ctaugment

# one Philox stream a purpose: what one of them draws never moves another
_LABELED_ORDER, _UNLABELED_ORDER, _WEAK, _STRONG, _PROBE, _MIXUP, _ROTATION = range(7)
OPS_PER_VIEW = 2


@dataclass(frozen=True)
class PlanSpec:
    """What a plan is drawn for; the same for every step of a run.

    Attributes:
        batch: B, labeled images a step over all ranks.
        k: K, strong views of an unlabeled image; at least 1.
        labeled_images: size of the labeled set.
        unlabeled_images: size of the unlabeled set; 0 trains on labeled images alone.
        max_shift: largest weak translation, in pixels, along each axis.
        flip: whether weak views may be mirrored.
        augment: False leaves strong views with their weak augmentation only.
        mixup_alpha: both parameters of mixup's Beta distribution; 0 for no mixup.
        mu: unlabeled images a step, in units of B.
        anchor: whether u_weak is in the pool, is there for the guess alone, or is not there.
        anchor_augment: of u_weak, of which the label is guessed.
        labeled_augment: of x_strong.
        probes: whether there are probes for CTAugment.
        ctaugment: "paper", or "code" for levels and effects as in the authors' code: see `pipelines.ctaugment`.
        side: min(H, W) of the images, which cutout of "code" depends on.
    """

    batch: int
    k: int
    labeled_images: int
    unlabeled_images: int
    max_shift: int
    flip: bool
    augment: bool = True
    mixup_alpha: float = 0.75
    mu: int = 1
    anchor: Literal["trained", "guess-only", "none"] = "trained"
    anchor_augment: Literal["weak", "none", "strong"] = "weak"
    labeled_augment: Literal["strong", "weak", "none"] = "strong"
    probes: bool = True
    ctaugment: Literal["paper", "code"] = "paper"
    side: int = 32

    @cached_property
    def anchor_blocks(self) -> range:
        """Blocks of B view rows that are u_weak's: mu, or none."""
        return range(1, 1 + self.mu) if self.unlabeled_images and self.anchor != "none" else range(1, 1)

    @cached_property
    def strong_blocks(self) -> range:
        """Blocks of B view rows that are u_1's to u_K's: K mu, or none without unlabeled data."""
        first = self.anchor_blocks.stop
        return range(first, first + self.k * self.mu if self.unlabeled_images else first)

    @cached_property
    def pool_views(self) -> np.ndarray:
        """The mixup pool's blocks of B view rows, in its order: int64, at first that of x_strong."""
        anchor = self.anchor_blocks if self.anchor == "trained" else ()
        return np.array([0, *anchor, *self.strong_blocks])

    @property
    def pool_blocks(self) -> int:
        """Blocks of B rows in the mixup pool: K + 2 for ReMixMatch, 1 without unlabeled data."""
        return len(self.pool_views)

    @property
    def blocks(self) -> int:
        """Blocks of B view rows: of images to train on or to guess of, and the probes'."""
        return self.strong_blocks.stop + self.probes

    @cached_property
    def strongly_augmented(self) -> np.ndarray:
        """View rows whose images are strongly augmented, but for the probes: int64."""
        blocks = list(self.strong_blocks)
        if self.anchor_augment == "strong":
            blocks = [*self.anchor_blocks, *blocks]
        if self.labeled_augment == "strong":
            blocks = [0, *blocks]
        first = np.array(blocks, dtype=np.int64) * self.batch
        return (first[:, None] + np.arange(self.batch)).reshape(-1)


@dataclass(frozen=True)
class ViewPlan:
    """How each view row is made from its image; V rows.

    Attributes:
        image: (V,) int64, row of the labeled set for x blocks, of the unlabeled set for u blocks.
        labeled: (V,) bool, which of the two sets.
        shift: (V, 2) int32, weak translation (dy, dx) in pixels.
        flip: (V,) int32, 1 where the image is mirrored.
        ops: (V, 2) int32, indices into `ctaugment.TRANSFORMATIONS`, applied left to right.
        levels: (V, 2, 2) float32 in [0, 1), level of each parameter; 0 where there is none, but for the second of
            rotate under "code" (`ctaugment.code_effects`).
        center: (V, 2, 2) float32 in [0, 1), cutout's center (y, x) as a fraction of the sides.
    """

    image: np.ndarray
    labeled: np.ndarray
    shift: np.ndarray
    flip: np.ndarray
    ops: np.ndarray
    levels: np.ndarray
    center: np.ndarray

    def select(self, views: np.ndarray) -> ViewPlan:
        """The plan of some of the rows, in the order given."""
        # `take` moves rows whole, several times faster than an index does
        return ViewPlan(**{name: value.take(views, axis=0) for name, value in vars(self).items()})


def stack(plans: Sequence[ViewPlan]) -> ViewPlan:
    """The rows of several view plans, one after another; of one plan, itself."""
    if len(plans) == 1:
        return plans[0]
    return ViewPlan(**{f.name: np.concatenate([getattr(plan, f.name) for plan in plans]) for f in fields(ViewPlan)})


@dataclass(frozen=True)
class GlobalPlan:
    """Every random number of one step.

    Attributes:
        step: the step it is for.
        labeled: (B,) int64, rows of the labeled set.
        unlabeled: (mu B,) int64, rows of the unlabeled set; empty without unlabeled data.
        views: B * blocks view rows, in the order of the module's docstring.
        lam: (P,) float32 in [0.5, 1], one mixup coefficient a pool row; 1 without mixup.
        perm: (P,) int64, partner of each pool row; itself without mixup.
        rotations: (mu B,) int64, multiples of 90 degrees for the rotation task, each for a quarter of the images.
        probe_ops: (B, 2) int64, transformations of the probes, as drawn; none without probes.
        probe_bins: (B, 2, 2) int64, their bins, -1 where there is no such parameter; likewise.
    """

    step: int
    labeled: np.ndarray
    unlabeled: np.ndarray
    views: ViewPlan
    lam: np.ndarray
    perm: np.ndarray
    rotations: np.ndarray
    probe_ops: np.ndarray
    probe_bins: np.ndarray


class _NoSeed(np.random.SeedSequence):
    """Keeps Philox from asking the system for a seed, only to replace it by a key: two thirds of a stream's cost."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.zeros(n_words, dtype)


_NO_SEED = _NoSeed(0)
_UNUSED_STATE = np.random.Philox(_NO_SEED).state  # nothing buffered, at the beginning of a block


def stream(seed: int, purpose: int, position: int) -> np.random.Generator:
    """A generator that depends on nothing but its three arguments: Philox with key (seed, purpose).

    The position goes to the top word of Philox's counter, which no single step's draws can reach from below.
    """
    bits = np.random.Philox(_NO_SEED)
    bits.state = _UNUSED_STATE | {"state": {"counter": (0, 0, 0, position), "key": (seed, purpose)}}  # type: ignore[assignment]
    return np.random.Generator(bits)


def _epoch_order(seed: int, purpose: int, epoch: int, images: int) -> np.ndarray:
    return stream(seed, purpose, epoch).permutation(images)


# a cache a set: the short epochs of a few labels would push the unlabeled set's out of a common one
_ORDERS = {purpose: lru_cache(maxsize=4)(_epoch_order) for purpose in (_LABELED_ORDER, _UNLABELED_ORDER)}


def drawn_images(seed: int, purpose: int, step: int, batch: int, images: int) -> np.ndarray:
    """Rows of a data set for one step: epochs in a fresh random order each, cut into batches without gaps.

    Returns:
        (batch,) int64; over any whole epoch every image comes exactly once.
    """
    position, end = step * batch, (step + 1) * batch
    parts = []
    while position < end:
        epoch, first = divmod(position, images)
        parts.append(_ORDERS[purpose](seed, purpose, epoch, images)[first : first + end - position])
        position += len(parts[-1])
    return np.concatenate(parts)


_LARGEST_LEVEL = np.nextafter(np.float32(1), np.float32(0))
_BINS_OR_ONE, _SEGMENTS_OR_ONE = np.maximum(ctaugment.BINS, 1), np.maximum(ctaugment.SEGMENTS, 1)
# probes draw from all bins alike, whatever the weights: that is how a dropped bin can come back
_UNIFORM_EDGES = ctaugment.bin_edges(ctaugment.bin_probabilities(ctaugment.initial_weights()))


def _draw_ops(
    rng: np.random.Generator, rows: int, edges: np.ndarray, counts: np.ndarray = _BINS_OR_ONE
) -> tuple[np.ndarray, ...]:
    """Two transformations a row, levels, cutout centers and bins: see `ViewPlan` and `GlobalPlan` for shapes.

    Args:
        rng: of one purpose and step.
        rows: how many.
        edges: of bins, or of the segments between them: see `ctaugment.bin_edges`.
        counts: (T, 2) int64, how many of them each parameter has, at least 1.
    """
    ops = rng.integers(len(ctaugment.TRANSFORMATIONS), size=(rows, OPS_PER_VIEW))
    uniform = rng.random((rows, OPS_PER_VIEW, ctaugment.MAX_PARAMETERS))
    bins = ctaugment.draw_bins(edges, ops, uniform)
    inside = rng.random(bins.shape)
    levels = np.where(bins >= 0, (bins + inside) / counts.take(ops, axis=0), 0.0).astype(np.float32)
    # float32 rounds the last sliver of the last bin up to 1, which would name a bin that does not exist
    np.minimum(levels, _LARGEST_LEVEL, out=levels)
    center = rng.random((rows, OPS_PER_VIEW, 2), dtype=np.float32)
    return ops, levels, center, bins


def make_plan(spec: PlanSpec, seed: int, step: int, weights: np.ndarray) -> GlobalPlan:
    """Draws one step: a pure function of its arguments.

    Args:
        spec: what to draw for.
        seed: the run's seed, at least 0.
        step: counted from 0.
        weights: (T, 2, 17) float64, CTAugment's bin weights (`ctaugment.initial_weights` for RandAugment).

    Returns:
        The step's plan, over the global batch: ranks execute rows of it and draw nothing themselves.
    """
    batch, rows = spec.batch, spec.batch * spec.blocks
    labeled = drawn_images(seed, _LABELED_ORDER, step, batch, spec.labeled_images)
    unlabeled = np.empty(0, dtype=np.int64)
    if spec.unlabeled_images:
        unlabeled = drawn_images(seed, _UNLABELED_ORDER, step, spec.mu * batch, spec.unlabeled_images)
    # the blocks x_strong and x_probe are labeled; what is between them, if anything, is not
    end = batch * spec.strong_blocks.stop
    image, is_labeled = np.empty(rows, dtype=np.int64), np.zeros(rows, dtype=bool)
    image[:batch] = labeled
    if spec.probes:
        image[end:] = labeled
    is_labeled[:batch] = is_labeled[end:] = True
    if spec.unlabeled_images:
        image[batch:end].reshape(-1, len(unlabeled))[:] = unlabeled

    weak = stream(seed, _WEAK, step)
    shift = weak.integers(-spec.max_shift, spec.max_shift, size=(rows, 2), dtype=np.int32, endpoint=True)
    flip = weak.integers(2, size=rows, dtype=np.int32) * np.int32(spec.flip)
    if spec.labeled_augment == "none":
        shift[:batch] = flip[:batch] = 0
    if spec.anchor_augment == "none":
        anchor = slice(batch, batch * spec.anchor_blocks.stop)
        shift[anchor] = flip[anchor] = 0

    ops = np.full((rows, OPS_PER_VIEW), ctaugment.IDENTITY, dtype=np.int32)
    levels = np.zeros((rows, OPS_PER_VIEW, ctaugment.MAX_PARAMETERS), dtype=np.float32)
    center = np.zeros((rows, OPS_PER_VIEW, 2), dtype=np.float32)
    if spec.augment:
        strong = spec.strongly_augmented
        probabilities, counts = ctaugment.bin_probabilities(weights), _BINS_OR_ONE
        if spec.ctaugment == "code":
            probabilities, counts = ctaugment.segment_probabilities(probabilities), _SEGMENTS_OR_ONE
        *drawn, _ = _draw_ops(stream(seed, _STRONG, step), len(strong), ctaugment.bin_edges(probabilities), counts)
        for of_views, of_strong in zip((ops, levels, center), drawn, strict=True):
            of_views[strong] = of_strong
    probes = batch if spec.probes else 0
    probe_ops, probe_levels, probe_center, probe_bins = _draw_ops(stream(seed, _PROBE, step), probes, _UNIFORM_EDGES)
    ops[end:], levels[end:], center[end:] = probe_ops, probe_levels, probe_center
    if spec.ctaugment == "code":
        probe_bins = ctaugment.code_probe_bins(probe_ops, probe_levels)
        ops, levels = ctaugment.code_effects(ops, levels, spec.side)

    mixup, pool = stream(seed, _MIXUP, step), batch * spec.pool_blocks
    lam, perm = np.ones(pool), np.arange(pool)
    if spec.mixup_alpha:
        lam, perm = mixup.beta(spec.mixup_alpha, spec.mixup_alpha, size=pool), mixup.permutation(pool)
    return GlobalPlan(
        step=step,
        labeled=labeled,
        unlabeled=unlabeled,
        views=ViewPlan(image, is_labeled, shift, flip, ops, levels, center),
        lam=np.maximum(lam, 1.0 - lam).astype(np.float32),
        perm=perm,
        rotations=stream(seed, _ROTATION, step).permutation(np.arange(spec.mu * batch) % 4),
        probe_ops=probe_ops,
        probe_bins=probe_bins,
    )


def rank_views(blocks: int, batch: int, rank: int, ranks: int) -> np.ndarray:
    """View rows that one rank executes: images r, r + R, ... of every block, block by block.

    Returns:
        (blocks * batch / ranks,) int64.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """
    if batch % ranks:
        raise ValueError(f"a global batch of {batch} cannot be shared by {ranks} ranks; take a multiple of {ranks}")
    images = np.arange(rank, batch, ranks)
    return (np.arange(blocks)[:, None] * batch + images).reshape(-1)
