"""What watches over a run from outside its steps: signals that ask for its end, and a clock for ranks that hang."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOK_SECONDS = 0.25


class StopRequest:
    """SIGTERM, SIGINT and SIGHUP as a wish, which the training loop grants after a step.

    Attributes:
        number: of the first signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while it lasts; does nothing outside the main thread, where Python has no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]  # as nohup has it
        before = {each: signal.signal(each, self._take) for each in wanted}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            # a second one ends this process, as does the end of a torchrun that got it. By the system's own hand, since
            # Python's would wait for a collective that another rank may never join
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Watchdog:
    """Ends this process with a message when no sign of life came for some time.

    A collective waits in native code, a captured one not even there: nothing but another thread can end it. Time in
    which this process was itself stopped or starved does not count.

    Args:
        seconds: without a sign of life.
        rank: named in the message.
    """

    EXIT_CODE = 75  # a temporary failure, in the words of sysexits.h

    def __init__(self, seconds: float, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._idle, self._doing = 0.0, "starting"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def alive(self, doing: str) -> None:
        """A sign of life; `doing` is what comes next, for the message."""
        self._idle, self._doing = 0.0, doing

    def _watch(self) -> None:
        seen = time.monotonic()
        while not self._end.wait(_LOOK_SECONDS):
            now = time.monotonic()
            self._idle += min(now - seen, 2 * _LOOK_SECONDS)
            seen = now
            if self._idle >= self._seconds:
                print(
                    f"remixmatch: rank {self._rank}: nothing came of {self._doing} for {self._seconds:g} s "
                    "(--timeout): another rank hangs or is lost; this one ends, go on with --resume",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(self.EXIT_CODE)
