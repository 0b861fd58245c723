"""One thread a process: those of two at once would wait for one another's cores, and bits depend on threads.

What needs a C++ compiler is marked so, and skipped with that reason where there is none. `--long` runs what is marked
`long`, and runs others for more steps.
"""

import os

import pytest

from bench.emulator.run import NOT_BUILT, compiler
from pipelines import datasets

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, here and in every process that a test starts


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="long campaigns too, and runs of full length")


@pytest.fixture(scope="session")
def long(request):
    """Whether time does not matter."""
    return request.config.getoption("--long")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips in this one line, so that pytest counts all of them together, and before a missing device is the reason."""
    on_emulator = os.environ.get(NOT_BUILT) and item.get_closest_marker("gpu")
    if (item.get_closest_marker("compiler") or on_emulator) and compiler() is None:
        pytest.skip("needs a C++ compiler: install g++")
    if item.get_closest_marker("long") and not item.config.getoption("--long"):
        pytest.skip("takes long: make test-long")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, and none of the user's data."""
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    datasets.prepared.cache_clear()
    yield
    datasets.prepared.cache_clear()
