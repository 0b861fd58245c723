"""Errors that end a run with one line and without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

APEX_BUILD = (  # what to do where apex is missing
    "build NVIDIA/apex from source: in a checkout of it run "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation . "
    "(the package 'apex' on PyPI is another project)"
)


class UserError(ValueError):
    """Says in one line what was given, what is allowed and what to do; the command line exits with code 2.

    With several ranks every rank meets it, and rank 0 says it.
    """


class RankError(RuntimeError):
    """What one rank met by itself, such as the loss of another; it says so, and the command line exits with code 1."""


class Stopped(Exception):
    """A signal asked for the end, and everything is saved; the command line exits with 128 + the signal's number."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def cannot_write(place: Path, error: OSError, advice: str = "") -> UserError:
    """Return the error that a file, or something in a folder, could not be written.

    Args:
        place: The file or folder, for an error that names none.
        error: Says why.
        advice: What to do about it.
    """
    text = f"cannot write {error.filename or place} ({error.strerror or error})"
    return UserError(f"{text}; {advice}" if advice else text)


def unknown(kind: str, name: str, known: Iterable[str], listed: str = "") -> UserError:
    """Return the error for a name that there is not, with the nearest ones that there are.

    Args:
        kind: What it should be a name of, such as "preset".
        name: As given.
        known: All names.
        listed: What lists them, where they are too many for a message.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else listed or f"choose from {', '.join(known)}"
    return UserError(f"unknown {kind} '{name}'; {hint}")
