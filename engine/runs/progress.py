"""Metrics and progress of a run: metrics.jsonl, a logger, and a progress bar on the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from engine.runs.loggers import Logger, Row, open_logger
from pipelines.files import fits, read_json_lines, write_text

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 10.0  # between progress lines if stderr is not a terminal
FLUSH_SECONDS = 30.0  # between writes to the logger


class MetricsLog:
    """Metrics in metrics.jsonl and in a logger; each line of the file is an object with a `step`.

    Resuming drops the lines of steps that will be trained again, so the file reads like one undisturbed run. If a write
    fails during training, the lines are kept and written as soon as possible.

    Args:
        folder: Folder of the run.
        step: Steps done when the run starts or resumes.
        logger: Name of the logger, see `engine.runs.loggers`; "none" for the file only.
        config: Configuration that the logger shows with the run.

    Raises:
        OSError: The file cannot be written at the start.
    """

    def __init__(
        self, folder: Path, step: int, logger: str = "tensorboard", config: Mapping[str, Any] | None = None
    ) -> None:
        self._folder, self._path = folder, folder / METRICS
        rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        self._lines = [json.dumps(row) + "\n" for row in rows]
        self._file: IO[str] | None = None
        self._logger: Logger | None = None
        self._logged = 0  # the last step that the logger already had at the start
        self._unlogged: list[Row] = []
        if logger != "none":
            self._logger, self._logged = open_logger(logger, folder, step, config or {})
            for row in rows:
                self._queue(row)
        self._trouble = False
        self._open()

    def _open(self) -> None:
        """Replace the file with all lines so far, and open it for more."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(self._lines))
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._next_flush = time.monotonic() + FLUSH_SECONDS

    def add(self, step: int, **values: float) -> None:
        """Add metrics of a step; steps must not decrease."""
        row: dict[str, float] = {"step": step, **values}
        self._lines.append(json.dumps(row) + "\n")
        self._queue(row)
        self._try(self._append)

    def _queue(self, row: Mapping[str, float]) -> None:
        """Queue metrics for the logger, merged with others of the same step: clients take one record per step."""
        step = int(row["step"])
        if self._logger is None or step <= self._logged:
            return
        if not self._unlogged or self._unlogged[-1].step < step:
            self._unlogged.append(Row(time.time(), step, {}))
        self._unlogged[-1].values.update((name, value) for name, value in row.items() if name != "step")

    def catch_up(self) -> None:
        """Retry writing after a failure."""
        if self._file is None:
            self._try(self._open)

    def _append(self) -> None:
        if self._file is None or not self._path.exists():
            self._let_go()
            self._open()
        else:
            self._file.write(self._lines[-1])
        if time.monotonic() >= self._next_flush:
            self._flush()

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._let_go()
            if not self._trouble:
                log.warning(f"cannot write metrics ({error.strerror or error}); they are kept; retrying")
            self._trouble = True
        else:
            self._trouble = False

    def _flush(self, last: bool = False) -> None:
        """Pass queued metrics to the logger; the newest step only if `last`, since more metrics of it may follow."""
        count = len(self._unlogged) if last else max(0, len(self._unlogged) - 1)
        if self._logger:
            self._logger.write(self._unlogged[:count])
        del self._unlogged[:count]
        self._next_flush = time.monotonic() + FLUSH_SECONDS

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None

    def close(self) -> None:
        """Write the remaining metrics and close the logger.

        Raises:
            OSError: The metrics cannot be written.
        """
        try:
            try:
                if self._file is None:
                    self._open()
                self._flush(last=True)
            except OSError:  # the folder may have been removed
                self._let_go()
                self._open()
                self._flush(last=True)
        finally:
            self._let_go()
            if self._logger:
                self._logger.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the objects of a metrics file, or none if it is missing. Skip damaged lines.

    Raises:
        OSError: The file exists and cannot be read.
    """
    return read_json_lines(path, lambda row: fits(row, {"step": int, str: float}))


class ProgressLine:
    """Progress of a run (steps/s, images/s, losses, time left), as a bar on a terminal or as log messages otherwise.

    Args:
        steps: Steps of the whole run.
        quiet: Show nothing.
    """

    def __init__(self, steps: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, soft_wrap=True)  # does not wrap messages that are logged meanwhile
        self._steps, self._quiet = steps, quiet
        self._bar: Progress | None = None

    def start(self, step: int, images_per_step: int) -> None:
        """Start timing after `step` steps; each step trains on `images_per_step` images."""
        self._images_per_step = images_per_step
        self._begin = self._last_line = time.monotonic()
        self._start = step
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._steps, completed=step)
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics after `step` steps."""
        now = time.monotonic()
        speed = (step - self._start) / max(now - self._begin, 1e-9)
        shown = [f"{speed:.2f} steps/s", f"{speed * self._images_per_step:,.0f} images/s"]
        shown += [f"{name} {value:.3f}" for name, value in values.items()]
        text = "  ".join(shown)
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif not self._quiet and (now - self._last_line >= PLAIN_SECONDS or step == self._steps):
            self._last_line = now
            left = (self._steps - step) / max(speed, 1e-9)
            log.info(f"step {step}/{self._steps}  {text}  {left:.0f} s left")

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar:
            self._bar.stop()
