"""A run's folder: begun, resumed, finished, and read back.

config.json  split.json  metrics.jsonl  tensorboard/  checkpoints/  summary.json
curves.png  views.png  average.safetensors
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from engine import checkpoint, distribution
from engine.config import Config, changed_fields, config_json, load_config, validate
from engine.errors import UserError
from engine.progress import ProgressLine, read_metrics
from engine.step import make_network
from engine.trainer import CHECKPOINTS, Trainer, pick_device
from pipelines.datasets import DATASETS, DataSet, label_split

RUNS = Path("runs")


def default_folder(config: Config, resume: bool) -> Path:
    """Where a run goes that names no folder: `runs/PRESET-seedN`, numbered on for a repetition.

    Resuming takes the newest of them.
    """
    name = f"{config.preset}-seed{config.seed}"
    folders = [RUNS / name]
    while folders[-1].exists():
        folders.append(RUNS / f"{name}-{len(folders) + 1}")
    return folders[-2] if resume and len(folders) > 1 else folders[-1]


def train(
    config: Config,
    folder: Path,
    resume: bool = False,
    quiet: bool = False,
    timeout: float = math.inf,
    check_ranks: int = 0,
) -> dict[str, Any]:
    """Trains one run to its end and writes everything that its folder holds.

    Args:
        config: what to train.
        folder: must hold no other run, unless `resume`.
        resume: go on from the newest good checkpoint, or from the start where there is none.
        quiet: print nothing but warnings.
        timeout: see `Trainer`.
        check_ranks: see `Trainer`.

    Returns:
        The content of summary.json.

    Raises:
        UserError: see `validate`, `checked_data` and `check_folder`; training diverged; something could not be written.
        Stopped: see `Trainer.run`.
    """
    validate(config, distribution.ranks())
    data, split = checked_data(config)
    try:
        begun = distribution.on_first(lambda: _begin(config, folder, resume, data, split))
        progress = ProgressLine(config.steps, quiet, silent=distribution.rank() > 0)

        def prepare_folder() -> None:
            if not (folder / "config.json").exists():
                _describe(config, folder, data, split)

        trainer = Trainer(config, data, split, folder, progress, prepare_folder, timeout, check_ranks)
        if begun:
            if trainer.resume():
                progress.say(f"resuming {folder} from step {trainer.step}")
            else:
                progress.say(f"{folder} has no good checkpoint; starting from step 0")
        progress.start(trainer.step, trainer.images_per_step)
        try:
            trainer.run()
        finally:
            progress.close()
        summary = _summary(config, trainer)
        distribution.on_first(lambda: _finish(folder, summary, trainer))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise UserError(
            f"cannot write{where or ' ' + str(folder)} ({error.strerror or error}); what was saved stays: "
            "mend that and go on with --resume"
        ) from error
    return summary


def checked_data(config: Config) -> tuple[DataSet, np.ndarray]:
    """A configuration's data set, and the training images that keep their label: see `label_split`.

    Raises:
        UserError: the configuration asks for what the data set does not have, or for a device that is not there.
    """
    data = DATASETS[config.dataset]()
    try:
        split = label_split(data.train_labels, len(data.classes), config.labels, config.seed)
    except ValueError as error:
        raise UserError(f"--labels: {error}") from None
    if len(config.class_distribution) not in (0, len(data.classes)):
        raise UserError(
            f"--class-distribution takes {len(data.classes)} numbers, one a class, got {len(config.class_distribution)}"
        )
    sides = data.train_images.shape[1:3]
    if config.max_shift >= min(sides):
        raise UserError(f"--max-shift must be less than the images' {min(sides)} pixels, got {config.max_shift}")
    pick_device(config)
    return data, split


def check_folder(config: Config, folder: Path, resume: bool) -> bool:
    """Whether the folder holds this very run.

    Raises:
        UserError: it holds another one, or this one and nobody asked to resume it; it is a file.
    """
    begun = (folder / "config.json").exists()
    if begun and not resume:
        raise UserError(f"{folder} holds a run already; choose another --out, or go on with it by --resume")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out takes a folder")
    if begun:
        _check_same_run(load_config(folder / "config.json"), config, folder)
    return begun


def _begin(config: Config, folder: Path, resume: bool, data: DataSet, split: np.ndarray) -> bool:
    begun = check_folder(config, folder, resume)
    _describe(config, folder, data, split)
    return begun


def _describe(config: Config, folder: Path, data: DataSet, split: np.ndarray) -> None:
    """Writes what makes a folder this run's."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "split.json", _split_json(config, split, data))
    _write_text(folder / "config.json", config_json(config))


def _check_same_run(old: Config, new: Config, folder: Path) -> None:
    differing = changed_fields(dataclasses.replace(old, steps=new.steps), new)
    if differing:
        raise UserError(f"{folder} was begun with another configuration: {'; '.join(differing)}")
    if new.steps < old.steps:
        raise UserError(f"{folder} was begun with {old.steps} steps; --steps may grow, not shrink to {new.steps}")


def _split_json(config: Config, split: np.ndarray, data: DataSet) -> str:
    content = {
        "dataset": config.dataset,
        "seed": config.seed,
        "labels": config.labels,
        "train_rows": split.tolist(),
        "classes": [data.classes[c] for c in data.train_labels[split]],
    }
    return json.dumps(content) + "\n"


def _write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that a full disk never leaves half of one in place of a good one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("remixmatch-engine", "torch", "triton", "nvidia-dali-cuda130", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or CPU with its processor and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"CPU, {model}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def _summary(config: Config, trainer: Trainer) -> dict[str, Any]:
    return {
        "preset": config.preset,
        "seed": config.seed,
        "labels": config.labels,
        "k": config.k,
        **trainer.summary(),
        "ranks": distribution.ranks(),
        "versions": versions(),
        "device": device_name(trainer.device),
    }


def _finish(folder: Path, summary: Mapping[str, Any], trainer: Trainer) -> None:
    from engine.pictures import draw_curves, draw_views  # matplotlib takes a second that only the end should pay

    _write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in trainer.state.average.state_dict().items()}
    save_file(tensors, folder / "average.safetensors")
    draw_curves(read_metrics(folder / "metrics.jsonl"), folder / "curves.png")
    draw_views(trainer, folder / "views.png")


def load_average(folder: Path, warn: Any = lambda text: None) -> tuple[Config, DataSet, nn.Module, torch.device]:
    """The averaged network of a run's newest good checkpoint, in evaluation mode, with its data set.

    Raises:
        UserError: the folder holds no run, or no good checkpoint.
    """
    config = load_config(folder / "config.json")
    found = checkpoint.load_newest(folder / CHECKPOINTS, warn)
    if found is None:
        raise UserError(f"{folder} has no good checkpoint yet; train it, or go on with --resume")
    data = DATASETS[config.dataset]()
    device = pick_device(dataclasses.replace(config, device="auto"))
    network = make_network(config, len(data.classes), device).eval()
    network.load_state_dict(found.content["state"]["average"])
    return config, data, network, device
