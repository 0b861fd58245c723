"""What a result depends on: versions, commit and device, in words."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("remixmatch-engine", "torch", "triton", "nvidia-dali-cuda130", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


@functools.cache
def commit() -> str:
    """The commit when first asked, marked where the working tree differs from it; "unknown" outside a checkout.

    Where files were copied without their history, the variable REMIXMATCH_COMMIT can name it.
    """
    if given := os.environ.get("REMIXMATCH_COMMIT"):
        return given
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the repository is that of whoever installed us
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or CPU with its processor and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"CPU, {model}, {torch.get_num_threads()} threads of {os.cpu_count()}"
