"""What is said of a name that there is not."""

import pytest

from engine.errors import UserError, unknown

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
