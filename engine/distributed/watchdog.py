"""Stop requests by signals, and a watchdog for ranks that hang."""

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
_CHECK_SECONDS = 0.25
_POLL_SECONDS = 0.05
SIGNAL_TIMEOUT = 5.0  # Seconds. If Python has not handled a signal by then, it hangs in native code.


class StopRequest:
    """A request to stop, from SIGTERM, SIGINT, SIGHUP or another thread; loops check it where they can stop.

    Attributes:
        number: Number of the first signal received, 0 without a request.
    """

    def __init__(self) -> None:
        self.number = 0
        self._delivered = 0
        self._inbox = -1

    def ask(self, number: int) -> None:
        """Request to stop as if this process had received the signal with that number."""
        self.number = self.number or number

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for a request. Returns whether there is one.

        This polls. A signal handler that sets a `threading.Event` can deadlock with a wait for it in the same thread.
        """
        end = time.monotonic() + seconds
        while not self.number and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
        return self.number != 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; a second SIGINT ends the process at once.

        Outside the main thread this does nothing, since Python handles signals only there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]  # As under nohup.
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

    def unhandled(self) -> int:
        """Return the number of a signal that was delivered but not yet handled by Python, or 0. For other threads."""
        if self._inbox < 0:  # Not listening.
            return 0
        with contextlib.suppress(BlockingIOError):
            self._delivered = next((each for each in os.read(self._inbox, 64) if each in _SIGNALS), self._delivered)
        if self.number:  # Python has handled it.
            self._delivered = 0
        return self._delivered

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.ask(number)
        if number == signal.SIGINT:
            # A second SIGINT ends this process, and so does SIGHUP, sent when torchrun ends. The default handlers act
            # at once; Python's would wait for a collective that another rank may never join.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Watchdog:
    """Ends this process with a message if it makes no progress for some time.

    A hanging collective waits in native code or on the device, so only another thread can end the process. Time during
    which the process itself was suspended or got no CPU does not count.

    The watchdog also ends a process that does not handle a stop signal. Python cannot handle it while a rank waits in
    native code for a rank that is gone. torchrun would kill the process only after 30 s; ending it sooner makes the
    restart faster.

    Args:
        seconds: Seconds without progress.
        rank: The rank to name in the message.
        stop: A stop request that is listening.
    """

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h.

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
        """Report progress; `doing` names the next activity, for the message."""
        self._idle, self._doing = 0.0, doing

    def _watch(self) -> None:
        last, unresponsive = time.monotonic(), 0.0
        while not self._end.wait(_CHECK_SECONDS):
            now = time.monotonic()
            passed = min(now - last, 2 * _CHECK_SECONDS)
            last = now
            self._idle += passed
            if self._idle >= self._seconds:
                self._exit(f"no progress in {self._doing} for {self._seconds:g} s (--timeout)", self.EXIT_CODE)
            number = self._stop.unhandled() if self._stop else 0
            unresponsive = unresponsive + passed if number else 0.0
            if unresponsive >= SIGNAL_TIMEOUT:
                name = signal.Signals(number).name
                self._exit(f"no progress in {self._doing} since {name} {SIGNAL_TIMEOUT:g} s ago", 128 + number)

    def _exit(self, reason: str, code: int) -> NoReturn:
        text = (
            f"remixmatch: rank {self._rank}: {reason}: another rank hangs or is lost; exiting, use --resume to continue"
        )
        print(text, file=sys.stderr, flush=True)
        os._exit(code)
