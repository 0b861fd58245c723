"""Analytic model of a training step on many ranks, based on its cost on one.

The time of a step is a rank's compute time for its share of the batch plus the time of the collectives: bytes over
bandwidth plus a latency per hop, with rings within and between nodes. The model is a best case. It ignores contention
(cores, memory, switches) and waiting for the slowest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Link:
    """Link from a rank to its neighbor.

    Attributes:
        bytes_per_second: Bandwidth per direction, with both directions in use.
        latency: Seconds per hop, software overhead included.
    """

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Topology of the ranks.

    Attributes:
        within: Link between ranks of a node.
        between: Link between nodes: the share of one rank when all ranks of a node use it.
        ranks_per_node: Ranks per node; None for a single node.
    """

    within: Link
    between: Link | None = None
    ranks_per_node: int | None = None

    def split(self, ranks: int) -> tuple[int, int]:
        """Return the number of ranks per node and the number of nodes.

        Raises:
            ValueError: The ranks do not fill their nodes, or there is no link between nodes.
        """
        if ranks < 1:
            raise ValueError(f"there must be at least 1 rank, got {ranks}")
        if self.ranks_per_node is None or ranks <= self.ranks_per_node:
            return ranks, 1
        if ranks % self.ranks_per_node:
            raise ValueError(f"{ranks} ranks do not fill nodes of {self.ranks_per_node}")
        if self.between is None:
            raise ValueError(
                f"{ranks} ranks need several nodes of {self.ranks_per_node}, but there is no link between nodes"
            )
        return self.ranks_per_node, ranks // self.ranks_per_node


def _ring(size: float, ranks: int, link: Link) -> float:
    """Return the seconds of one round of a ring: `size` bytes in R parts, each forwarded R - 1 times."""
    return (ranks - 1) / ranks * size / link.bytes_per_second + (ranks - 1) * link.latency


def all_reduce_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Return the time of an all-reduce of `size` bytes per rank: a reduce-scatter and an all-gather of equal cost."""
    return 2 * all_gather_seconds(size, ranks, cluster)


def all_gather_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Return the time of an all-gather.

    In one node it is one round of a ring: (R - 1) / R of the bytes over bandwidth, plus R - 1 latencies. With several
    nodes each rank first gathers from its counterparts in the other nodes, then the ranks of a node from one another.

    Args:
        size: Bytes that every rank has at the end.
        ranks: Number of ranks R.
        cluster: Topology of the ranks.
    """
    local, nodes = cluster.split(ranks)
    seconds = _ring(size, local, cluster.within)
    if cluster.between and nodes > 1:
        seconds += _ring(size / local, nodes, cluster.between)
    return seconds


@dataclass(frozen=True)
class Collective:
    """A collective that runs once per step.

    Attributes:
        name: Name of the data.
        kind: "all-reduce" or "all-gather".
        fixed_bytes: Bytes that do not depend on the batch.
        bytes_per_image: Bytes per image of the global batch B; for an all-gather, the total of all ranks.
    """

    name: str
    kind: Literal["all-reduce", "all-gather"]
    fixed_bytes: int = 0
    bytes_per_image: int = 0

    def bytes(self, batch: int) -> int:
        """Return its size at a global batch B."""
        return self.fixed_bytes + self.bytes_per_image * batch

    def seconds(self, batch: int, ranks: int, cluster: Cluster) -> float:
        """Return its time at a global batch B."""
        time = all_reduce_seconds if self.kind == "all-reduce" else all_gather_seconds
        return time(self.bytes(batch), ranks, cluster)


@dataclass(frozen=True)
class Work:
    """Cost of a step.

    Attributes:
        fixed: Seconds of a rank's step that do not depend on its batch.
        per_image: Seconds for each of its B / R images, with all of the image's views.
        gradients: The all-reduce of the gradients.
        others: The other collectives; none of them overlaps with compute.
        overlap: Fraction of the gradient all-reduce that overlaps with the backward pass, 0 to 1.
    """

    fixed: float
    per_image: float
    gradients: Collective
    others: tuple[Collective, ...] = ()
    overlap: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step.

    Attributes:
        compute: Compute time of a rank.
        gradients: Time of the gradient all-reduce, overlap included.
        others: Time of the other collectives.
        seconds: Time of the whole step, with only the part of `gradients` that does not overlap.
        efficiency: Images per second and rank, relative to one rank that trains `base` images per step.
    """

    compute: float
    gradients: float
    others: float
    seconds: float
    efficiency: float


def predict(work: Work, cluster: Cluster, ranks: int, batch: int, base: int) -> Prediction:
    """Predict the time of a step.

    Args:
        work: Cost of the step.
        cluster: Topology of the ranks.
        ranks: Number of ranks R; must divide `batch`.
        batch: Global batch B. Weak scaling is batch = base * ranks, strong scaling batch = base.
        base: B of the single rank that efficiency is relative to.

    Raises:
        ValueError: The ranks do not fill their nodes, or do not divide the batch.
    """
    if batch % ranks:
        raise ValueError(f"batch {batch} is not divisible by {ranks} ranks")
    compute = work.fixed + work.per_image * batch / ranks
    gradients = work.gradients.seconds(batch, ranks, cluster)
    others = sum(each.seconds(batch, ranks, cluster) for each in work.others)
    hidden = min(work.overlap * gradients, compute)
    seconds = compute + gradients - hidden + others
    one = work.fixed + work.per_image * base
    return Prediction(compute, gradients, others, seconds, (batch / seconds) / (ranks * base / one))


# Assumed effective rates, below the nominal ones; not measured.
_NVLINK = Link(0.8 * 450e9, 2e-6)
ASSUMED_CLUSTERS = {
    "8 GPUs, NVLink": (8, Cluster(_NVLINK)),
    "64 GPUs, NVLink and 400 Gb/s per GPU": (64, Cluster(_NVLINK, Link(0.9 * 50e9, 5e-6), 8)),
    "64 GPUs, NVLink and 100 Gb/s per node": (64, Cluster(_NVLINK, Link(0.9 * 12.5e9 / 8, 2e-5), 8)),
}
ASSUMPTIONS = """\
  NVLink 4: 80 % of the nominal 450 GB/s per direction; 2 us per hop
  400 Gb/s InfiniBand per GPU: 90 % of the nominal 50 GB/s; 5 us per hop
  100 Gb/s per node: 90 % of the nominal 12.5 GB/s, shared by 8 GPUs; 20 us per hop
  rings within and between nodes; NCCL may use trees or in-switch reductions, which have fewer hops
  no overlap, although the first of two gradient buckets can overlap with backward; no waiting for slower ranks
  views are made as fast as they are used, as on one GPU"""


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Fit a line with nonnegative intercept and slope, minimizing the squared errors relative to each y > 0.

    If all x are equal, the line passes through the origin.

    Returns:
        Intercept and slope.
    """
    return _fit(np.full(len(x), float(len(set(x)) > 1)), np.asarray(x), np.asarray(y))


def fit_link(sizes: Sequence[int], ranks: Sequence[int], seconds: Sequence[float]) -> Link:
    """Fit a link to measured all-reduces within a node, minimizing the squared relative errors.

    Args:
        sizes: Bytes of each all-reduce.
        ranks: Ranks of each all-reduce, at least 2.
        seconds: Measured time of each all-reduce.
    """
    r = np.asarray(ranks)
    latency, per_byte = _fit(2 * (r - 1), 2 * (r - 1) / r * np.asarray(sizes), np.asarray(seconds))
    return Link(1 / per_byte if per_byte else np.inf, latency)


def _fit(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Solve for p, q >= 0 that minimize the squared errors of (p a + q b) / y = 1."""
    columns = np.stack([a / y, b / y], axis=1)
    scale = np.linalg.norm(columns, axis=0).clip(min=np.finfo(float).tiny)  # Bytes and latencies differ in magnitude.
    p, q = (nnls(columns / scale, np.ones(len(y)))[0] / scale).tolist()
    return p, q
