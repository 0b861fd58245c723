"""What of an error is told in one line."""

import pytest

from pipelines.text import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (OSError(28, "No space left"), "[Errno 28] No space left"),
        (ValueError("x" * 200), "x" * 120),
    ],
)
def test_the_first_line_of_an_error_or_its_type(error, said):
    assert first_line(error) == said and first_line(error, 2) == said[: 2 if str(error) else None]
