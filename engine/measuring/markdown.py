"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with the columns of `head`, without a line break at its end."""
    lines = [head, ["---"] * len(head), *rows]
    assert all(len(cells) == len(head) for cells in lines), "a table has as many cells in each row as columns"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
