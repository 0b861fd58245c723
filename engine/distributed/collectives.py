"""Ranks: who we are, and the few collectives of a step, all of them the identity on one rank.

Everything rests on torch.distributed as torchrun sets it up; `engine.distributed.launch` starts torchrun itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
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
    """Joins the process group that torchrun's environment describes; does nothing without one.

    Args:
        device: what this rank trains on; with GPUs it becomes the one of LOCAL_RANK.
        timeout: seconds after which a collective that some rank does not join is an error.
        alone: makes a group even where there is one rank.

    Raises:
        RankError: the other ranks did not come in time, or there is no GPU for this one.
    """
    if dist.is_initialized() or (launch.world_size_from_env() == 1 and not alone):
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise RankError(f"there is no GPU {local}: torch sees {torch.cuda.device_count()} here")
        torch.cuda.set_device(local)
    own_store: dict[str, Any] = {}
    if "MASTER_ADDR" not in os.environ:
        own_store = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        # what the first rank's store answers is waited for without a timeout: that rank may have been stopped
        with Watchdog(1.5 * timeout, int(os.environ.get("RANK", "0"))) as watchdog:
            watchdog.alive("the ranks' coming together")
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout), **own_store
            )
    except dist.DistError as error:
        raise RankError(f"the {launch.world_size_from_env()} ranks did not come together: {_reason(error)}") from error


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def grouped() -> bool:
    """Whether there is a process group, be it of one rank."""
    return dist.is_initialized()


def rank() -> int:
    """This process's number, 0 on its own."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def lost(error: BaseException) -> RankError | None:
    """The error in words, if it is a collective that failed because of another rank; None otherwise."""
    if ranks() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return RankError(f"lost the other ranks ({_reason(error)})")
    return None


def gather(rows: Tensor) -> Tensor:
    """Concatenates every rank's rows, rank by rank: (n, ...) to (R * n, ...)."""
    if ranks() == 1:
        return rows
    gathered = rows.new_empty(ranks() * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(context, own: Tensor) -> Tensor:
        return gather(own[None])

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return total(gradient.contiguous())[rank()]


def stack(own: Tensor) -> Tensor:
    """Every rank's tensor: (...) to (R, ...). What a rank's loss owes to another's tensor flows back to that rank."""
    return _Stack.apply(own) if ranks() > 1 else own[None]


def mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks of equally shaped tensors, in place."""
    return total(tensor).div_(ranks()) if ranks() > 1 else tensor


def total(tensor: Tensor) -> Tensor:
    """Sum over the ranks of equally shaped tensors, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def run_on_rank_0(function: Callable[[], Result]) -> Result:
    """Calls a function on rank 0; every rank gets what it returns, or the UserError or OSError that it raises."""
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
    """What every rank holds, rank by rank."""
    if ranks() == 1:
        return [own]
    held: list = [None] * ranks()
    dist.all_gather_object(held, own)
    return held


def barrier() -> None:
    """Waits for every rank."""
    if ranks() > 1:
        dist.barrier()


def _reason(error: BaseException) -> str:
    """What an error says, without the place in torch's sources and without advice."""
    text = re.sub(r"^\[[^\]]*\] ", "", first_line(error, 400))
    return text.partition(". This is typically")[0][:200]
