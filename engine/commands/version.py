"""`remixmatch version`, also `remixmatch --version`."""

from __future__ import annotations

from dataclasses import dataclass

from engine import __version__
from engine.commands.parsing import parse


@dataclass
class VersionOptions:
    """Print the version."""


def main(argv: list[str]) -> None:
    """Run `remixmatch version`."""
    parse(VersionOptions, "version", argv)
    print(f"remixmatch-engine {__version__}")
