"""Fixtures for tests of runs."""

import pytest

from tests.logs import no_warnings


@pytest.fixture
def unwarned():
    """Fail the test if the engine logs a warning."""
    with no_warnings():
        yield
