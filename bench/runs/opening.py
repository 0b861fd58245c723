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
WINDOWS = {"desk": (1400, 900, "light"), "phone": (360, 780, "dark")}  # Width, height, color scheme.


@dataclass
class OpeningOptions:
    """Write the page of some runs, and open it repeatedly."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = field(default_factory=tuple)
    """Run folders, or folders that contain run folders."""
    out: Path = records.OUT / "opening.jsonl"
    """File to append a record to."""
    repeats: int = 5
    """Number of times the page is opened in each window, with a new profile; the median is reported."""


def main(options: OpeningOptions) -> None:
    """Write the page, open it, and write a record.

    Raises:
        UserError: A flag is invalid, or the browser or the runs are missing.
    """
    records.check_numbers(options, repeats=1)
    if problem := missing():
        raise UserError(f"bench opening requires {problem}")
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
    """Return what has to be installed to open a page; "" if nothing is missing."""
    if find_spec("playwright") is None:
        return "playwright: pip install playwright"
    return "" if _program() else "a browser: apt-get install chromium"


@contextmanager
def launch() -> Iterator[Any]:
    """Start the system's browser headless, as a playwright Browser; playwright does not download one."""
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
    """Wait until all visible charts of a `remixmatch report` page are drawn.

    Args:
        page: A playwright Page.
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
    quick=None,  # Requires a browser, which not every machine has.
    tables={
        "opening": Table(
            key=("runs",),
            columns={
                "runs": "{runs}",
                "size, MB": "{megabytes:.2f}",
                "writing, s": "{write_seconds:.1f}",
                "drawing at 1 400 pixels, s": "{desk_seconds:.2f}",
                "drawing at 360 pixels, s": "{phone_seconds:.2f}",
                "browser": "{browser}",
            },
        ),
    },
)
