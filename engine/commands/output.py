"""What commands say while they work: log messages on stderr. Results are printed on stdout."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("engine", "pipelines", "bench")  # packages whose messages are shown; other libraries keep their own ways


class _Formatter(logging.Formatter):
    """One line a message, whatever it quotes. Warnings and errors say whose they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().splitlines())
        return f"remixmatch: {text}" if record.levelno >= logging.WARNING else text


class _Handler(logging.Handler):
    """Writes to whatever is sys.stderr at the moment.

    That is what puts messages above a live progress bar, neither wrapped nor styled: rich replaces sys.stderr while it
    shows one. `rich.logging.RichHandler` would wrap lines, color words, and cost every command its import.
    """

    def emit(self, record: logging.LogRecord) -> None:
        # all ranks say the same, but what ends one of them
        if record.levelno < logging.ERROR and os.environ.get("RANK", "0") != "0":
            return
        try:
            sys.stderr.write(f"{self.format(record)}\n")  # at once, since ranks share it
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Show the messages of our packages, and theirs alone, while a command runs."""
    loggers = [logging.getLogger(name) for name in OURS]
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
    """Show nothing below a warning from here on, as --quiet asks for."""
    for name in OURS:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, _Handler):
                handler.setLevel(logging.WARNING)
