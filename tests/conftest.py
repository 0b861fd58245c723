"""One thread a process: those of two at once would wait for one another's cores, and bits depend on threads.

What needs a C++ compiler is marked so, and skipped with that reason where there is none.
"""

import os

import pytest

from tests.emulator.run import NOT_BUILT, compiler

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, here and in every process that a test starts


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips in this one line, so that pytest counts all of them together, and before a missing device is the reason."""
    on_emulator = os.environ.get(NOT_BUILT) and item.get_closest_marker("gpu")
    if (item.get_closest_marker("compiler") or on_emulator) and compiler() is None:
        pytest.skip("needs a C++ compiler: install g++")
