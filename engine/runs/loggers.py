"""Loggers of metrics, in addition to metrics.jsonl: TensorBoard, Weights & Biases, trackio.

A logger receives metrics in the order of their steps. For each logger, logged.json in the run's folder holds the last
step it received and the client's run ID. A resumed run continues from there with any logger: it sends the metrics that
the logger lacks, and sends no step twice, because clients cannot undo a step.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipelines.files import first_line, fits, read_json, write_text

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0  # time for a client to finish at the end of a run
OPEN_SECONDS = 30.0  # time for wandb to reach its server before a retry
PROJECT = "remixmatch"  # project name in the clients


class Row(NamedTuple):
    """Metrics of one step and the time of their arrival, in seconds since the epoch."""

    time: float
    step: int
    values: dict[str, float]


class Logger(Protocol):
    """Destination of metrics."""

    def write(self, rows: Sequence[Row]) -> None:
        """Log metrics.

        Raises:
            OSError: They were not logged and must be passed again.
        """

    def close(self) -> None:
        """Log everything received so far, and close."""


def open_logger(name: str, folder: Path, step: int, config: Mapping[str, Any]) -> tuple[Logger, int]:
    """Open a logger by its name; it imports and writes nothing before the first metrics.

    Args:
        name: "tensorboard", "wandb" or "trackio".
        folder: Folder of the run.
        step: Steps done when the run starts or resumes.
        config: Configuration that clients show with the run.

    Returns:
        The logger, and the last step that it already has. The first metrics must be of a later step.
    """
    last = _logged(folder, name).get("step", 0)
    if name == "tensorboard":
        last = min(last, step)
        return Board(folder, last), last
    return Client(name, folder, config), last


def _logged(folder: Path, name: str) -> dict[str, Any]:
    """Return a logger's entry in logged.json, or an empty one if it is missing or damaged."""
    found = read_json(folder / "logged.json").get(name)
    return found if isinstance(found, dict) and fits(found, {"step?": int, "run?": str}) else {}


def _update_state(folder: Path, name: str, **values: Any) -> None:
    known = {each: _logged(folder, each) for each in ("tensorboard", *_OPEN)}
    known[name] |= values
    write_text(folder / "logged.json", json.dumps({each: values for each, values in known.items() if values}) + "\n")


class Board:
    """Writer of TensorBoard event files.

    Unlike TensorBoard's own writer it has no thread, which a write error would end with a traceback.

    Args:
        folder: Folder of the run.
        last: Last step to keep; TensorBoard discards later steps of earlier files.
    """

    _files = itertools.count()

    def __init__(self, folder: Path, last: int) -> None:
        self._folder, self._last = folder, last
        self._path: Path | None = None

    def write(self, rows: Sequence[Row]) -> None:
        """Log metrics. After an error a new file starts with them, and TensorBoard discards those in the old file."""
        try:
            if self._path is None or not self._path.exists():
                self._begin()
            self._append(rows)
        except OSError:
            self._path = None
            raise

    def close(self) -> None:
        """Do nothing; every write is complete."""

    def _begin(self) -> None:
        # Importing this takes half a second, which should not delay the start.
        from tensorboard.compat.proto import event_pb2

        folder = self._folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names; the number orders those of the same second.
        number = f"{os.getpid()}.{next(self._files):06}"
        self._path = folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{number}"
        self._event = event_pb2.Event
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        now = time.time()
        self._write([
            self._event(wall_time=now, file_version="brain.Event:2"),
            self._event(wall_time=now, step=self._last + 1, session_log=start),
        ])  # fmt: skip

    def _append(self, rows: Sequence[Row]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
            events.append(self._event(wall_time=row.time, step=row.step, summary=Summary(value=values)))
        self._write(events)
        if rows:
            _update_state(self._folder, "tensorboard", step=rows[-1].step)
            self._last = rows[-1].step

    def _write(self, events: Iterable[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._path is not None
        with self._path.open("ab") as file:
            records = RecordWriter(file)
            for event in events:
                records.write(event.SerializeToString())


class Client:
    """Runs a third-party client in its own thread so that network waits never block training.

    Errors of the client cause one warning. Unsent metrics are retried with the next ones, and sent by a resumed run if
    any are left at the end. Metrics count as sent once the client has accepted them. A kill loses those that the client
    has not written yet: the last 15 seconds of wandb's offline files.

    Args:
        name: "wandb" or "trackio".
        folder: Folder of the run.
        config: Configuration that the client shows with the run.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._name, self._folder, self._config = name, folder, config
        self._queue: queue.SimpleQueue[Sequence[Row] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._run = ""
        self._failed = False

    def write(self, rows: Sequence[Row]) -> None:
        """Queue metrics for the thread."""
        if rows and self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put(rows)

    def close(self) -> None:
        """Wait until the client has finished, for at most CLOSE_SECONDS."""
        self._queue.put(None)
        if self._thread:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._fail(f"not finished after {CLOSE_SECONDS:g} s")

    def _work(self) -> None:
        rows: list[Row] = []
        client: _Open | None = None
        new: list[Sequence[Row] | None] = []
        while None not in new:
            # Take everything that arrived while the client was busy, for example waiting for a server.
            new = [self._queue.get(), *(self._queue.get() for _ in range(self._queue.qsize()))]
            rows += [row for each in new for row in each or ()]
            before = client
            with self._forgiving():
                client = client or self._open()
                self._give(client, rows)
            if client is not before and client:
                log.info(f"{self._name}: {client.where}")
        if client:
            with self._forgiving():
                client.finish()

    def _give(self, client: _Open, rows: list[Row]) -> None:
        """Have the client log metrics, and remove those it has accepted from the list."""
        last = 0
        try:
            while rows:
                client.log(rows[0])
                last = rows.pop(0).step
        finally:
            if last:
                _update_state(self._folder, self._name, run=self._run, step=last)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Turn any error of the client into a warning, and keep its output off the terminal."""
        try:
            with _quiet():
                yield
        except (Exception, SystemExit) as error:
            self._fail(first_line(error))

    def _open(self) -> _Open:
        self._run = self._run or _logged(self._folder, self._name).get("run") or uuid.uuid4().hex[:8]
        _update_state(self._folder, self._name, run=self._run)
        return _OPEN[self._name](self._folder.resolve(), self._run, dict(self._config))

    def _fail(self, what: str) -> None:
        if not self._failed:
            flag = f"--log {self._name}"
            log.warning(f"{flag} failed ({what}); metrics.jsonl is complete, and --resume {flag} sends the rest")
        self._failed = True


class _Open(NamedTuple):
    """A run opened in a client: where to view it, and functions that log metrics and finish it."""

    where: str
    log: Callable[[Row], object]
    finish: Callable[[], object]


def _open_wandb(folder: Path, run_id: str, config: dict[str, Any]) -> _Open:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=run_id,
        resume="allow",
        dir=folder,
        config=config,
        reinit="create_new",  # not the run that a caller of engine.api may have open
        settings=wandb.Settings(silent=True, console="off", init_timeout=OPEN_SECONDS),
    )

    def log(row: Row) -> None:
        # Commit at once: no more metrics of this step follow, and a kill would lose uncommitted ones.
        run.log({**row.values, "_timestamp": row.time}, step=row.step, commit=True)

    where = f"wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)
    return _Open(where, log, run.finish)


def _open_trackio(folder: Path, run_id: str, config: dict[str, Any]) -> _Open:
    import trackio

    # trackio identifies runs by name, and two folders may have the same name.
    run = trackio.init(PROJECT, name=f"{folder.name}-{run_id}", resume="allow", config=config, embed=False)
    where = f"trackio show --project {PROJECT}"
    return _Open(where, lambda row: run.log(dict(row.values), step=row.step), run.finish)


_OPEN: dict[str, Callable[[Path, str, dict[str, Any]], _Open]] = {"wandb": _open_wandb, "trackio": _open_trackio}


class _Others:
    """A stream that discards the output of the thread that created it, and is no terminal for that thread."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def _mine(self) -> bool:
        return threading.get_ident() == self._thread

    def write(self, text: str) -> int:
        return len(text) if self._mine() else self._stream.write(text)

    def isatty(self) -> bool:
        return not self._mine() and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep this thread's output off the terminal: stdout is for results, and stderr for progress.

    Without a terminal, wandb raises an error for a missing API key instead of asking for it in the middle of a run.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    ours = {name: _Others(stream) for name, stream in before.items()}
    for name, stream in ours.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in ours.items():
            if getattr(sys, name) is stream:  # if a client hangs, others may have replaced it meanwhile
                setattr(sys, name, before[name])
