"""Texts of messages."""

from __future__ import annotations


def first_line(error: BaseException, most: int = 120) -> str:
    """Return the first line of what an error says, at most so many characters of it; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
