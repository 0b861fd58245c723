"""Run a computation concurrently with what its caller does until it requests the result."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from engine.training import ranges

Place = torch.cuda.Stream | ThreadPoolExecutor  # A stream of a GPU, or a thread of the CPU.


def new_place(device: torch.device) -> Place:
    """Return a new place for computations on a device: a CUDA stream, or a thread of the CPU."""
    if device.type == "cuda":
        return torch.cuda.Stream(device)
    # This call sets a new thread's number of threads per operator to torch's, before oneDNN reads OpenMP's default.
    return ThreadPoolExecutor(1, "side pass", torch.get_num_threads)


def start(place: Place | None, name: str, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Start a computation and return a function that waits for its result.

    Args:
        place: Where to compute: on a stream, after the work submitted to the current stream so far; in a thread; or,
            with None, before this function returns.
        name: The range that the computation enters; see `engine.training.ranges`.
        compute: The computation. It must not depend on anything the caller changes before requesting the result.

    Returns:
        A function that returns the result and may be called repeatedly. With a stream, it makes the current stream
        wait and not the host. With a thread, it raises what the computation raises.
    """
    if isinstance(place, ThreadPoolExecutor):
        return place.submit(_in_thread, name, compute).result
    if place is None:
        ranges.enter(name)
        result = compute()
        return lambda: result
    place.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(place):
        ranges.enter(name)
        result = compute()

    def wait() -> Tensor:
        torch.cuda.current_stream().wait_stream(place)
        return result

    return wait


def _in_thread(name: str, compute: Callable[[], Tensor]) -> Tensor:
    ranges.enter(name)
    try:
        return compute()
    finally:
        ranges.leave()
