"""The optimizers: torch's fused AdamW and FusedAdam of NVIDIA apex.

Both implement the paper's update, Adam with decoupled weight decay, with fused kernels over all parameters. Step counts
and overflow flags stay on the device, so a CUDA graph can capture the update.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from engine.errors import APEX_BUILD, UserError

BETAS = (0.9, 0.999)
APEX_ABSENT = "apex is not installed"


class _AdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers that exclude its methods from torch.compile.

    The wrappers import the compiler, which takes 1.5 s, and are not needed, since the optimizer is never compiled. The
    wrapper of `step` also disables gradients, so `step` does that here.
    """

    _step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        check_layouts(self)
        self._step(closure)


def check_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Check that gradients and moments on a CPU are stored in the order of their parameters.

    There the fused update of torch 2.15 reads and writes memory in order, whatever the strides, so a contiguous
    gradient of a `torch.channels_last` parameter would update the wrong elements without an error. The check takes
    microseconds. It is not needed on a GPU, where a step is launched asynchronously, or captured.

    Args:
        optimizer: An optimizer whose parameters are on one device.

    Raises:
        AssertionError: An order differs.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.device.type != "cpu":
                return
            if parameter.grad is None:
                continue
            strides = parameter.stride()
            for name, tensor in (("grad", parameter.grad), *optimizer.state[parameter].items()):
                if tensor.stride() != strides and tensor.ndim and _order(tensor) != _order(parameter):
                    raise AssertionError(
                        f"internal error: {name} of a parameter {tuple(parameter.shape)} has strides {tensor.stride()} "
                        f"and not the parameter's {strides}, so the fused optimizer would update the wrong elements"
                    )


def _order(tensor: torch.Tensor) -> list[int]:
    """Return the strides of the dimensions that have more than one element: those of others have no meaning."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _adamw(groups: list[dict[str, Any]], lr: float, device: torch.device) -> torch.optim.Optimizer:
    return _AdamW(groups, lr=lr, betas=BETAS, fused=True, capturable=device.type == "cuda")


def apex_problem() -> str | None:
    """Return why apex cannot be used, or None if it can."""
    try:
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018
    except (ImportError, AttributeError):
        try:
            version("apex")
        except PackageNotFoundError:
            return APEX_ABSENT
        return "the installed package 'apex' is not NVIDIA's: pip uninstall apex"
    try:
        importlib.import_module("amp_C")
    except ImportError:
        return "apex is installed without its CUDA extensions"
    return None


def _fused_adam(groups: list[dict[str, Any]], lr: float, device: torch.device) -> torch.optim.Optimizer:
    if problem := apex_problem():
        raise UserError(f"--optimizer apex: {problem}; {APEX_BUILD}, or use --optimizer torch")
    if device.type != "cuda":
        raise UserError("--optimizer apex requires a GPU; use --optimizer torch")
    fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    return fused_adam(groups, lr=lr, betas=BETAS, adam_w_mode=True, capturable=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float, torch.device], torch.optim.Optimizer]] = {
    "torch": _adamw,
    "apex": _fused_adam,
}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], device: torch.device) -> None:
    """Load the state of an optimizer that may have been saved on another kind of device.

    torch also loads the options of the parameter groups and leaves tensors among them on their device. This keeps the
    options that depend on the device, and moves those tensors.

    Args:
        optimizer: The optimizer, changed in place.
        saved: The state from `Optimizer.state_dict`.
        device: The device of the parameters.
    """
    own = [{name: group[name] for name in ("fused", "capturable") if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        moved = {name: value.to(device) for name, value in group.items() if isinstance(value, torch.Tensor)}
        group.update(moved | options)
