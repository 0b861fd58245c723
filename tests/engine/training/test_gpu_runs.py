"""Whole runs on one or two GPUs in the default graph mode, with interruptions and resumes.

Results must equal those of eager steps, in whatever order a device executes the work of its streams.
"""

import os
import signal
import time

import pytest
import torch

from engine.runs.checkpoint import list_checkpoints
from engine.runs.folder import CHECKPOINTS
from tests import processes
from tests.processes import assert_close, finish, skip_compilation, start, start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
# Double precision, since with single precision rounding makes equal runs diverge within some tens of steps.
FLAGS = [
    *("--precision", "fp64", "--views", "fused", "--bn", "split", "--bn-groups", "2", "--quiet"),
    *("--batch", "8", "--width", "8", "--eval-every", "5", "--log-every", "1", "--checkpoint-every", "5"),
]
STEPS = ("--steps", 20)
UNCOMPILED = {"torch.compile": skip_compilation}


def train(folder, gpus, *flags, patch=UNCOMPILED):
    """Train digits-40 on a number of GPUs, or with 0 on the CPU; it must succeed."""
    environment = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return processes.train(folder, max(gpus, 1), *FLAGS, *flags, patch=patch, **environment)


def await_checkpoint(process, folder):
    """Wait until a running process has saved its first checkpoint or has ended."""
    while process.is_alive() and not list_checkpoints(folder / CHECKPOINTS):
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """An eager run on one GPU."""
    return train(tmp_path_factory.mktemp("gpu") / "one", 1, *STEPS, "--mode", "eager")


def test_a_gpu_run_equals_a_cpu_run(one, tmp_path):
    assert_close(one, train(tmp_path / "cpu", 0, *STEPS))


@pytest.mark.parametrize("patch", [UNCOMPILED, None])
def test_a_captured_run_equals_an_eager_run(one, tmp_path, patch):
    assert_close(one, train(tmp_path / "graph", 1, *STEPS, "--mode", "graph", patch=patch))


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "mixmatch"), ("--method", "fixmatch", "--mu", 2), ("--method", "supervised"),
        ("--ablate", "joint-guess", "--bn", "joint"), ("--method", "pi-model"), ("--method", "mean-teacher"),
        ("--method", "adamatch", "--mu", 1),
    ],
)  # fmt: skip
def test_captured_runs_of_other_methods_equal_eager_runs(tmp_path, flags):
    """Other samples, fewer passes, or more: by the teacher beside the probes, and over the labeled images alone."""
    flags = (*flags, "--steps", 10, "--mode")
    assert_close(train(tmp_path / "eager", 0, *flags, "eager"), train(tmp_path / "graph", 1, *flags, "graph"))


def test_a_captured_run_is_resumed(one, tmp_path):
    folder = tmp_path / "run"
    for steps, gpus in ((5, 0), (10, 1), (20, 1)):
        train(folder, gpus, "--steps", steps, "--resume")
    assert_close(one, folder)


def test_captured_micro_batches_of_whole_groups_equal_one_pass_over_groups(one, tmp_path):
    assert_close(one, train(tmp_path / "parts", 1, *STEPS, "--mode", "graph", "--micro-batches", 2))


def test_a_captured_run_saves_when_it_is_stopped(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(log, "train", "digits-40", "--out", folder, *FLAGS, "--steps", 10_000, patch=UNCOMPILED)
    await_checkpoint(process, folder)
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process]) == [128 + signal.SIGTERM], log.read_text()
    assert "--resume" in log.read_text()


@needs_two
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_two_gpus_equal_one(one, tmp_path, mode):
    """DistributedDataParallel over NCCL, in graph mode inside the graph."""
    assert_close(one, train(tmp_path / mode, 2, *STEPS, "--mode", mode, "--check-ranks", 1))


@needs_two
@pytest.mark.parametrize("guess_pass", ["separate", "joint"])
def test_synchronized_batch_norm_is_batch_norm_over_the_global_batch(tmp_path, guess_pass):
    flags = (*STEPS, "--guess-pass", guess_pass)
    joint = train(tmp_path / "joint", 1, *flags, "--bn", "joint", "--mode", "eager")
    assert_close(joint, train(tmp_path / "sync", 2, *flags, "--bn", "sync"))


@needs_two
def test_captured_ranks_reduce_the_gradients_of_all_their_micro_batches(tmp_path):
    flags = (*STEPS, "--bn", "joint", "--micro-batches", 4)
    one = train(tmp_path / "one", 1, *flags, "--mode", "eager")
    assert_close(one, train(tmp_path / "two", 2, *flags, "--mode", "graph", "--check-ranks", 1))


@needs_two
def test_captured_ranks_are_resumed_after_one_was_killed(one, tmp_path):
    """The other rank gets SIGTERM from torchrun while it waits for the killed one in native code."""
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = ("train", "digits-40", "--out", folder, "--mode", "graph", *FLAGS, *STEPS)
    patch = UNCOMPILED | {"engine.distributed.watchdog.SIGNAL_TIMEOUT": 2.0}
    left, killed = start_ranks(log, 2, *arguments, patch=patch)
    await_checkpoint(left, folder)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    os.kill(left.pid, signal.SIGTERM)
    assert finish([left]) == [128 + signal.SIGTERM], log.read_text()
    assert "since SIGTERM 2 s ago" in log.read_text()
    assert_close(one, train(folder, 2, *STEPS, "--mode", "graph", "--resume"))
