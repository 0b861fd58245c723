"""Log messages of commands on stderr. Results are printed on stdout."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import printable

PACKAGES = (
    "engine",
    "pipelines",
    "bench",
)  # Packages whose messages are shown; logging of other libraries is left alone.


class _Formatter(logging.Formatter):
    """Formats each message as one line without control characters. Warnings and errors start with "remixmatch: "."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(" ".join(record.getMessage().splitlines()))
        return f"remixmatch: {text}" if record.levelno >= logging.WARNING else text


class _Handler(logging.Handler):
    """Writes to the current value of sys.stderr.

    rich replaces sys.stderr while it shows a progress bar, so messages appear above it, neither wrapped nor styled.
    `rich.logging.RichHandler` would wrap lines, color words, and make every command import it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        # All ranks log the same messages, except for an error that ends one rank.
        if record.levelno < logging.ERROR and os.environ.get("RANK", "0") != "0":
            return
        try:
            sys.stderr.write(f"{self.format(record)}\n")  # One call, since ranks share stderr.
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Show messages of this project's packages, and of no others, while a command runs."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    handler = _Handler()
    handler.setFormatter(_Formatter())
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def show_warnings_only() -> None:
    """Show nothing below a warning from now on, for --quiet."""
    for name in PACKAGES:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, _Handler):
                handler.setLevel(logging.WARNING)
