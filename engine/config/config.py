"""Configuration of a run.

Defaults are the paper's (K, B, T, p(y), loss weights, ramp, mixup, CTAugment, WRN-28-2, batch norm's momentum, Adam,
EMA), but for `labels`, `steps`, `lag` and what says where and how to compute; a preset names what it changes.
Every field is a flag of `remixmatch train` with its help and default, in sections. A run is its configuration, and
resumes only under the one that it began with, but for more `steps` and another `log`. Two runs with equal
configurations on one machine are equal bit for bit: on a CPU with equal numbers of threads, on a GPU with
`deterministic`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from engine.errors import UserError
from pipelines.cache import DataError
from pipelines.data_set import DataSet
from pipelines.datasets import DATASETS
from pipelines.splits import RULES


@dataclass(frozen=True)
class MethodOptions:
    """What is learned, from which rows, with which losses. Paper: ReMixMatch (ICLR 2020), section 3."""

    method: Literal["remixmatch", "mixmatch", "fixmatch", "uda", "pseudo-label", "supervised"] = "remixmatch"
    """Sets the other fields of the method, of which each can be given beside it: see engine.config.methods.
    'supervised' trains the same network on the labeled images alone, with the same augmentation and mixup."""
    k: int = 8
    """K: strong views of every unlabeled image; with --anchor none all its views, which are weak in MixMatch."""
    batch: int = 64
    """B: labeled images a step, over all ranks."""
    mu: int = 1
    """Unlabeled images a step, in units of B: FixMatch's mu."""
    anchor: Literal["trained", "guess-only", "none"] = "trained"
    """u_weak, of which the label is guessed: trained like the other views, as in ReMixMatch; only guessed of, as in
    FixMatch and UDA; or not there, as in MixMatch and pseudo-labeling, where the views guess for themselves."""
    guess: Literal["anchor", "mean"] = "anchor"
    """The guess is the prediction for u_weak, or the mean of those for all views of the image."""
    temperature: float = 0.5
    """T of the sharpening."""
    hard_labels: bool = False
    """A guess becomes the one-hot label of its largest class, instead of being sharpened."""
    threshold: float = 0.0
    """Guesses whose largest probability, before sharpening, is less than this are left out of the loss."""
    align: bool = True
    """Distribution alignment of the guessed labels."""
    class_distribution: tuple[float, ...] = ()
    """p(y) where it is known, one probability a class; by default the running marginal of the labeled examples."""
    marginal_decay: float = 0.999
    """Decay of the running label marginal p(y)."""
    unlabeled_loss: Literal["cross-entropy", "l2", "kl"] = "cross-entropy"
    """Loss of the mixed unlabeled rows: cross-entropy; squared difference to the softmax, a mean over classes, as in
    MixMatch; or KL divergence, as in UDA."""
    w_u: float = 1.5
    """Weight of the mixed unlabeled rows' loss."""
    w_u1: float = 0.5
    """Weight of the cross-entropy of u_1, one strong view unmixed; 0 leaves its rows out."""
    w_rot: float = 0.5
    """Weight of the rotation task; 0 leaves its rows out."""
    ramp_kimg: float = 1024.0
    """Labeled images, in units of 1024, over which w_u and w_u1 rise linearly from 0; 0 for their full weights from
    the start."""
    mixup_alpha: float = 0.75
    """Both parameters of mixup's Beta distribution; 0 for no mixup."""


@dataclass(frozen=True)
class DataOptions:
    """Images, and which of them keep their label."""

    dataset: str = "digits"
    """Data set, a key of pipelines.datasets.DATASETS."""
    labels: int = 40
    """Labeled images."""
    split: Literal["balanced", "paper", "usb", "torchssl", "fixmatch-pytorch", "all"] = "balanced"
    """Rule by which the seed chooses the labeled images: as many of every class; exactly those of the paper's authors;
    those of other implementations; or every image that has a label, whatever --labels."""
    seed: int = 0
    """Seed of the label split, the initial weights and every plan."""


@dataclass(frozen=True)
class AugmentationOptions:
    """Weak and strong views of an image. Section 3.2 of the paper."""

    augment: Literal["ctaugment", "randaugment", "none"] = "ctaugment"
    """Strong augmentation: learned bins, uniform bins, or weak augmentation only."""
    ctaugment: Literal["paper", "code"] = "paper"
    """CTAugment as the paper describes it, or as in its authors' code: translations by at most 0.3 and rescaling by at
    most 0.25 pixels, which change no pixel; rotations by whole degrees; cutouts of an even number of pixels; and levels
    from the segments between neighbouring bins. Which of the two gave the paper's figures is not known."""
    labeled_augment: Literal["strong", "weak", "none"] = "strong"
    """Augmentation of the labeled training images; strong is what --augment says."""
    max_shift: int = 4
    """Largest translation of a weak view, in pixels; -1 for an eighth of the images' side."""
    flip: bool = True
    """Whether weak views may be mirrored."""
    anchor_augment: Literal["weak", "none", "strong"] = "weak"
    """Augmentation of the anchor u_weak, of which labels are guessed: in the paper weak, but none for STL-10."""
    lag: int = 8
    """Steps between a CTAugment probe and the first plan that its outcome moves."""


@dataclass(frozen=True)
class NetworkOptions:
    """A Wide ResNet (WRN-28-2 by default) or a model of timm, and its batch norm."""

    network: str = "wide-resnet"
    """wide-resnet, timm:NAME for a model of timm, such as timm:resnet50 (pip install 'remixmatch-engine[timm]'), or
    auto: by the images' side, a Wide ResNet of 3 scales up to 48 pixels and 4 up to 96, timm:resnet50 beyond."""
    pretrained: bool = False
    """With a model of timm: start from its published weights."""
    weights: str = ""
    """With a model of timm: start from the weights in this file, for a machine without a network."""
    width: int = 32
    """Channels of the first group: 16 times the widen factor of a Wide ResNet, 32 for WRN-28-2."""
    blocks: int = 4
    """Residual blocks a group: 4 for WRN-28-2, whose depth is scales * (2 * blocks + 1) + 1 = 28."""
    scales: int = 3
    """Groups of residual blocks; each after the first halves the resolution and doubles the width. WRN-28-2 has 3,
    WRN-37-2 has 4."""
    bn: Literal["joint", "split", "sync"] = "joint"
    """Batch norm over all training rows of a rank or its micro-batch, over interleaved groups as the paper's separate
    passes, or over the rows of all ranks."""
    bn_groups: int = 1
    """With bn=split: parts into which each pass of B rows is cut; a multiple of the ranks and of the micro-batches."""
    bn_stats: Literal["all", "pool"] = "all"
    """Training rows that move the running statistics: all; or the mixup pool alone, as in the authors' code, where
    u_1 and its rotations do not. There the last of the pool's passes moves them, here the mean over the pool."""
    bn_momentum: float = 0.001
    """Momentum of the running statistics, in PyTorch's convention."""


@dataclass(frozen=True)
class OptimisationOptions:
    """How long, and how fast, parameters and their exponential moving average (EMA) move."""

    steps: int = 1000
    """Training steps. A finished run may be resumed with more of them; nothing else but --log may change."""
    lr: float = 0.002
    """Adam's learning rate, constant."""
    weight_decay: float = 0.02
    """Decoupled: weights of convolutions and linear layers shrink by 1 - weight_decay * lr a step; biases and batch
    norm do not."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the parameters, which is what is evaluated."""
    optimizer: Literal["torch", "apex"] = "torch"
    """torch's fused AdamW, or NVIDIA apex's FusedAdam, which has to be built from source."""


@dataclass(frozen=True)
class ExecutionOptions:
    """Where and how it is computed. Results are the same, but for rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision of the network, fp16 with a loss scaler; auto is bf16 on a GPU and fp32 on a CPU. fp64
    has the whole network in double precision, which is slow and tells rounding from mistakes."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How a step is executed: operator by operator, with the network compiled by torch.compile, or compiled and the
    whole step captured once as a CUDA graph; auto is graph on a GPU and eager on a CPU."""
    views: Literal["auto", "dali", "fused"] = "auto"
    """Who makes views: DALI's pipeline, which is for CPUs, or one fused kernel, for images of up to 256x256 pixels;
    auto is fused on a GPU, DALI on a CPU."""
    resident: Literal["auto", "device", "host"] = "auto"
    """On a GPU, where the training images lie: on the device; or on the host, from where those of a step are copied
    ahead of time. auto is the device if they take at most half of its free memory."""
    micro_batches: int = 1
    """Gradient accumulation: parts into which a step's rows are cut, over all ranks. A rank trains its parts one after
    another and accumulates their gradients, which takes less memory and gives the numbers of a run on as many ranks.
    1 is one part a rank."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """What ranks exchange gradients in: as they are, or in half of the bytes."""
    deterministic: bool = False
    """On a GPU, the same bits in every run: kernels that are chosen by rule and not by their times, and none that add
    by atomics. Off, cuDNN measures its kernels, which is faster. On a CPU bits are the same without it."""
    stem_channels: Literal[3, 8] = 3
    """Channels of the rows that a Wide ResNet is given: 8, of which five are zeros, may let cuDNN use tensor cores in
    the first convolution. Nobody has measured it."""
    tune: bool = False
    """On a GPU, have Inductor try more variants of every kernel (coordinate descent): minutes at the start of a run."""
    view_steps: int = 1
    """Steps whose views are made as one batch: small batches cost DALI as much as larger ones."""
    prefetch: int = 2
    """Batches of views made ahead; (prefetch + 1) * view_steps may not exceed lag."""
    view_threads: int = 1
    """Threads of the view pipeline."""


@dataclass(frozen=True)
class OutputOptions:
    """What is measured and written on the way."""

    eval_every: int = 1024
    """Steps between evaluations of the EMA model on the test images."""
    log_every: int = 64
    """Steps between rows of metrics."""
    checkpoint_every: int = 1024
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 3
    """Checkpoints kept."""
    log: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where metrics go beside metrics.jsonl: TensorBoard's files; Weights & Biases or trackio, by their own clients
    (pip install 'remixmatch-engine[wandb]' or [trackio]); or nowhere. A run may be resumed with another one, which is
    then given all rows so far."""


@dataclass(frozen=True)
class Config(
    OutputOptions,
    ExecutionOptions,
    OptimisationOptions,
    NetworkOptions,
    AugmentationOptions,
    DataOptions,
    MethodOptions,
):
    """What is trained, on what, and how: the fields of all sections, by their own names."""

    preset: str = "digits-40"
    """Name of the preset that the other fields started from."""

    @property
    def backbone(self) -> str:
        """Name of timm's model; "" for a Wide ResNet."""
        return self.network.removeprefix("timm:") if self.network.startswith("timm:") else ""

    @property
    def architecture(self) -> str:
        """The network by its name in the field, such as WRN-28-2."""
        return self.network if self.backbone else f"WRN-{self.depth}-{self.widen_factor:g}"

    @property
    def depth(self) -> int:
        """Depth of the Wide ResNet as its name counts: the convolutions, shortcuts included, and the linear layer."""
        return self.scales * (2 * self.blocks + 1) + 1

    @property
    def widen_factor(self) -> float:
        """Widen factor of the Wide ResNet."""
        return self.width / 16

    @property
    def unlabeled(self) -> bool:
        """Whether the method looks at unlabeled images."""
        return self.method != "supervised"

    def micro_batches_of(self, ranks: int) -> int:
        """M: micro-batches of a step over so many ranks, at least one for each."""
        return max(self.micro_batches, ranks)


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
        "log_every": 1, "checkpoint_every": 1, "keep": 1, "max_shift": -1, "w_u": 0, "w_u1": 0, "w_rot": 0,
        "weight_decay": 0, "mu": 1, "ramp_kimg": 0, "mixup_alpha": 0, "threshold": 0,
    }  # fmt: skip
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
    _check_name(config.dataset)
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
    known = get_args(get_type_hints(OutputOptions)["log"])
    if name not in known:
        raise UserError(f"--log takes {', '.join(known)}, got '{name}'")
    if name in ("wandb", "trackio"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as wandb leaves where it is used
            raise UserError(f"--log {name} needs {name}: pip install 'remixmatch-engine[{name}]'")


def folder_name(folder: str | Path) -> str:
    """The name of the data set that a folder of images is."""
    return FOLDER + str(Path(folder).resolve())


def _check_name(name: str) -> None:
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


def open_data(name: str) -> DataSet:
    """A data set by its name.

    Raises:
        UserError: there is none of that name, or it has not been prepared.
    """
    _check_name(name)
    if name == "folder":
        raise UserError("which folder? give it by --data, as in: remixmatch train folder --data pets/")
    try:
        if name.startswith(FOLDER):
            from pipelines.folder import open_folder

            return open_folder(Path(name.removeprefix(FOLDER)))
        return DATASETS[name]()
    except DataError as error:
        raise UserError(str(error)) from None
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


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


def check_data(config: Config, data: DataSet | None = None) -> tuple[DataSet, np.ndarray]:
    """A configuration's data set, and the training images that keep their label: see `pipelines.splits`.

    Args:
        config: of a run.
        data: its data set, where that is open already.

    Raises:
        UserError: the configuration asks for what the data set does not have.
    """
    data = data or open_data(config.dataset)
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
    return data, split


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def config_json(config: Config) -> str:
    """A configuration as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load_config(path: Path) -> Config:
    """Reads a file that holds what `config_json` gave.

    Raises:
        UserError: the file is missing, is not JSON, or is of another version of the engine.
    """
    try:
        return parse_config(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no run: there is no {path.name} in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a configuration of this version: {error}") from None


def parse_config(text: str, path: Path) -> Config:
    """A configuration from what `config_json` gave.

    Args:
        text: JSON.
        path: where it was, for a message.

    Raises:
        UserError: it is not JSON, or of another version of the engine.
    """
    try:
        values: Any = json.loads(text)
        if "weak_anchor" in values:  # anchor_augment in earlier versions
            values["anchor_augment"] = "weak" if values.pop("weak_anchor") else "none"
        config = Config(**values)
        return dataclasses.replace(config, class_distribution=tuple(config.class_distribution))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path} is not a configuration of this version: {error}") from None


def changed_fields(old: Config, new: Config) -> list[str]:
    """Names and values of the fields that differ, for a message: `k 8 -> 4`."""
    return [
        f"{field.name} {getattr(old, field.name)} -> {getattr(new, field.name)}"
        for field in dataclasses.fields(Config)
        if getattr(old, field.name) != getattr(new, field.name)
    ]
