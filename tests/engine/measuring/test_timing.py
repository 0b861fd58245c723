"""Timing: the order of calls and the results."""

import time

import pytest
import torch

from engine.measuring.timing import ceilings, measure

CPU = torch.device("cpu")


def test_calls_are_interleaved_and_short_functions_are_called_repeatedly():
    called = []

    def slow():
        called.append("slow")
        time.sleep(2e-3)

    def quick():
        called.append("quick")
        time.sleep(1e-4)

    times = measure({"slow": slow, "quick": quick}, CPU, repeats=3, warm_up=2)
    assert called[:4] == ["slow", "slow", "quick", "quick"]
    order = [name for before, name in zip(["", *called[4:]], called[4:], strict=False) if name != before]
    assert order == ["slow", "quick"] * 3
    assert called[4:].count("slow") == 3 and called[4:].count("quick") > 3
    assert times["slow"].seconds > 2e-3 and times["quick"].seconds > 1e-4
    for t in times.values():
        assert t.low <= t.seconds <= t.high and t.host > 0


def test_ceilings_are_measured_once_per_process():
    found = ceilings(CPU)
    assert found.copy_bytes_per_second > 1e8 and found.matmul_flops_per_second > 1e8
    assert ceilings(CPU) is found
    assert "GB/s" in found.text() and "TFLOP/s" in found.text()


@pytest.mark.gpu
@pytest.mark.hardware
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_queued_kernels_are_timed_without_launch_overhead():
    device = torch.device("cuda", 0)
    x = torch.ones(1024, device=device)

    def launches():
        x.add_(1)
        time.sleep(1e-3)

    times = measure({"f": launches}, device, repeats=5, queued=True)["f"]
    assert times.host > 1e-3 > times.seconds
