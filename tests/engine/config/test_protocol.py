"""Methods and ablations in docs/protocol.md match the code."""

import re
from pathlib import Path

from engine.config.config import Config, changes
from engine.config.methods import ABLATIONS, METHODS, with_method

TEXT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")


def table(last):
    """Return the rows of the table whose first column is the method and whose last has this heading."""
    (rows,) = re.findall(rf"^\| method \|.* {last} \|\n\| ---.*\n((?:\|.*\n)+)", TEXT, re.M)
    cells = [line.strip("| ").split(" | ") for line in rows.splitlines()]
    return {name: rest for name, *rest in cells}


def flag(name, value):
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed} {value:g}" if isinstance(value, float) else f"--{dashed} {value}"


def test_the_table_of_settings():
    rows = table("settings that differ from remixmatch")
    assert list(rows) == list(METHODS)
    for method, (cell,) in rows.items():
        # AdaMatch's ramp depends on the number of steps.
        ignored = {"method"} | ({"ramp_kimg"} if method == "adamatch" else set())
        differing = changes(Config(), with_method(Config(), method), ignored)
        assert set(re.findall(r"`([^`]*)`", cell)) == {flag(name, new) for name, (_, new) in differing.items()}, method


def test_the_table_of_rules():
    rows = table("unlabeled loss")
    assert list(rows) == list(METHODS)
    for method, (_, align, pseudo_label, threshold, _, views, loss) in rows.items():
        c = with_method(Config(), method)
        if not c.unlabeled:
            continue
        assert align.startswith("to ") == c.align and pseudo_label.endswith("hard") == (
            c.hard_labels or method == "dash"
        )
        assert ("sharpened" in pseudo_label) == (not c.hard_labels and c.temperature != 1)
        assert threshold.startswith(f"{c.threshold:g}" if c.threshold else ("none", "on the loss", "running"))
        assert ("mixup" in views) == (c.mixup_alpha > 0) and ("K strong" in views) == (c.augment != "none")
        assert ("squared" in loss, "KL" in loss) == (c.unlabeled_loss == "l2", c.unlabeled_loss == "kl")
        assert ("fairness" in loss, "rotation" in loss) == (c.w_fair > 0, c.w_rot > 0)


def test_every_ablation_is_explained():
    explained = TEXT.partition("## Ablations")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([\w=-]+)`", explained)) >= set(ABLATIONS)
