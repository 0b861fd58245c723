"""Ranks: who we are, and the few collectives of a step, all of them the identity on one rank.

Everything rests on torch.distributed as torchrun sets it up; nothing is launched here.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: torch.device) -> None:
    """Joins the process group that torchrun's environment describes; does nothing without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 on its own."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    """Concatenates every rank's rows, rank by rank: (n, ...) to (R * n, ...)."""
    if ranks() == 1:
        return rows
    gathered = rows.new_empty(ranks() * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks of equally shaped tensors, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
        tensor /= ranks()
    return tensor


@torch.no_grad()
def mean_buffers(network: nn.Module) -> None:
    """Averages a network's buffers over the ranks: batch norm's running statistics are linear in the batches'."""
    if ranks() > 1:
        buffers = list(network.buffers())
        flat = mean(torch.cat([b.flatten() for b in buffers]))
        for buffer, averaged in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(averaged.view_as(buffer))


def agreed(text: str) -> str:
    """What rank 0 says, on every rank."""
    said = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    return said[0]


def barrier() -> None:
    """Waits for every rank."""
    if dist.is_initialized():
        dist.barrier()
