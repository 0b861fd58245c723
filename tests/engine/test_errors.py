"""Messages about unknown names and files that cannot be written."""

from pathlib import Path

import pytest

from engine.errors import UserError, cannot_write, suggestion, unknown

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
