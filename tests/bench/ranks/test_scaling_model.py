"""The scaling model: values by hand, limits and consistency."""

import math

import pytest

from bench.ranks.scaling_model import (
    Cluster,
    Collective,
    Link,
    Work,
    all_gather_seconds,
    all_reduce_seconds,
    fit_line,
    fit_link,
    predict,
)

LINK, SLOW = Link(1e9, 1e-5), Link(1e8, 1e-4)
NODE = Cluster(LINK)
NODES = Cluster(LINK, SLOW, ranks_per_node=4)
GRADIENTS = Collective("gradients", "all-reduce", 8_000_000)
VIEWS = Collective("views", "all-gather", bytes_per_image=1_000)


def test_a_ring_by_hand():
    # 4 ranks, 8 MB: a quarter per hop, 6 hops for an all-reduce and 3 for an all-gather.
    assert all_reduce_seconds(8e6, 4, NODE) == pytest.approx(6 * (2e6 / 1e9 + 1e-5))
    assert all_gather_seconds(8e6, 4, NODE) == pytest.approx(3 * (2e6 / 1e9 + 1e-5))
    assert all_reduce_seconds(8e6, 2, NODE) == pytest.approx(2 * (4e6 / 1e9 + 1e-5))


def test_nodes_by_hand():
    # 2 nodes of 4: each rank exchanges a quarter of the sum with its counterpart, in halves.
    within, between = 3 * (2e6 / 1e9 + 1e-5), 1e6 / 1e8 + 1e-4
    assert all_reduce_seconds(8e6, 8, NODES) == pytest.approx(2 * within + 2 * between)
    # 8 MB in 8 parts: one part comes from the counterpart, then each rank of the node has 2 parts.
    assert all_gather_seconds(8e6, 8, NODES) == pytest.approx(between + within)


@pytest.mark.parametrize("seconds", [all_reduce_seconds, all_gather_seconds])
def test_clusters_with_one_node_or_one_rank_per_node_are_a_single_ring(seconds):
    for ranks in (1, 2, 3, 4):
        assert seconds(8e6, ranks, NODES) == seconds(8e6, ranks, NODE)
    for ranks in (2, 5):
        single = Cluster(LINK, SLOW, ranks_per_node=1)
        assert seconds(8e6, ranks, single) == pytest.approx(seconds(8e6, ranks, Cluster(SLOW)))


@pytest.mark.parametrize("seconds", [all_reduce_seconds, all_gather_seconds])
def test_limits(seconds):
    rounds = 2 if seconds is all_reduce_seconds else 1
    assert seconds(8e6, 1, NODES) == 0
    assert seconds(0, 8, NODE) == pytest.approx(rounds * 7 * 1e-5)  # Latency only.
    assert seconds(1e15, 1000, NODE) == pytest.approx(rounds * 1e6, rel=2e-3)  # Bandwidth only, for any R.
    for cluster, steps in ((NODE, range(1, 9)), (NODES, (1, 2, 3, 4, 8, 12, 64))):
        times = [seconds(8e6, ranks, cluster) for ranks in steps]
        assert times == sorted(times)
    assert seconds(9e6, 8, NODES) > seconds(8e6, 8, NODES)
    assert seconds(8e6, 8, Cluster(LINK, LINK, 4)) < seconds(8e6, 8, NODES)


def test_one_rank_has_no_communication():
    work = Work(2e-3, 1e-4, GRADIENTS, (VIEWS,))
    one = predict(work, NODES, 1, 64, base=64)
    assert one.seconds == one.compute == pytest.approx(2e-3 + 64e-4)
    assert one.gradients == one.others == 0 and one.efficiency == pytest.approx(1)


def test_weak_and_strong_scaling_by_hand():
    work = Work(2e-3, 1e-4, GRADIENTS, (VIEWS,))
    weak, strong = predict(work, NODE, 2, 128, base=64), predict(work, NODE, 2, 64, base=64)
    gradients = 2 * (4e6 / 1e9 + 1e-5)
    assert weak.compute == pytest.approx(8.4e-3) and strong.compute == pytest.approx(5.2e-3)
    assert weak.gradients == strong.gradients == pytest.approx(gradients)
    assert weak.others == pytest.approx(64_000 / 1e9 + 1e-5) and strong.others == pytest.approx(32_000 / 1e9 + 1e-5)
    assert weak.seconds == pytest.approx(8.4e-3 + gradients + weak.others)
    assert weak.efficiency == pytest.approx(8.4e-3 / weak.seconds)
    assert strong.efficiency == pytest.approx(8.4e-3 / (2 * strong.seconds))


def test_overlap_is_limited_by_gradients_and_compute():
    def seconds(overlap, fixed=1.0):
        return predict(Work(fixed, 0.0, GRADIENTS, overlap=overlap), NODE, 2, 2, base=1).seconds

    gradients = all_reduce_seconds(8e6, 2, NODE)
    assert seconds(0) == pytest.approx(1 + gradients) and seconds(0.5) == pytest.approx(1 + gradients / 2)
    assert seconds(1) == pytest.approx(1)
    assert seconds(1, fixed=1e-3) == pytest.approx(gradients)


def test_efficiency_falls_with_ranks_unless_communication_is_free():
    work = Work(2e-3, 1e-4, GRADIENTS, (VIEWS,), overlap=0.3)
    for batch in (lambda ranks: 64 * ranks, lambda ranks: 64):
        efficiencies = [predict(work, NODES, ranks, batch(ranks), base=64).efficiency for ranks in (1, 2, 4, 8, 16, 64)]
        assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[-1] > 0
    free = Cluster(Link(math.inf, 0.0))
    assert predict(work, free, 8, 512, base=64).efficiency == pytest.approx(1)
    assert predict(work, free, 8, 64, base=64).efficiency == pytest.approx(8.4e-3 / (8 * 2.8e-3))


def test_invalid_arguments():
    with pytest.raises(ValueError, match="6 ranks do not fill nodes of 4"):
        all_reduce_seconds(1, 6, NODES)
    with pytest.raises(ValueError, match="8 ranks need several nodes of 4, but there is no link between nodes"):
        all_reduce_seconds(1, 8, Cluster(LINK, ranks_per_node=4))
    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        all_gather_seconds(1, 0, NODE)
    with pytest.raises(ValueError, match="batch 64 is not divisible by 3 ranks"):
        predict(Work(0, 1, GRADIENTS), NODE, 3, 64, base=64)


def test_fits_recover_exact_parameters():
    sizes, ranks = [4096, 2**20, 2**23, 4096, 2**20], [2, 2, 2, 4, 4]
    fitted = fit_link(sizes, ranks, [all_reduce_seconds(*each, NODE) for each in zip(sizes, ranks, strict=True)])
    assert fitted.bytes_per_second == pytest.approx(1e9) and fitted.latency == pytest.approx(1e-5)
    assert fit_line([8, 16, 64], [3.0, 4.0, 10.0]) == pytest.approx((2.0, 0.125))


def test_fits_are_nonnegative():
    start, slope = fit_line([8, 16], [1.0, 4.0])
    assert start == 0 and 0.125 < slope < 0.25
    assert fit_line([8], [1.0]) == (0, 0.125)
    start, slope = fit_line([8, 16], [4.0, 3.0])
    assert slope == 0 and 3 < start < 4
    assert fit_link([1000, 2000], [2, 2], [2e-3, 1e-3]).bytes_per_second == math.inf
