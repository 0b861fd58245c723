"""Fixtures and options of all tests.

Processes use one thread each, since results depend on the number of threads and concurrent processes would compete for
cores. Tests marked `compiler` are skipped without a C++ compiler. `--long` runs tests marked `long`, and more steps of
other tests.
"""

import os

import pytest

from bench.emulator.run import NOT_BUILT, compiler
from pipelines.data import datasets

os.environ["OMP_NUM_THREADS"] = "1"  # Read when torch is loaded, here and in all subprocesses.


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run long tests and full-length runs")


@pytest.fixture(scope="session")
def long(request):
    """Return whether to run full-length tests."""
    return request.config.getoption("--long")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip tests here, so that pytest groups them and does not give a missing device as the reason."""
    on_emulator = os.environ.get(NOT_BUILT) and item.get_closest_marker("gpu")
    if (item.get_closest_marker("compiler") or on_emulator) and compiler() is None:
        pytest.skip("needs a C++ compiler: install g++")
    if item.get_closest_marker("long") and not item.config.getoption("--long"):
        pytest.skip("long test: run make test-long")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Change to an empty folder, without the user's data."""
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    datasets.prepared.cache_clear()
    yield
    datasets.prepared.cache_clear()
