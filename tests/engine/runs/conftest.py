"""Fixtures for tests of runs."""

from types import SimpleNamespace

import pytest

from tests.logs import no_warnings


@pytest.fixture
def unwarned():
    """Fail the test if the engine logs a warning."""
    with no_warnings():
        yield


@pytest.fixture
def replace_clock(monkeypatch):
    """Return a function that replaces a clock that a module reads. Tests move the new one by its `now`, in seconds."""

    def replace(module, function, now):
        moved = SimpleNamespace(now=now)
        monkeypatch.setattr(module, "time", SimpleNamespace(**{function: lambda: moved.now}))
        return moved

    return replace
