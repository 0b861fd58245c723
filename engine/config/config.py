"""The configuration of a run.

Defaults are the paper's (K, B, T, p(y), loss weights, ramp, mixup, CTAugment, WRN-28-2, batch norm momentum, Adam,
EMA), except for `labels`, `steps`, `lag`, and the execution and output settings. A preset lists what it changes.
Every field is a flag of `remixmatch train`; its metadata hold the help text, the section, and its role in a run. Two
runs with equal configurations on one machine are bit-identical: on a CPU with equal numbers of threads, on a GPU with
`deterministic`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

from engine.config.values import convert
from engine.errors import UserError, unknown
from pipelines.data.imbalance import Imbalance
from pipelines.files import read_file

# Sections of the command-line help, in order.
SECTIONS = {
    "method": "Views, pseudo-labels and losses. Paper: ReMixMatch (ICLR 2020), section 3.",
    "data": "Images, and which of them keep their label.",
    "augmentation": "Weak and strong augmentation. Section 3.2 of the paper.",
    "network": "A Wide ResNet (WRN-28-2 by default) or a timm model, and its batch norm.",
    "optimization": "Length of training, optimizer, and the exponential moving average (EMA) of the parameters.",
    "execution": "Device, precision and execution mode. Results agree up to rounding.",
    "output": "Evaluation, logging and checkpoints.",
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
        default: Default value.
        help: Help text of its flag.
        section: Key of SECTIONS.
        identity: Whether a different value makes a different run: results differ by more than rounding.
        resumable: Whether a run can be resumed with a different value.
        counted: Whether it changes what a step launches.
    """
    roles = {"section": section, "identity": identity, "resumable": resumable, "counted": counted}
    return dataclasses.field(default=default, metadata={"help": help, **roles})


_method = partial(_setting, section="method", counted=True)
_data = partial(_setting, section="data")
_augmentation = partial(_setting, section="augmentation", counted=True)
_network = partial(_setting, section="network", counted=True)
_optimization = partial(_setting, section="optimization")
# A run of a table may start on one machine and finish on another, so execution and output settings do not identify it.
# Exceptions are precision, gradients and micro-batches, which change what the network is trained with (fewer bits, or
# batch norm over fewer images), and the evaluation interval, since the median is over the last 20 evaluations.
_execution = partial(_setting, section="execution", identity=False)
_output = partial(_setting, section="output", identity=False)


@dataclass(frozen=True)
class Config:
    """Settings of a run: method, data, network, optimization, execution and output."""

    # Method
    method: str = _method(
        "remixmatch",
        "Method. It sets other flags, which can be overridden unless the method computes them itself (see "
        "engine/config/methods.py). "
        "'supervised' trains the same network on the labeled images alone, with the same augmentation and mixup.",
    )
    k: int = _method(
        8,
        "K: strong views per unlabeled image. With --anchor none, all views of an unlabeled image; in MixMatch they "
        "are weak.",
    )
    batch: int = _method(64, "B: labeled images per step, over all ranks.")
    mu: int = _method(1, "mu: unlabeled images per step, as a multiple of B, as in FixMatch.")
    anchor: Literal["trained", "guess-only", "none"] = _method(
        "trained",
        "How the weak view u_weak is used: 'trained', trained on like the other views, as in ReMixMatch; "
        "'guess-only', only for pseudo-labels, as in FixMatch and UDA; or 'none', absent: pseudo-labels come from "
        "the other views, as in MixMatch and pseudo-labeling.",
    )
    guess: Literal["anchor", "mean"] = _method(
        "anchor",
        "Source of the pseudo-label: 'anchor', the prediction for u_weak; or 'mean', the mean prediction over all "
        "views of the image.",
    )
    guess_pass: Literal["separate", "joint", "trained"] = _method(
        "separate",
        "Forward pass that makes the pseudo-labels: 'separate', one of its own, whose views are normalized on their "
        "own and do not update the running statistics; 'joint', the training pass, whose batch norm then includes "
        "these views, unmixed; or 'trained', the training pass without more views: pseudo-labels are made from its "
        "predictions for the views that it trains on, as in the Pi model, which requires --mixup-alpha 0. Views used "
        "only for pseudo-labels enter no loss. 'joint' and 'trained' allow one micro-batch per rank.",
    )
    guess_network: Literal["network", "ema"] = _method(
        "network",
        "Network that makes the pseudo-labels, in training mode: the one that is trained, or the EMA of its "
        "parameters, as in Mean Teacher.",
    )
    temperature: float = _method(0.5, "Sharpening temperature T.")
    hard_labels: bool = _method(
        False, "Use the most probable class as a one-hot pseudo-label, instead of sharpening the distribution."
    )
    threshold: float = _method(
        0.0,
        "Leave out of the loss all pseudo-labels whose largest probability, before sharpening, is below this value; "
        "0 keeps all. In AdaMatch it is a multiple of the mean confidence in labeled images.",
    )
    threshold_decay: float = _method(
        0.999,
        "Decay of the running averages that FreeMatch's thresholds and SoftMatch's weights are made from.",
        counted=False,
    )
    flex_warmup: bool = _method(
        True,
        "FlexMatch: keep thresholds low while most unlabeled images have not had a confident prediction yet.",
    )
    dash_epoch_kimg: float = _method(
        64.0,
        "Dash: length of an epoch in kimg (1024 labeled images). Its first 10 epochs train on labeled images alone; "
        "then its threshold decays every 9 epochs.",
        counted=False,
    )
    align: bool = _method(True, "Apply distribution alignment to pseudo-labels.")
    class_distribution: tuple[float, ...] = _method(
        (),
        "Known class distribution p(y), one probability per class. By default p(y) is the running marginal of the "
        "labeled examples.",
        counted=False,
    )
    marginal: Literal["running", "labels", "uniform"] = _method(
        "running",
        "p(y) without --class-distribution: 'running', the running marginal of the labeled examples; 'labels', the "
        "class frequencies of all labeled images, from the first step on; or 'uniform'.",
        counted=False,
    )
    marginal_decay: float = _method(
        0.999,
        "Decay of the running label marginal p(y).",
        counted=False,
    )
    unlabeled_loss: Literal["cross-entropy", "l2", "kl"] = _method(
        "cross-entropy",
        "Loss of the mixed unlabeled examples: cross-entropy; 'l2', the squared difference from the softmax, "
        "averaged over classes, as in MixMatch; or 'kl', the KL divergence, as in UDA.",
    )
    interpolate_logits: bool = _method(
        False,
        "Random logit interpolation, as in AdaMatch: the logits of labeled images are a random mixture, drawn for each "
        "logit, of those from the training pass and those from a further pass over the labeled images alone.",
    )
    w_u: float = _method(1.5, "Weight of the loss of mixed unlabeled examples.")
    w_u1: float = _method(
        0.5, "Weight of the cross-entropy of u_1, one strong view without mixup; 0 removes it from the batch."
    )
    w_rot: float = _method(0.5, "Weight of the rotation loss; 0 removes rotated images from the batch.")
    w_fair: float = _method(0.0, "Weight of FreeMatch's fairness loss, which makes the mean prediction less uneven.")
    ramp_kimg: float = _method(
        1024.0,
        "Length of the ramp of w_u and w_u1, in kimg (1024 labeled images); 0 starts at full weight.",
    )
    ramp: Literal["linear", "gaussian", "cosine"] = _method(
        "linear",
        "Shape of the ramp over its progress t from 0 to 1: linear, t; gaussian, exp(-5 (1 - t)^2), as in the Pi model "
        "and Mean Teacher; or cosine, (1 - cos(pi t)) / 2, as in AdaMatch.",
    )
    mixup_alpha: float = _method(0.75, "Both parameters of mixup's Beta distribution; 0 disables mixup.")

    # Data
    dataset: str = _data("digits", "Name of the data set; 'remixmatch data list' shows all.")
    labels: int = _data(40, "Number of labeled images; not allowed with --split all or --n1.")
    split: Literal["balanced", "paper", "usb", "torchssl", "fixmatch-pytorch", "all"] = _data(
        "balanced",
        "Rule that picks the labeled images, given --labels and --seed: 'balanced', equally many of each class; "
        "'paper', the images chosen by the paper's authors; 'usb', 'torchssl' or 'fixmatch-pytorch', as these "
        "implementations do; or 'all', every image with a label.",
    )
    seed: int = _data(0, "Seed of the label split, the initial weights, and all random draws, below 2^32.")
    imbalance: float = _data(
        1.0,
        "gamma: images of the first class per image of the last one, decaying exponentially in between, for labeled "
        "and unlabeled images. A negative value reverses the order of the classes; 1 leaves them as they are.",
    )
    imbalance_labeled: float = _data(0.0, "gamma of the labeled images; 0 for that of --imbalance.")
    imbalance_unlabeled: float = _data(0.0, "gamma of the unlabeled images; 0 for that of --imbalance.")
    n1: int = _data(
        0, "N_1: labeled images of the largest class, instead of --labels; 0 derives it from --labels. Needs a gamma."
    )
    m1: int = _data(
        0,
        "M_1: unlabeled images of the largest class, in addition to the labeled ones; 0 for the most that every class "
        "can supply.",
    )

    # Augmentation
    augment: Literal["ctaugment", "randaugment", "none"] = _augmentation(
        "ctaugment",
        "Strong augmentation: 'ctaugment' (learned bins), 'randaugment' (uniform bins), or 'none' (weak "
        "augmentation only).",
    )
    ctaugment: Literal["paper", "code"] = _augmentation(
        "paper",
        "CTAugment as described in the paper, or as in the authors' code: translations of at most 0.3 pixels and "
        "rescaling by at most 0.25 pixels, neither of which changes a pixel; rotations by whole degrees; cutouts of "
        "an even number of pixels; and levels drawn between neighboring bins. It is not known which of the two "
        "produced the paper's numbers.",
    )
    labeled_augment: Literal["strong", "weak", "none", "both"] = _augmentation(
        "strong",
        "Augmentation of labeled training images; 'strong' is defined by --augment, and 'both' trains on a strong and "
        "a weak view of every image, as in AdaMatch.",
    )
    max_shift: int = _augmentation(
        4, "Largest translation of a weak view, in pixels; -1 for 1/8 of the images' shorter side."
    )
    flip: bool = _augmentation(True, "Flip weak views horizontally at random.")
    anchor_augment: Literal["weak", "none", "strong"] = _augmentation(
        "weak", "Augmentation of the anchor u_weak. The paper uses 'weak', and 'none' for STL-10."
    )
    lag: int = _augmentation(
        8,
        "Steps between a CTAugment probe and the first step whose sampling it affects.",
        counted=False,
    )

    # Network
    network: str = _network(
        "wide-resnet",
        "wide-resnet; timm:NAME for a timm model, such as timm:resnet50 (pip install 'remixmatch-engine[timm]'); or "
        "auto, which depends on the images' shorter side: a Wide ResNet with 3 scales up to 48 pixels and 4 scales "
        "up to 96 (or those of --scales), timm:resnet50 above.",
    )
    pretrained: bool = _network(
        False,
        "Start from the published weights of a timm model.",
        counted=False,
    )
    weights: str = _network(
        "",
        "File with the initial weights of a timm model; needs no network access.",
        counted=False,
    )
    width: int = _network(
        32, "Channels of the first group of a Wide ResNet: 16 times the widen factor, 32 for WRN-28-2."
    )
    blocks: int = _network(
        4, "Residual blocks per group: 4 for WRN-28-2, whose depth is scales * (2 * blocks + 1) + 1 = 28."
    )
    scales: int = _network(
        3,
        "Groups of residual blocks; each group after the first halves the resolution and doubles the width. "
        "3 for WRN-28-2, 4 for WRN-37-2.",
    )
    bn: Literal["joint", "split", "sync"] = _network(
        "joint",
        "Images that batch norm normalizes together: 'joint', all training images of a rank or its micro-batch; "
        "'split', interleaved groups, like the separate passes of the paper's code; or 'sync', those of all ranks.",
    )
    bn_groups: int = _network(
        1,
        "Groups into which --bn split cuts each pass of B images; a multiple of the number of ranks and of "
        "--micro-batches.",
    )
    bn_stats: Literal["all", "pool"] = _network(
        "all",
        "Training images that update the running statistics: all; or 'pool', the mixup pool alone, without u_1 and "
        "its rotations, as in the authors' code. The authors' code uses the last pass over the pool; here the "
        "statistics are the mean over the pool.",
    )
    bn_momentum: float = _network(0.001, "Momentum of the running statistics, in PyTorch's convention.")

    # Optimization
    steps: int = _optimization(
        1000,
        "Training steps. When a run is resumed, this may be increased, and --log may change, but no other setting.",
        resumable=True,
    )
    lr: float = _optimization(0.002, "Adam's learning rate, constant.")
    weight_decay: float = _optimization(
        0.02,
        "Decoupled weight decay: each step multiplies the weights of convolutions and linear layers by "
        "1 - weight_decay * lr; biases and batch norm are exempt.",
    )
    ema_decay: float = _optimization(
        0.999, "Decay of the exponential moving average (EMA) of the parameters, which is the model evaluated."
    )
    optimizer: Literal["torch", "apex"] = _optimization(
        "torch",
        "torch's fused AdamW, or NVIDIA apex's FusedAdam, which must be built from source.",
        counted=True,
    )

    # Execution
    device: Literal["auto", "cpu", "cuda"] = _execution(
        "auto", "Device to train on; auto uses a GPU if one is available."
    )
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = _execution(
        "auto",
        "Autocast precision of the network; fp16 uses a loss scaler. auto is bf16 on a GPU and fp32 on a CPU. fp64 "
        "runs the whole network in double precision, which is slow and separates rounding errors from bugs.",
        identity=True,
    )
    mode: Literal["auto", "eager", "compile", "graph"] = _execution(
        "auto",
        "How a step runs: 'eager'; 'compile', the network compiled by torch.compile; or 'graph', compiled and the "
        "whole step captured as a CUDA graph. auto is graph on a GPU and eager on a CPU.",
    )
    views: Literal["auto", "dali", "dali-graph", "fused"] = _execution(
        "auto",
        "How views are made: 'fused', one kernel, for images of up to 256x256 pixels; 'dali', a DALI pipeline; or "
        "'dali-graph', DALI's own operators only, whose equalize and rescale differ from PIL's, and rotations above "
        "128x128 in a few pixels. On a GPU dali is dali-graph. auto is fused on a GPU and dali on a CPU.",
    )
    resident: Literal["auto", "device", "host"] = _execution(
        "auto",
        "Where training images are stored when training on a GPU: on the device, or on the host, from which each "
        "step's images are prefetched. auto is device if they need at most half of the GPU's free memory.",
    )
    micro_batches: int = _execution(
        1,
        "Gradient accumulation: micro-batches per step, over all ranks. A rank trains its micro-batches one after "
        "another, which takes less memory and gives the results of a run on that many ranks. 1 means one per rank.",
        identity=True,
    )
    gradients: Literal["fp32", "bf16"] = _execution(
        "fp32",
        "Precision in which ranks exchange gradients; bf16 halves the bytes.",
        identity=True,
    )
    deterministic: bool = _execution(
        False,
        "Make GPU runs bit-identical: kernels are chosen by heuristic instead of by timing, and none uses atomic "
        "additions. Without it cuDNN times its kernels and uses the fastest. CPU runs do not need it.",
    )
    cudnn_plans: int = _execution(
        0,
        "On a GPU, number of plans that cuDNN times for each convolution at the start of a run to choose the fastest, "
        "in the order of its heuristic; 0 times all, 10 is torch's default. With --deterministic none is timed.",
    )
    stem_channels: Literal[3, 8] = _execution(
        3,
        "Input channels of a Wide ResNet. 8 adds five channels of zeros, so that cuDNN may use tensor cores in the "
        "first convolution: 1.1 % less time per step, measured on an H100.",
        counted=True,
    )
    convolutions: Literal["auto", "cudnn", "triton"] = _execution(
        "auto",
        "Kernels of a Wide ResNet's convolutions on a GPU: 'cudnn'; 'triton', which also compute batch norm, leaky "
        "ReLU and residual addition, for every shape that they support; or 'auto', whichever is faster for each layer, "
        "measured when training starts. auto is cudnn with --deterministic, with --bn split or sync, in fp32 and fp64, "
        "for timm models, and on a CPU.",
        counted=True,
    )
    tune: bool = _execution(
        False,
        "On a GPU, let Inductor try more variants of every kernel (coordinate descent), which takes minutes at the "
        "start of a run.",
    )
    view_steps: int = _execution(1, "Steps whose views are made as one batch; larger batches cost DALI less per view.")
    prefetch: int = _execution(
        2, "Batches of views made ahead of time; (prefetch + 1) * view_steps must not exceed --lag."
    )
    view_threads: int = _execution(1, "Threads of the view pipeline.")

    # Output
    eval_every: int = _output(
        1024,
        "Steps between evaluations of the EMA model on the test images.",
        identity=True,
    )
    log_every: int = _output(64, "Steps between records of metrics.")
    checkpoint_every: int = _output(1024, "Steps between checkpoints; the last step always writes one.")
    keep: int = _output(3, "Number of checkpoints to keep; older ones are deleted.")
    log: Literal["tensorboard", "wandb", "trackio", "none"] = _output(
        "tensorboard",
        "Where metrics go in addition to metrics.jsonl: TensorBoard files; Weights & Biases or trackio, through "
        "their own clients (pip install 'remixmatch-engine[wandb]' or 'remixmatch-engine[trackio]'); or nowhere. "
        "A run can be resumed with a different value; the new logger then receives all earlier records.",
        resumable=True,
    )

    preset: str = "digits-40"
    """Name of the preset that the other fields started from."""

    @property
    def backbone(self) -> str:
        """Name of the timm model; "" for a Wide ResNet."""
        return self.network.removeprefix("timm:") if self.network.startswith("timm:") else ""

    @property
    def architecture(self) -> str:
        """Common name of the network, such as WRN-28-2."""
        return self.network if self.backbone else f"WRN-{self.depth}-{self.widen_factor:g}"

    @property
    def depth(self) -> int:
        """Depth in the name of the Wide ResNet: all convolutions, including shortcuts, and the linear layer."""
        return self.scales * (2 * self.blocks + 1) + 1

    @property
    def widen_factor(self) -> float:
        """Widen factor of the Wide ResNet."""
        return self.width / 16

    @property
    def unlabeled(self) -> bool:
        """Whether the method uses unlabeled images."""
        return self.method != "supervised"

    @property
    def class_ratios(self) -> Imbalance:
        """Class ratios of the training images."""
        gammas = (self.imbalance_labeled or self.imbalance, self.imbalance_unlabeled or self.imbalance)
        return Imbalance(*gammas, self.n1, self.m1)

    def micro_batches_of(self, ranks: int) -> int:
        """Return M, the number of micro-batches of a step over `ranks` ranks: at least one each."""
        return max(self.micro_batches, ranks)


@functools.cache
def field_types() -> Mapping[str, Any]:
    """Return the type of each field."""
    return get_type_hints(Config)


def convert_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values from outside, such as Python or JSON, to the types of their fields.

    Raises:
        UserError: A name is no field, or a value has another type or is not one of the allowed ones.
    """
    for name in values:
        if name not in field_types():
            listed = "'remixmatch train digits-40 --help' lists all fields"
            raise unknown("configuration field", name, field_types(), listed)
    try:
        return {name: convert(name, field_types()[name], value) for name, value in values.items()}
    except TypeError as error:
        raise UserError(str(error)) from None


def fields_that(role: str) -> frozenset[str]:
    """Return the names of the fields with a role: "identity", "resumable" or "counted"."""
    return frozenset(field.name for field in dataclasses.fields(Config) if field.metadata.get(role))


RESUMABLE = fields_that("resumable")
COUNTED = fields_that("counted")
EXECUTION_FIELDS = frozenset(
    field.name for field in dataclasses.fields(Config) if not field.metadata.get("identity", True)
)


def run_identity(config: Config) -> dict[str, Any]:
    """Return the settings that cannot change when a run is resumed."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in RESUMABLE}


def changes(old: Config, new: Config, ignored: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, each with its old and new value."""
    pairs = {field.name: (getattr(old, field.name), getattr(new, field.name)) for field in dataclasses.fields(Config)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in ignored}


def changed_fields(old: Config, new: Config, ignored: Collection[str] = ()) -> list[str]:
    """Return the fields that differ as text for a message, such as `k 8 -> 4`."""
    return [f"{name} {before} -> {after}" for name, (before, after) in changes(old, new, ignored).items()]


def config_json(config: Config) -> str:
    """Return a configuration as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def check_run_folder(folder: Path) -> None:
    """Raise UserError if the folder of a run does not exist, or is a file."""
    if folder.is_file():
        run = f", {folder.parent}" if (folder.parent / "config.json").is_file() else ""
        raise UserError(f"{folder} is a file; give the run's folder{run}")
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'")


# Fields that every version has written.
_WRITTEN = frozenset({"preset", "dataset", "seed", "steps"})


def load_config(path: Path) -> Config:
    """Load a configuration that `config_json` has written.

    Raises:
        UserError: The file is missing, cannot be read, is not JSON, or comes from a different version of the engine.
    """
    check_run_folder(path.parent)
    try:
        return parse_config(read_file(path).decode("utf-8"), path)
    except FileNotFoundError:
        inside = sorted(path.parent.glob(f"*/{path.name}"))
        hint = f"give the folder of one run, for example {inside[0].parent}" if inside else f"{path.name} is missing"
        raise UserError(f"{path.parent} holds no run; {hint}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a configuration of this version ({error})") from None


def parse_config(text: str, path: Path) -> Config:
    """Parse a configuration from the JSON of `config_json`.

    Args:
        text: JSON.
        path: The file it was read from, for error messages.

    Raises:
        UserError: It is not JSON, or comes from a different version of the engine.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise UserError("not a JSON object")
        if missing := _WRITTEN - values.keys():
            raise UserError(f"it lacks {', '.join(sorted(missing))}")
        return Config(**convert_fields(values))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a configuration of this version ({error})") from None
