"""The parts of a step, by name, for whoever counts or times them; nothing happens where nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# in the order in which a step begins them
PARTS = ("assemble", "probes", "guess", "forward", "targets", "losses", "backward", "update", "ema", "metrics")

_listener: Callable[[str], None] | None = None


def begin(part: str) -> None:
    """Says that a part of the step begins, and so that the one before it ends."""
    if _listener is not None:
        _listener(part)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Has a function called with the name of every part that begins."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
