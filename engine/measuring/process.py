"""Run modules in subprocesses: what they print, and their memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipelines.processes import python_environment


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
