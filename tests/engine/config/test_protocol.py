"""Methods and ablations in docs/protocol.md match the code."""

import re
from pathlib import Path

from engine.config.config import Config
from engine.config.methods import ABLATIONS, METHODS, with_method

TEXT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")


def shown(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_of_methods():
    (table,) = re.findall(r"^\| field \|.*\n\| ---.*\n((?:\|.*\n)+)", TEXT, re.M)
    (heading,) = re.findall(r"^\| field \| (.*) \|$", TEXT, re.M)
    methods = heading.split(" | ")
    assert methods == list(METHODS)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    fields = [name.strip("`") for name, *_ in rows]
    assert {field for changes in METHODS.values() for field in changes} <= set(fields)
    for field, (_, *cells) in zip(fields, rows, strict=True):
        for method, cell in zip(methods, cells, strict=True):
            if cell != "-":  # Supervised training has no unlabeled images.
                assert cell == shown(getattr(with_method(Config(), method), field)), (field, method)
            else:
                assert method == "supervised"


def test_every_ablation_is_explained():
    explained = TEXT.partition("## Ablations")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([\w=-]+)`", explained)) >= set(ABLATIONS)
