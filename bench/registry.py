"""Finds the benches and defines what each of them declares; importing it does not import torch.

A bench is one file NAME.py, in any folder of this package. Its first line gives its name and help line,

    \"\"\"`remixmatch bench NAME`: HELP.

and its last statement defines `BENCH`, a `Bench`. The list of `remixmatch bench --help`, the tables and charts of
`remixmatch bench report` and the flags that the tests add all follow from these.
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

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A kind of record that a bench writes to KIND.jsonl, and how `remixmatch bench report` shows it.

    Attributes:
        key: fields that identify a case. A newer record of a case replaces an older one.
        columns: the format of a cell by the head of its column, such as `"step, ms": "{step_ms:.2f}"`.
        source: how the records came about, a format of their fields.
        make: makes the Markdown from all records, instead of one table per device with these columns.
        chart: draws the newest records of a device, by kind, on matplotlib's Axes.
    """

    key: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    source: str = "Measured on {device}"
    make: Callable[[Sequence[Row]], str] | None = None
    chart: Callable[[Any, Mapping[str, Sequence[Row]]], None] | None = None

    def newest(self, rows: Iterable[Row]) -> dict[str, list[Row]]:
        """Return the newest record of each case by device, in the order in which cases were first measured."""
        cases: dict[str, dict[Any, Row]] = defaultdict(dict)
        for row in rows:
            cases[row["device"]][tuple(row.get(name) for name in self.key)] = row
        return {device: list(found.values()) for device, found in cases.items()}

    def text(self, row: Row) -> str:
        """Return a record as text, each cell after the head of its column; a column without a value is left out."""
        cells = ((head, _cell(form, row)) for head, form in self.columns.items())
        return "; ".join(f"{head}: {cell}" for head, cell in cells if cell.strip())

    def markdown(self, rows: Sequence[Row]) -> str:
        """Return the records as Markdown: by default a table per device, a line per case, and where it comes from."""
        if self.make:
            return self.make(rows)
        parts = []
        for cases in self.newest(rows).values():
            versions = cases[-1]["versions"]
            commits = ", ".join(dict.fromkeys(row["commit"] for row in cases))
            source = self.source.format(**cases[-1])
            body = markdown_table(self.columns, ([_cell(form, row) for form in self.columns.values()] for row in cases))
            parts.append(f"{body}\n\n{source}; torch {versions['torch']}, triton {versions['triton']}; {commits}.")
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Bench:
    """What a bench declares besides its first line.

    Attributes:
        options: dataclass of its flags.
        main: measures and writes records, given the options.
        quick: flags with which it ends within seconds, for tests; None if no flags can make it that quick.
        tables: what it writes, by kind of record: NAME, and any others that it writes with those.
    """

    options: type
    main: Callable[[Any], None]
    quick: str | None
    tables: Mapping[str, Table] = field(default_factory=dict)

    def write(self, path: Path, kind: str, device: Any, /, **values: Any) -> None:
        """Append a record of what was measured on a torch.device to a file, and print it."""
        from engine.measuring import records  # Imports torch.

        records.append(path, records.record(kind, device, **values))
        print(self.tables[kind].text(values), flush=True)


@dataclass(frozen=True)
class Listed:
    """A bench as its file's name and first line give it."""

    module: str
    help: str

    def load(self) -> Bench:
        """Import the bench."""
        return import_module(self.module).BENCH


def find() -> dict[str, Listed]:
    """Return all benches by name, in alphabetical order, without importing them."""
    found = {}
    for folder in map(Path, bench.__path__):
        for path in folder.rglob("*.py"):
            with path.open(encoding="utf-8") as file:
                line = re.match(rf'"""`remixmatch bench {path.stem}`: (.+?)\.(?:""")?$', file.readline())
            if line:
                module = ".".join([bench.__name__, *path.relative_to(folder).with_suffix("").parts])
                found[path.stem] = Listed(module, line[1])
    return dict(sorted(found.items()))


def quartiles(name: str, samples: Any) -> Row:
    """Return the fields NAME, NAME_low and NAME_high of a record: median and quartiles of an array of samples."""
    median, low, high = np.percentile(samples, (50, 25, 75)).tolist()
    return {name: median, f"{name}_low": low, f"{name}_high": high}


def markdown_table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table of cells."""
    heads = list(heads)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


def _cell(form: str, row: Row) -> str:
    try:
        return form.format(**row)
    except (KeyError, TypeError):  # Not measured here: a roofline bound needs a GPU, a ratio the engine.
        return ""
