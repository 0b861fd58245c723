"""Time functions with interleaved repeats, and measure the device's ceilings in the same run."""

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

_SAMPLE_SECONDS = 1e-3  # Shorter functions are called repeatedly per sample, since events resolve 0.5 us.
_MAX_CALLS = 100
_CYCLES_PER_SECOND = 2e9  # Upper bound of GPU clocks, so that a sleep lasts at least as long as requested.


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        seconds: Median over the repeats.
        low: Lower quartile.
        high: Upper quartile.
        host: Time until the call returned. On a GPU, this is the launch time only.
        samples: One sample per repeat, in order. Samples of all functions with the same index were taken in one repeat.
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
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions with interleaved repeats, so that slow phases of the machine affect all of them alike.

    On a GPU, CUDA events measure the time up to the function's last kernel on the current stream. On a CPU, this is the
    wall-clock time, or that of another clock.

    Args:
        functions: Functions to call, by name.
        device: Device on which they run.
        repeats: Number of samples of each, at least 1.
        warm_up: Number of calls of each before the first sample, at least 1, for compilation, allocation and caches.
        queued: On a GPU, block the device until all calls of a sample are launched, so that the time of short kernels
            excludes launch overhead. This has no effect on functions that wait for the device.
        clock: Returns the time on a CPU in seconds; `time.process_time` leaves out what other processes take.

    Returns:
        One `Timing` per name.
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
        calls[name] = min(max(math.ceil(_SAMPLE_SECONDS / total), 1), _MAX_CALLS)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            blocker = 1.5 * host[name] * calls[name] + 1e-4 if queued else 0.0
            samples[name].append(sample(function, device, calls[name], blocker, clock))
    timings = {}
    for name, times in samples.items():
        median, low, high = np.percentile(times, (50, 25, 75)).tolist()
        timings[name] = Timing(median, low, high, host[name], tuple(times))
    return timings


def interleave(functions: Mapping[Name, Callable[[], Result]], rounds: int) -> list[dict[Name, Result]]:
    """Call each function once per round. The order is reversed every second round, so that no function is always last.

    Returns:
        For each round, the result of every function.
    """
    order = list(functions)
    return [{name: functions[name]() for name in order[:: -1 if number % 2 else 1]} for number in range(rounds)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(
    function: Callable[[], Any],
    device: torch.device,
    calls: int,
    blocker: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return seconds per call, averaged over consecutive calls.

    Args:
        function: Function to call.
        device: Device on which it runs.
        calls: Number of calls, at least 1.
        blocker: Seconds for which a GPU is blocked first, so that it does not wait for the host.
        clock: See `measure`.
    """
    if device.type != "cuda":
        begin = clock()
        for _ in range(calls):
            function()
        return (clock() - begin) / calls
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
    """Measured peak rates of a device.

    Attributes:
        copy_bytes_per_second: Rate of a large copy on the device, counting bytes read and bytes written.
        matmul_flops_per_second: Rate of a large square matrix product, in bf16 on a GPU and fp32 on a CPU.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def text(self) -> str:
        """Return a one-line description."""
        return (
            f"ceilings measured in this run: copy {self.copy_bytes_per_second / 1e9:.4g} GB/s (read + written), "
            f"matrix product {self.matmul_flops_per_second / 1e12:.3g} TFLOP/s"
        )


@functools.cache
def ceilings(device: torch.device) -> Ceilings:
    """Measure copy bandwidth and matrix-product rate, once per process.

    The data is much larger than the caches: 1 GiB per buffer and 8192 x 8192 on a GPU, 64 MiB and 1024 x 1024 on a CPU.
    The factors are random because products of zeros draw less power and run faster.
    """
    cuda = device.type == "cuda"
    size, side, dtype = (2**30, 8192, torch.bfloat16) if cuda else (2**26, 1024, torch.float32)
    # Write the source before it is read: on a CPU, untouched pages all map to one cached page.
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.ones_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    functions = {"copy": lambda: copy.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}
    times = measure(functions, device, repeats=10, queued=True)
    return Ceilings(2 * size / times["copy"].seconds, 2 * side**3 / times["matmul"].seconds)


def bench_device() -> torch.device:
    """Return the GPU if there is one. Otherwise return the CPU and print that sizes are small."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    print("CPU: torch sees no GPU here, so sizes are small and results do not apply to GPUs")
    return torch.device("cpu")
