"""`remixmatch bench digits`: accuracy on handwritten digits over seeds, alongside LabelSpreading of scikit-learn.

Evaluation protocol of Oliver et al. (2018): one code base, several label splits, mean and standard deviation. Existing
records are not measured again, so an interrupted bench can be resumed.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from bench.registry import Bench, Table, markdown_table
from engine import run
from engine.config.presets import PRESETS, preset
from engine.measuring import records
from engine.runs.setup import setup_run
from engine.training.execution import pick_device
from pipelines.data.datasets import digits
from pipelines.data.splits import balanced

LOW_ACCURACY = 96  # Percent. digits-40 runs below it have confused one style of writing with another digit.
NEIGHBORS = (5, 7, 10, 15, 20, 30)
LABEL_COUNTS = (40, 10)


@dataclass
class DigitsOptions:
    """Train presets over seeds, and LabelSpreading on the same splits."""

    presets: tuple[str, ...] = tuple(name for name, config in PRESETS.items() if config.dataset == "digits")
    """Presets to train."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of label splits, initial weights and plans."""
    out: Path = records.OUT / "digits.jsonl"
    """File to append records to."""
    steps: int | None = None
    """Number of steps instead of the preset's, for a quick check."""


def main(options: DigitsOptions) -> None:
    """Measure what is missing from the results file."""
    known = {(row["method"], row["seed"], row.get("neighbours")) for row in records.read(options.out)}
    device = torch.device("cpu")
    for labels in LABEL_COUNTS:
        method = f"LabelSpreading, {labels} labels"
        for seed, neighbours in itertools.product(options.seeds, NEIGHBORS):
            if (method, seed, neighbours) not in known:
                row = _label_spreading(labels, seed, neighbours)
                records.append(options.out, records.record("digits", device, method=method, seed=seed, **row))
    for name in options.presets:
        for seed in options.seeds:
            if (name, seed, None) in known:
                continue
            config = dataclasses.replace(preset(name), seed=seed)
            if options.steps:
                config = dataclasses.replace(config, steps=options.steps)
            with tempfile.TemporaryDirectory() as folder:
                summary = run.train(setup_run(config, Path(folder) / "run"), quiet=True)
            wanted = ("labels", "k", "steps", "test_accuracy", "median_last_20", "train_seconds", "images_per_second")
            row = {key: summary[key] for key in wanted}
            row["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            records.append(options.out, records.record("digits", pick_device(config), method=name, seed=seed, **row))
            print(f"{name} seed {seed}: {summary['test_accuracy']:.2f} %, {summary['train_seconds']:.0f} s", flush=True)


def _label_spreading(labels: int, seed: int, neighbours: int) -> dict:
    from sklearn.semi_supervised import LabelSpreading

    data = digits()
    split = balanced(data, labels, seed)
    known = np.full(len(data.train_labels), -1)
    known[split] = data.train_labels[split]
    begin = time.perf_counter()
    model = LabelSpreading(kernel="knn", n_neighbors=neighbours, max_iter=200)
    with np.errstate(invalid="ignore"):  # With few neighbors, some islands are not reached by any label.
        model.fit(_flat(data.train_images), known)
        predicted = model.predict(_flat(data.test_images))
    accuracy = 100.0 * float(np.mean(predicted == data.test_labels))
    return {
        "labels": labels,
        "neighbours": neighbours,
        "test_accuracy": accuracy,
        "train_seconds": time.perf_counter() - begin,
    }


def _flat(images: np.ndarray) -> np.ndarray:
    """Convert (N, H, W, 3) uint8 gray images to (N, H * W) float64 in [0, 1]."""
    return images[..., 0].reshape(len(images), -1) / 255.0


def digits_table(rows: Sequence[records.Row]) -> str:
    """Return a table per machine with a line per method: mean and sample standard deviation over seeds, in percent.

    LabelSpreading is shown with the neighbor count of the best mean, chosen on the test images in its favor.
    """
    machines: dict[str, list[records.Row]] = defaultdict(list)
    for row in rows:
        machines[re.sub(r", \d+ threads of \d+$", "", row["device"])].append(row)
    return "\n\n".join(map(_table_of_machine, machines.values()))


def _table_of_machine(rows: Sequence[records.Row]) -> str:
    methods: dict[str, dict[Any, list[records.Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (-row["labels"], row["method"])):
        methods[row["method"]][row.get("neighbours")].append(row)
    lines = []
    for method, by_neighbours in methods.items():
        neighbours, runs = max(by_neighbours.items(), key=lambda item: mean(r["test_accuracy"] for r in item[1]))
        accuracies = [r["test_accuracy"] for r in runs]
        medians = [r["median_last_20"] for r in runs if "median_last_20" in r]
        lines.append([
            method if neighbours is None else f"{method.split(',')[0]} (scikit-learn), {neighbours} neighbors",
            str(runs[0]["labels"]),
            str(len(runs)),
            _spread(accuracies),
            f"{min(accuracies):.1f}",
            str(sum(accuracy < LOW_ACCURACY for accuracy in accuracies)),
            _spread(medians) if medians else "",
        ])  # fmt: skip
    low = f"seeds below {LOW_ACCURACY} %"
    heads = ["method", "labels", "seeds", "test accuracy, %", "worst seed", low, "median of last 20, %"]
    source = f"Measured on {rows[-1]['device']}; torch {rows[-1]['versions']['torch']}."
    return f"{markdown_table(heads, lines)}\n\n{source}"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


BENCH = Bench(
    options=DigitsOptions,
    main=main,
    quick="--presets digits-40-supervised --seeds 0 --steps 2",
    tables={"digits": Table(key=("method", "seed", "neighbours"), make=digits_table)},
)
