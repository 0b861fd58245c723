"""The CTAugment policy against the formulas of the paper."""

import numpy as np
import pytest

from pipelines import ctaugment
from pipelines.ctaugment import (
    CTAugmentPolicy,
    bin_edges,
    bin_probabilities,
    draw_bins,
    initial_weights,
    update_weights,
)

ROTATE, POSTERIZE, RESCALE = (ctaugment.NAMES.index(n) for n in ("rotate", "posterize", "rescale"))


def test_there_are_eighteen_transformations_and_the_identity():
    assert len(set(ctaugment.NAMES)) == 19
    assert [t.bins for t in ctaugment.TRANSFORMATIONS].count((17,)) == 16
    assert ctaugment.TRANSFORMATIONS[POSTERIZE].bins == (8,)
    assert ctaugment.TRANSFORMATIONS[RESCALE].bins == (17, 6)
    assert ctaugment.TRANSFORMATIONS[ctaugment.IDENTITY].bins == ()


def test_all_weights_start_at_one():
    weights = initial_weights()
    assert weights.sum() == 16 * 17 + 8 + 17 + 6
    assert set(np.unique(weights)) == {0.0, 1.0}


def test_initial_probabilities_are_uniform_over_existing_bins():
    probabilities = bin_probabilities(initial_weights())
    np.testing.assert_allclose(probabilities[ROTATE, 0], 1 / 17)
    np.testing.assert_allclose(probabilities[POSTERIZE, 0, :8], 1 / 8)
    assert not probabilities[POSTERIZE, 0, 8:].any() and not probabilities[POSTERIZE, 1].any()
    np.testing.assert_allclose(probabilities[RESCALE, 1, :6], 1 / 6)
    assert not probabilities[ctaugment.IDENTITY].any()


def test_bins_below_eight_tenths_of_the_maximum_are_dropped():
    weights = initial_weights()
    # m^ = (m + 0.01) / (1 + 0.01)
    weights[ROTATE, 0, 0] = 0.8 * 1.01 - 0.01 - 1e-9  # Just below.
    weights[ROTATE, 0, 1] = 0.8 * 1.01 - 0.01 + 1e-9  # Just above.
    weights[ROTATE, 0, 2] = 0.9
    p = bin_probabilities(weights)[ROTATE, 0]
    kept = np.array([0.0, 0.8, 0.91 / 1.01] + [1.0] * 14)
    np.testing.assert_allclose(p, kept / kept.sum(), atol=1e-8)


def test_draws_follow_the_probabilities():
    weights = initial_weights()
    weights[ROTATE, 0, [0, 16]] = 0.1
    weights[ROTATE, 0, 5] = 0.85
    probabilities = bin_probabilities(weights)
    uniform = np.random.default_rng(0).random((200_000, 2))
    bins = draw_bins(bin_edges(probabilities), np.full(200_000, ROTATE), uniform)
    assert (bins[:, 1] == -1).all()
    frequency = np.bincount(bins[:, 0], minlength=17) / 200_000
    assert frequency[0] == frequency[16] == 0
    np.testing.assert_allclose(frequency, probabilities[ROTATE, 0], atol=0.003)


def test_the_ends_of_the_unit_interval_draw_existing_bins():
    edges = bin_edges(bin_probabilities(initial_weights()))
    ends = np.array([[0.0, 0.0], [np.nextafter(1, 0)] * 2])
    for op, transformation in enumerate(ctaugment.TRANSFORMATIONS):
        bins = draw_bins(edges, np.array([op, op]), ends)
        for parameter in range(2):
            if parameter < len(transformation.bins):
                assert bins[:, parameter].tolist() == [0, transformation.bins[parameter] - 1]
            else:
                assert bins[:, parameter].tolist() == [-1, -1]


def test_the_lower_edge_belongs_to_the_bin():
    weights = initial_weights()
    weights[ROTATE, 0, [0, 4, 5, 16]] = 0.1  # Never drawn: the first, the last, and two neighbors.
    probabilities = bin_probabilities(weights)[ROTATE, 0]
    edges = np.cumsum(probabilities)[:-1]
    kept = [chosen for chosen in range(17) if probabilities[chosen]]
    ops = np.full(len(kept), ROTATE)
    for shift, expected in ((0.0, kept), (-1e-12, [kept[0], *kept[:-1]])):
        numbers = np.array([0.0, *edges[[chosen - 1 for chosen in kept[1:]]] + shift])
        bins = draw_bins(bin_edges(bin_probabilities(weights)), ops, np.stack([numbers, numbers], axis=-1))
        assert bins[:, 0].tolist() == expected and bins.dtype == np.int64
    # Every number in [0, 1) maps to a kept bin, even if the sum of probabilities is rounded down.
    assert np.isinf(bin_edges(bin_probabilities(weights))[16, ROTATE, 0])


def test_update_changes_only_used_bins_in_order():
    ops = np.array([[ROTATE, RESCALE], [ctaugment.IDENTITY, ROTATE]])
    bins = np.array([[[3, -1], [2, 5]], [[-1, -1], [3, -1]]])
    before = initial_weights()
    after = update_weights(before, ops, bins, np.array([0.2, 0.6], np.float32))
    assert (before == initial_weights()).all()
    once = 0.99 * 1 + 0.01 * np.float32(0.2)
    assert after[ROTATE, 0, 3] == pytest.approx(0.99 * once + 0.01 * np.float32(0.6))
    assert after[RESCALE, 0, 2] == after[RESCALE, 1, 5] == pytest.approx(once)
    assert (after != before).sum() == 3


def probes(step):
    return dict(
        step=step,
        ops=np.array([[ROTATE, ctaugment.IDENTITY]]),
        bins=np.array([[[step % 17, -1], [-1, -1]]]),
        omega=np.array([0.5], np.float32),
    )


def random_probes(step, batch=6):
    rng = np.random.default_rng(step)
    ops = rng.integers(len(ctaugment.NAMES), size=(batch, 2))
    bins = (rng.random((batch, 2, 2)) * ctaugment.BINS[ops]).astype(int)
    omega = rng.random(batch, dtype=np.float32)
    return dict(step=step, ops=ops, bins=np.where(ctaugment.BINS[ops] > 0, bins, -1), omega=omega)


def slow_weights(until):
    """Return the weights after the probes of all steps before `until`, computed one number at a time."""
    weights = initial_weights()
    for step in range(until):
        given = random_probes(step)
        for probe, match in enumerate(given["omega"]):
            for stage, parameter in np.ndindex(2, 2):
                chosen = given["bins"][probe, stage, parameter]
                if chosen >= 0:
                    cell = given["ops"][probe, stage], parameter, chosen
                    weights[cell] = 0.99 * float(weights[cell]) + (1 - 0.99) * float(match)
    return weights


@pytest.mark.parametrize("lag", [1, 3, 8])
def test_weights_include_exactly_the_probes_up_to_the_lag(lag):
    policy = CTAugmentPolicy(lag)
    for step in range(12):
        policy.observe(**random_probes(step))
        for planned in (*range(step + lag, step, -1), step + 1, step + lag, step + lag + 5):
            expected = slow_weights(min(planned - lag, step) + 1)
            assert policy.weights_for(planned).tobytes() == expected.tobytes(), (step, planned)
        # A checkpoint contains the weights for the next plan, and the later probes unchanged.
        state = policy.state_dict()
        assert state.keys() == {"weights", "waiting"}
        assert state["weights"].tobytes() == slow_weights(max(step + 2 - lag, 0)).tobytes()
        assert [set(probes) for probes in state["waiting"]] == [{"step", "ops", "bins", "omega"}] * len(policy.waiting)
        assert [probes["step"] for probes in state["waiting"]] == list(range(max(step + 2 - lag, 0), step + 1))
        if step % 4 == 3:
            policy = CTAugmentPolicy(lag)
            policy.observe(**random_probes(99))  # Loading must discard the previous state.
            policy.load_state_dict(state)


def test_each_probe_is_applied_once(monkeypatch):
    applied = []

    def counting(weights, ops, bins, omega):
        applied.append(omega)
        return update_weights(weights, ops, bins, omega)

    monkeypatch.setattr(ctaugment, "update_weights", counting)
    policy = CTAugmentPolicy(lag=8)
    for step in range(20):
        policy.observe(**random_probes(step))
        for planned in range(step + 1, step + 9):
            policy.weights_for(planned)
    assert len(applied) == 20


def test_a_probe_takes_effect_after_lag_steps():
    policy = CTAugmentPolicy(lag=3)
    for step in range(6):
        policy.observe(**probes(step))
        for planned in range(step + 1, step + 4):  # Plans that can be made by now.
            moved = (policy.weights_for(planned)[ROTATE, 0] < 1).sum()
            assert moved == max(0, planned - 3 + 1)


def test_a_restored_policy_continues_identically():
    policy, resumed = CTAugmentPolicy(lag=4), CTAugmentPolicy(lag=4)
    for step in range(7):
        policy.observe(**probes(step))
        policy.weights_for(step + 3)  # Planning ahead must have no side effects.
    resumed.load_state_dict(policy.state_dict())
    for step in range(7, 12):
        for one in (policy, resumed):
            one.observe(**probes(step))
        np.testing.assert_array_equal(policy.weights_for(step + 2), resumed.weights_for(step + 2))
    assert len(policy.waiting) == 3


def test_without_learning_weights_stay_uniform():
    policy = CTAugmentPolicy(lag=1, learn=False)
    policy.observe(**probes(0))
    np.testing.assert_array_equal(policy.weights_for(9), initial_weights())


def test_lag_below_one_raises():
    with pytest.raises(ValueError, match="at least 1"):
        CTAugmentPolicy(lag=0)


def test_descriptions_name_transformations_and_levels():
    levels = np.array([[0.5, 0.0], [0.25, 0.75]])
    assert ctaugment.describe([ROTATE, RESCALE], levels) == "rotate 0.50, rescale 0.25 0.75"
    assert ctaugment.describe([ctaugment.IDENTITY], levels[:1]) == "identity"
