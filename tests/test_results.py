"""The tables of README and docs/results.md that are written by hand have the figures of the rows that were measured."""

import re
from math import sqrt
from statistics import mean, stdev

import pytest
from scipy.stats import t as student

from engine.config.methods import ABLATIONS, METHODS
from engine.config.presets import PRESETS
from engine.measuring import records
from tests.pages import TEXTS

ROWS = {name: records.read(records.RESULTS / f"{name}.jsonl") for name in ("ablate", "reproduce")}
# what a column shows, by a word of its head
KINDS = {
    "error, %": "error",
    "worst seed": "worst",
    "minutes": "minutes",
    "points": "difference",
    "difference": "difference",
    "times": "ratio",
    "launches": "counts",
}


def tables(text):
    """Tables of a page, each a list of lines, each a list of cells; the line under the head is left out."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *lines = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        yield [head, *lines]


def named(cell):
    """The method or ablation of a line, and in which file its rows are; None where it is another table."""
    for code in re.findall(r"`([^`]+)`", cell):
        if code in ABLATIONS:
            return "ablate", code
    if cell.startswith("full method"):
        return "ablate", "remixmatch"
    return ("reproduce", cell.lower()) if cell.lower() in METHODS else None


def columns(head):
    """What the columns show: (preset, steps, kind of figure), preset and steps being the last named up to there.

    Steps are the preset's where a head names none.
    """
    preset, steps, found = None, 0, []
    for cell in head:
        # the longest, since names begin with others
        if name := max((name for name in PRESETS if name in cell), key=len, default=None):
            said = re.search(r"(\d[\d ]*) steps", cell)
            preset, steps = name, int(said[1].replace(" ", "")) if said else PRESETS[name].steps
        found.append((preset, steps, next((kind for word, kind in KINDS.items() if word in cell), None)))
    return found


def runs(file, preset, steps, row):
    """Rows of trained cells."""
    case = {"bench": "reproduce", "preset": preset, "steps": steps, "row": row}
    return [each for each in ROWS[file] if case.items() <= each.items()]


def errors(file, preset, steps, row):
    """Median test errors by seed."""
    return {each["seed"]: 100 - each["median_last_20"] for each in runs(file, preset, steps, row)}


def figures(file, preset, steps, row, kind):
    """What a cell has to show."""
    if kind in ("ratio", "counts"):
        names = {"ratio": ("costs", "ratio"), "counts": ("counts", "launches", "gigabytes")}[kind]
        found = [
            each
            for each in ROWS[file]
            if each.get("kind") == names[0] and each["preset"] == preset and each["variant"] == row
        ]
        return [found[-1][name] for name in names[1:]] if found else []
    if kind == "minutes":  # the least and the most; rows of early runs say the clock's alone
        taken = [each["cpu_seconds"] / 60 for each in runs(file, preset, steps, row) if each.get("cpu_seconds")]
        ends = min(taken), max(taken)
        return ends if round(ends[0], 1) < round(ends[1], 1) else ends[:1]
    own, full = errors(file, preset, steps, row), errors(file, preset, steps, "remixmatch")
    if kind == "worst":
        return [max(own.values())] if own else []
    if kind == "error":
        return [mean(own.values()), *([stdev(own.values())] if len(own) > 1 else [])] if own else []
    apart = [own[seed] - full[seed] for seed in own.keys() & full.keys()] if row != "remixmatch" else []
    if len(apart) < 2:
        return apart
    half = float(student.ppf(0.975, len(apart) - 1)) * stdev(apart) / sqrt(len(apart))
    return [mean(apart), mean(apart) - half, mean(apart) + half]


def checked(page):
    """Cells that show figures of rows: (first cell of the line, cell, figures that it has to show)."""
    for head, *lines in tables(TEXTS[page]):
        kinds = columns(head)
        for line in lines:
            if (place := named(line[0])) is None:
                continue
            for cell, (preset, steps, kind) in zip(line[1:], kinds[1:], strict=True):
                if preset and kind:
                    yield line[0], cell, figures(place[0], preset, steps, place[1], kind)


@pytest.mark.parametrize(("page", "least"), [("README.md", 70), ("docs/results.md", 187)])
def test_tables_written_by_hand_show_what_was_measured(page, least):
    found = list(checked(page))
    assert len(found) >= least
    for name, cell, wanted in found:
        shown = re.findall(r"[+-]?\d+(?:\.\d+)?", cell)
        assert len(shown) == len(wanted), (name, cell, wanted)
        for text, value in zip(shown, wanted, strict=True):
            places = len(text.partition(".")[2])
            assert abs(float(text) - value) <= 0.5 * 10**-places + 1e-9, (name, cell, wanted)


def test_every_variant_that_was_measured_stands_in_the_results():
    shown = {
        (preset, place[1])
        for head, *lines in tables(TEXTS["docs/results.md"])
        for preset, *_ in columns(head)
        for place in map(named, (line[0] for line in lines))
        if place
    }
    measured = {(row["preset"], row.get("variant") or row["row"]) for rows in ROWS.values() for row in rows}
    assert measured <= shown
