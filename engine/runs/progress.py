"""What a run tells while it goes on: metrics.jsonl, and a line on the terminal."""

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
from pipelines.files import write_text

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0  # between lines where the output is not a terminal
FLUSH_SECONDS = 30.0  # between the moments when a logger is given its rows


class MetricsLog:
    """Rows of metrics in a JSON-lines file and in a logger; each row has its `step`.

    Resuming drops the rows of steps that will be trained again, so that a file reads like one undisturbed run. What
    cannot be written while training goes on is kept, and written once that can be done.

    Args:
        folder: the run's.
        step: steps done when the run starts or resumes.
        logger: name of the logger, see `engine.runs.loggers`; "none" for the file alone.
        config: what it is told of the run.

    Raises:
        OSError: it cannot be written to begin with.
    """

    def __init__(
        self, folder: Path, step: int, logger: str = "tensorboard", config: Mapping[str, Any] | None = None
    ) -> None:
        self._folder, self._path = folder, folder / "metrics.jsonl"
        rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        self._lines = [json.dumps(row) + "\n" for row in rows]
        self._file: IO[str] | None = None
        self._logger: Logger | None = None
        self._logged = 0  # the last step of which the logger had the rows to begin with
        self._unlogged: list[Row] = []
        if logger != "none":
            self._logger, self._logged = open_logger(logger, folder, step, config or {})
            for row in rows:
                self._queue(row)
        self._trouble = False
        self._open()

    def _open(self) -> None:
        """Writes everything so far, as a whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(self._lines))
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._next_flush = time.monotonic() + FLUSH_SECONDS

    def add(self, step: int, **values: float) -> None:
        """Adds one row, of no earlier step than the row before."""
        row: dict[str, float] = {"step": step, **values}
        self._lines.append(json.dumps(row) + "\n")
        self._queue(row)
        self._try(self._append)

    def _queue(self, row: Mapping[str, float]) -> None:
        """Keeps a row for the logger, as one with what else there is of its step: clients have one row a step."""
        step = int(row["step"])
        if self._logger is None or step <= self._logged:
            return
        if not self._unlogged or self._unlogged[-1].step < step:
            self._unlogged.append(Row(time.time(), step, {}))
        self._unlogged[-1].values.update((name, value) for name, value in row.items() if name != "step")

    def catch_up(self) -> None:
        """Writes what could not be written when it was added, if that can be done now."""
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
                log.warning(f"metrics cannot be written ({error.strerror or error}); they are kept and tried again")
            self._trouble = True
        else:
            self._trouble = False

    def _flush(self, last: bool = False) -> None:
        """Gives the logger its rows; without `last` not those of the newest step, of which there may be more."""
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
        """Writes what is left.

        Raises:
            OSError: that cannot be done.
        """
        try:
            try:
                if self._file is None:
                    self._open()
                self._flush(last=True)
            except OSError:  # its folder may have gone
                self._let_go()
                self._open()
                self._flush(last=True)
        finally:
            self._let_go()
            if self._logger:
                self._logger.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file; a last line that a kill cut short is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "probe_match" in row:  # omega's name in earlier versions
            row["omega"] = row.pop("probe_match")
        rows.append(row)
    return rows


class ProgressLine:
    """Steps/s, images/s, losses and time left: a live bar on a terminal, a plain line now and then elsewhere.

    Args:
        steps: steps of the whole run.
        quiet: show nothing.
    """

    def __init__(self, steps: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, soft_wrap=True)  # soft: what is logged meanwhile stays one line
        self._steps, self._quiet = steps, quiet
        self._bar: Progress | None = None

    def start(self, step: int, images_per_step: int) -> None:
        """Begins to count time, at `step` steps done; a step trains the network on so many images."""
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
        """Shows the newest figures of `step` steps done."""
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
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()
