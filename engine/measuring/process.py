"""Modules run in processes of their own, where a start, a process's memory or another device is what is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def search_path(*folders: Path) -> str:
    """PYTHONPATH for a process that finds modules in these folders first, and then where this one was told to look."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def output(*command: str, **environment: str) -> str:
    """What a module prints.

    Args:
        command: the module's name, and its arguments.
        environment: variables that it has besides this process's.

    Raises:
        RuntimeError: it ended with another exit code than 0.
    """
    variables = os.environ | {"PYTHONPATH": search_path(Path(__file__).parents[2])} | environment
    done = subprocess.run([sys.executable, "-m", *command], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr}")
    return done.stdout


def peak_memory() -> float:
    """The most memory that this process has had resident, pages of mapped files included, in MiB.

    Not `ru_maxrss`: that begins with the memory of the process which started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return kibibytes / 1024
