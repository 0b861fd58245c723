"""Messages about unknown names and files that cannot be written."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.commands.main import run_with_exit_codes
from engine.errors import RankError, UserError, cannot_write, out_of_memory, suggestion, unknown

KNOWN = {"digits-40": 1, "digits-10": 2, "svhn-40": 3}


@pytest.mark.parametrize(
    ("name", "listed", "said"),
    [
        ("digit-40", "", "unknown preset 'digit-40'; did you mean digits-40 or digits-10?"),
        ("DIGITS-40", "", "unknown preset 'DIGITS-40'; did you mean digits-40 or digits-10?"),
        ("s-40", "", "unknown preset 's-40'; did you mean svhn-40 or digits-40?"),
        ("zzz", "", "unknown preset 'zzz'; choose from digits-40, digits-10, svhn-40"),
        ("zzz", "a command lists them", "unknown preset 'zzz'; a command lists them"),
    ],
)
def test_unknown_suggests_near_names_or_lists_all(name, listed, said):
    error = unknown("preset", name, KNOWN, listed)
    assert type(error) is UserError and str(error) == said


def test_three_suggestions_are_joined_by_commas_and_or():
    assert suggestion("seed", ["seed1", "seed2", "seed3"]) == "did you mean seed3, seed2 or seed1?"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left"), "cannot write run (No space left)"),
        (OSError(13, "Permission denied", "run/a"), "cannot write run/a (Permission denied)"),
        (OSError("unknown"), "cannot write run (unknown)"),
    ],
)
def test_cannot_write_names_the_file_and_the_reason(error, said):
    assert str(cannot_write(Path("run"), error)) == said
    assert str(cannot_write(Path("run"), error, "free some space")) == f"{said}; free some space"


CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.00 GiB"
HOST = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 1. GiB"), "Unable to allocate 1. GiB"),
        (torch.OutOfMemoryError(CUDA), CUDA),
        (RuntimeError(HOST), HOST),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
            "DefaultCPUAllocator: not enough memory: you tried",
        ),
        (
            RuntimeError("[/opt/dali/m.cc:1]\n Can't allocate 9 bytes on device 0.\nCurrent pipeline"),
            "Can't allocate 9 bytes on device 0.",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (OSError(errno.ENOSPC, "No space left on device"), ""),
        (RuntimeError("CUDA error: device-side assert triggered"), ""),
        (RankError("lost the other ranks (out of memory)"), ""),
        (ValueError("out of memory"), ""),
    ],
)
def test_errors_that_mean_that_memory_ran_out(error, reason):
    assert out_of_memory(error) == reason


@pytest.mark.parametrize(("command", "advice"), [("predict", "use a smaller --batch"), ("eval", "end other programs")])
def test_a_command_without_memory_ends_with_one_line(capsys, command, advice):
    def run_out(argv):
        raise MemoryError("Unable to allocate 1. GiB")

    with pytest.raises(SystemExit) as ended:
        run_with_exit_codes(run_out, [command])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith(f"remixmatch: out of memory (Unable to allocate 1. GiB); {advice}")


def test_other_runtime_errors_keep_their_traceback():
    def fail(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_with_exit_codes(fail, [])


def test_real_allocations_that_fail_are_recognized():
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        assert out_of_memory(raised.value)
