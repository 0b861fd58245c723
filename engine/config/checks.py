"""Checks of a configuration, on its own and against its data."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np

from engine.config.config import Config
from engine.config.methods import METHODS, OWN_SETTINGS, contradiction
from engine.config.values import flag_of, shown
from engine.errors import UserError, unknown
from pipelines.data.cache import DataSet
from pipelines.data.datasets import DATASETS
from pipelines.data.imbalance import choose

CLIENTS = ("wandb", "trackio")  # Loggers that may send metrics to a server.
FOLDER = "folder:"  # Prefix of the name of a data set that is a folder of images; the folder's path follows.
PYTHON = "python"  # Name of a data set that was given in Python.

# With fewer channels, oneDNN computes wrong gradients of some convolutions on CPUs, or ends the process. Only what was
# measured to be right is allowed; see docs/measurements/cpu.md.
MIN_WIDTH, MIN_WIDTH_LARGE, LARGE_SIDE = 8, 16, 96


def check_seed(seed: int, flag: str = "--seed") -> None:
    """Raise UserError if a seed is not allowed: torch and numpy's legacy generator use 32 bits of a seed."""
    if not 0 <= seed < 2**32:
        raise UserError(f"{flag} must be from 0 to {2**32 - 1}, got {shown(seed)}")


def check_labels(config: Config, given: Mapping[str, str]) -> None:
    """Raise UserError if the user gave a number of labels that the configuration does not use.

    Args:
        config: The configuration.
        given: The fields that the user gave, and what a message calls each of them.
    """
    labels = given.get("labels")
    if labels and config.split == "all":
        raise UserError(f"--split all uses every label; leave out {labels}, or give another --split")
    if labels and config.n1:
        raise UserError(f"--n1 {config.n1} and the ratios set the number of labels; leave out {labels} or --n1")


def validate(config: Config, ranks: int = 1) -> None:
    """Check a configuration without its data.

    Args:
        config: The configuration.
        ranks: Number of ranks that train it.

    Raises:
        UserError: A value that is not allowed.
    """
    minimum = {
        "labels": 1, "seed": 0, "steps": 1, "batch": 1, "k": 1, "lag": 1, "prefetch": 1, "view_steps": 1,
        "view_threads": 1, "scales": 1, "blocks": 1, "bn_groups": 1, "micro_batches": 1, "eval_every": 1,
        "log_every": 1, "checkpoint_every": 1, "keep": 1, "max_shift": -1, "cudnn_plans": 0,
        "weight_decay": 0, "mu": 1, "ramp_kimg": 0, "mixup_alpha": 0, "threshold": 0, "n1": 0, "m1": 0,
    }  # fmt: skip
    minimum |= {field.name: 0 for field in dataclasses.fields(Config) if field.name.startswith("w_")}
    for name, bound in minimum.items():
        if not getattr(config, name) >= bound:
            raise UserError(f"{flag_of(name)} must be at least {bound}, got {shown(getattr(config, name))}")
    if not config.backbone and config.network not in ("wide-resnet", "auto"):
        raise UserError(f"--network must be wide-resnet, timm:NAME or auto, got '{config.network}'")
    if config.backbone and config.bn != "joint":
        raise UserError(f"--bn {config.bn} requires a Wide ResNet; timm models need --bn joint")
    if not config.backbone and (config.pretrained or config.weights):
        raise UserError("--pretrained and --weights require a timm model: --network timm:NAME")
    if config.backbone and config.stem_channels != 3:
        raise UserError("--stem-channels 8 requires a Wide ResNet; timm models need --stem-channels 3")
    if config.pretrained and config.weights:
        raise UserError("--pretrained and --weights are mutually exclusive")
    if config.width < MIN_WIDTH:
        raise UserError(
            f"--width must be at least {MIN_WIDTH}, got {shown(config.width)}: with fewer channels torch computes "
            "wrong gradients or crashes on CPUs"
        )
    for name in ("temperature", "lr", "dash_epoch_kimg"):
        if not getattr(config, name) > 0:
            raise UserError(f"{flag_of(name)} must be more than 0, got {shown(getattr(config, name))}")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag_of(name)} must be finite, got {value}")
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"{flag_of(name)} must be less than 2^63, got {shown(value)}")
    for name in ("bn_momentum", "ema_decay", "marginal_decay", "threshold", "threshold_decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{flag_of(name)} must be between 0 and 1, got {shown(getattr(config, name))}")
    for name, none in (("imbalance", ()), ("imbalance_labeled", (0,)), ("imbalance_unlabeled", (0,))):
        if not (abs(getattr(config, name)) >= 1 or getattr(config, name) in none):
            raise UserError(f"{flag_of(name)} must be at least 1, or at most -1, got {shown(getattr(config, name))}")
    if config.n1 and not config.class_ratios.of_labeled:
        raise UserError("--n1 requires --imbalance or --imbalance-labeled; without them, --labels sets the labels")
    _check_method(config)
    _check_log(config.log)
    check_name(config.dataset)
    p = config.class_distribution
    if p and not (min(p) >= 0 and abs(sum(p) - 1) < 1e-3):
        raise UserError(f"--class-distribution must be probabilities that sum to 1, got {' '.join(map(str, p))}")
    steps_ahead = (config.prefetch + 1) * config.view_steps
    if config.lag < steps_ahead:
        raise UserError(
            f"--lag must be at least (prefetch + 1) * view_steps = {steps_ahead}, as views are drawn that many steps "
            f"ahead; got {config.lag}"
        )
    micro_batches = config.micro_batches_of(ranks)
    shares = f"{micro_batches} micro-batches" if micro_batches > ranks else f"{ranks} ranks"
    if micro_batches % ranks:
        raise UserError(f"--micro-batches must be a multiple of the {ranks} ranks, got {config.micro_batches}")
    if config.batch % micro_batches:
        raise UserError(f"--batch {config.batch} cannot be shared by {shares}; use a multiple of {micro_batches}")
    if config.bn == "sync" and micro_batches > ranks:
        raise UserError(
            f"--bn sync needs all images of a step at once, but --micro-batches {micro_batches} trains them one after "
            "another; use --bn joint or --bn split"
        )
    if config.guess_pass != "separate" and config.unlabeled and micro_batches > ranks:
        other = "" if "guess_pass" in OWN_SETTINGS.get(config.method, ()) else "--guess-pass separate or "
        raise UserError(
            f"--guess-pass {config.guess_pass} needs all pseudo-labels of a step after its first forward pass, but "
            f"--micro-batches {micro_batches} trains them one after another; use {other}--micro-batches {ranks}"
        )
    if config.bn == "split":
        if config.bn_groups % micro_batches or config.batch % config.bn_groups:
            raise UserError(
                f"--bn-groups must be a multiple of the {shares} and a divisor of --batch {config.batch}, "
                f"got {config.bn_groups}"
            )
        passes = 1 + (config.labeled_augment == "both") + config.mu * (config.k + (config.anchor == "trained"))
        if config.unlabeled and config.batch // config.bn_groups < passes:
            raise UserError(
                f"--bn split needs at least {passes} images per group, so that each group has labeled and unlabeled "
                f"images; --batch {config.batch} in --bn-groups {config.bn_groups} gives "
                f"{config.batch // config.bn_groups}"
            )


def _check_method(config: Config) -> None:
    """Raise UserError if settings of the method contradict each other."""
    if config.method not in METHODS:
        raise unknown("method", config.method, METHODS)
    if problem := contradiction(config):
        raise UserError(problem)
    if config.bn_stats == "pool" and config.backbone:
        raise UserError("--bn-stats pool requires a Wide ResNet; timm models need --bn-stats all")
    if not config.unlabeled:
        return
    if config.anchor == "none" and config.guess == "anchor":
        raise UserError("--anchor none requires --guess mean (there is no weak view to label)")
    if config.anchor == "guess-only" and config.guess == "mean":
        raise UserError("--guess mean requires --anchor trained or none (the mean is over the views trained on)")
    if config.guess_pass == "trained":
        if config.anchor == "guess-only":
            raise UserError("--guess-pass trained requires --anchor trained or none (u_weak is not trained on)")
        if config.mixup_alpha:
            raise UserError("--guess-pass trained requires --mixup-alpha 0 (pseudo-labels are of views without mixup)")
    if config.guess_network == "ema" and config.guess_pass != "separate":
        raise UserError(f"--guess-network ema requires --guess-pass separate, got {config.guess_pass}")
    if config.guess_network == "ema" and not config.ema_decay:
        raise UserError("--guess-network ema requires --ema-decay above 0; with 0, the EMA is the trained network")
    if config.method == "pi-model" and config.k < 2:
        raise UserError("--method pi-model requires --k 2 or more (it compares the views of an image), got 1")
    if config.method == "adamatch" and config.labeled_augment == "strong":
        raise UserError(
            "--method adamatch requires --labeled-augment both, weak or none (it predicts weak views), got strong"
        )
    if config.threshold and config.unlabeled_loss == "l2":
        raise UserError("--threshold requires --unlabeled-loss cross-entropy or kl, got l2")


def _check_log(name: str) -> None:
    known = get_args(get_type_hints(Config)["log"])
    if name not in known:
        raise UserError(f"--log must be one of {', '.join(known)}; got '{name}'")
    if name in CLIENTS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # A folder of that name, such as the one wandb writes its files to.
            raise UserError(f"--log {name} requires {name}: pip install 'remixmatch-engine[{name}]'")


def folder_name(folder: str | Path) -> str:
    """Return the data set name of a folder of images."""
    return FOLDER + str(Path(folder).resolve())


def check_name(name: str) -> None:
    """Raise UserError if there is no data set of that name."""
    if name not in DATASETS and not name.startswith(FOLDER) and name not in ("folder", PYTHON):
        listed = f"choose from {', '.join(DATASETS)}, or use --data DIR for your own images"
        raise unknown("data set", name, DATASETS, listed)


def check_size(size: int, name: str) -> None:
    """Raise UserError if images cannot have this size, in pixels; `name` is what the user calls it."""
    if not 8 <= size <= 1024:
        raise UserError(f"{name} must be from 8 to 1024 pixels, got {shown(size)}")


def resolve(config: Config, data: DataSet) -> Config:
    """Return the configuration with the values that depend on the images filled in: `network` and `max_shift`."""
    side = min(data.sides)
    if config.max_shift < 0:
        config = dataclasses.replace(config, max_shift=side // 8)
    if config.network != "auto":
        return config
    if side > 96:
        return dataclasses.replace(config, network="timm:resnet50")
    if config.scales != Config().scales:  # given by --scales
        return dataclasses.replace(config, network="wide-resnet")
    return dataclasses.replace(config, network="wide-resnet", scales=3 if side <= 48 else 4)


def read_prior(path: Path, classes: tuple[str, ...]) -> tuple[float, ...]:
    """Read class probabilities from a JSON object. Returns them in the order of the classes, normalized.

    Args:
        path: The file.
        classes: Names of the classes.

    Raises:
        UserError: The file cannot be read, or its keys are not exactly the classes, or a value is not allowed.
    """
    try:
        prior = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--class-prior {path} cannot be read ({reason})") from None
    if not isinstance(prior, dict) or not all(type(value) in (int, float) for value in prior.values()):
        raise UserError(f"--class-prior {path} must be a JSON object that maps class names to numbers")
    if prior.keys() != set(classes):
        differing = sorted(prior.keys() ^ set(classes))
        raise UserError(
            f"--class-prior {path} must have the classes of the data as keys; they differ in {', '.join(differing)}"
        )
    total = sum(prior.values())
    if not (min(prior.values()) >= 0 and 0 < total < math.inf):
        raise UserError(f"--class-prior {path} must contain finite, nonnegative numbers, at least one of them positive")
    return tuple(prior[name] / total for name in classes)


def check_data(config: Config, data: DataSet) -> tuple[np.ndarray, DataSet]:
    """Choose the training images that keep their label, and check the configuration against its data.

    Args:
        config: A resolved configuration, see `resolve`.
        data: Its data set.

    Returns:
        Indices of training images, (labels,) int64, see `pipelines.data.splits`; and the data set with the unlabeled
        images of the run.

    Raises:
        UserError: The data set does not have what the configuration requires.
    """
    try:
        split, unlabeled = choose(data, config.split, config.labels, config.seed, config.class_ratios)
    except ValueError as error:
        raise UserError(str(error)) from None
    if unlabeled is not None:
        data = dataclasses.replace(data, unlabeled=unlabeled)
    if config.class_distribution and config.marginal != "running":
        raise UserError(f"--marginal {config.marginal} and a given class distribution are mutually exclusive")
    if len(config.class_distribution) not in (0, len(data.classes)):
        raise UserError(
            f"--class-distribution needs {len(data.classes)} numbers, one per class, "
            f"got {len(config.class_distribution)}"
        )
    sides = data.sides
    if config.width < MIN_WIDTH_LARGE and max(sides) > LARGE_SIDE and not config.backbone:
        raise UserError(
            f"--width must be at least {MIN_WIDTH_LARGE} for images of more than {LARGE_SIDE} pixels, got "
            f"{config.width}: with fewer channels torch computes wrong gradients or crashes on CPUs"
        )
    if config.max_shift >= min(sides):
        raise UserError(
            f"--max-shift must be less than the images' shorter side of {min(sides)} pixels, got {config.max_shift}"
        )
    return split, data
