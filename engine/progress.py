"""What a run tells while it goes on: metrics.jsonl, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between lines where the output is not a terminal
BOARD_SECONDS = 30.0  # between flushes of TensorBoard's file


class MetricsLog:
    """Rows of metrics in a JSON-lines file and in TensorBoard; each row has its `step`.

    Resuming drops the rows of steps that will be trained again, so that a file reads like one undisturbed run. What
    cannot be written while training goes on is kept, and written once that can be done.

    Args:
        folder: the run's.
        step: steps done when the run starts or resumes.
        warn: called with one line when writing fails.

    Raises:
        OSError: it cannot be written to begin with.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        self._folder, self._path = folder, folder / "metrics.jsonl"
        self._warn = warn
        self._lines = [json.dumps(row) + "\n" for row in read_metrics(self._path) if row["step"] <= step]
        self._file: IO[str] | None = None
        self._board: _Board | None = None
        self._flushed = step + 1  # the first step that TensorBoard's file does not surely have
        self._unflushed: list[tuple[float, dict[str, float]]] = []  # beside each row the time when it came, in s
        self._trouble = False
        self._open()

    def _open(self) -> None:
        """Writes everything so far, as a whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(self._lines), encoding="utf-8")
        partial.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._next_flush = time.monotonic() + BOARD_SECONDS

    def add(self, step: int, **values: float) -> None:
        """Adds one row."""
        row: dict[str, float] = {"step": step, **values}
        self._lines.append(json.dumps(row) + "\n")
        self._unflushed.append((time.time(), row))
        self._try(self._append)

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
                self._warn(f"metrics cannot be written ({error.strerror or error}); they are kept and tried again")
            self._trouble = True
        else:
            self._trouble = False

    def _flush(self) -> None:
        if self._board is None:
            self._board = _Board(self._folder / "tensorboard", self._flushed)
        self._board.write(self._unflushed)
        if self._unflushed:
            self._flushed = int(self._unflushed[-1][1]["step"]) + 1
        self._unflushed.clear()
        self._next_flush = time.monotonic() + BOARD_SECONDS

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = self._board = None

    def close(self) -> None:
        """Writes what is left.

        Raises:
            OSError: that cannot be done.
        """
        try:
            try:
                if self._file is None:
                    self._open()
                self._flush()
            except OSError:  # its folder may have gone
                self._let_go()
                self._open()
                self._flush()
        finally:
            self._let_go()


class _Board:
    """A file of TensorBoard's, which nothing but `write` writes to.

    Its own writer has a thread that writes, and that an error ends with a traceback.

    Args:
        folder: made if missing.
        step: what earlier files say of this step and later ones is to be forgotten.
    """

    _files = itertools.count()

    def __init__(self, folder: Path, step: int) -> None:
        # imported when there is something to write: that takes half a second, for which no step should wait
        from tensorboard.compat.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, of which those of one second differ in the number
        number = f"{os.getpid()}.{next(self._files):06}"
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{number}"
        self._path = folder / name
        self._event = event_pb2.Event
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        now = time.time()
        self._append([
            self._event(wall_time=now, file_version="brain.Event:2"),
            self._event(wall_time=now, step=step, session_log=start),
        ])  # fmt: skip

    def write(self, rows: Iterable[tuple[float, Mapping[str, float]]]) -> None:
        """Adds rows, each with its time in s; after an error the file is good up to there, and takes no more."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        for when, row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
            events.append(self._event(wall_time=when, step=int(row["step"]), summary=Summary(value=values)))
        self._append(events)

    def _append(self, events: Iterable[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self._path.open("ab") as file:
            records = RecordWriter(file)
            for event in events:
                records.write(event.SerializeToString())


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
        quiet: say nothing but warnings.
        silent: nor those.
    """

    def __init__(self, steps: int, quiet: bool = False, silent: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet or silent, soft_wrap=True)
        self._silent = silent
        self._steps = steps
        self._bar: Progress | None = None

    def start(self, step: int, images_per_step: int) -> None:
        """Begins to count time, at `step` steps done; a step trains the network on so many images."""
        self._images_per_step = images_per_step
        self._begin = self._last_line = time.monotonic()
        self._start = step
        if self.console.is_terminal and not self.console.quiet:
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
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
        elif now - self._last_line >= PLAIN_SECONDS or step == self._steps:
            self._last_line = now
            left = (self._steps - step) / max(speed, 1e-9)
            self.say(f"step {step}/{self._steps}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """Prints one line without disturbing the bar."""
        self.console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """Says one line even where nothing else is said."""
        if self._silent:
            return
        if self.console.quiet:
            print(f"remixmatch: {text}", file=sys.stderr, flush=True)
        else:
            self.say(text)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()
