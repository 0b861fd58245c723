"""Passes that run concurrently with the training pass on a CPU. `test_gpu_*` and `test_modes` cover those on a GPU."""

import os
import threading
import time

import pytest
import torch
from threadpoolctl import threadpool_info

from engine.config.methods import METHODS, with_method
from engine.studies.reproduce import environments
from engine.training import ranges
from engine.training.concurrency import new_place, start
from engine.training.execution import Execution
from tests.engine.training.noise_training import CPU, NoiseTraining

STEPS = 3


def metrics_of(training):
    """Train a few steps and return their metrics and omega."""
    return [tensor for output in training.advance(STEPS) for tensor in (output.metrics, output.omega)]


def assert_same_steps(config, **options):
    both = [NoiseTraining(config, concurrent=concurrent, **options) for concurrent in (False, True)]
    for one, other in zip(*map(metrics_of, both), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(training.state.tensors() for training in both), strict=True):
        assert torch.equal(one, other)
    return both[1].step


@pytest.mark.parametrize("method", sorted(METHODS))
def test_concurrent_passes_change_no_bit(tiny, method):
    step = assert_same_steps(with_method(tiny(), method))
    makes_probes = step.config.augment == "ctaugment"
    assert (step.probe_place is not None) == makes_probes
    assert (step.guess_place is not None) == bool(step.pass_sizes[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 8},
        {"micro_batches": 2},
        {"micro_batches": 4, "k": 3},
        {"bn": "split"},
        {"bn_stats": "pool"},
        {"guess_pass": "joint"},
        {"guess_network": "ema"},
        {"precision": "fp64"},
    ],
    ids=str,
)
def test_concurrent_passes_of_other_configurations_change_no_bit(tiny, changes):
    precision = torch.float64 if changes.get("precision") == "fp64" else torch.float32
    assert_same_steps(tiny(**changes), precision=precision)


def test_parameters_are_averaged_after_the_probes(tiny):
    """The probes' pass is delayed, so averaging that does not wait for it changes omega."""
    # Without a separate guess, since it would wait for the probes in the same thread.
    expected, delayed = (NoiseTraining(tiny(guess_pass="joint"), concurrent=concurrent) for concurrent in (False, True))
    delayed.state.ema_model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    for one, other in zip(metrics_of(expected), metrics_of(delayed), strict=True):
        assert torch.equal(one, other)


def test_passes_share_no_thread_with_the_training_pass(tiny):
    training, threads = NoiseTraining(tiny(), concurrent=True), {}
    for name, model in (("f", training.state.network), ("f_ema", training.state.ema_model)):
        seen = threads[name] = set()
        model.register_forward_pre_hook(lambda *_, seen=seen: seen.add(threading.get_ident()))
    training.advance(STEPS)
    here = threading.get_ident()
    (other,) = threads["f_ema"]
    assert threads["f"] == {here, other}


@pytest.mark.parametrize(
    ("changes", "options", "guess", "probes"),
    [
        ({}, {}, True, True),
        ({"bn": "sync"}, {}, False, True),
        ({"augment": "randaugment"}, {}, True, False),
        ({}, {"precision": torch.bfloat16}, False, False),
        ({}, {"compiled": True}, False, False),
        ({"network": "timm:resnet18"}, {}, False, True),
    ],
    ids=str,
)
def test_what_threads_share_is_not_used_concurrently(tiny, changes, options, guess, probes):
    if "network" in changes:
        pytest.importorskip("timm", reason="timm is an optional dependency")
    step = NoiseTraining(tiny(**changes), concurrent=True, **options).step
    assert (step.guess_place is not None, step.probe_place is not None) == (guess, probes)


def test_a_timm_model_changes_no_bit(tiny):
    pytest.importorskip("timm", reason="timm is an optional dependency")
    assert_same_steps(tiny(network="timm:resnet18"))


@pytest.mark.parametrize("place", [None, new_place(CPU)], ids=["here", "thread"])
def test_a_result_can_be_requested_repeatedly(place):
    names = []
    with ranges.listening(names.append):
        wait = start(place, "guess", lambda: torch.ones(2) * 3)
        assert [wait().tolist() for _ in range(2)] == [[3, 3], [3, 3]]
    assert names == ["guess"] + [""] * (place is not None)  # A thread leaves its range.


def test_an_error_is_raised_where_the_result_is_requested():
    place = new_place(CPU)

    def fail():
        raise ValueError("no logits")

    wait = start(place, "guess", fail)
    with pytest.raises(ValueError, match="no logits"):
        wait()
    assert start(place, "guess", lambda: torch.ones(1))().item() == 1, "the thread is still usable"


def test_the_thread_uses_as_many_threads_per_operator_as_its_caller():
    """torch.get_num_threads would set the number in a thread that does not have one, so it is not asked."""

    def openmp_threads():
        return torch.tensor([library["num_threads"] for library in threadpool_info() if "torch" in library["filepath"]])

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = start(new_place(CPU), "guess", openmp_threads)().tolist()
            assert found and set(found) == {threads}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "ranks", "cores", "concurrent"),
    [(1, 1, 2, True), (1, 1, 1, False), (2, 1, 2, False), (2, 1, 4, True), (1, 2, 2, False), (1, 2, 4, True)],
)
def test_passes_are_concurrent_if_every_thread_has_a_core(tiny, monkeypatch, threads, ranks, cores, concurrent):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("REMIXMATCH_CORES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert Execution.pick(tiny(), (9, 8, 8, 3)).concurrent == concurrent


def test_jobs_that_share_the_cores_have_no_second_thread(tiny, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for workers, concurrent in ((1, True), (2, False)):
        with monkeypatch.context() as patched:
            for name, value in environments(workers, [])[0].items():
                patched.setenv(name, value)
            assert Execution.pick(tiny(), (9, 8, 8, 3)).concurrent == concurrent
