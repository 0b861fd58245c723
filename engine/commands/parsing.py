"""Command lines: flags into dataclasses, and how a command is used."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from engine.errors import UserError


def show_usage(usage: str, words: Mapping[str, str], more: str) -> None:
    """Prints how a command is used, with a line for each word that it takes, and where there is more."""
    print(f"usage: remixmatch {usage}\n")
    width = max(map(len, words))
    for word, text in words.items():
        print(f"  {word:{width}}  {text}")
    print(f"\n{more}")


def usage_is_all(argv: Sequence[str], needs: str, usage: str, words: Mapping[str, str], more: str) -> bool:
    """Show how a command is used if its first word is missing or asks for that, and return whether it did.

    Args:
        argv: Words after the command.
        needs: What the first word should be, such as "preset".
        usage: See `show_usage`, as are `words` and `more`.

    Raises:
        UserError: The first word is missing.
    """
    if argv and argv[0] not in ("-h", "--help"):
        return False
    show_usage(usage, words, more)
    if not argv:
        raise UserError(f"{usage.split()[0]} needs a {needs}")
    return True


def parse(options: Any, command: str, argv: list[str], **default: Any) -> Any:
    """Fills a dataclass from flags; tyro's framed complaint becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            flags = (tyro.conf.OmitArgPrefixes,)  # sections are for reading
            return tyro.cli(options, prog=f"remixmatch {command}", args=argv, config=flags, **default)
    except SystemExit as ended:
        if not ended.code:
            raise
        words = re.sub(r"[\u2500-\u257f]+", " ", complaint.getvalue()).split()
        raise UserError(" ".join(words)) from None
