"""Records of measurements: JSON lines with device, versions and command."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.config.values import flag_of
from engine.errors import UserError
from engine.measuring.provenance import commit, device_name, versions

# The project's own records. The package includes only count.jsonl.
RESULTS = Path(__file__).parents[2] / "bench" / "results"
OUT = Path("bench-results")  # The user's records, in the current folder.

Row = dict[str, Any]


def record(bench: str, device: Any, **values: Any) -> Row:
    """Return a record: the measurements and everything needed to repeat them.

    Args:
        bench: Name of the bench.
        device: The measured torch.device.
        values: Settings and measurements, with units in the names.
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
    """Append a record to a file, which is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """Return all records of a file, or an empty list if it is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Failures:
    """Collects the failed parts of a bench, so that the other parts can continue."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Print the traceback of an exception in the block and record the failure."""
        try:
            yield
        except Exception:  # One failing library or kernel does not affect the other measurements.
            print(f"{name}: failed", file=sys.stderr)
            traceback.print_exc()
            self.names.append(name)

    def finish(self) -> None:
        """Exit with code 1 if any part failed."""
        if self.names:
            sys.exit(f"remixmatch: failed: {'; '.join(self.names)}")


def check_choices(options: Any, **known: Collection[str]) -> None:
    """Raise UserError if an option, or one of its values, is unknown. Empty values are accepted."""
    for name, choices in known.items():
        given = getattr(options, name)
        for value in [given] if isinstance(given, str) else given:
            if value and value not in choices:
                noun = name.replace("_", "-").removesuffix("s")
                raise UserError(f"{flag_of(name)}: unknown {noun} '{value}'; choose from {', '.join(choices)}")


def check_numbers(options: Any, **least: int) -> None:
    """Raise UserError if an option, or one of its values, is too small. None is accepted."""
    for name, bound in least.items():
        given = getattr(options, name)
        if given is not None:
            check_minimum(flag_of(name), given, bound)


def check_minimum(flag: str, given: int | Collection[int], least: int) -> None:
    """Raise UserError if the value of a flag, or one of its values, is too small."""
    for number in [given] if isinstance(given, int) else given:
        if number < least:
            raise UserError(f"{flag} must be at least {least}, got {number}")
