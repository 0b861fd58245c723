"""Environment of subprocesses that run Python."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_environment(*folders: Path) -> dict[str, str]:
    """Return the environment for Python processes, in which no module of the working folder hides one of ours.

    `python -m` and `python -c` search the working folder first, so they would run a user's own `engine/` or `torch.py`.

    Args:
        folders: Folders to search before those of PYTHONPATH; by default the folder of this package.
    """
    current = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # "" is the working folder.
    path = dict.fromkeys([*map(str, folders or [ROOT]), *current])
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
