"""The command `remixmatch report`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from engine.commands.parsing import parse
from engine.errors import UserError, cannot_write
from engine.report.reading import Found, read
from pipelines.files import write_bytes

log = logging.getLogger(__name__)

NEEDED = ("altair", "vl_convert", "jinja2")


@dataclass
class ReportOptions:
    """Write one self-contained HTML page about a run, several runs, or a folder of `reproduce` or `ablate`."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="DIR [DIR ...]", help_behavior_hint="(required)"),
    ] = field(default_factory=tuple)
    """Folders of runs, or folders that contain such folders."""
    out: Path | None = None
    """Output file; by default report.html in the given folder, or in the current one if several are given."""
    title: str = ""
    """Title of the page; by default the name of the run or table."""


def main(argv: Sequence[str]) -> None:
    """Entry point of `remixmatch report`.

    Raises:
        UserError: A folder contains no run with metrics, a package is missing, or the file cannot be written.
    """
    write(parse(ReportOptions, "report", list(argv)))


def write(options: ReportOptions) -> Found:
    """Write the page and print its size.

    Returns:
        The content of the page.

    Raises:
        UserError: See `main`.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"report needs {', '.join(missing)}: pip install 'remixmatch-engine[report]'")
    try:
        found = read(options.runs)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    out = options.out or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; it must be a file")
    from engine.report.page import render  # needs the packages checked above

    date = datetime.now(UTC).strftime("%Y-%m-%d")
    page = render(found, options.title, f"Written by remixmatch report on {date}.")
    content = page.encode("utf-8", "replace")  # folder names may be invalid UTF-8
    try:
        write_bytes(out, content)
    except OSError as error:
        raise cannot_write(out, error) from None
    runs = "1 run" if len(found.runs) == 1 else f"{len(found.runs)} runs"
    print(f"{out}: {runs}, {len(content) / 1e6:.1f} MB")
    for each in found.left_out:
        log.warning(each)
    return found
