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
from typing import NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOK_SECONDS = 0.25
_POLL_SECONDS = 0.05
DEAF_SECONDS = 5.0  # in which Python has not got to a signal: it waits in native code, for what may never come


class StopRequest:
    """A request to stop, by SIGTERM, SIGINT, SIGHUP or another thread, which whoever works grants when it can.

    Attributes:
        number: of the first signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._come = 0
        self._inbox = -1

    def ask(self, number: int) -> None:
        """Request to stop as if a signal of that number had come."""
        self.number = self.number or number

    def wait(self, seconds: float) -> bool:
        """Wait for a request, but not longer than so many seconds. Returns whether there is one.

        It looks now and then: a handler of signals that sets a `threading.Event` for which the same thread waits can
        lock up.
        """
        end = time.monotonic() + seconds
        while not self.number and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
        return self.number != 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while it lasts; does nothing outside the main thread, where Python has no signals.

        A second SIGINT ends the process at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]  # as nohup has it
        self._inbox, outbox = os.pipe()
        for end in (self._inbox, outbox):
            os.set_blocking(end, False)
        waker = signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
        before = {each: signal.signal(each, self._take) for each in wanted}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
            signal.set_wakeup_fd(waker)
            for end in (self._inbox, outbox):
                os.close(end)
            self._inbox = -1

    def unheard(self) -> int:
        """The number of a signal that the system has delivered and Python has not got to, or 0; for other threads."""
        if self._inbox < 0:  # nobody listens
            return 0
        with contextlib.suppress(BlockingIOError):
            self._come = next((each for each in os.read(self._inbox, 64) if each in _SIGNALS), self._come)
        if self.number:  # Python has got to it
            self._come = 0
        return self._come

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.ask(number)
        if number == signal.SIGINT:
            # a second one ends this process, as does the end of a torchrun that got it. By the system's own hand, since
            # Python's would wait for a collective that another rank may never join
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Watchdog:
    """Ends this process with a message when no sign of life came for some time.

    A collective waits in native code, a captured one not even there: nothing but another thread can end it. Time in
    which this process was itself stopped or starved does not count.

    A signal that asks for the end has to find Python awake. A rank that waits for one that is gone is not, and would
    be killed only after torchrun's half minute: it ends by itself, and the group is started again so much sooner.

    Args:
        seconds: without a sign of life.
        rank: named in the message.
        stop: listening, while this lasts.
    """

    EXIT_CODE = 75  # a temporary failure, in the words of sysexits.h

    def __init__(self, seconds: float, rank: int, stop: StopRequest | None = None) -> None:
        self._seconds, self._rank, self._stop = seconds, rank, stop
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
        seen, deaf = time.monotonic(), 0.0
        while not self._end.wait(_LOOK_SECONDS):
            now = time.monotonic()
            passed = min(now - seen, 2 * _LOOK_SECONDS)
            seen = now
            self._idle += passed
            if self._idle >= self._seconds:
                self._leave(f"nothing came of {self._doing} for {self._seconds:g} s (--timeout)", self.EXIT_CODE)
            number = self._stop.unheard() if self._stop else 0
            deaf = deaf + passed if number else 0.0
            if deaf >= DEAF_SECONDS:
                name = signal.Signals(number).name
                self._leave(f"{name} came {DEAF_SECONDS:g} s ago, and nothing of {self._doing} since", 128 + number)

    def _leave(self, why: str, code: int) -> NoReturn:
        text = (
            f"remixmatch: rank {self._rank}: {why}: another rank hangs or is lost; this one ends, go on with --resume"
        )
        print(text, file=sys.stderr, flush=True)
        os._exit(code)
