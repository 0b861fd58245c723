"""The plan of a training step: all its random numbers as arrays, a function of (seed, step, CTAugment weights).

Random numbers come from counter-based Philox streams, keyed by seed and purpose and positioned at the step. There is no
generator state: step 70 000 can be planned without the 69 999 before it, on any number of ranks, with the same result.

The views of a step are numbered in blocks. With B labeled images, mu B unlabeled images and K strong views:

    x_strong | u_weak | u_1 | ... | u_K | x_probe

The first K + 2 blocks are the mixup pool (ReMixMatch, algorithm 1). The probes x_probe exist only if CTAugment learns.
AdaMatch trains on two views of every labeled image: a block x_weak then follows x_strong.
Methods without augmentation anchoring have no u_weak; others use it only for pseudo-labels, outside the pool. Without
unlabeled data (`unlabeled_images=0`) only x_strong and x_probe remain. A block of mu B unlabeled images consists of mu
consecutive blocks of B, so that all blocks are split across ranks in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from pipelines import ctaugment

# One Philox stream per purpose, so that draws from one stream never affect another.
_LABELED_ORDER, _UNLABELED_ORDER, _WEAK, _STRONG, _PROBE, _MIXUP, _ROTATION, _INTERPOLATION = range(8)
OPS_PER_VIEW = 2


@dataclass(frozen=True)
class PlanSpec:
    """Parameters of the plans, the same for every step of a run.

    Attributes:
        batch: B, labeled images per step over all ranks.
        k: K, strong views per unlabeled image; at least 1.
        labeled_images: Size of the labeled set.
        unlabeled_images: Size of the unlabeled set; 0 to train on labeled images only.
        max_shift: Largest weak translation along each axis, in pixels.
        flip: Whether weak views may be mirrored.
        augment: If False, strong views get only the weak augmentation.
        mixup_alpha: Both parameters of mixup's Beta distribution; 0 disables mixup.
        mu: Unlabeled images per step, in units of B.
        anchor: Whether u_weak is in the mixup pool, used only for pseudo-labels, or absent.
        anchor_augment: Augmentation of u_weak, from which the pseudo-label is computed.
        labeled_augment: Augmentation of x_strong; "both" adds the block x_weak.
        probes: Whether the plan has probes for CTAugment.
        ctaugment: "paper", or "code" for levels and effects as in the authors' code; see `pipelines.ctaugment`.
        side: min(H, W) of the images; used by cutout if `ctaugment` is "code".
        interpolated_classes: L if logits of the labeled views are interpolated at random, else 0.
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
    labeled_augment: Literal["strong", "weak", "none", "both"] = "strong"
    probes: bool = True
    ctaugment: Literal["paper", "code"] = "paper"
    side: int = 32
    interpolated_classes: int = 0

    @cached_property
    def labeled_blocks(self) -> range:
        """Blocks of the labeled images: x_strong, or x_strong and x_weak."""
        return range(1 + (self.labeled_augment == "both"))

    @cached_property
    def anchor_blocks(self) -> range:
        """Blocks of u_weak: mu of them, or none."""
        first = self.labeled_blocks.stop
        return range(first, first + self.mu if self.unlabeled_images and self.anchor != "none" else first)

    @cached_property
    def strong_blocks(self) -> range:
        """Blocks of u_1 to u_K: K mu of them, or none without unlabeled data."""
        first = self.anchor_blocks.stop
        return range(first, first + self.k * self.mu if self.unlabeled_images else first)

    @cached_property
    def pool_views(self) -> np.ndarray:
        """Blocks of the mixup pool in its order, starting with x_strong: int64."""
        anchor = self.anchor_blocks if self.anchor == "trained" else ()
        return np.array([*self.labeled_blocks, *anchor, *self.strong_blocks])

    @property
    def pool_blocks(self) -> int:
        """Number of blocks in the mixup pool: K + 2 for ReMixMatch, 1 without unlabeled data."""
        return len(self.pool_views)

    @property
    def blocks(self) -> int:
        """Number of blocks of B views, including the probes."""
        return self.strong_blocks.stop + self.probes

    @cached_property
    def strongly_augmented(self) -> np.ndarray:
        """Indices of the strongly augmented views, without the probes: int64."""
        blocks = list(self.strong_blocks)
        if self.anchor_augment == "strong":
            blocks = [*self.anchor_blocks, *blocks]
        if self.labeled_augment in ("strong", "both"):
            blocks = [0, *blocks]
        first = np.array(blocks, dtype=np.int64) * self.batch
        return (first[:, None] + np.arange(self.batch)).reshape(-1)


@dataclass(frozen=True)
class ViewPlan:
    """Source image and augmentation of each of V views.

    Attributes:
        image: (V,) int64, index into the labeled set (x blocks) or the unlabeled set (u blocks).
        labeled: (V,) bool, whether `image` is an index into the labeled set.
        shift: (V, 2) int32, weak translation (dy, dx) in pixels.
        flip: (V,) int32, 1 if the image is mirrored.
        ops: (V, 2) int32, indices into `ctaugment.TRANSFORMATIONS`, applied in order.
        levels: (V, 2, 2) float32 in [0, 1), level of each parameter; 0 if there is none, except for the second level of
            rotate with "code" (`ctaugment.code_effects`).
        center: (V, 2, 2) float32 in [0, 1), center (y, x) of cutout as a fraction of the sides.
    """

    image: np.ndarray
    labeled: np.ndarray
    shift: np.ndarray
    flip: np.ndarray
    ops: np.ndarray
    levels: np.ndarray
    center: np.ndarray

    def select(self, views: np.ndarray) -> ViewPlan:
        """Return the plan of the given views, in the given order."""
        # `take` is several times faster than indexing.
        return ViewPlan(**{name: value.take(views, axis=0) for name, value in vars(self).items()})


def stack(plans: Sequence[ViewPlan]) -> ViewPlan:
    """Concatenate view plans; a single plan is returned as is."""
    if len(plans) == 1:
        return plans[0]
    return ViewPlan(**{f.name: np.concatenate([getattr(plan, f.name) for plan in plans]) for f in fields(ViewPlan)})


@dataclass(frozen=True)
class GlobalPlan:
    """All random numbers of one step, over the global batch. P is the size of the mixup pool.

    Attributes:
        step: Step that the plan is for.
        labeled: (B,) int64, indices into the labeled set.
        unlabeled: (mu B,) int64, indices into the unlabeled set; empty without unlabeled data.
        views: B * blocks views, in the order given in the module docstring.
        lam: (P,) float32 in [0.5, 1], mixup coefficient of each pool entry; 1 without mixup.
        perm: (P,) int64, mixup partner of each pool entry; the entry itself without mixup.
        rotations: (mu B,) int64, rotation of each image in multiples of 90 degrees; each occurs for a quarter of the
            images.
        probe_ops: (B, 2) int64, transformations of the probes as drawn; empty without probes.
        probe_bins: (B, 2, 2) int64, their bins, -1 without such a parameter; empty without probes.
        interpolation: (P_x, L) float32 in [0, 1), weights of the random logit interpolation for the P_x labeled views
            of the pool; (0, 0) without it.
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
    interpolation: np.ndarray


class _NoSeed(np.random.SeedSequence):
    """Seed sequence of zeros: avoids reading system entropy for a seed that is never used, 2/3 of a stream's cost."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.zeros(n_words, dtype)


_NO_SEED = _NoSeed(0)
_UNUSED_STATE = np.random.Philox(_NO_SEED).state  # Empty buffer, start of a block.


def stream(seed: int, purpose: int, position: int) -> np.random.Generator:
    """Return a Philox generator with key (seed, purpose), starting at `position`.

    The position is the top word of Philox's counter, so the draws of one position never overlap those of the next.
    """
    bits = np.random.Philox(_NO_SEED)
    bits.state = _UNUSED_STATE | {"state": {"counter": (0, 0, 0, position), "key": (seed, purpose)}}  # type: ignore[assignment]
    return np.random.Generator(bits)


def _epoch_order(seed: int, purpose: int, epoch: int, images: int) -> np.ndarray:
    return stream(seed, purpose, epoch).permutation(images)


# One cache per set: in a shared cache, the many short epochs of a small labeled set would evict the unlabeled set's.
_ORDERS = {purpose: lru_cache(maxsize=4)(_epoch_order) for purpose in (_LABELED_ORDER, _UNLABELED_ORDER)}


def drawn_images(seed: int, purpose: int, step: int, batch: int, images: int) -> np.ndarray:
    """Return the images of one step. Each epoch has a new random order; batches may span epochs.

    Returns:
        (batch,) int64 indices; every image occurs exactly once per epoch.
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
# Probes draw uniformly from all bins, independent of the weights, so that a dropped bin can recover.
_UNIFORM_EDGES = ctaugment.bin_edges(ctaugment.bin_probabilities(ctaugment.initial_weights()))


def _draw_ops(
    rng: np.random.Generator, views: int, edges: np.ndarray, counts: np.ndarray = _BINS_OR_ONE
) -> tuple[np.ndarray, ...]:
    """Draw two transformations per view. See `ViewPlan` and `GlobalPlan` for shapes.

    Args:
        rng: Generator of one purpose and step.
        views: Number of views.
        edges: Edges of bins, or of the segments between them, from `ctaugment.bin_edges`.
        counts: (T, 2) int64, number of bins or segments of each parameter, at least 1.

    Returns:
        Transformations, levels, cutout centers, and bins or segments.
    """
    ops = rng.integers(len(ctaugment.TRANSFORMATIONS), size=(views, OPS_PER_VIEW))
    uniform = rng.random((views, OPS_PER_VIEW, ctaugment.MAX_PARAMETERS))
    bins = ctaugment.draw_bins(edges, ops, uniform)
    inside = rng.random(bins.shape)
    levels = np.where(bins >= 0, (bins + inside) / counts.take(ops, axis=0), 0.0).astype(np.float32)
    # float32 rounds levels just below 1 up to 1, which is past the last bin.
    np.minimum(levels, _LARGEST_LEVEL, out=levels)
    center = rng.random((views, OPS_PER_VIEW, 2), dtype=np.float32)
    return ops, levels, center, bins


def make_plan(spec: PlanSpec, seed: int, step: int, weights: np.ndarray) -> GlobalPlan:
    """Draw the plan of one step. A pure function of its arguments.

    Args:
        spec: Parameters of the plan.
        seed: Seed of the run, at least 0.
        step: Step, counted from 0.
        weights: (T, 2, 17) float64, CTAugment's bin weights (`ctaugment.initial_weights` for RandAugment).

    Returns:
        The plan over the global batch. Ranks execute their share of it and draw no random numbers themselves.
    """
    batch, count = spec.batch, spec.batch * spec.blocks
    labeled = drawn_images(seed, _LABELED_ORDER, step, batch, spec.labeled_images)
    unlabeled = np.empty(0, dtype=np.int64)
    if spec.unlabeled_images:
        unlabeled = drawn_images(seed, _UNLABELED_ORDER, step, spec.mu * batch, spec.unlabeled_images)
    # The first blocks (x_strong, x_weak) and the last (x_probe, if any) are labeled; the blocks in between are not.
    first, end = batch * spec.labeled_blocks.stop, batch * spec.strong_blocks.stop
    image, is_labeled = np.empty(count, dtype=np.int64), np.zeros(count, dtype=bool)
    image[:first].reshape(-1, batch)[:] = labeled
    if spec.probes:
        image[end:] = labeled
    is_labeled[:first] = is_labeled[end:] = True
    if spec.unlabeled_images:
        image[first:end].reshape(-1, len(unlabeled))[:] = unlabeled

    weak = stream(seed, _WEAK, step)
    shift = weak.integers(-spec.max_shift, spec.max_shift, size=(count, 2), dtype=np.int32, endpoint=True)
    flip = weak.integers(2, size=count, dtype=np.int32) * np.int32(spec.flip)
    if spec.labeled_augment == "none":
        shift[:batch] = flip[:batch] = 0
    if spec.anchor_augment == "none":
        anchor = slice(first, batch * spec.anchor_blocks.stop)
        shift[anchor] = flip[anchor] = 0

    ops = np.full((count, OPS_PER_VIEW), ctaugment.IDENTITY, dtype=np.int32)
    levels = np.zeros((count, OPS_PER_VIEW, ctaugment.MAX_PARAMETERS), dtype=np.float32)
    center = np.zeros((count, OPS_PER_VIEW, 2), dtype=np.float32)
    if spec.augment:
        strong = spec.strongly_augmented
        probabilities, counts = ctaugment.bin_probabilities(weights), _BINS_OR_ONE
        if spec.ctaugment == "code":
            probabilities, counts = ctaugment.segment_probabilities(probabilities), _SEGMENTS_OR_ONE
        *drawn, _ = _draw_ops(stream(seed, _STRONG, step), len(strong), ctaugment.bin_edges(probabilities), counts)
        for array, values in zip((ops, levels, center), drawn, strict=True):
            array[strong] = values
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
    interpolation = np.empty((0, 0), dtype=np.float32)
    if spec.interpolated_classes:
        shape = first, spec.interpolated_classes
        interpolation = stream(seed, _INTERPOLATION, step).random(shape, dtype=np.float32)
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
        interpolation=interpolation,
    )


def rank_views(blocks: int, batch: int, rank: int, ranks: int) -> np.ndarray:
    """Return the views of one rank: those of images r, r + R, ... in every block, block by block.

    Returns:
        (blocks * batch / ranks,) int64 view indices.

    Raises:
        ValueError: The batch is not divisible by the number of ranks.
    """
    if batch % ranks:
        raise ValueError(f"a global batch of {batch} cannot be split across {ranks} ranks; use a multiple of {ranks}")
    images = np.arange(rank, batch, ranks)
    return (np.arange(blocks)[:, None] * batch + images).reshape(-1)
