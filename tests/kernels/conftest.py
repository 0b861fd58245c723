"""Fixtures that run kernel launchers without a GPU, in Triton's interpreter."""

from collections.abc import Iterator

import pytest
from interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Return a function that calls launchers with their kernels in Triton's interpreter."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
