"""Rows of measurements: JSON lines that say on what, with what and by which command they were measured."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.run import device_name, versions

RESULTS = Path(__file__).parent / "results"


@functools.cache
def commit() -> str:
    """The commit when first asked, marked where the working tree differs from it; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(bench: str, device: Any, **values: Any) -> dict[str, Any]:
    """One row: what was measured, and everything needed to measure it again.

    Args:
        bench: which bench.
        device: the torch.device measured.
        values: figures, their units in their names.
    """
    return {
        "bench": bench,
        **values,
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "command": "remixmatch " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file, which is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none if it is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
