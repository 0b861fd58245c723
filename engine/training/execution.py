"""How a run is executed on this machine: what `auto` stands for, and which arithmetic torch's libraries may choose."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from engine.config.config import Config
from engine.errors import UserError
from kernels.augment import MAX_SIDE

# Options of Inductor on a GPU. Per-channel vectors count as reads: with the default of 4, the gradient before each
# batch norm would be written to memory and read twice. Small kernels that do not depend on one another become one
INDUCTOR: dict[str, Any] = {"realize_reads_threshold": 12, "combo_kernels": True}

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 2**20  # bytes; no higher threshold is taken


@dataclass(frozen=True)
class Execution:
    """A configuration's `device`, `precision`, `mode`, `views` and `resident`, without `auto`.

    Attributes:
        device: where the step runs.
        precision: see `pick_precision`.
        mode: "eager", "compile" or "graph".
        views: "dali" or "fused".
        resident: whether the training images lie on the device.
        inductor: options of Inductor on a GPU; None for INDUCTOR.
        concurrent: on a GPU, whether passes that do not need one another run beside one another.
        cudnn_benchmark: whether cuDNN measures its kernels.
    """

    device: torch.device
    precision: torch.dtype
    mode: str
    views: str
    resident: bool = True
    inductor: Mapping[str, Any] | None = None
    concurrent: bool = True
    cudnn_benchmark: bool = True

    @classmethod
    def pick(cls, config: Config, shape: tuple[int, ...]) -> Execution:
        """Chooses for training images of a shape: (N, H, W, 3), uint8.

        Raises:
            UserError: the device or the machine cannot do what was asked for.
        """
        device = pick_device(config)
        return cls(
            device,
            pick_precision(config, device),
            pick_mode(config, device),
            pick_views(config, device, (shape[1], shape[2])),
            pick_resident(config, device, math.prod(shape)),
            cudnn_benchmark=not config.deterministic,
        )


def pick_device(config: Config) -> torch.device:
    """The device of a run.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; `remixmatch doctor` says what is missing")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_precision(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the network's input: autocast's, or without autocast the parameters' own, float32 or float64."""
    name = config.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def pick_mode(config: Config, device: torch.device) -> str:
    """How steps are executed: "eager", "compile" or "graph".

    Raises:
        UserError: the device or the machine cannot do what was asked for.
    """
    if config.mode == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if config.mode == "graph" and device.type != "cuda":
        raise UserError("--mode graph captures a CUDA graph and needs a GPU; take --mode eager or compile")
    if config.mode == "compile" and device.type == "cpu":
        names = [os.environ.get("CXX", "g++"), "c++", "clang++"]
        if not any(map(shutil.which, names)):
            raise UserError("--mode compile needs a C++ compiler on a CPU; install g++, or take --mode eager")
    return config.mode


def pick_views(config: Config, device: torch.device, sides: tuple[int, int]) -> str:
    """Who makes views of images of those sides: "dali" or "fused".

    Raises:
        UserError: the device does not have what was asked for, or the images are too large for it.
    """
    cuda = device.type == "cuda"
    if config.views == "dali" and cuda:
        raise UserError("--views dali makes views on a CPU; on a GPU take --views fused")
    views = ("fused" if cuda else "dali") if config.views == "auto" else config.views
    if views == "fused" and max(sides) > MAX_SIDE:
        other = "prepare smaller ones" if cuda else "take --views dali"
        raise UserError(
            f"--views fused takes images of up to {MAX_SIDE}x{MAX_SIDE} pixels, these have "
            f"{sides[0]}x{sides[1]}; {other}"
        )
    return views


def pick_resident(config: Config, device: torch.device, images: int) -> bool:
    """Whether training images of so many bytes lie on the device: with auto, if they take half of its free memory."""
    if device.type != "cuda" or config.resident != "auto":
        return config.resident != "host"
    return 2 * images <= torch.cuda.mem_get_info(device)[0]


def compiler(config: Config, device: torch.device, inductor: Mapping[str, Any] | None = None) -> Callable[[Any], Any]:
    """torch.compile as a run has it, for modules and functions that are called with one shape a place.

    An option that the installed torch does not have is left out, with a warning.
    """
    options = {}
    if device.type == "cuda":
        from torch import _inductor  # which takes its time, and is for those who compile

        wanted = dict(INDUCTOR if inductor is None else inductor)
        if config.tune:
            wanted["coordinate_descent_tuning"] = True
        known = _inductor.list_options()
        options = {name: value for name, value in wanted.items() if name in known}
        if missing := sorted(wanted.keys() - options.keys()):
            warnings.warn(f"torch {torch.__version__} has no option {', '.join(missing)}: left out", stacklevel=2)
    # a graph for each shape is faster than one for any number of rows
    return partial(torch.compile, dynamic=False, options=options or None)


def keep_freed_memory(device: torch.device) -> None:
    """Lets this process keep the memory that it frees, for the next step, where the step is on a CPU.

    torch keeps a GPU's memory itself. On a CPU every activation is malloc's, and glibc returns what is freed to the
    kernel, which clears each page before it gives it again: about a tenth of a step's time. Blocks of more than 32 MiB,
    such as an evaluation of large images has, still go back: between smaller ones they would leave gaps in the heap.
    So does what is free at its end once it is 1 GiB. Where malloc is another library's, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)  # a block that is mapped by itself is unmapped when it is freed
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def set_numerics(deterministic: bool, cudnn_benchmark: bool | None = None) -> None:
    """Tells torch's libraries which arithmetic they may choose, for the whole process.

    float32 is float32 whatever the flag: TF32, which cuDNN takes by default, would keep 10 bits of a factor's 23, in
    evaluation too.

    Args:
        deterministic: the same inputs give the same bits in every run on one machine: no kernels that add by atomics,
            and none that cuDNN or Inductor chooses by its time. Otherwise cuDNN measures its kernels, which is faster.
        cudnn_benchmark: whether cuDNN measures its kernels; by default unless `deterministic`.
    """
    # the older of two ways to say it: with the newer, torch refuses to tell its own compiler what cuDNN may do
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic if cudnn_benchmark is None else cudnn_benchmark
    torch.backends.cudnn.deterministic = deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)  # Inductor's too, and so imports it
