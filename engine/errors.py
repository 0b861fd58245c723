"""Errors that end a run with one line and without a traceback."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path

APEX_BUILD = (  # How to install apex.
    "build NVIDIA/apex from source: in a checkout of it run "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation . "
    "(the package 'apex' on PyPI is another project)"
)


class UserError(ValueError):
    """Invalid input. One line says what was given, what is allowed, and what to do; the command exits with code 2.

    With several ranks, all raise it and rank 0 prints it.
    """


class RankError(RuntimeError):
    """A failure of a single rank, such as the loss of another rank. The rank prints it and exits with code 1."""


class Incomplete(Exception):
    """The command has left out some of its input, such as damaged files. One line says what; it exits with code 1."""


class Stopped(Exception):
    """A signal stopped the command after everything was saved; it exits with 128 + the signal's number.

    Without a text, another process has said so already.
    """

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def cannot_write(place: Path, error: OSError, advice: str = "") -> UserError:
    """Return the error for a file that could not be written.

    Args:
        place: The file or folder, in case the error names none.
        error: The reason.
        advice: What to do about it.
    """
    text = f"cannot write {error.filename or place} ({error.strerror or error})"
    return UserError(f"{text}; {advice}" if advice else text)


_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|alloc_failed|can.?t allocate|cannot allocate|failed to allocate|bad_alloc|"
    "cudaErrorMemoryAllocation",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> str:
    """Return the line of an error that says that memory ran out, on the host or on a GPU; "" for any other error."""
    if isinstance(error, MemoryError):
        return str(error) or "MemoryError"
    if isinstance(error, OSError):
        return str(error.strerror) if error.errno == errno.ENOMEM else ""
    if not isinstance(error, RuntimeError) or isinstance(error, RankError):
        return ""
    # torch raises RuntimeError on the host, and a subclass on a GPU; DALI ends its messages with a line about itself.
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:160] for line in lines if _NO_MEMORY.search(line)), "")


def printable(text: str) -> str:
    """Return text on one line: names from files may contain line breaks and other control characters; tabs remain."""
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def unknown(kind: str, name: str, known: Iterable[str], listed: str = "") -> UserError:
    """Return the error for an unknown name, with a suggestion.

    Args:
        kind: What the name should refer to, such as "preset".
        name: The unknown name.
        known: All names.
        listed: Where all names are listed, if they are too many for a message.
    """
    return UserError(f"unknown {kind} '{printable(name)[:80]}'; {suggestion(name, known, listed)}")


def suggestion(name: str, known: Iterable[str], listed: str = "") -> str:
    """Return the question "did you mean ...?"; without near names, `listed` or a list of all names."""
    known = list(known)
    *names, last = near_names(name, known) or [""]
    if not last:
        return listed or f"choose from {', '.join(known)}"
    return f"did you mean {', '.join(names)} or {last}?" if names else f"did you mean {last}?"


def nearest_hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean ...?" with the nearest of the known names, or "" if none is near."""
    near = near_names(name, known)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three names that differ little from a misspelled one, ignoring case, the nearest first."""
    by_lower = {each.lower(): each for each in known}
    return [by_lower[each] for each in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)]
