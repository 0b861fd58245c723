"""Launches and bytes of the captured step, as `remixmatch bench count` has counted them, for those who look them up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.config import methods, presets
from engine.config.config import COUNTED, Config, changes
from engine.measuring import records

KINDS = ("triton", "library", "operator")  # of launches

# (side, classes), so that a preset can be counted without its data
IMAGES = {
    "digits": (16, 10), "fashion-mnist-16": (16, 10), "fashion-mnist": (32, 10), "cifar10": (32, 10),
    "cifar100": (32, 100), "svhn": (32, 10), "svhn-extra": (32, 10), "stl10": (96, 10),
}  # fmt: skip


def counted(config: Config, precision: str, images: tuple[int, int]) -> Mapping[str, Any] | None:
    """The newest record of `bench count` for a step, the user's before the project's; None where there is none.

    What is counted is the compiled step on one rank, in one micro-batch.

    Args:
        config: of the step.
        precision: "bf16", "fp16" or "fp32".
        images: their side in pixels, and how many classes they have.
    """
    if config.micro_batches > 1:
        return None
    rows = [
        row for path in (records.RESULTS / "count.jsonl", records.OUT / "count.jsonl") for row in records.read(path)
    ]
    for row in reversed(rows):
        if row["precision"] != precision or row["preset"] not in presets.PRESETS:
            continue
        of = configuration(row)
        if IMAGES.get(of.dataset) == images and not changes(of, config).keys() & COUNTED:
            return row
    return None


def configuration(row: Mapping[str, Any]) -> Config:
    """What a record of `bench count` is of."""
    config = presets.preset(row["preset"])
    if "method" in row:
        config = methods.with_method(config, row["method"])
    if "ablate" in row:
        config = methods.ablate(config, row["ablate"])
    return dataclasses.replace(config, k=row["k"], batch=row["batch"])
