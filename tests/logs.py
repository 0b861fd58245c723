"""What the engine logs, for tests."""

import logging
from contextlib import contextmanager


@contextmanager
def no_warnings():
    """Fail at the end of the block if the engine has warned in it."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("engine")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not said, said
