"""Metrics and progress of a run: metrics.jsonl, a logger, and a progress bar on the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid

from engine.runs.loggers import Logger, Row, open_logger
from pipelines.files import fits, read_json_lines, write_text

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
THROUGHPUT = ("images_per_second", "step_ms", "memory_mib", "lr")  # See `engine.runs.throughput`.
FLUSH_SECONDS = 30.0  # between writes to the logger

REDRAWS = 1.0  # of the progress line, per second
# Without a terminal there is a line after 5, 10, 20, 40 and 80 s, and then every minute.
FIRST_SECONDS, MOST_SECONDS = 5.0, 60.0
WIDEST_BAR = 20
NOTEBOOK_WIDTH = 100


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
    """Progress of a run: steps, time left, speed and metrics.

    On a terminal it is a line below all messages, redrawn every second, and in a notebook an output that is updated.
    Otherwise it is a line now and then: a log message if those are shown, or else printed to stderr.

    Args:
        steps: Steps of the whole run.
        quiet: Show nothing.
    """

    def __init__(self, steps: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, soft_wrap=True)  # does not wrap messages that are logged meanwhile
        self._steps, self._quiet = steps, quiet
        self._values: Mapping[str, float] = {}
        self._live: Live | None = None
        self._notebook: Any = None
        self._next_line = math.inf

    def start(self, step: int, images_per_step: int) -> None:
        """Start timing after `step` steps; each step trains on `images_per_step` images."""
        self._images_per_step = images_per_step
        now = time.monotonic()
        self._step, self._last = step, now
        self._begin = self._base = step, now
        if self._quiet:
            return
        if self._console.is_interactive and self._console.file.isatty():
            self._live = Live(console=self._console, get_renderable=self._drawn, refresh_per_second=REDRAWS)
            self._live.start(refresh=True)
        elif self._console.is_jupyter:
            from IPython.display import display

            self._notebook = display({"text/plain": self._text()}, raw=True, display_id=True)
            self._next_line = now
        else:
            self._next_line, self._interval = now + FIRST_SECONDS, FIRST_SECONDS

    def advance(self, step: int) -> None:
        """Take note of the number of steps done; called after every step."""
        if step <= self._step:
            return
        now = time.monotonic()
        if self._step == self._begin[0]:
            self._base = step, now  # The first step initializes much, so it does not count once there are more.
        self._step, self._last = step, now
        if now >= self._next_line or (step == self._steps and self._next_line < math.inf):
            self._tell(now)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Take note of the metrics after `step` steps."""
        self._values = values
        self.advance(step)

    def close(self) -> None:
        """Show the last state, and stop redrawing it."""
        if self._live:
            self._live.stop()
        elif self._notebook:
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        """Update the notebook's output, or write a line, and say when to do so again."""
        if self._notebook:
            self._notebook.update({"text/plain": self._text()}, raw=True)
            self._next_line = now + 1 / REDRAWS
            return
        count, left, *words = self._words()
        text = f"step {count}  {left}  {'  '.join(words)}"
        if log.isEnabledFor(logging.INFO):
            log.info(text)
        else:
            print(text, file=self._console.file, flush=True)
        self._next_line = now + self._interval
        self._interval = min(2 * self._interval, MOST_SECONDS)

    def _words(self) -> list[str]:
        """Return steps, time left, speed and metrics, the most important first."""
        step, begin = self._base if self._step > self._base[0] else self._begin
        speed = (self._step - step) / max(self._last - begin, 1e-9)
        left = "time left unknown"
        if self._step >= self._steps:
            left = "0 s left"
        elif speed:
            seconds = (self._steps - self._step) / speed - (time.monotonic() - self._last)
            left = f"{duration(max(seconds, 0.0))} left"
        words = [f"{self._step}/{self._steps}", left]
        if speed:
            words += [f"{speed:.2f} steps/s", f"{speed * self._images_per_step:,.0f} images/s"]
        metrics = [f"{name} {value:.3f}" for name, value in self._values.items()]
        return [*words[:3], *metrics[:2], *words[3:], *metrics[2:]]

    def _drawn(self) -> Grid:
        """Return the line for the width of the console."""
        return self._line(self._console.width)

    def _line(self, width: int) -> Grid:
        """Return steps, a bar, the time left, and as many of the other words as fit."""
        count, left, *words = self._words()
        bar = max(min(WIDEST_BAR if width >= 100 else WIDEST_BAR // 2, width - len(f"{count}  {left}")), 1)
        cells: list[Any] = [count, ProgressBar(max(self._steps, 1), self._step, width=bar), left]
        room = width - len(f"{count} {left} ") - bar
        for word in words:
            room -= len(f"  {word}")
            if room < 0:
                break
            cells.append(f" {word}")
        grid = Grid.grid(padding=(0, 1, 0, 0))
        for _ in cells:
            grid.add_column(no_wrap=True)
        grid.add_row(*cells)
        return grid

    def _text(self) -> str:
        """Return the line as plain text."""
        console = Console(file=io.StringIO(), width=NOTEBOOK_WIDTH, force_jupyter=False)
        with console.capture() as capture:
            console.print(self._line(NOTEBOOK_WIDTH))
        return capture.get().strip()


def duration(seconds: float) -> str:
    """Format a duration, for example as 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
