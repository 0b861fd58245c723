"""Where metrics go beside metrics.jsonl: TensorBoard, or Weights & Biases or trackio by their own clients.

A logger is given rows in the order of their steps. What it was given stands in logged.json of the run's folder, by its
name: the last step, and the client's id of the run. A resumed run goes on from there, whatever logged it before: what
a logger lacks of metrics.jsonl is given to it, and a client, which cannot take a row back, is given no step twice.
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

from pipelines.files import first_line, read_json, write_text

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0  # that a client is given at the end of a run
OPEN_SECONDS = 30.0  # that wandb is given to reach its server, before it is tried again
PROJECT = "remixmatch"  # in which the clients show a run


class Row(NamedTuple):
    """Metrics of one step, with the time when they came, in s."""

    time: float
    step: int
    values: dict[str, float]


class Logger(Protocol):
    """Takes rows of metrics."""

    def write(self, rows: Sequence[Row]) -> None:
        """Adds rows.

        Raises:
            OSError: they are to be given again.
        """

    def close(self) -> None:
        """Ends it, with all that it was given."""


def open_logger(name: str, folder: Path, step: int, config: Mapping[str, Any]) -> tuple[Logger, int]:
    """A logger by its name, which imports nothing and writes nothing before its first row.

    Args:
        name: "tensorboard", "wandb" or "trackio".
        folder: the run's.
        step: steps done when the run starts or resumes.
        config: what clients are told of the run.

    Returns:
        The logger, and the last step that it has and keeps; its first row is to be of a later one.
    """
    last = _logged(folder, name).get("step", 0)
    if name == "tensorboard":
        last = min(last, step)
        return Board(folder, last), last
    return Client(name, folder, config), last


def _logged(folder: Path, name: str) -> dict[str, Any]:
    """What logged.json says of a logger; nothing where it is not there or damaged."""
    found = read_json(folder / "logged.json").get(name)
    return found if isinstance(found, dict) else {}


def _update_state(folder: Path, name: str, **values: Any) -> None:
    known = {each: _logged(folder, each) for each in ("tensorboard", *_OPEN)}
    known[name] |= values
    write_text(folder / "logged.json", json.dumps({each: values for each, values in known.items() if values}) + "\n")


class Board:
    """Files of TensorBoard's, which nothing but `write` writes to.

    Its own writer has a thread that writes, and that an error ends with a traceback.

    Args:
        folder: the run's.
        last: what earlier files say of steps after this one is to be forgotten.
    """

    _files = itertools.count()

    def __init__(self, folder: Path, last: int) -> None:
        self._folder, self._last = folder, last
        self._path: Path | None = None

    def write(self, rows: Sequence[Row]) -> None:
        """Adds rows; after an error the next file begins with them, and what this one has of them is forgotten."""
        try:
            if self._path is None or not self._path.exists():
                self._begin()
            self._append(rows)
        except OSError:
            self._path = None
            raise

    def close(self) -> None:
        """Nothing is left to do."""

    def _begin(self) -> None:
        # imported when there is something to write: that takes half a second, for which no start should wait
        from tensorboard.compat.proto import event_pb2

        folder = self._folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, of which those of one second differ in the number
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
    """A client of somebody else's, in a thread of its own: it may wait for a network, and no step should.

    What it raises is one warning. The rows are kept and tried again with the next ones; what is left at the end, a
    resumed run gives it. A row counts as given once the client has taken it. After a kill those are missing that it had
    not written yet: of wandb's offline files the last 15 seconds.

    Args:
        name: "wandb" or "trackio".
        folder: the run's.
        config: of the run.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._name, self._folder, self._config = name, folder, config
        self._queue: queue.SimpleQueue[Sequence[Row] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._run = ""
        self._failed = False

    def write(self, rows: Sequence[Row]) -> None:
        """Leaves rows to the thread."""
        if rows and self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put(rows)

    def close(self) -> None:
        """Waits until the client has ended, but not for long."""
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
            # with all that came while the client was busy, such as waiting for a server that is not there
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
        """Has the client log rows, and takes those off that it has taken."""
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
        """Whatever a client fails by, training goes on; what it prints is kept from the terminal."""
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
            log.warning(f"--log {self._name} failed ({what}); metrics.jsonl has every row, and --resume sends the rest")
        self._failed = True


class _Open(NamedTuple):
    """A client's run: where it is shown, and what logs a row and ends it."""

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
        reinit="create_new",  # not into a run that the caller of engine.api may have open
        settings=wandb.Settings(silent=True, console="off", init_timeout=OPEN_SECONDS),
    )

    def log(row: Row) -> None:
        # complete, since no later row has its step: what it waits with, a kill would lose
        run.log({**row.values, "_timestamp": row.time}, step=row.step, commit=True)

    where = f"wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)
    return _Open(where, log, run.finish)


def _open_trackio(folder: Path, run_id: str, config: dict[str, Any]) -> _Open:
    import trackio

    # known by its name, which of two folders may be one
    run = trackio.init(PROJECT, name=f"{folder.name}-{run_id}", resume="allow", config=config, embed=False)
    where = f"trackio show --project {PROJECT}"
    return _Open(where, lambda row: run.log(dict(row.values), step=row.step), run.finish)


_OPEN: dict[str, Callable[[Path, str, dict[str, Any]], _Open]] = {"wandb": _open_wandb, "trackio": _open_trackio}


class _Others:
    """A stream, but for what the thread that made this writes, to which it is no terminal."""

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
    """Keeps this thread's words from the terminal: stdout is for results, and stderr for the progress of the run.

    wandb asks for a missing key on a terminal, and raises without one; nobody would expect the question in the middle
    of a run.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    ours = {name: _Others(stream) for name, stream in before.items()}
    for name, stream in ours.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in ours.items():
            if getattr(sys, name) is stream:  # where a client hangs, others may have replaced it in the meantime
                setattr(sys, name, before[name])
