"""Registry of the benches. Importing it does not import torch.

A bench is a file NAME.py in any folder of this package. Its first line contains its name and help text,

    \"\"\"`remixmatch bench NAME`: HELP.

and its last statement defines `BENCH`, a `Bench`. `remixmatch bench --help`, `remixmatch bench report` and the tests
are driven by these two.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import bench

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A kind of record that a bench writes to KIND.jsonl, and how `remixmatch bench report` displays it.

    Attributes:
        key: Fields that identify a case. A newer record of a case replaces an older one.
        columns: Format string of each column by its heading, such as `"step, ms": "{step_ms:.2f}"`.
        source: Format string of the sentence below a table, filled with the fields of its last record.
        make: Replaces the default Markdown, one table per device; called with all records.
        chart: Draws the newest records of one device, given by kind, on a matplotlib Axes.
    """

    key: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    source: str = "Measured on {device}"
    make: Callable[[Sequence[Record]], str] | None = None
    chart: Callable[[Any, Mapping[str, Sequence[Record]]], None] | None = None

    def newest(self, records: Iterable[Record]) -> dict[str, list[Record]]:
        """Return the newest record of each case by device, in the order in which cases were first measured."""
        cases: dict[str, dict[Any, Record]] = defaultdict(dict)
        for record in records:
            cases[record["device"]][tuple(record.get(name) for name in self.key)] = record
        return {device: list(by_key.values()) for device, by_key in cases.items()}

    def text(self, record: Record) -> str:
        """Return a record as one line of "heading: value" pairs, without the columns that have no value."""
        cells = ((heading, _cell(template, record)) for heading, template in self.columns.items())
        return "; ".join(f"{heading}: {cell}" for heading, cell in cells if cell.strip())

    def markdown(self, records: Sequence[Record]) -> str:
        """Return the records as Markdown, by default a table per device followed by the versions and commits."""
        if self.make:
            return self.make(records)
        parts = []
        for cases in self.newest(records).values():
            versions = cases[-1]["versions"]
            commits = ", ".join(dict.fromkeys(record["commit"] for record in cases))
            source = self.source.format(**cases[-1])
            lines = ([_cell(template, record) for template in self.columns.values()] for record in cases)
            body = markdown_table(self.columns, lines)
            parts.append(f"{body}\n\n{source}; torch {versions['torch']}, triton {versions['triton']}; {commits}.")
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Bench:
    """Definition of a bench.

    Attributes:
        options: Dataclass of its flags.
        main: Function that takes the options, measures and writes records.
        quick: Flags that make it finish within seconds, for tests; None if it cannot be that fast.
        tables: Its kinds of records: NAME, and any others it writes.
    """

    options: type
    main: Callable[[Any], None]
    quick: str | None
    tables: Mapping[str, Table] = field(default_factory=dict)

    def write(self, path: Path, kind: str, device: Any, /, **values: Any) -> None:
        """Append a record of values measured on a torch.device to a file, and print it."""
        from engine.measuring import records  # Imports torch.

        records.append(path, records.record(kind, device, **values))
        print(self.tables[kind].text(values), flush=True)


@dataclass(frozen=True)
class Listed:
    """Module and help text of a bench that has not been imported."""

    module: str
    help: str

    def load(self) -> Bench:
        """Import the bench."""
        return import_module(self.module).BENCH


def find() -> dict[str, Listed]:
    """Return all benches by name, in alphabetical order, without importing them."""
    benches = {}
    for folder in map(Path, bench.__path__):
        for path in folder.rglob("*.py"):
            with path.open(encoding="utf-8") as file:
                line = re.match(rf'"""`remixmatch bench {path.stem}`: (.+?)\.(?:""")?$', file.readline())
            if line:
                module = ".".join([bench.__name__, *path.relative_to(folder).with_suffix("").parts])
                benches[path.stem] = Listed(module, line[1])
    return dict(sorted(benches.items()))


def quartiles(name: str, samples: Any) -> Record:
    """Return the median and the quartiles of an array of samples as fields NAME, NAME_low and NAME_high."""
    median, low, high = np.percentile(samples, (50, 25, 75)).tolist()
    return {name: median, f"{name}_low": low, f"{name}_high": high}


def markdown_table(headings: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table of headings and lines of cells."""
    headings = list(headings)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, ["---"] * len(headings), *lines])


def _cell(template: str, record: Record) -> str:
    try:
        return template.format(**record)
    except (KeyError, TypeError):  # Not every record has every column: host time, for example, needs a GPU.
        return ""
