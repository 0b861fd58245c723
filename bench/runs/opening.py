"""`remixmatch bench opening`: the size of a `remixmatch report` page, and how long a browser takes to draw it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro

from bench.registry import Bench, Table
from engine.errors import UserError
from engine.measuring import records
from engine.report import command

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOWS = {"desk": (1400, 900, "light"), "phone": (360, 780, "dark")}  # width, height, colour scheme


@dataclass
class OpeningOptions:
    """Writes the page of some runs, and opens it again and again."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = field(default_factory=tuple)
    """Folders of runs, or folders that hold such folders."""
    out: Path = records.OUT / "opening.jsonl"
    """A row is added to this file."""
    repeats: int = 5
    """Openings in each window, each in a new profile; the median counts."""


def main(options: OpeningOptions) -> None:
    """Writes the page, opens it, and writes a row.

    Raises:
        UserError: a flag that cannot work, no browser, or no runs.
    """
    records.check_numbers(options, repeats=1)
    if problem := missing():
        raise UserError(f"bench opening needs {problem}")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        begin = time.perf_counter()
        found = command.write(command.ReportOptions(options.runs, out=path))
        row: dict[str, Any] = {
            "write_seconds": time.perf_counter() - begin,
            "runs": len(found.runs),
            "megabytes": path.stat().st_size / 1e6,
        }
        with launch() as browser:
            for name, window in WINDOWS.items():
                row[f"{name}_seconds"] = median(_seconds(browser, path, *window) for _ in range(options.repeats))
            row["browser"] = f"chromium {browser.version}"
    BENCH.write(options.out, "opening", torch.device("cpu"), repeats=options.repeats, **row)


def missing() -> str:
    """What there is to install before a page can be opened; "" if nothing."""
    if find_spec("playwright") is None:
        return "playwright: pip install playwright"
    return "" if _program() else "a browser: apt-get install chromium"


@contextmanager
def launch() -> Iterator[Any]:
    """The system's browser, without a window, as playwright's Browser; playwright downloads none."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=_program(), args=flags)
        try:
            yield browser
        finally:
            browser.close()


def _program() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def wait_until_drawn(page: Any) -> None:
    """Waits until all charts of a page of `remixmatch report` that are open are drawn.

    Args:
        page: playwright's Page.
    """
    page.wait_for_selector("html[data-drawn=yes]", timeout=60_000)


def _seconds(browser: Any, path: Path, width: int, height: int, scheme: Any) -> float:
    with browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height}) as context:
        page = context.new_page()
        begin = time.perf_counter()
        page.goto(path.as_uri())
        wait_until_drawn(page)
        return time.perf_counter() - begin


BENCH = Bench(
    options=OpeningOptions,
    main=main,
    quick=None,  # It needs a browser, which not every machine has.
    tables={
        "opening": Table(
            key=("runs",),
            columns={
                "runs on the page": "{runs}",
                "MB": "{megabytes:.2f}",
                "written in, s": "{write_seconds:.1f}",
                "drawn at 1 400 pixels, s": "{desk_seconds:.2f}",
                "at 360, s": "{phone_seconds:.2f}",
                "browser": "{browser}",
            },
        ),
    },
)
