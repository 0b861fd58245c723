"""Execution of a run on this machine: what `auto` resolves to, and the global settings of torch's libraries."""

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
from torch.utils._triton import has_triton

from engine.config.config import Config
from engine.config.values import CORES
from engine.errors import UserError
from kernels.augment import MAX_SIDE
from pipelines.views import MAX_GRAPH_SIDE

# Options of Inductor on a GPU. Per-channel vectors count as reads, so with the default threshold of 4 the gradient
# before each batch norm would be written to memory and read twice. Combo kernels merge small independent kernels.
INDUCTOR: dict[str, Any] = {"realize_reads_threshold": 12, "combo_kernels": True}

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 2**20  # Bytes; glibc accepts no larger threshold.


@dataclass(frozen=True)
class Execution:
    """The execution settings of a configuration with `auto` resolved.

    Attributes:
        device: The device of the training step.
        precision: See `pick_precision`.
        mode: "eager", "compile" or "graph".
        views: "dali", "dali-graph" or "fused".
        resident: Whether the training images are stored on the device.
        inductor: Options of Inductor on a GPU; None for INDUCTOR.
        concurrent: Whether independent passes run concurrently: on streams of a GPU, or in a thread of a CPU.
        cudnn_plans: See `set_numerics`.
        convolutions: "cudnn", "triton", or "measured": the faster of them for each layer.
    """

    device: torch.device
    precision: torch.dtype
    mode: str
    views: str
    resident: bool = True
    inductor: Mapping[str, Any] | None = None
    concurrent: bool = True
    cudnn_plans: int | None = 0
    convolutions: str = "cudnn"

    @classmethod
    def pick(cls, config: Config, shape: tuple[int, ...]) -> Execution:
        """Resolve a configuration for uint8 training images of the given shape, (N, H, W, 3).

        Raises:
            UserError: The device or the machine does not support a setting.
        """
        device = pick_device(config)
        return cls(
            device,
            pick_precision(config, device),
            pick_mode(config, device),
            pick_views(config, device, (shape[1], shape[2])),
            pick_resident(config, device, math.prod(shape)),
            concurrent=pick_concurrency(device),
            cudnn_plans=None if config.deterministic else config.cudnn_plans,
            convolutions=pick_convolutions(config, device),
        )


def pick_device(config: Config) -> torch.device:
    """Return the device of a run.

    Raises:
        UserError: A GPU was requested and none is available.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; run `remixmatch doctor` to see why")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_precision(config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of the network's input: autocast's, or without autocast that of the parameters."""
    name = config.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def pick_mode(config: Config, device: torch.device) -> str:
    """Return how steps are executed: "eager", "compile" or "graph".

    Raises:
        UserError: The device or the machine does not support the requested mode.
    """
    if config.mode == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if config.mode == "graph" and device.type != "cuda":
        raise UserError("--mode graph captures a CUDA graph and requires a GPU; use --mode eager or compile")
    if config.mode == "compile" and device.type == "cpu":
        names = [os.environ.get("CXX", "g++"), "c++", "clang++"]
        if not any(map(shutil.which, names)):
            raise UserError("--mode compile requires a C++ compiler on a CPU; install g++, or use --mode eager")
    return config.mode


def pick_views(config: Config, device: torch.device, sides: tuple[int, int]) -> str:
    """Return the backend that makes views of images with sides (H, W): "dali" (CPU), "dali-graph" or "fused".

    Raises:
        UserError: The device does not support the requested backend, or the images are too large for it.
    """
    cuda = device.type == "cuda"
    views: str = config.views
    if views == "auto":
        views = "fused" if cuda else "dali"
    elif views == "dali" and cuda:
        views = "dali-graph"
    largest = {"fused": MAX_SIDE, "dali-graph": MAX_GRAPH_SIDE}.get(views)
    if largest and max(sides) > largest:
        advice = "use --views dali" if not cuda or max(sides) <= MAX_GRAPH_SIDE else "prepare smaller images"
        raise UserError(
            f"--views {config.views} supports images of up to {largest}x{largest} pixels, got "
            f"{sides[0]}x{sides[1]}; {advice}"
        )
    return views


def pick_resident(config: Config, device: torch.device, images: int) -> bool:
    """Return whether training images, of that many bytes, are stored on the device.

    With auto they are if they take at most half of the device's free memory.
    """
    if device.type != "cuda" or config.resident != "auto":
        return config.resident != "host"
    return 2 * images <= torch.cuda.mem_get_info(device)[0]


def pick_concurrency(device: torch.device) -> bool:
    """Return whether independent passes of a step run concurrently: on a GPU, or on a CPU with enough cores.

    On a CPU every pass has its own team of threads. If the teams of all processes that share the cores have more
    threads than there are cores, every operator waits for threads that do not run.
    """
    if device.type == "cuda":
        return True
    cores = int(os.environ.get(CORES, len(os.sched_getaffinity(0))))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # Ranks on this machine, from torchrun.
    return 2 * torch.get_num_threads() * ranks <= cores


def pick_convolutions(config: Config, device: torch.device) -> str:
    """Return the kernels of the network's convolutions: "cudnn", "triton", or "measured".

    Raises:
        UserError: The requested kernels do not support the device or another setting.
    """
    if config.convolutions == "cudnn":
        return "cudnn"
    required = {
        "a GPU": device.type == "cuda",
        "a Wide ResNet": not config.backbone,
        "--bn joint": config.bn == "joint",
        "--precision bf16 or fp16": pick_precision(config, device) in (torch.bfloat16, torch.float16),
    }
    missing = [requirement for requirement, fulfilled in required.items() if not fulfilled]
    if config.convolutions == "triton":
        if missing:
            raise UserError(f"--convolutions triton requires {', '.join(missing)}")
        return "triton"
    # What is chosen by measurement may differ between runs, and with it the rounding of results.
    return "cudnn" if missing or config.deterministic or not has_triton() else "measured"


def compiler(config: Config, device: torch.device, inductor: Mapping[str, Any] | None = None) -> Callable[[Any], Any]:
    """Return torch.compile with the options of a run, for modules and functions called with static shapes.

    Options that the installed torch does not have are omitted with a warning.
    """
    options = {}
    if device.type == "cuda":
        from torch import _inductor  # Imported only to compile, since it is slow.

        wanted = dict(INDUCTOR if inductor is None else inductor)
        if config.tune:
            wanted["coordinate_descent_tuning"] = True
        known = _inductor.list_options()
        options = {name: value for name, value in wanted.items() if name in known}
        if missing := sorted(wanted.keys() - options.keys()):
            warnings.warn(f"torch {torch.__version__} has no option {', '.join(missing)}; omitting it", stacklevel=2)
    # One graph per shape is faster than one graph for any batch size.
    return partial(torch.compile, dynamic=False, options=options or None)


def keep_freed_memory(device: torch.device) -> None:
    """Make malloc keep freed memory for the next step, if the step runs on a CPU.

    On a GPU torch caches memory itself. On a CPU activations are allocated by malloc, and glibc returns freed memory to
    the kernel, which clears every page before reusing it: about a tenth of a step's time. Two kinds of memory
    are still returned: blocks of more than 32 MiB, for example in an evaluation of large images, since they would leave
    gaps between smaller blocks in the heap; and free memory at the end of the heap once it reaches 1 GiB. Other
    implementations of malloc are left unchanged.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)  # Smaller blocks are not mapped individually, hence not unmapped.
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def set_numerics(deterministic: bool, cudnn_plans: int | None = 10) -> None:
    """Set determinism, cuDNN's choice of kernels and TF32 for the whole process.

    TF32 is always disabled. cuDNN uses it by default, also in evaluation, and it keeps only 10 of the 23 mantissa bits
    of float32.

    Args:
        deterministic: Make runs with the same inputs on the same machine bit-identical: no kernels with atomic
            additions, and none that cuDNN or Inductor chooses by timing.
        cudnn_plans: Number of plans that cuDNN times for each direction of a convolution to choose the fastest, in the
            order of its heuristic; 0 for all, None to choose by heuristic alone. The default is torch's. It has no
            effect on a convolution that has already run, or with `deterministic`.
    """
    # The older of torch's two interfaces. Once the newer one is used, torch's compiler cannot read the setting.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = cudnn_plans is not None and not deterministic
    torch.backends.cudnn.benchmark_limit = 10 if cudnn_plans is None else cudnn_plans
    torch.backends.cudnn.deterministic = deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # No such memory is read.
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Read by cuBLAS on first use.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)  # This imports Inductor to set the option there as well.
