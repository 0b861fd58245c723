"""What is said of names that there are not, and of files that cannot be written."""

from pathlib import Path

import pytest

from engine.errors import UserError, cannot_write, unknown

KNOWN = {"digits-40": 1, "digits-10": 2, "svhn-40": 3}


@pytest.mark.parametrize(
    ("name", "listed", "said"),
    [
        ("digit-40", "", "unknown preset 'digit-40'; did you mean digits-40 or digits-10?"),
        ("zzz", "", "unknown preset 'zzz'; choose from digits-40, digits-10, svhn-40"),
        ("zzz", "a command lists them", "unknown preset 'zzz'; a command lists them"),
    ],
)
def test_near_names_are_offered_and_otherwise_all(name, listed, said):
    error = unknown("preset", name, KNOWN, listed)
    assert type(error) is UserError and str(error).startswith(said.rstrip("?"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left"), "cannot write run (No space left)"),
        (OSError(13, "Permission denied", "run/a"), "cannot write run/a (Permission denied)"),
        (OSError("unknown"), "cannot write run (unknown)"),
    ],
)
def test_what_cannot_be_written_is_named_with_its_reason(error, said):
    assert str(cannot_write(Path("run"), error)) == said
    assert str(cannot_write(Path("run"), error, "mend that")) == f"{said}; mend that"
