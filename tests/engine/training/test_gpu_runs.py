"""Whole runs on GPUs: captured as they are by default, on one and on two, ended and gone on with.

On devices that work in any order that streams and events allow, results are those of steps done one by one.
"""

import os
import signal
import time

import pytest
import torch

from engine.runs.checkpoint import list_checkpoints
from engine.training.trainer import CHECKPOINTS
from tests import processes
from tests.processes import assert_close, finish, skip_compilation, start, start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
# double precision: single precision's rounding would part equal runs within some tens of steps
FLAGS = [
    *("--precision", "fp64", "--views", "fused", "--bn", "split", "--bn-groups", "2", "--quiet"),
    *("--batch", "8", "--width", "8", "--eval-every", "5", "--log-every", "1", "--checkpoint-every", "5"),
]
STEPS = ("--steps", 20)
UNCOMPILED = {"torch.compile": skip_compilation}


def train(folder, gpus, *flags, patch=UNCOMPILED):
    """Trains digits-40 on so many GPUs, or on the CPU on 0; it has to succeed."""
    environment = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return processes.train(folder, max(gpus, 1), *FLAGS, *flags, patch=patch, **environment)


def await_checkpoint(process, folder):
    """Returns when a running process has saved for the first time, or has ended."""
    while process.is_alive() and not list_checkpoints(folder / CHECKPOINTS):
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run on one GPU, one operator after another."""
    return train(tmp_path_factory.mktemp("gpu") / "one", 1, *STEPS, "--mode", "eager")


def test_a_gpu_gives_the_losses_of_a_cpu(one, tmp_path):
    assert_close(one, train(tmp_path / "cpu", 0, *STEPS))


@pytest.mark.parametrize("patch", [UNCOMPILED, None])
def test_a_captured_run_is_an_eager_one(one, tmp_path, patch):
    assert_close(one, train(tmp_path / "graph", 1, *STEPS, "--mode", "graph", patch=patch))


@pytest.mark.parametrize("method", ["mixmatch", "fixmatch", "supervised"])
def test_captured_runs_of_other_methods_are_eager_ones(tmp_path, method):
    """Without probes, without u_weak in the pool, with several blocks of unlabeled images, or with none."""
    flags = ("--method", method, "--mu", 2 if method == "fixmatch" else 1, "--steps", 10, "--mode")
    assert_close(train(tmp_path / "eager", 0, *flags, "eager"), train(tmp_path / "graph", 1, *flags, "graph"))


def test_a_captured_run_is_gone_on_with(one, tmp_path):
    folder = tmp_path / "run"
    for steps, gpus in ((5, 0), (10, 1), (20, 1)):
        train(folder, gpus, "--steps", steps, "--resume")
    assert_close(one, folder)


def test_captured_micro_batches_of_whole_groups_are_one_pass_over_groups(one, tmp_path):
    assert_close(one, train(tmp_path / "parts", 1, *STEPS, "--mode", "graph", "--micro-batches", 2))


def test_a_captured_run_that_is_told_to_stop_has_saved(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(log, "train", "digits-40", "--out", folder, *FLAGS, "--steps", 10_000, patch=UNCOMPILED)
    await_checkpoint(process, folder)
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process]) == [128 + signal.SIGTERM], log.read_text()
    assert "--resume" in log.read_text()


@needs_two
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_two_gpus_give_the_losses_of_one(one, tmp_path, mode):
    """DistributedDataParallel over NCCL, inside the graph."""
    assert_close(one, train(tmp_path / mode, 2, *STEPS, "--mode", mode, "--check-ranks", 1))


@needs_two
def test_batch_norm_over_two_gpus_is_batch_norm_over_all_rows(tmp_path):
    joint = train(tmp_path / "joint", 1, *STEPS, "--bn", "joint", "--mode", "eager")
    assert_close(joint, train(tmp_path / "sync", 2, *STEPS, "--bn", "sync"))


@needs_two
def test_captured_ranks_exchange_the_gradients_of_all_their_micro_batches(tmp_path):
    flags = (*STEPS, "--bn", "joint", "--micro-batches", 4)
    one = train(tmp_path / "one", 1, *flags, "--mode", "eager")
    assert_close(one, train(tmp_path / "two", 2, *flags, "--mode", "graph", "--check-ranks", 1))


@needs_two
def test_captured_ranks_of_which_one_is_killed_are_gone_on_with(one, tmp_path):
    """torchrun sends SIGTERM to the other rank, which waits for the killed one where Python hears no signal."""
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
