"""What a run warns of."""

import pytest

from tests.logs import no_warnings


@pytest.fixture
def unwarned():
    """Fails the test if the engine warns in it."""
    with no_warnings():
        yield
