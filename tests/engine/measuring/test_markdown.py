"""Markdown tables."""

import pytest

from engine.measuring.markdown import table


def test_a_table_has_one_line_per_row():
    assert (
        table(["a", "b"], (row for row in (["1", ""], ["2", "3"]))) == "| a | b |\n| --- | --- |\n| 1 |  |\n| 2 | 3 |"
    )
    assert table(["a"], []) == "| a |\n| --- |"


def test_a_row_with_missing_columns_is_an_error():
    with pytest.raises(AssertionError):
        table(["a", "b"], [["1"]])
