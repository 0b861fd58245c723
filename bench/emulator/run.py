"""Run Python with an emulated CUDA device on a host without a GPU.

    python -m bench.emulator -m pytest -m "gpu and not hardware"
    python -m bench.emulator -m engine train digits-40 --mode graph

The emulator implements the functions of the CUDA runtime and of NCCL that torch calls (runtime.cpp, collectives.cpp),
and replaces torch's CUDA kernels with CPU operators on the same memory (operators.cpp). torch's own code for streams,
events, graph capture, the caching and pinned allocators, autograd's device threads, DistributedDataParallel and NCCL
process groups runs unchanged. To expose errors in host code, work is done late and in any order that streams and
events allow, new and freed memory is poisoned, and captures forbid what CUDA forbids.

It cannot test kernels (Triton kernels are replaced by their reference implementations, and torch.compile stops after
AOTAutograd, without Inductor), DALI on a device, timings, or the behavior of libraries such as cuDNN.

EMULATED_DEVICES sets the number of devices (default 2); EMULATED_CAPABILITY, EMULATED_MULTIPROCESSORS and
EMULATED_MEMORY_GIB set their properties. With EMULATED_IDLE=1 nothing is computed: shapes are correct but values are
not, which suffices to count launches (`bench count`). The emulator is built once, in build/emulator of a checkout. This
requires a C++ compiler and the C++ sources, which are not part of the package. Without a compiler, the tests are
skipped.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from engine.errors import UserError
from pipelines.processes import python_environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOT_BUILT = "EMULATOR_NOT_BUILT"  # Tells tests/conftest.py to skip tests that need the emulated device.
SOURCES = ("runtime.h", "runtime.cpp", "collectives.cpp", "operators.cpp")


def build() -> Path:
    """Build the two libraries, unless they exist for these sources and this torch, and return their folder.

    Raises:
        UserError: This is not a checkout, or there is no C++ compiler.
    """
    if not all((HERE / name).exists() for name in SOURCES):
        raise UserError("the emulated device needs a checkout of the project; its C++ sources are not in the package")
    content = b"".join((HERE / name).read_bytes() for name in (*SOURCES, "run.py"))
    key = hashlib.sha256(content + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    folder = ROOT / "build" / "emulator" / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "built").exists():
            return folder
        torch, triton = _folder("torch"), _folder("triton")
        nvidia = torch.parent / "nvidia"
        system = (torch / "include", torch / "include/torch/csrc/api/include", nvidia / "nccl/include")
        cuda = (*sorted(nvidia.glob("cu*/include")), triton / "backends/nvidia/include")
        flags = ["-std=c++20", "-O1", "-Wall", "-shared", "-fPIC"]
        flags += [option for path in (*system, *cuda) for option in ("-isystem", str(path))]
        # Other libraries load this file instead of the driver, because of its name.
        _compile(folder / "libcuda.so.1", ["runtime.cpp", "collectives.cpp"], [*flags, "-Wl,-soname,libcuda.so.1"])
        libraries = ["-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda"]
        links = [f"-L{folder}", "-l:libcuda.so.1", f"-L{torch / 'lib'}", *libraries]
        _compile(folder / "operators.so", ["operators.cpp"], flags, links)
        (folder / "built").touch()
    return folder


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"the emulated device needs {package}")
    return Path(found.origin).parent


def compiler() -> str | None:
    """Return the C++ compiler of this machine, or None."""
    names = (os.environ.get("CXX", "g++"), "c++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)


def _compile(result: Path, sources: list[str], flags: list[str], links: list[str] | None = None) -> None:
    found = compiler()
    if found is None:
        raise UserError("building the emulated device needs a C++ compiler: install g++")
    command = [found, *flags, *(str(HERE / name) for name in sources), "-o", str(result), *(links or [])]
    subprocess.run(command, check=True)


def environment() -> dict[str, str]:
    """Return the environment for Python processes with an emulated device.

    Raises:
        UserError: The device cannot be built. See `build`.
    """
    folder = build()
    defaults = {"EMULATED_DEVICES": "2", "OMP_NUM_THREADS": "1"}
    ours = {"LD_PRELOAD": str(folder / "libcuda.so.1"), "EMULATOR": str(folder)}
    return defaults | python_environment(HERE / "site", ROOT) | ours


def main() -> None:
    """Run Python with the command-line arguments and an emulated device."""
    if compiler() is None and sys.argv[1:3] == ["-m", "pytest"]:
        variables = os.environ | {NOT_BUILT: "1"}
    else:
        try:
            variables = environment()
        except UserError as error:
            print(f"remixmatch: {error}", file=sys.stderr)
            sys.exit(2)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], variables)
