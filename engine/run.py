"""A run: begun or resumed in its folder, finished, and read back.

config.json  split.json  metrics.jsonl  history.jsonl  tensorboard/  logged.json  checkpoints/  summary.json
curves.png  views.png  results.npz  ema.safetensors
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config.config import Config, changed_fields, check_data, load_config, open_data, validate
from engine.config.presets import PRESETS, PUBLISHED
from engine.distributed import collectives
from engine.errors import UserError
from engine.inference import predict
from engine.inference.export import safetensors_bytes
from engine.models.wide_resnet import Classifier
from engine.runs import checkpoint, history
from engine.runs.folder import check_folder, describe, read_classes
from engine.runs.progress import ProgressLine, read_metrics
from engine.training.execution import pick_device, set_numerics
from engine.training.step import make_network
from engine.training.trainer import CHECKPOINTS, Trainer
from pipelines.data_set import DataSet
from pipelines.files import write_bytes, write_text


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
        UserError: see `validate`, `check_data`, `Execution.pick` and `check_folder`; training diverged; something could
            not be written.
        Stopped: see `Trainer.run`.
    """
    validate(config, collectives.ranks())
    data, split = check_data(config)
    try:
        progress = ProgressLine(config.steps, quiet, silent=collectives.rank() > 0)

        def prepare_folder() -> None:
            if not (folder / "config.json").exists():
                describe(config, folder, data, split)

        trainer = Trainer(config, data, split, folder, progress, prepare_folder, timeout, check_ranks)
        # written to only now, when nothing is left that the user may have to be told of
        begun = collectives.on_first(lambda: _begin(config, folder, resume, data, split))
        if begun:
            if trainer.resume():
                progress.say(f"resuming {folder} from step {trainer.step}")
            else:
                progress.say(f"{folder} has no good checkpoint; starting from step 0")
        try:
            trainer.run()
        finally:
            progress.close()
        summary = _summary(config, trainer)
        collectives.on_first(lambda: _finish(folder, summary, trainer))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise UserError(
            f"cannot write{where or ' ' + str(folder)} ({error.strerror or error}); what was saved stays: "
            "mend that and go on with --resume"
        ) from error
    return summary


def _begin(config: Config, folder: Path, resume: bool, data: DataSet, split: np.ndarray) -> bool:
    begun = check_folder(config, folder, resume)
    commit()  # what trains is what was there at the start, whatever is committed meanwhile
    describe(config, folder, data, split)
    return begun


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


@functools.cache
def commit() -> str:
    """The commit when first asked, marked where the working tree differs from it; "unknown" outside a checkout.

    Where files were copied without their history, the variable REMIXMATCH_COMMIT can name it.
    """
    if given := os.environ.get("REMIXMATCH_COMMIT"):
        return given
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the repository is that of whoever installed us
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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


def _published(config: Config, accuracy: float) -> dict[str, Any]:
    """The paper's figure for the preset, and how far this run's test error is from it, in percentage points.

    Figures are of ReMixMatch: other methods have none.
    """
    if config.preset not in PUBLISHED or config.method != "remixmatch":
        return {}
    figure = PUBLISHED[config.preset]
    return {
        "paper_error": figure.error,
        "paper_deviation": figure.deviation,
        "paper_source": figure.source,
        "error": 100.0 - accuracy,
        "difference_to_paper": 100.0 - accuracy - figure.error,
        "same_settings_as_paper": not changed_fields(
            dataclasses.replace(PRESETS[config.preset], seed=config.seed, log=config.log), config
        ),
    }


def _summary(config: Config, trainer: Trainer) -> dict[str, Any]:
    return {
        "preset": config.preset,
        "method": config.method,
        "seed": config.seed,
        "labels": len(trainer.feed.split),
        **({"held_out_test_images": trainer.data.held_out} if trainer.data.held_out else {}),
        "k": config.k,
        **trainer.summary(),
        **_published(config, trainer.summary()["median_last_20"]),
        "ranks": collectives.ranks(),
        "versions": versions(),
        "device": device_name(trainer.execution.device),
        "commit": commit(),
    }


def _finish(folder: Path, summary: Mapping[str, Any], trainer: Trainer) -> None:
    # matplotlib takes a second that only the end should pay
    from engine.runs.pictures import draw_curves, draw_views, make_views

    write_bytes(folder / "ema.safetensors", safetensors_bytes(trainer.state.ema_model))
    (folder / "average.safetensors").unlink(missing_ok=True)  # the same file under its name in earlier versions
    draw_curves(read_metrics(folder / "metrics.jsonl"), folder / "curves.png")
    views = make_views(trainer.feed, trainer.step)
    draw_views(views, folder / "views.png")
    data, rows = trainer.data, history.predicted_rows(trainer.data)
    probabilities = predict.probabilities(trainer.state.ema_model, data.test_images[rows], trainer.execution.device)
    history.save_results(folder, probabilities, rows, data, views)
    # last, since who finds it takes the run for done, and nobody would make the other files any more
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


@dataclass(frozen=True)
class Trained:
    """What a run has trained; its data need not be there any more.

    Attributes:
        config: of the run.
        classes: names.
        sides: (H, W) of the images.
        network: the EMA model, in evaluation mode.
        device: where it is.
    """

    config: Config
    classes: tuple[str, ...]
    sides: tuple[int, int]
    network: Classifier
    device: torch.device


def load_ema_model(folder: Path, warn: Any = lambda text: None) -> Trained:
    """The EMA model of a run's newest good checkpoint.

    Raises:
        UserError: the folder holds no run, or no good checkpoint.
    """
    config = load_config(folder / "config.json")
    found = checkpoint.load_newest(folder / CHECKPOINTS, warn)
    if found is None:
        raise UserError(f"{folder} has no good checkpoint yet; train it, or go on with --resume")
    described = read_classes(folder)
    if described is None:
        data = open_data(config.dataset)
        described = data.classes, data.sides
    classes, sides = described
    device = pick_device(dataclasses.replace(config, device="auto"))
    set_numerics(config.deterministic)
    network = make_network(config, len(classes), device, sides, trained=True).eval()
    network.load_state_dict(found.content["state"]["ema_model"])
    return Trained(config, classes, sides, network, device)
