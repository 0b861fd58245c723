"""The parts of training, by name, for whoever counts or times them; nothing happens where nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# of a step, in the order in which it begins them
PARTS = ("assemble", "probes", "guess", "forward", "targets", "losses", "backward", "update", "ema", "metrics")
# what the training loop does between steps, and waits for; its threads have "plan" and "views", too
LOOP = ("wait for views", "wait for device", "drain", "plan", "wait for plan", "views", "copy plan", "replay")
# of a start, in the order in which a command begins them; torch is not imported before the second
START = ("set up", "import", "build", "prepare")
RANGES = (*LOOP, "exchange", *PARTS)

_listener: Callable[[str], None] | None = None


def enter(part: str) -> None:
    """Says that a part begins in this thread, and so that the one before it ends."""
    if _listener is not None:
        _listener(part)


def leave() -> None:
    """Says that the part of this thread ends and that none begins: listeners are called with ""."""
    if _listener is not None:
        _listener("")


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Has a function called with the name of every part that begins, in the thread in which it does."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
