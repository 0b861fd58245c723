"""Run modules in subprocesses: their environment, what they print, and their memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python_environment(*folders: Path) -> dict[str, str]:
    """Return the environment for Python processes, in which no module of the working folder hides one of ours.

    `python -m` and `python -c` search the working folder first, so they would run a user's own `engine/` or `torch.py`.

    Args:
        folders: Folders to search before those of PYTHONPATH; by default the folder of this package.
    """
    current = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # "" is the working folder.
    path = dict.fromkeys([*map(str, folders or [ROOT]), *current])
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def output(*command: str, **environment: str) -> str:
    """Run a module, which does not receive this process's SIGINT, and return what it prints to stdout.

    Args:
        command: Name of the module, and its arguments.
        environment: Additional environment variables.

    Raises:
        RuntimeError: The exit code is not 0.
    """
    variables = python_environment() | environment
    done = subprocess.run(
        [sys.executable, "-m", *command], env=variables, capture_output=True, text=True, process_group=0
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr}")
    return done.stdout


def peak_memory() -> float:
    """Return the peak resident memory of this process in MiB, including pages of mapped files.

    `ru_maxrss` would be wrong here: it starts at the memory of the parent process.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return kibibytes / 1024
