"""Captured runs with fused convolutions on one or two GPUs, compared with cuDNN's and with each other.

On the emulated device the operators are their reference implementations.
"""

import pytest
import torch

from engine.runs.checkpoint import list_checkpoints
from engine.runs.folder import CHECKPOINTS
from tests import processes
from tests.processes import assert_same_bits, final_state, repeatable_metrics, skip_compilation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
FLAGS = [
    *("--precision", "bf16", "--views", "fused", "--mode", "graph", "--deterministic", "--quiet", "--bn-stats", "pool"),
    *(
        "--batch",
        "16",
        "--k",
        "2",
        "--scales",
        "2",
        "--blocks",
        "1",
        "--eval-every",
        "4",
        "--log-every",
        "1",
        "--checkpoint-every",
        "4",
    ),
]
UNCOMPILED = {"torch.compile": skip_compilation}
PATCHES = {"uncompiled": UNCOMPILED, "compiled": None}


def train(folder, kernels, *flags, ranks=1, patch=UNCOMPILED):
    return processes.train(folder, ranks, *FLAGS, "--convolutions", kernels, *flags, patch=patch)


def assert_similar(one, two):
    """Check that the losses of two bfloat16 runs agree in their first steps."""
    records, others = ([row for row in repeatable_metrics(run) if "loss" in row] for run in (one, two))
    assert len(records) == len(others) > 0
    for a, b in zip(records, others, strict=True):
        for name in ("loss_x", "loss_u", "loss_rot"):
            assert a[name] == pytest.approx(b[name], rel=0.05, abs=0.05), (a["step"], name)


def test_losses_of_compiled_networks_agree_with_cudnn(tmp_path):
    runs = [train(tmp_path / name, name, "--steps", 4, patch=None) for name in ("cudnn", "triton")]
    assert_similar(*runs)
    states = [final_state(run)[1]["state"]["network"] for run in runs]
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items()), "both are cuDNN's"


def test_a_run_is_resumed_bit_for_bit(tmp_path):
    ours, folder = train(tmp_path / "ours", "triton", "--steps", 8), tmp_path / "run"
    for steps in (4, 8):
        train(folder, "triton", "--steps", steps, "--resume")
    assert len(list_checkpoints(folder / CHECKPOINTS)) == 2
    assert_same_bits(ours, folder)


def test_fp16_uses_a_loss_scaler(tmp_path):
    flags = ("--steps", 4, "--precision", "fp16")
    assert_similar(*(train(tmp_path / name, name, *flags) for name in ("cudnn", "triton")))


@pytest.mark.hardware
def test_auto_measures_once(tmp_path):
    flags = [flag for flag in FLAGS if flag not in ("--deterministic", "--quiet")]
    logs = []
    for name in ("one", "two"):
        processes.train(tmp_path / name, 1, *flags, "--steps", 4, XDG_CACHE_HOME=tmp_path / "cache")
        logs.append((tmp_path / f"{name}.log").read_text())
    assert "(measured in" in logs[0] and "(measured earlier)" in logs[1]


@needs_two
def test_two_ranks_equal_two_micro_batches(tmp_path):
    flags = ("--steps", 4, "--check-ranks", 1)
    one = train(tmp_path / "one", "triton", *flags, "--micro-batches", 2)
    assert_same_bits(one, train(tmp_path / "two", "triton", *flags, ranks=2))


@needs_two
@pytest.mark.long
def test_compiled_ranks_agree_with_uncompiled_ones(tmp_path):
    """DistributedDataParallel has its own compilation."""
    runs = [train(tmp_path / name, "triton", "--steps", 4, ranks=2, patch=patch) for name, patch in PATCHES.items()]
    assert_similar(*runs)
