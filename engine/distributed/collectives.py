"""Process group and collectives; with a single rank, every collective returns its input.

Based on torch.distributed and the environment variables of torchrun, which `engine.distributed.launch` runs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed import launch
from engine.distributed.watchdog import Watchdog
from engine.errors import RankError, UserError
from pipelines.files import first_line

Result = TypeVar("Result")


def start(device: torch.device, timeout: float, alone: bool = False) -> None:
    """Join the process group described by torchrun's environment; without one, do nothing.

    Args:
        device: The device type to train on. With "cuda", the current device becomes that of LOCAL_RANK.
        timeout: Seconds after which a collective fails if a rank does not join it.
        alone: Whether to make a group even for a single rank.

    Raises:
        RankError: The other ranks did not connect in time, or there is no GPU for this rank.
    """
    if dist.is_initialized() or (launch.world_size_from_env() == 1 and not alone):
        return
    # Its functions take the process group that exists when it is imported as their default. DistributedDataParallel
    # imports it, too, but with a group, which would then never be destroyed.
    from torch.distributed.nn import functional  # noqa: F401

    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise RankError(f"no GPU for local rank {local}: torch finds {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    own_store: dict[str, Any] = {}
    if "MASTER_ADDR" not in os.environ:
        own_store = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        # init_process_group waits for the store of rank 0 without a timeout, and that process may be suspended.
        with Watchdog(1.5 * timeout, int(os.environ.get("RANK", "0"))) as watchdog:
            watchdog.alive("joining the process group")
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout), **own_store
            )
    except dist.DistError as error:
        raise RankError(f"the {launch.world_size_from_env()} ranks could not connect: {_reason(error)}") from error


def stop() -> None:
    """Leave the process group and wait for its threads.

    A thread that drops the last reference to a tensor while Python exits aborts the process.
    """
    if dist.is_initialized():
        gc.collect()  # The group lives as long as DistributedDataParallel, which may be part of reference cycles.
        dist.destroy_process_group()


@contextlib.contextmanager
def group(device: torch.device, timeout: float) -> Iterator[None]:
    """Be in the process group inside the block; see `start`.

    Raises:
        RankError: Another rank was lost. The group is not left then, since its threads may wait for that rank.
    """
    start(device, timeout)
    try:
        yield
    except UserError:
        stop()  # All ranks raise it.
        raise
    except RuntimeError as error:
        if other := lost(error):
            raise other from error
        raise
    stop()


def grouped() -> bool:
    """Return whether there is a process group, possibly of a single rank."""
    return dist.is_initialized()


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def lost(error: BaseException) -> RankError | None:
    """Return a RankError for a collective that failed because of another rank; None for other errors."""
    if ranks() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return RankError(f"lost the other ranks ({_reason(error)})")
    return None


def gather(tensor: Tensor) -> Tensor:
    """All-gather the ranks' tensors, concatenated rank by rank: (n, ...) to (R * n, ...)."""
    if ranks() == 1:
        return tensor
    gathered = tensor.new_empty(ranks() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(context, own: Tensor) -> Tensor:
        return gather(own[None])

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return total(gradient.contiguous())[rank()]


def stack(own: Tensor) -> Tensor:
    """All-gather the ranks' tensors, (...) to (R, ...); gradients flow back to the rank of each tensor."""
    return _Stack.apply(own) if ranks() > 1 else own[None]


def mean(tensor: Tensor) -> Tensor:
    """All-reduce equally shaped tensors to their mean, in place."""
    return total(tensor).div_(ranks()) if ranks() > 1 else tensor


def total(tensor: Tensor) -> Tensor:
    """All-reduce equally shaped tensors to their sum, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def run_on_rank_0(function: Callable[[], Result]) -> Result:
    """Call a function on rank 0. Every rank returns its result, or raises its UserError or OSError."""
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1] = error
    if ranks() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def all_gather_object(own: object) -> list:
    """All-gather picklable objects into a list, in the order of the ranks."""
    if ranks() == 1:
        return [own]
    gathered: list = [None] * ranks()
    dist.all_gather_object(gathered, own)
    return gathered


def barrier() -> None:
    """Wait for all ranks."""
    if ranks() > 1:
        dist.barrier()


def _reason(error: BaseException) -> str:
    """Return the message of an error without the source location and advice that torch adds."""
    text = re.sub(r"^\[[^\]]*\] ", "", first_line(error, 400))
    return text.partition(". This is typically")[0][:200]
