"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with the given column heads, without a trailing newline."""
    lines = [head, ["---"] * len(head), *rows]
    assert all(len(cells) == len(head) for cells in lines), "every row must have one cell per column"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
