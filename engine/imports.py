"""Importing what is large."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Keeps Python's garbage collector away from imports.

    torch alone makes half a million objects that stay for good; to look for garbage among them again and again is a
    fifth of the time that importing takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
