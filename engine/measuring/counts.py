"""Look up launches and bytes of a captured step in the records of `remixmatch bench count`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.config import methods, presets
from engine.config.config import COUNTED, Config, changes
from engine.measuring import records

KINDS = ("triton", "library", "operator")  # Kinds of launches.

# (side, classes) of each data set, so that presets can be counted without their data.
IMAGES = {
    "digits": (16, 10), "fashion-mnist-16": (16, 10), "fashion-mnist": (32, 10), "cifar10": (32, 10),
    "cifar100": (32, 100), "svhn": (32, 10), "svhn-extra": (32, 10), "stl10": (96, 10),
}  # fmt: skip


def counted(config: Config, precision: str, images: tuple[int, int]) -> Mapping[str, Any] | None:
    """Return the newest record of `bench count` for a step, or None. The user's records take precedence.

    Counts are of the compiled step on one rank with one micro-batch. `--convolutions auto` depends on the device, and
    is taken for cudnn.

    Args:
        config: Configuration of the step.
        precision: "bf16", "fp16" or "fp32".
        images: Side in pixels and number of classes.
    """
    if config.micro_batches > 1:
        return None
    if config.convolutions == "auto":
        config = dataclasses.replace(config, convolutions="cudnn")
    counts = [
        count for path in (records.RESULTS / "count.jsonl", records.OUT / "count.jsonl") for count in records.read(path)
    ]
    for count in reversed(counts):
        if count["precision"] != precision or count["preset"] not in presets.PRESETS:
            continue
        recorded = configuration(count)
        if IMAGES.get(recorded.dataset) == images and not changes(recorded, config).keys() & COUNTED:
            return count
    return None


def configuration(record: Mapping[str, Any]) -> Config:
    """Return the configuration that a record of `bench count` was measured with."""
    config = presets.preset(record["preset"])
    if "method" in record:
        config = methods.with_method(config, record["method"])
    if "ablate" in record:
        config = methods.ablate(config, record["ablate"])
    kernels = record.get("convolutions", "cudnn")
    return dataclasses.replace(config, k=record["k"], batch=record["batch"], convolutions=kernels)
