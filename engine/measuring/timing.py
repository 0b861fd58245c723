"""How everything here is timed: callables in turn, repeat by repeat, and the ceilings of the device in the same run."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Name = TypeVar("Name")
Result = TypeVar("Result")

_SAMPLE_SECONDS = 1e-3  # shorter functions are called several times a sample: events resolve half a microsecond
_MOST_CALLS = 100
_CYCLES_PER_SECOND = 2e9  # of the fastest clock that the blocker may have to outlast


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        seconds: median over the repeats.
        low: lower quartile.
        high: upper quartile.
        host: until the call returned, which on a GPU is before its work is done: what it takes to hand it over.
        samples: of every repeat, in order: those of one repeat were taken one after another.
    """

    seconds: float
    low: float
    high: float
    host: float
    samples: tuple[float, ...] = ()


def measure(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int = 20,
    warm_up: int = 3,
    queued: bool = False,
) -> dict[str, Timing]:
    """Times functions in turn, so that a slow moment of the machine falls on all of them alike.

    CUDA events on a GPU, from which everything that the function does up to its last kernel on the current stream is
    between them; the wall clock on a CPU.

    Args:
        functions: what to call, by name.
        device: where they work.
        repeats: samples of each, at least 1.
        warm_up: calls of each before the first sample, at least 1: compilation, allocation, caches.
        queued: on a GPU, hold the device until the whole sample is handed over, so that short kernels are timed and
            not the host that launches them. A function that waits for the device gains nothing by it.

    Returns:
        One `Timing` a name.
    """
    calls, host = {}, {}
    for name, function in functions.items():
        for _ in range(warm_up):
            _wait(device)
            begin = time.perf_counter()
            function()
            host[name] = time.perf_counter() - begin
            _wait(device)
            total = time.perf_counter() - begin
        calls[name] = min(max(math.ceil(_SAMPLE_SECONDS / total), 1), _MOST_CALLS)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            blocker = 1.5 * host[name] * calls[name] + 1e-4 if queued else 0.0
            samples[name].append(sample(function, device, calls[name], blocker))
    timings = {}
    for name, times in samples.items():
        median, low, high = np.percentile(times, (50, 25, 75)).tolist()
        timings[name] = Timing(median, low, high, host[name], tuple(times))
    return timings


def in_turns(functions: Mapping[Name, Callable[[], Result]], rounds: int) -> list[dict[Name, Result]]:
    """Calls each function once a round, in every second round backwards, so that none is always the last.

    Returns:
        For each round what every function has returned.
    """
    order = list(functions)
    return [{name: functions[name]() for name in order[:: -1 if number % 2 else 1]} for number in range(rounds)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(function: Callable[[], Any], device: torch.device, calls: int, blocker: float = 0.0) -> float:
    """Seconds a call, over `calls` of them one after another.

    Args:
        function: what to call.
        device: where it works.
        calls: at least 1.
        blocker: seconds for which a GPU is held first, so that it does not wait for the host.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - begin) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if blocker:
        torch.cuda._sleep(int(min(blocker, 0.1) * _CYCLES_PER_SECOND))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / calls


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at best, as measured.

    Attributes:
        copy_bytes_per_second: of a large copy on the device, bytes read and bytes written.
        matmul_flops_per_second: of a large square matrix product, in bf16 on a GPU and fp32 on a CPU.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def text(self) -> str:
        """One line for the reader of a table."""
        return (
            f"ceilings measured in this run: copy {self.copy_bytes_per_second / 1e9:.4g} GB/s (read + written), "
            f"matrix product {self.matmul_flops_per_second / 1e12:.3g} TFLOP/s"
        )


@functools.cache
def ceilings(device: torch.device) -> Ceilings:
    """Measures copy bandwidth and matrix-product rate; once a process.

    Sizes lie far beyond the caches: 1 GiB a side and 8192 x 8192 on a GPU, 64 MiB and 1024 x 1024 on a CPU. The
    factors are random: products of zeros draw less power and run faster than any real one.
    """
    cuda = device.type == "cuda"
    size, side, dtype = (2**30, 8192, torch.bfloat16) if cuda else (2**26, 1024, torch.float32)
    # written before it is read: untouched pages of a CPU's memory are all one page, and in the cache
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.ones_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    functions = {"copy": lambda: copy.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}
    times = measure(functions, device, repeats=10, queued=True)
    return Ceilings(2 * size / times["copy"].seconds, 2 * side**3 / times["matmul"].seconds)


def bench_device() -> torch.device:
    """What a bench measures: the GPU where there is one. Says so where there is none, since sizes are smaller then."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    print("CPU: torch sees no GPU here, so sizes are small and figures say nothing about one")
    return torch.device("cpu")
