"""`remixmatch doctor`: check the installation and suggest fixes."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

from engine.commands.parsing import parse
from engine.errors import APEX_BUILD

Finding = tuple[bool | None, str, str]  # Whether it works (None: optional and absent), what was found, the fix.


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return None, "none; training runs on the CPU", "for faster training, use a machine with an NVIDIA GPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, ", ".join(names), ""


def _driver() -> Finding:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "libcuda.so.1 not found", "install the NVIDIA driver if there is a GPU"
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    known = f"supports CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    return (
        (True, known, "")
        if number.value >= 13000
        else (False, known, "install driver 580 or newer, which CUDA 13 needs")
    )


def _torch() -> Finding:
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2)
    return True, f"{torch.__version__}, built for CUDA {torch.version.cuda}", ""


def _package(name: str, module: str) -> Callable[[], Finding]:
    def check() -> Finding:
        importlib.import_module(module)
        return True, version(name), ""

    return check


def _dali() -> Finding:
    import numpy as np

    from pipelines.dali import DaliViews

    pipeline = DaliViews(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64), None, batch_size=1, max_shift=0)
    pipeline.close()
    return True, f"{version('nvidia-dali-cuda130')}, builds the view pipeline", ""


def _compiler() -> Finding:
    found = shutil.which("gcc") or shutil.which("cc")
    return (True, found, "") if found else (None, "no C compiler", "install gcc, which --mode compile and graph need")


def _apex() -> Finding:
    from engine.training.optimizers import APEX_ABSENT, apex_problem

    problem = apex_problem()
    if problem is None:
        return True, "apex.optimizers.FusedAdam", ""
    absent = problem == APEX_ABSENT
    return (None, "absent; optional", APEX_BUILD) if absent else (False, problem, APEX_BUILD)


CHECKS: dict[str, tuple[Callable[[], Finding], str]] = {
    "GPU": (_gpu, ""),
    "driver": (_driver, ""),
    "torch": (_torch, "pip install 'torch>=2.11'"),
    "torchvision": (_package("torchvision", "torchvision"), "pip install the torchvision release that matches torch"),
    "triton": (_package("triton", "triton"), "pip install 'triton>=3.6'"),
    "DALI": (_dali, "pip install nvidia-dali-cuda130"),
    "C compiler": (_compiler, ""),
    "apex": (_apex, APEX_BUILD),
}


def report() -> bool:
    """Print a table of findings. Returns whether everything training needs is installed."""
    table = Table("", "component", "found", "fix")
    healthy = True
    for name, (check, fix) in CHECKS.items():
        try:
            works, found, todo = check()
        except Exception as error:  # Reporting any failure is the purpose of this command.
            works, found, todo = False, f"{type(error).__name__}: {error}".splitlines()[0], fix
        healthy = healthy and works is not False
        table.add_row({True: "ok", None: "-", False: "MISSING"}[works], name, found, todo)
    console = Console()
    console.print(table)
    console.print("ready to train" if healthy else "not ready: apply the fixes above")
    return healthy


@dataclass
class DoctorOptions:
    """Check the installation (GPU, driver, torch, triton, DALI, apex) and suggest fixes.

    The exit code is 1 if something that training needs is missing.
    """


def main(argv: list[str]) -> None:
    """Run `remixmatch doctor`."""
    parse(DoctorOptions, "doctor", argv)
    sys.exit(0 if report() else 1)
