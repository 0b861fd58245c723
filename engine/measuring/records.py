"""Rows of measurements: JSON lines that say on what, with what and by which command they were measured."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.measuring.provenance import commit, device_name, versions

RESULTS = (
    Path(__file__).parents[2] / "bench" / "results"
)  # the project's own rows, of which count.jsonl comes with the package
OUT = Path("bench-results")  # a user's, in the current folder

Row = dict[str, Any]


def record(bench: str, device: Any, **values: Any) -> Row:
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


def append(path: Path, row: Row) -> None:
    """Adds a row to a file, which is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """All rows of a file; none if it is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Failures:
    """Parts of a bench that failed while the others went on; its exit code tells at the end."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What fails in here is shown with its traceback, and remembered."""
        try:
            yield
        except Exception:  # of somebody else's library, or of a kernel that is wrong: other figures are none the worse
            print(f"{name}: failed", file=sys.stderr)
            traceback.print_exc()
            self.names.append(name)

    def finish(self) -> None:
        """Exits with code 1 if anything failed."""
        if self.names:
            sys.exit(f"remixmatch: failed: {'; '.join(self.names)}")


def check_choices(options: Any, **known: Collection[str]) -> None:
    """Raise UserError if an option, or one of its values, is not among those known; an empty one is left alone."""
    for name, choices in known.items():
        given = getattr(options, name)
        for value in [given] if isinstance(given, str) else given:
            if value and value not in choices:
                raise UserError(f"{_flag(name)}: unknown '{value}'; choose from {', '.join(choices)}")


def check_numbers(options: Any, **least: int) -> None:
    """Raise UserError if an option, or one of its numbers, is too small; None is left alone."""
    for name, bound in least.items():
        given = getattr(options, name)
        if given is not None:
            check_least(_flag(name), given, bound)


def check_least(flag: str, given: int | Collection[int], least: int) -> None:
    """Raise UserError if a flag's number, or one of its numbers, is too small."""
    for number in [given] if isinstance(given, int) else given:
        if number < least:
            raise UserError(f"{flag} must be at least {least}, got {number}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
