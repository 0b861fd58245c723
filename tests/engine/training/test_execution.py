"""Settings of torch's libraries, its compiler and malloc."""

import ctypes
import os
import subprocess
import sys
import warnings

import pytest
import torch

from engine import run
from engine.inference.trained import load_ema_model
from engine.runs.setup import setup_run
from engine.training import execution, trainer
from engine.training.execution import Execution, compiler, set_numerics
from tests.processes import ROOT, final_state


@pytest.fixture(autouse=True)
def restore_settings():
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    set_numerics(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def settings():
    """Return whether kernels may be chosen by timing and may be nondeterministic. TF32 must be off."""
    cudnn = torch.backends.cudnn
    assert not torch.backends.cuda.matmul.allow_tf32 and not cudnn.allow_tf32
    return cudnn.benchmark, not (cudnn.deterministic and torch.are_deterministic_algorithms_enabled())


def test_deterministic_sets_all_libraries():
    for deterministic in (False, True, False):
        set_numerics(deterministic)
        assert settings() == (not deterministic, not deterministic)
        # This holds whether Inductor was imported before or is imported now.
        from torch._inductor import config

        assert config.deterministic == deterministic
        if deterministic:
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_cudnn_times_all_plans_in_training_only(tiny, tmp_path):
    cudnn = torch.backends.cudnn
    run.train(setup_run(tiny(), tmp_path), quiet=True)
    assert (cudnn.benchmark, cudnn.benchmark_limit) == (True, 0), "torch takes 0 for all"
    load_ema_model(tmp_path)
    assert (cudnn.benchmark, cudnn.benchmark_limit) == (True, 10)
    for flags, wanted in (({"cudnn_plans": 5}, (True, 5)), ({"cudnn_plans": 5, "deterministic": True}, (False, 10))):
        config = tiny(**flags)
        set_numerics(config.deterministic, Execution.pick(config, (1, 8, 8, 3)).cudnn_plans)
        assert (cudnn.benchmark, cudnn.benchmark_limit) == wanted
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()


def options_for(config, device, monkeypatch):
    """Return the options that torch.compile is called with."""
    passed = {}
    monkeypatch.setattr("torch.compile", lambda model, **options: passed.update(options))
    compiler(config, torch.device(device))("a network")
    assert passed.pop("dynamic") is False
    return passed["options"]


def test_inductor_options_are_for_gpus_and_exist_in_this_torch(tiny, monkeypatch):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no option.*")
        assert options_for(tiny(), "cpu", monkeypatch) is None
        assert options_for(tiny(), "cuda", monkeypatch) == execution.INDUCTOR
        tuned = options_for(tiny(tune=True), "cuda", monkeypatch)
        assert tuned == execution.INDUCTOR | {"coordinate_descent_tuning": True}


def test_an_option_that_torch_lacks_is_omitted_with_a_warning(tiny, monkeypatch):
    known = torch._inductor.list_options()
    monkeypatch.setattr("torch._inductor.list_options", lambda: [name for name in known if name != "combo_kernels"])
    with pytest.warns(UserWarning, match=r"has no option combo_kernels; omitting it"):
        assert options_for(tiny(), "cuda", monkeypatch) == {"realize_reads_threshold": 12}


def test_a_deterministic_run_is_the_same_on_a_cpu(tiny, tmp_path):
    for deterministic in (False, True):
        folder = tmp_path / str(deterministic)
        run.train(setup_run(tiny(deterministic=deterministic), folder), quiet=True)
        assert settings() == (not deterministic, not deterministic)
        set_numerics(not deterministic)
        load_ema_model(folder)
        assert settings() == (not deterministic, not deterministic)
    one, two = (final_state(tmp_path / name)[1]["state"]["network"] for name in ("False", "True"))
    assert all(torch.equal(one[name], two[name]) for name in one)


BLOCKS = """
import ctypes, sys, torch
from engine.training.execution import keep_freed_memory

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info

def mapped(blocks, mib):
    # Return how many of several live blocks are mapped individually.
    before = libc.mallinfo2().hblks
    alive = [torch.ones(mib * 2**18) for _ in range(blocks)]
    return libc.mallinfo2().hblks - before

if len(sys.argv) > 1:
    keep_freed_memory(torch.device(sys.argv[1]))
print(mapped(8, 24), libc.mallinfo2().arena >> 20, mapped(1, 512))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_memory_freed_on_a_cpu_is_kept_except_for_large_blocks():
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def blocks(*arguments):
        command = [sys.executable, "-c", BLOCKS, *arguments]
        done = subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return map(int, done.stdout.split())

    for arguments in ((), ("cuda",)):
        each, heap, large = blocks(*arguments)
        assert (each, large) == (8, 1) and heap < 8 * 24
    each, heap, large = blocks("cpu")
    assert (each, large) == (0, 1) and heap >= 8 * 24


def test_a_run_keeps_freed_memory(tiny, tmp_path, monkeypatch):
    devices = []
    monkeypatch.setattr(trainer, "keep_freed_memory", devices.append)
    run.train(setup_run(tiny(steps=2), tmp_path), quiet=True)
    assert devices == [torch.device("cpu")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_deterministic_runs_on_a_gpu_are_bit_identical(tiny, tmp_path):
    states = []
    for name in ("one", "two"):
        run.train(
            setup_run(tiny(deterministic=True, device="cuda", steps=20, checkpoint_every=20), tmp_path / name),
            quiet=True,
        )
        states.append(final_state(tmp_path / name)[1]["state"])
    for network in ("network", "ema_model"):
        for name, value in states[0][network].items():
            assert torch.equal(value, states[1][network][name]), (network, name)
