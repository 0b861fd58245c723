"""What a training step should cost on many ranks, from what it costs on one: arithmetic only, nothing is measured here.

Every rank computes its share as one rank would, and the collectives come on top: bytes over bandwidth, and a latency
for each time that data are passed on. Rings within a node and between nodes. The model knows nothing of ranks that get
in one another's way (cores, memory, switches) or that wait for the slowest of them, so it is a best case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Link:
    """How a rank reaches its neighbour.

    Attributes:
        bytes_per_second: that it can send while it receives as many.
        latency: seconds from one rank to the next, with what software adds.
    """

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Where ranks run.

    Attributes:
        within: the link of ranks of one node.
        between: the link of two nodes, as each rank of a node has it when all of them use it at once.
        ranks_per_node: ranks that share a node; None where there is but one node.
    """

    within: Link
    between: Link | None = None
    ranks_per_node: int | None = None

    def split(self, ranks: int) -> tuple[int, int]:
        """Ranks in a node, and nodes.

        Raises:
            ValueError: the ranks do not fill their nodes, or there is no link between nodes.
        """
        if ranks < 1:
            raise ValueError(f"there must be at least 1 rank, got {ranks}")
        if self.ranks_per_node is None or ranks <= self.ranks_per_node:
            return ranks, 1
        if ranks % self.ranks_per_node:
            raise ValueError(f"{ranks} ranks do not fill nodes of {self.ranks_per_node}")
        if self.between is None:
            raise ValueError(f"{ranks} ranks need several nodes of {self.ranks_per_node}, and a link between them")
        return self.ranks_per_node, ranks // self.ranks_per_node


def _ring(size: float, ranks: int, link: Link) -> float:
    """Seconds of one way round a ring: `size` bytes are in R parts, each passed on R - 1 times."""
    return (ranks - 1) / ranks * size / link.bytes_per_second + (ranks - 1) * link.latency


def all_reduce_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Time of an all-reduce of `size` bytes of every rank: once round all rings to add up, once more to gather."""
    return 2 * all_gather_seconds(size, ranks, cluster)


def all_gather_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Time of an all-gather.

    In one node a ring once round, (R - 1) / R bytes over bandwidth and R - 1 latencies. With several nodes: each rank
    gathers from its counterparts in the other nodes, and then the node's ranks from one another.

    Args:
        size: bytes that every rank holds in the end.
        ranks: R.
        cluster: where they run.
    """
    local, nodes = cluster.split(ranks)
    seconds = _ring(size, local, cluster.within)
    if cluster.between and nodes > 1:
        seconds += _ring(size / local, nodes, cluster.between)
    return seconds


@dataclass(frozen=True)
class Collective:
    """A collective that every step runs once.

    Attributes:
        name: what it moves.
        kind: "all-reduce" or "all-gather".
        fixed_bytes: its size whatever the batch.
        bytes_per_image: its size for each of the B images of the global batch; gathered bytes are those of all ranks.
    """

    name: str
    kind: Literal["all-reduce", "all-gather"]
    fixed_bytes: int = 0
    bytes_per_image: int = 0

    def bytes(self, batch: int) -> int:
        """Its size at a global batch of B."""
        return self.fixed_bytes + self.bytes_per_image * batch

    def seconds(self, batch: int, ranks: int, cluster: Cluster) -> float:
        """Its time."""
        time = all_reduce_seconds if self.kind == "all-reduce" else all_gather_seconds
        return time(self.bytes(batch), ranks, cluster)


@dataclass(frozen=True)
class Work:
    """A step.

    Attributes:
        fixed: seconds of a rank's step that do not depend on its rows.
        per_image: seconds for each of its B / R images, with all the rows that belong to one.
        gradients: the all-reduce of the gradients.
        others: the other collectives, for each of which the device waits.
        overlap: share of the gradients' all-reduce behind which the backward pass goes on, 0 to 1.
    """

    fixed: float
    per_image: float
    gradients: Collective
    others: tuple[Collective, ...] = ()
    overlap: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """A step on some ranks, in seconds.

    Attributes:
        compute: what a rank computes.
        gradients: their all-reduce, with what overlaps.
        others: the other collectives.
        seconds: the whole step; of `gradients`, only what does not overlap is in it.
        efficiency: images a second and rank, against one rank that trains `base` images a step.
    """

    compute: float
    gradients: float
    others: float
    seconds: float
    efficiency: float


def predict(work: Work, cluster: Cluster, ranks: int, batch: int, base: int) -> Prediction:
    """The model.

    Args:
        work: the step.
        cluster: where it runs.
        ranks: R, divides `batch`.
        batch: B over all ranks. Weak scaling is batch = base * ranks, strong scaling batch = base.
        base: B of the one rank that efficiency is measured by.

    Raises:
        ValueError: ranks that do not fill nodes, or cannot share the batch.
    """
    if batch % ranks:
        raise ValueError(f"{ranks} ranks cannot share a batch of {batch}")
    compute = work.fixed + work.per_image * batch / ranks
    gradients = work.gradients.seconds(batch, ranks, cluster)
    others = sum(each.seconds(batch, ranks, cluster) for each in work.others)
    hidden = min(work.overlap * gradients, compute)
    seconds = compute + gradients - hidden + others
    one = work.fixed + work.per_image * base
    return Prediction(compute, gradients, others, seconds, (batch / seconds) / (ranks * base / one))


# GPUs that nobody has measured here. Effective rates: no collective reaches a nominal one
_NVLINK = Link(0.8 * 450e9, 2e-6)
ASSUMED_CLUSTERS = {
    "8 GPUs, NVLink": (8, Cluster(_NVLINK)),
    "64 GPUs, NVLink and 400 Gb/s a GPU": (64, Cluster(_NVLINK, Link(0.9 * 50e9, 5e-6), 8)),
    "64 GPUs, NVLink and 100 Gb/s a node": (64, Cluster(_NVLINK, Link(0.9 * 12.5e9 / 8, 2e-5), 8)),
}
ASSUMPTIONS = """\
  NVLink 4: 450 GB/s nominal a direction, 80 % of it; 2 us a hop
  400 Gb/s InfiniBand a GPU: 50 GB/s nominal, 90 % of it; 5 us a hop
  100 Gb/s a node: 12.5 GB/s nominal for 8 GPUs together, 90 % of it; 20 us a hop
  rings within nodes and between them; NCCL may take trees or the switch's own sums, which have fewer hops
  nothing overlaps, though the first of two buckets of gradients may go while backward does; no rank waits for a slower
  one
  real views keep up, as they do on one GPU"""


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Start and slope, neither below zero, of a line that is off by as little as possible relative to each y > 0.

    One x gives a line through the origin.
    """
    return _fit(np.full(len(x), float(len(set(x)) > 1)), np.asarray(x), np.asarray(y))


def fit_link(sizes: Sequence[int], ranks: Sequence[int], seconds: Sequence[float]) -> Link:
    """The link that explains measured all-reduces of one node best, relative to each time.

    Args:
        sizes: bytes of each.
        ranks: of each, at least 2.
        seconds: measured.
    """
    r = np.asarray(ranks)
    latency, per_byte = _fit(2 * (r - 1), 2 * (r - 1) / r * np.asarray(sizes), np.asarray(seconds))
    return Link(1 / per_byte if per_byte else np.inf, latency)


def _fit(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least squares of (p a + q b) / y against 1 with p, q >= 0."""
    columns = np.stack([a / y, b / y], axis=1)
    scale = np.linalg.norm(columns, axis=0).clip(min=np.finfo(float).tiny)  # Bytes and latencies are far apart.
    p, q = (nnls(columns / scale, np.ones(len(y)))[0] / scale).tolist()
    return p, q
