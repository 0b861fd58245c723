"""Synthetic run folders for tests of `remixmatch report`."""

import dataclasses
import json

import numpy as np

from engine.config.config import config_json
from engine.config.methods import with_method
from engine.config.presets import preset
from engine.runs.history import History, SampleViews, named_bins, save_results
from pipelines.ctaugment import initial_weights
from pipelines.data.cache import DataSet

LOSSES = ("loss", "loss_x", "loss_u", "loss_u1", "loss_rot")


def make_run(
    folder,
    classes=("cat", "dog", "bird"),
    seed=0,
    method="remixmatch",
    error=5.0,
    steps=60,
    done=True,
    side=8,
    recalls=(),
    **changes,
):
    """Write a run's folder with a final test error in percent; `changes` are fields of the configuration."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = dataclasses.replace(preset("digits-40"), seed=seed, steps=steps, eval_every=10, log_every=2, **changes)
    if method != config.method:
        config = with_method(config, method)
    (folder / "config.json").write_text(config_json(config))
    split = {"labels": 4, "sha256": "abc123", "images_sha256": "def456", "class_names": classes, "sides": [side, side]}
    (folder / "split.json").write_text(json.dumps(split))
    reached = steps if done else steps // 2
    lines, count = [], len(classes)
    for step in range(2, reached + 1, 2):
        row = {"step": step, **{name: 2.0 + float(rng.random()) for name in LOSSES}, "confidence": step / steps}
        lines.append(row | {"guesses_used": 1.0, "alignment_gap": 0.1, "omega": 0.5})
        if step % 10 == 0:
            lines.append({"step": step, "test_accuracy": 100 - error - (reached - step), "test_loss": 1 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    kept = History(folder, 0, 10)
    for step in range(10, reached + 1, 10):
        weights = initial_weights() * rng.uniform(0.6, 1, (19, 2, 17))
        p = rng.dirichlet(np.ones(count))
        bins = [[4, 2] if number > 4 else [0, 0] for number in range(10)]
        kept.add(step, {
            "p_model": p.tolist(), "label_marginal": [1 / count] * count, "bins": named_bins(weights),
            "guesses": {"images": 20, "accuracy": 0.5, "confidence": 0.7, "bins": bins},
        })  # fmt: skip
    if not done:
        return folder
    summary = {
        "preset": config.preset, "method": method, "seed": seed, "steps": steps, "test_accuracy": 100.0 - error,
        "median_last_20": 99.0 - error, "train_seconds": 75.0, "images_per_second": 1234.0, "ranks": 1,
        "versions": {"torch": "2.15.0"}, "device": "CPU, a machine", "commit": "0123456789ab",
    }  # fmt: skip
    if recalls:
        means = {"balanced_accuracy": float(np.mean(recalls)), "geometric_mean": float(np.prod(recalls) ** (1 / count))}
        summary |= {"recall": dict(zip(classes, recalls, strict=True)), **means}
    (folder / "summary.json").write_text(json.dumps(summary))
    labels = np.arange(40 * count) % count
    images = rng.integers(0, 256, (len(labels), side, side, 3), dtype=np.uint8)
    data = DataSet("made", tuple(classes), images, labels, images, labels)
    probabilities = 0.5 * np.eye(count)[rng.permutation(labels) if count > 2 else labels] + 0.5 / count
    views = SampleViews(
        images[: 6 * 4].reshape(6, 4, side, side, 3), [["image", "weak", "rotate 0.71, blur 0.20", "x"]] * 6
    )
    save_results(folder, probabilities.astype(np.float32), slice(None), data, views)
    return folder


def make_table(folder, rows=("remixmatch", "fixmatch"), seeds=(0, 1), method=""):
    """Write a folder like `remixmatch reproduce`: a run per cell, one run without metrics, and table.json.

    Rows are methods, or other names if `method` is given.
    """
    cells, lines = [], []
    for number, row in enumerate(rows):
        for seed in seeds:
            name = f"digits-40-{row}-seed{seed}-0123456789"
            make_run(folder / name, seed=seed, method=method or row, error=5.0 + number + 0.1 * seed)
            cells.append({"cell": name, "row": row, "preset": "digits-40", "seed": seed, "state": "done"})
        full = {"mean": 1.0, "low": 0.5, "high": 1.5, "seeds": list(seeds)} if number else None
        lines.append({
            "row": row, "preset": "digits-40", "seeds": list(seeds), "wanted": list(seeds),
            "median": {"mean": 6.05 + number, "deviation": 0.07}, "last": {"mean": 5.05 + number, "deviation": None},
            "paper": None, "to_paper": None, "to_full": full, "steps": [60], "split": ["balanced"],
        })  # fmt: skip
    waiting = folder / "digits-40-uda-seed0-9876543210"
    waiting.mkdir()
    (waiting / "config.json").write_text((folder / cells[0]["cell"] / "config.json").read_text())
    table = {"table": "digits", "title": "digits: test error in percent", "lines": lines, "cells": cells}
    (folder / "table.json").write_text(json.dumps(table))
    return folder
