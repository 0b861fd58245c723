"""What can be wrong with a configuration: by itself, and with its data."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np

from engine.config.config import Config
from engine.config.methods import METHODS
from engine.errors import UserError
from pipelines.cache import DataSet
from pipelines.datasets import DATASETS
from pipelines.splits import RULES

FOLDER = "folder:"  # before the path of a folder of images, in the name of a data set

# oneDNN in torch 2.15, without AVX-512: the weight gradient of a 1x1 convolution of stride 2 is wrong, and written past
# its buffer, with 1 to 7 input channels, and with 8 to 15 where the side is 80 pixels or more. Others of networks of 8
# to 40 channels were right, odd numbers included
LEAST_WIDTH, LEAST_WIDTH_LARGE, LARGE_SIDE = 8, 16, 72


def validate(config: Config, ranks: int = 1) -> None:
    """Checks what can be checked without data.

    Raises:
        UserError: a value that cannot work, with the values that can.
    """
    least = {
        "labels": 1, "seed": 0, "steps": 1, "batch": 1, "k": 1, "lag": 1, "prefetch": 1, "view_steps": 1,
        "view_threads": 1, "scales": 1, "blocks": 1, "bn_groups": 1, "micro_batches": 1, "eval_every": 1,
        "log_every": 1, "checkpoint_every": 1, "keep": 1, "max_shift": -1,
        "weight_decay": 0, "mu": 1, "ramp_kimg": 0, "mixup_alpha": 0, "threshold": 0,
    }  # fmt: skip
    least |= {field.name: 0 for field in dataclasses.fields(Config) if field.name.startswith("w_")}
    for name, bound in least.items():
        if not getattr(config, name) >= bound:
            raise UserError(f"{_flag(name)} must be at least {bound}, got {getattr(config, name)}")
    if not config.backbone and config.network not in ("wide-resnet", "auto"):
        raise UserError(f"--network takes wide-resnet, timm:NAME or auto, got '{config.network}'")
    if config.backbone and config.bn != "joint":
        raise UserError(f"--bn {config.bn} is for the Wide ResNet; models of timm have --bn joint")
    if not config.backbone and (config.pretrained or config.weights):
        raise UserError("--pretrained and --weights need a model of timm: --network timm:NAME")
    if config.backbone and config.stem_channels != 3:
        raise UserError("--stem-channels 8 is for the Wide ResNet; models of timm take 3")
    if config.pretrained and config.weights:
        raise UserError("--pretrained and --weights are two sources of weights: leave out one of them")
    if config.width < LEAST_WIDTH:
        raise UserError(
            f"--width must be at least {LEAST_WIDTH}, got {config.width}: with fewer channels torch computes wrong "
            "gradients on CPUs without AVX-512"
        )
    for name in ("temperature", "lr"):
        if not getattr(config, name) > 0:
            raise UserError(f"{_flag(name)} must be more than 0, got {getattr(config, name)}")
    for name in ("bn_momentum", "ema_decay", "marginal_decay", "threshold"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{_flag(name)} must lie between 0 and 1, got {getattr(config, name)}")
    _check_method(config)
    _check_log(config.log)
    check_name(config.dataset)
    if config.seed >= 2**63:
        raise UserError(f"--seed must be less than 2^63, got {config.seed}")
    given = config.class_distribution
    if given and not (min(given) >= 0 and abs(sum(given) - 1) < 1e-3):
        raise UserError(f"--class-distribution must be probabilities that sum to 1, got {' '.join(map(str, given))}")
    ahead = (config.prefetch + 1) * config.view_steps
    if config.lag < ahead:
        raise UserError(
            f"--lag must be at least (prefetch + 1) * view_steps = {ahead}, since plans are made so many steps ahead "
            f"of their probes; got {config.lag}"
        )
    micro_batches = config.micro_batches_of(ranks)
    shares = f"{micro_batches} micro-batches" if micro_batches > ranks else f"{ranks} ranks"
    if micro_batches % ranks:
        raise UserError(f"--micro-batches must be a multiple of the {ranks} ranks, got {config.micro_batches}")
    if config.batch % micro_batches:
        raise UserError(f"--batch {config.batch} cannot be shared by {shares}; take a multiple of {micro_batches}")
    if config.bn == "sync" and micro_batches > ranks:
        raise UserError(
            f"--bn sync needs all rows of a step at once; --micro-batches {micro_batches} takes them one after another"
        )
    if config.bn == "split":
        if config.bn_groups % micro_batches or config.batch % config.bn_groups:
            raise UserError(
                f"--bn-groups must be a multiple of the {shares} and divide --batch {config.batch}, "
                f"got {config.bn_groups}"
            )
        passes = 1 + config.mu * (config.k + (config.anchor == "trained"))
        if config.unlabeled and config.batch // config.bn_groups < passes:
            raise UserError(
                f"--bn split needs at least {passes} rows a group, as many as the pool has blocks, so that each holds "
                f"labeled and unlabeled rows; --batch {config.batch} in {config.bn_groups} groups gives "
                f"{config.batch // config.bn_groups}"
            )


def _check_method(config: Config) -> None:
    """Raises UserError where fields of the method contradict each other."""
    if config.method not in METHODS:
        raise UserError(f"unknown method '{config.method}'; there are {', '.join(METHODS)}")
    if config.anchor == "none" and config.guess == "anchor":
        raise UserError("--anchor none leaves no u_weak to guess of: it needs --guess mean")
    if config.anchor == "guess-only" and config.guess == "mean":
        raise UserError("--guess mean is over views that are trained: it needs --anchor trained or none")
    if config.threshold and config.unlabeled_loss == "l2":
        raise UserError(
            "--threshold leaves guesses out of a cross-entropy or a KL divergence, not of --unlabeled-loss l2"
        )
    if config.bn_stats == "pool" and config.backbone:
        raise UserError("--bn-stats pool is for the Wide ResNet; models of timm have --bn-stats all")


def _check_log(name: str) -> None:
    known = get_args(get_type_hints(Config)["log"])
    if name not in known:
        raise UserError(f"--log takes {', '.join(known)}, got '{name}'")
    if name in ("wandb", "trackio"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as wandb leaves where it is used
            raise UserError(f"--log {name} needs {name}: pip install 'remixmatch-engine[{name}]'")


def folder_name(folder: str | Path) -> str:
    """The name of the data set that a folder of images is."""
    return FOLDER + str(Path(folder).resolve())


def check_name(name: str) -> None:
    if name not in DATASETS and not name.startswith(FOLDER) and name != "folder":
        raise UserError(f"unknown data set '{name}'; there are {', '.join(DATASETS)}, and --data FOLDER")


def resolve(config: Config, data: DataSet) -> Config:
    """The configuration with what depends on the images: `network` auto and `max_shift` -1."""
    side = min(data.sides)
    if config.max_shift < 0:
        config = dataclasses.replace(config, max_shift=side // 8)
    if config.network != "auto":
        return config
    if side > 96:
        return dataclasses.replace(config, network="timm:resnet50")
    return dataclasses.replace(config, network="wide-resnet", scales=3 if side <= 48 else 4)


def read_prior(path: Path, classes: tuple[str, ...]) -> tuple[float, ...]:
    """Known class probabilities from a JSON object, in the order of the classes.

    Raises:
        UserError: the file cannot be read, or does not have a number for every class and no other.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--class-prior {path} cannot be read ({error})") from None
    if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
        raise UserError(f"--class-prior {path} must be a JSON object of class names and numbers")
    if found.keys() != set(classes):
        differing = sorted(found.keys() ^ set(classes))
        raise UserError(f"--class-prior {path} must have the classes of the data; it differs in {', '.join(differing)}")
    total = sum(found.values())
    if not (min(found.values()) >= 0 and 0 < total < math.inf):
        raise UserError(f"--class-prior {path} must have finite numbers of at least 0 that are not all 0")
    return tuple(found[name] / total for name in classes)


def check_data(config: Config, data: DataSet) -> np.ndarray:
    """Choose the training images that keep their label, (labels,) int64: see `pipelines.splits`.

    Args:
        config: of a run, resolved.
        data: its data set.

    Raises:
        UserError: the configuration asks for what the data set does not have.
    """
    try:
        split = RULES[config.split](data, config.labels, config.seed)
    except ValueError as error:
        raise UserError(f"--labels: {error}") from None
    if len(config.class_distribution) not in (0, len(data.classes)):
        raise UserError(
            f"--class-distribution takes {len(data.classes)} numbers, one a class, got {len(config.class_distribution)}"
        )
    sides = data.sides
    if config.width < LEAST_WIDTH_LARGE and max(sides) > LARGE_SIDE and not config.backbone:
        raise UserError(
            f"--width must be at least {LEAST_WIDTH_LARGE} for images of more than {LARGE_SIDE} pixels, got "
            f"{config.width}: with fewer channels torch computes wrong gradients on CPUs without AVX-512"
        )
    if config.max_shift >= min(sides):
        raise UserError(f"--max-shift must be less than the images' {min(sides)} pixels, got {config.max_shift}")
    return split


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
