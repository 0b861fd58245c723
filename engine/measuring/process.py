"""Run modules in subprocesses, to measure startup or memory or to use another device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def search_path(*folders: Path) -> str:
    """Return a PYTHONPATH with these folders before the current PYTHONPATH."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def output(*command: str, **environment: str) -> str:
    """Run a module and return what it prints to stdout.

    Args:
        command: Name of the module, and its arguments.
        environment: Additional environment variables.

    Raises:
        RuntimeError: The exit code is not 0.
    """
    variables = os.environ | {"PYTHONPATH": search_path(Path(__file__).parents[2])} | environment
    done = subprocess.run([sys.executable, "-m", *command], env=variables, capture_output=True, text=True)
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
