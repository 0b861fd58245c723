"""Runs Python on a host without a GPU as if it had one: torch finds an emulated CUDA device.

    python -m bench.emulator -m pytest -m "gpu and not hardware"
    python -m bench.emulator -m engine train digits-40 --mode graph

What torch calls of CUDA's runtime and of NCCL is taken over (runtime.cpp, collectives.cpp), and its CUDA kernels are
replaced by its CPU operators over the same memory (operators.cpp). Streams, events, captures and graphs, caching and
pinned allocation, autograd's device threads, DistributedDataParallel and torch's NCCL process groups are the real
thing. Work is done late and in any order that streams and events allow, memory is poisoned when it is new or freed,
and a capture forbids what CUDA forbids: what a host does wrong with a device shows.

What it cannot show: anything about a kernel (Triton's are replaced by their PyTorch twins, torch.compile goes as far as
AOTAutograd and leaves out Inductor), DALI on a device, times, and what libraries such as cuDNN do by themselves.

EMULATED_DEVICES is how many devices there are (2), EMULATED_CAPABILITY, EMULATED_MULTIPROCESSORS and
EMULATED_MEMORY_GIB what they are like. With EMULATED_IDLE=1 they compute nothing: shapes are right and values are not,
which is enough to count launches (`bench count`). It is built once, into build/emulator of a checkout: an installed
package does not have its C++ sources. That takes a C++ compiler, without which tests are skipped with that reason.
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
from engine.measuring.process import search_path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOT_BUILT = "EMULATOR_NOT_BUILT"  # has tests/conftest.py skip what needs the emulated device
SOURCES = ("runtime.h", "runtime.cpp", "collectives.cpp", "operators.cpp")


def build() -> Path:
    """Build the two libraries, unless they are there for these sources and this torch; return their folder.

    Raises:
        UserError: this is no checkout, or there is no C++ compiler.
    """
    if not all((HERE / name).exists() for name in SOURCES):
        raise UserError("the emulated device needs a checkout of the project: its C++ sources are not in the package")
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
        # by this name it is also what others find when they look for the driver
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
    """The C++ compiler of this machine, None where there is none."""
    names = (os.environ.get("CXX", "g++"), "c++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)


def _compile(result: Path, sources: list[str], flags: list[str], links: list[str] | None = None) -> None:
    found = compiler()
    if found is None:
        raise UserError("the emulated device has to be built, which needs a C++ compiler: install g++")
    command = [found, *flags, *(str(HERE / name) for name in sources), "-o", str(result), *(links or [])]
    subprocess.run(command, check=True)


def environment() -> dict[str, str]:
    """Return this process's environment, and in it what gives every Python that is started an emulated device.

    Raises:
        UserError: see `build`.
    """
    folder, path = build(), search_path(HERE / "site", ROOT)
    defaults = {"EMULATED_DEVICES": "2", "OMP_NUM_THREADS": "1"}
    ours = {"LD_PRELOAD": str(folder / "libcuda.so.1"), "EMULATOR": str(folder), "PYTHONPATH": path}
    return defaults | os.environ | ours


def main() -> None:
    """Run Python with the arguments of the command line and an emulated device."""
    if compiler() is None and sys.argv[1:3] == ["-m", "pytest"]:
        variables = os.environ | {NOT_BUILT: "1"}
    else:
        try:
            variables = environment()
        except UserError as error:
            print(f"remixmatch: {error}", file=sys.stderr)
            sys.exit(2)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], variables)
