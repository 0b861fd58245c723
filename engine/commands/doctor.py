"""`remixmatch doctor`: check the installation and suggest fixes."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine import __version__
from engine.commands.parsing import DataDir, parse
from engine.errors import APEX_BUILD
from pipelines.data.cache import data_dir, set_data_dir

EXTRAS = {  # Optional packages of setup.py's extras.
    "timm": ("timm",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "slurm": ("submitit",),
    "report": ("altair", "vl-convert-python", "jinja2"),
}
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # Flags of /proc/cpuinfo that speed up training.

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


def _engine() -> Finding:
    return True, f"remixmatch-engine {__version__}, Python {sys.version.split()[0]}", ""


def _cpu() -> Finding:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    here = [name for name in CPU_FEATURES if name in flags]
    return True, f"has {', '.join(here) or 'none'} of {', '.join(CPU_FEATURES)}", ""


def _threads() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0))
    given = os.environ.get("OMP_NUM_THREADS")
    setting = f"OMP_NUM_THREADS={given}" if given else "OMP_NUM_THREADS is not set"
    return True, f"torch uses {torch.get_num_threads()} on {cores} cores ({setting})", ""


def _extra(name: str) -> Callable[[], Finding]:
    def check() -> Finding:
        try:
            return True, ", ".join(f"{package} {version(package)}" for package in EXTRAS[name]), ""
        except PackageNotFoundError as error:
            return None, f"{error.name} is not installed; optional", f"pip install 'remixmatch-engine[{name}]'"

    return check


def _data() -> Finding:
    folder = data_dir()
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free / 2**30
    if not os.access(place, os.W_OK):
        return None, f"{folder} cannot be written", "set REMIXMATCH_DATA or --data-dir to another folder"
    return True, f"{folder}{'' if place == folder else ' (not created yet)'}, {free:.1f} GiB free", ""


CHECKS: dict[str, tuple[Callable[[], Finding], str]] = {
    "engine": (_engine, ""),
    "CPU": (_cpu, ""),
    "threads": (_threads, ""),
    "GPU": (_gpu, ""),
    "driver": (_driver, ""),
    "torch": (_torch, "pip install 'torch>=2.11'"),
    "torchvision": (_package("torchvision", "torchvision"), "pip install the torchvision release that matches torch"),
    "triton": (_package("triton", "triton"), "pip install 'triton>=3.6'"),
    "DALI": (_dali, "pip install nvidia-dali-cuda130"),
    "C compiler": (_compiler, ""),
    "apex": (_apex, APEX_BUILD),
    **{f"extra {name}": (_extra(name), "") for name in EXTRAS},
    "data": (_data, "set REMIXMATCH_DATA or --data-dir to another folder"),
}


def findings() -> dict[str, Finding]:
    """Return the result of every check."""
    found: dict[str, Finding] = {}
    for name, (check, fix) in CHECKS.items():
        try:
            found[name] = check()
        except Exception as error:  # Reporting any failure is the purpose of this command.
            found[name] = False, f"{type(error).__name__}: {error}".splitlines()[0], fix
    return found


def _print_table(found: dict[str, Finding], ready: bool) -> None:
    table = Table("", "component", "found", "fix")
    for name, (works, text, fix) in found.items():
        table.add_row({True: "ok", None: "-", False: "MISSING"}[works], name, text, fix)
    Console().print(table)
    print("ready to train" if ready else "not ready: apply the fixes above")


@dataclass
class DoctorOptions:
    """Check the installation (GPU, driver, torch, triton, DALI, apex, extras, data folder) and suggest fixes.

    The exit code is 1 if something that training needs is missing.
    """

    json: bool = False
    """Print JSON."""
    data_dir: DataDir = None


def main(argv: list[str]) -> None:
    """Run `remixmatch doctor`."""
    options: DoctorOptions = parse(DoctorOptions, "doctor", argv)
    set_data_dir(options.data_dir)
    found = findings()
    ready = all(works is not False for works, _, _ in found.values())
    if options.json:
        states = {True: "ok", None: "optional", False: "missing"}
        checks = {
            name: {"state": states[works], "found": text, "fix": fix} for name, (works, text, fix) in found.items()
        }
        print(json.dumps({"version": __version__, "ready": ready, "checks": checks}, indent=2))
    else:
        _print_table(found, ready)
    sys.exit(0 if ready else 1)
