"""Named ranges of a training step for profilers and counters; no-ops without a listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Ranges of a step, in the order in which it enters them.
PARTS = ("assemble", "probes", "guess", "forward", "targets", "losses", "backward", "update", "ema", "metrics")
# Ranges of the training loop outside of a step. Its threads also enter "plan" and "views".
LOOP = ("wait for views", "wait for device", "drain", "plan", "wait for plan", "views", "copy plan", "replay")
# Ranges of a command's start, in order. torch is imported in the second.
START = ("set up", "import", "build", "prepare")
RANGES = (*LOOP, "exchange", *PARTS)

_listener: Callable[[str], None] | None = None


def enter(name: str) -> None:
    """Enter a range in this thread, which leaves the previous one."""
    if _listener is not None:
        _listener(name)


def leave() -> None:
    """Leave this thread's range without entering another; the listener is called with ""."""
    if _listener is not None:
        _listener("")


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call a function with the name of every range entered in the block, in the thread that enters it."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
