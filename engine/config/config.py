"""The configuration of a run.

Defaults are the paper's (K, B, T, p(y), loss weights, ramp, mixup, CTAugment, WRN-28-2, batch norm's momentum, Adam,
EMA), but for `labels`, `steps`, `lag` and what says where and how to compute; a preset names what it changes.
Every field is a flag of `remixmatch train`: its help, its section and what it means for a run are in its metadata. Two
runs with equal configurations on one machine are equal bit for bit: on a CPU with equal numbers of threads, on a GPU
with `deterministic`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError

# sections of the command line's help, in its order
SECTIONS = {
    "method": "What is learned, from which rows, with which losses. Paper: ReMixMatch (ICLR 2020), section 3.",
    "data": "Images, and which of them keep their label.",
    "augmentation": "Weak and strong views of an image. Section 3.2 of the paper.",
    "network": "A Wide ResNet (WRN-28-2 by default) or a model of timm, and its batch norm.",
    "optimization": "How long, and how fast, parameters and their exponential moving average (EMA) move.",
    "execution": "Where and how it is computed. Results are the same, but for rounding.",
    "output": "What is measured and written on the way.",
}


def _setting(
    default: Any,
    help: str,
    *,
    section: str,
    identity: bool = True,
    resumable: bool = False,
    counted: bool = False,
) -> Any:
    """Describe a field of `Config`.

    Args:
        default: value.
        help: of its flag.
        section: of SECTIONS.
        identity: whether another value makes another run: results differ by more than rounding.
        resumable: whether a run may be resumed with another value.
        counted: whether it changes what a step launches.
    """
    roles = {"section": section, "identity": identity, "resumable": resumable, "counted": counted}
    return dataclasses.field(default=default, metadata={"help": help, **roles})


_method = partial(_setting, section="method", counted=True)
_data = partial(_setting, section="data")
_augmentation = partial(_setting, section="augmentation", counted=True)
_network = partial(_setting, section="network", counted=True)
_optimization = partial(_setting, section="optimization")
# where and how fast a step is computed, and how often it is logged and saved: a run begun on one machine can be ended
# on another. Not precision, gradients and micro-batches, which change what the network is trained with: half of the
# bits, or batch norm over fewer rows; nor how often the run is evaluated: the median is over the last 20 evaluations
_execution = partial(_setting, section="execution", identity=False)
_output = partial(_setting, section="output", identity=False)


@dataclass(frozen=True)
class Config:
    """What is trained, on what, and how."""

    # method
    method: str = _method(
        "remixmatch",
        "Sets the other fields of the method, of which each can be given beside it: see engine.config.methods. "
        "'supervised' trains the same network on the labeled images alone, with the same augmentation and mixup.",
    )
    k: int = _method(
        8, "K: strong views of every unlabeled image; with --anchor none all its views, which are weak in MixMatch."
    )
    batch: int = _method(64, "B: labeled images a step, over all ranks.")
    mu: int = _method(1, "Unlabeled images a step, in units of B: FixMatch's mu.")
    anchor: Literal["trained", "guess-only", "none"] = _method(
        "trained",
        "u_weak, of which the label is guessed: trained like the other views, as in ReMixMatch; only guessed of, "
        "as in FixMatch and UDA; or not there, as in MixMatch and pseudo-labeling, where the views guess for "
        "themselves.",
    )
    guess: Literal["anchor", "mean"] = _method(
        "anchor", "The guess is the prediction for u_weak, or the mean of those for all views of the image."
    )
    temperature: float = _method(0.5, "T of the sharpening.")
    hard_labels: bool = _method(
        False, "A guess becomes the one-hot label of its largest class, instead of being sharpened."
    )
    threshold: float = _method(
        0.0, "Guesses whose largest probability, before sharpening, is less than this are left out of the loss."
    )
    align: bool = _method(True, "Distribution alignment of the guessed labels.")
    class_distribution: tuple[float, ...] = _method(
        (),
        "p(y) where it is known, one probability a class; by default the running marginal of the labeled examples.",
        counted=False,
    )
    marginal_decay: float = _method(
        0.999,
        "Decay of the running label marginal p(y).",
        counted=False,
    )
    unlabeled_loss: Literal["cross-entropy", "l2", "kl"] = _method(
        "cross-entropy",
        "Loss of the mixed unlabeled rows: cross-entropy; squared difference to the softmax, a mean over classes, "
        "as in MixMatch; or KL divergence, as in UDA.",
    )
    w_u: float = _method(1.5, "Weight of the mixed unlabeled rows' loss.")
    w_u1: float = _method(0.5, "Weight of the cross-entropy of u_1, one strong view unmixed; 0 leaves its rows out.")
    w_rot: float = _method(0.5, "Weight of the rotation task; 0 leaves its rows out.")
    ramp_kimg: float = _method(
        1024.0,
        "Labeled images, in units of 1024, over which w_u and w_u1 rise linearly from 0; 0 for their full weights "
        "from the start.",
    )
    mixup_alpha: float = _method(0.75, "Both parameters of mixup's Beta distribution; 0 for no mixup.")

    # data
    dataset: str = _data("digits", "Data set, a key of pipelines.datasets.DATASETS.")
    labels: int = _data(40, "Labeled images.")
    split: Literal["balanced", "paper", "usb", "torchssl", "fixmatch-pytorch", "all"] = _data(
        "balanced",
        "Rule by which the seed chooses the labeled images: as many of every class; exactly those of the paper's "
        "authors; those of other implementations; or every image that has a label, whatever --labels.",
    )
    seed: int = _data(0, "Seed of the label split, the initial weights and every plan.")

    # augmentation
    augment: Literal["ctaugment", "randaugment", "none"] = _augmentation(
        "ctaugment", "Strong augmentation: learned bins, uniform bins, or weak augmentation only."
    )
    ctaugment: Literal["paper", "code"] = _augmentation(
        "paper",
        "CTAugment as the paper describes it, or as in its authors' code: translations by at most 0.3 and "
        "rescaling by at most 0.25 pixels, which change no pixel; rotations by whole degrees; cutouts of an even "
        "number of pixels; and levels from the segments between neighbouring bins. Which of the two gave the "
        "paper's figures is not known.",
    )
    labeled_augment: Literal["strong", "weak", "none"] = _augmentation(
        "strong", "Augmentation of the labeled training images; strong is what --augment says."
    )
    max_shift: int = _augmentation(
        4, "Largest translation of a weak view, in pixels; -1 for an eighth of the images' side."
    )
    flip: bool = _augmentation(True, "Whether weak views may be mirrored.")
    anchor_augment: Literal["weak", "none", "strong"] = _augmentation(
        "weak",
        "Augmentation of the anchor u_weak, of which labels are guessed: in the paper weak, but none for STL-10.",
    )
    lag: int = _augmentation(
        8,
        "Steps between a CTAugment probe and the first plan that its outcome moves.",
        counted=False,
    )

    # network
    network: str = _network(
        "wide-resnet",
        "wide-resnet, timm:NAME for a model of timm, such as timm:resnet50 (pip install "
        "'remixmatch-engine[timm]'), or auto: by the images' side, a Wide ResNet of 3 scales up to 48 pixels and "
        "4 up to 96, timm:resnet50 beyond.",
    )
    pretrained: bool = _network(
        False,
        "With a model of timm: start from its published weights.",
        counted=False,
    )
    weights: str = _network(
        "",
        "With a model of timm: start from the weights in this file, for a machine without a network.",
        counted=False,
    )
    width: int = _network(
        32, "Channels of the first group: 16 times the widen factor of a Wide ResNet, 32 for WRN-28-2."
    )
    blocks: int = _network(
        4, "Residual blocks a group: 4 for WRN-28-2, whose depth is scales * (2 * blocks + 1) + 1 = 28."
    )
    scales: int = _network(
        3,
        "Groups of residual blocks; each after the first halves the resolution and doubles the width. WRN-28-2 "
        "has 3, WRN-37-2 has 4.",
    )
    bn: Literal["joint", "split", "sync"] = _network(
        "joint",
        "Batch norm over all training rows of a rank or its micro-batch, over interleaved groups as the paper's "
        "separate passes, or over the rows of all ranks.",
    )
    bn_groups: int = _network(
        1,
        "With bn=split: parts into which each pass of B rows is cut; a multiple of the ranks and of the micro-batches.",
    )
    bn_stats: Literal["all", "pool"] = _network(
        "all",
        "Training rows that move the running statistics: all; or the mixup pool alone, as in the authors' code, "
        "where u_1 and its rotations do not. There the last of the pool's passes moves them, here the mean over "
        "the pool.",
    )
    bn_momentum: float = _network(0.001, "Momentum of the running statistics, in PyTorch's convention.")

    # optimization
    steps: int = _optimization(
        1000,
        "Training steps. A finished run may be resumed with more of them; nothing else but --log may change.",
        resumable=True,
    )
    lr: float = _optimization(0.002, "Adam's learning rate, constant.")
    weight_decay: float = _optimization(
        0.02,
        "Decoupled: weights of convolutions and linear layers shrink by 1 - weight_decay * lr a step; biases and "
        "batch norm do not.",
    )
    ema_decay: float = _optimization(
        0.999, "Decay of the exponential moving average of the parameters, which is what is evaluated."
    )
    optimizer: Literal["torch", "apex"] = _optimization(
        "torch",
        "torch's fused AdamW, or NVIDIA apex's FusedAdam, which has to be built from source.",
        counted=True,
    )

    # execution
    device: Literal["auto", "cpu", "cuda"] = _execution("auto", "Where to train; auto takes a GPU where there is one.")
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = _execution(
        "auto",
        "Autocast precision of the network, fp16 with a loss scaler; auto is bf16 on a GPU and fp32 on a CPU. "
        "fp64 has the whole network in double precision, which is slow and tells rounding from mistakes.",
        identity=True,
    )
    mode: Literal["auto", "eager", "compile", "graph"] = _execution(
        "auto",
        "How a step is executed: operator by operator, with the network compiled by torch.compile, or compiled "
        "and the whole step captured once as a CUDA graph; auto is graph on a GPU and eager on a CPU.",
    )
    views: Literal["auto", "dali", "fused"] = _execution(
        "auto",
        "Who makes views: DALI's pipeline, which is for CPUs, or one fused kernel, for images of up to 256x256 "
        "pixels; auto is fused on a GPU, DALI on a CPU.",
    )
    resident: Literal["auto", "device", "host"] = _execution(
        "auto",
        "On a GPU, where the training images lie: on the device; or on the host, from where those of a step are "
        "copied ahead of time. auto is the device if they take at most half of its free memory.",
    )
    micro_batches: int = _execution(
        1,
        "Gradient accumulation: parts into which a step's rows are cut, over all ranks. A rank trains its parts "
        "one after another and accumulates their gradients, which takes less memory and gives the numbers of a "
        "run on as many ranks. 1 is one part a rank.",
        identity=True,
    )
    gradients: Literal["fp32", "bf16"] = _execution(
        "fp32",
        "What ranks exchange gradients in: as they are, or in half of the bytes.",
        identity=True,
    )
    deterministic: bool = _execution(
        False,
        "On a GPU, the same bits in every run: kernels that are chosen by rule and not by their times, and none "
        "that add by atomics. Off, cuDNN measures its kernels, which is faster. On a CPU bits are the same "
        "without it.",
    )
    stem_channels: Literal[3, 8] = _execution(
        3,
        "Channels of the rows that a Wide ResNet is given: 8, of which five are zeros, may let cuDNN use tensor "
        "cores in the first convolution. Nobody has measured it.",
        counted=True,
    )
    tune: bool = _execution(
        False,
        "On a GPU, have Inductor try more variants of every kernel (coordinate descent): minutes at the start of "
        "a run.",
    )
    view_steps: int = _execution(
        1, "Steps whose views are made as one batch: small batches cost DALI as much as larger ones."
    )
    prefetch: int = _execution(2, "Batches of views made ahead; (prefetch + 1) * view_steps may not exceed lag.")
    view_threads: int = _execution(1, "Threads of the view pipeline.")

    # output
    eval_every: int = _output(
        1024,
        "Steps between evaluations of the EMA model on the test images.",
        identity=True,
    )
    log_every: int = _output(64, "Steps between rows of metrics.")
    checkpoint_every: int = _output(1024, "Steps between checkpoints; the last step always writes one.")
    keep: int = _output(3, "Checkpoints kept.")
    log: Literal["tensorboard", "wandb", "trackio", "none"] = _output(
        "tensorboard",
        "Where metrics go beside metrics.jsonl: TensorBoard's files; Weights & Biases or trackio, by their own "
        "clients (pip install 'remixmatch-engine[wandb]' or [trackio]); or nowhere. A run may be resumed with "
        "another one, which is then given all rows so far.",
        resumable=True,
    )

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


def fields_that(role: str) -> frozenset[str]:
    """Return the names of the fields whose metadata have a role: "identity", "resumable" or "counted"."""
    return frozenset(field.name for field in dataclasses.fields(Config) if field.metadata.get(role))


RESUMABLE = fields_that("resumable")
COUNTED = fields_that("counted")
PLACE = frozenset(field.name for field in dataclasses.fields(Config) if not field.metadata.get("identity", True))


def run_identity(config: Config) -> dict[str, Any]:
    """Return the values that a run keeps for life: all but those it may be resumed with."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in RESUMABLE}


def changes(old: Config, new: Config, ignored: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, each with its old and its new value."""
    pairs = {field.name: (getattr(old, field.name), getattr(new, field.name)) for field in dataclasses.fields(Config)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in ignored}


def changed_fields(old: Config, new: Config, ignored: Collection[str] = ()) -> list[str]:
    """Say which fields differ, for a message: `k 8 -> 4`."""
    return [f"{name} {before} -> {after}" for name, (before, after) in changes(old, new, ignored).items()]


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
        config = Config(**values)
        for field in dataclasses.fields(Config):
            found, wanted = getattr(config, field.name), type(field.default)
            kinds: dict[Any, Any] = {tuple: list, float: int | float}  # in JSON
            if not isinstance(found, kinds.get(wanted, wanted)):
                raise TypeError(f"{field.name} is {found!r}")
        return dataclasses.replace(config, class_distribution=tuple(config.class_distribution))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path} is not a configuration of this version: {error}") from None
