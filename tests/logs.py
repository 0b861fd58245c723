"""Checks of the engine's log."""

import logging
from contextlib import contextmanager


@contextmanager
def no_warnings():
    """Fail at the end of the block if the engine has logged a warning."""
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("engine")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not warnings, warnings
