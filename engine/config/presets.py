"""Presets: named configurations, and the results that the paper reports for them.

A preset lists what differs from the defaults of `Config`, which are the paper's. Published results are test errors of
ReMixMatch in percent (tables 1 and 2 and section 4.2 of the paper): mean and standard deviation over five label splits,
or a single number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engine.config.config import Config
from engine.config.methods import with_method
from engine.config.values import flag_with_value
from engine.errors import unknown


@dataclass(frozen=True)
class PublishedError:
    """A published test error.

    Attributes:
        error: Percent.
        deviation: Standard deviation over five label splits, in percentage points; None if not reported.
        source: Paper and table or section.
    """

    error: float
    deviation: float | None
    source: str


_PAPER = "ReMixMatch (arXiv 1911.09785)"
_REALISTIC, _STL, _FEW = f"{_PAPER}, table 1", f"{_PAPER}, table 2", f"{_PAPER}, section 4.2"

# 2^26 labeled images, with an evaluation every 65 536.
_FULL = Config(steps=2**20, eval_every=1024, checkpoint_every=4096, split="paper")
_CIFAR10 = dataclasses.replace(_FULL, dataset="cifar10")
_CIFAR100 = dataclasses.replace(_FULL, dataset="cifar100")
_SVHN = dataclasses.replace(_FULL, dataset="svhn", flip=False)
# STL-10: the anchor is not augmented.
_STL10 = dataclasses.replace(
    _FULL, dataset="stl10", labels=1000, k=4, max_shift=12, anchor_augment="none", scales=4, width=64
)
_FASHION = dataclasses.replace(_FULL, dataset="fashion-mnist")

# Small batches give many steps, and distribution alignment needs many steps to separate similar digits. Running
# statistics and the EMA average over fewer steps than in the paper, whose runs are hundreds of times longer.
_DIGITS = Config(
    dataset="digits",
    batch=16,
    k=2,
    steps=2500,
    ramp_kimg=4.0,
    dash_epoch_kimg=0.25,
    max_shift=2,
    flip=False,
    blocks=1,
    width=16,
    bn_momentum=0.02,
    ema_decay=0.99,
    threshold_decay=0.99,
    lag=16,
    view_steps=8,
    prefetch=1,
    eval_every=50,
    log_every=20,
    checkpoint_every=250,
)
# 16x16 images and a WRN-10-2, which a CPU trains in minutes. Width, batch and ramp were chosen on 5 000 of the training
# images.
_FASHION_SMALL = dataclasses.replace(
    _DIGITS,
    dataset="fashion-mnist-16",
    labels=100,
    split="paper",
    batch=32,
    width=32,
    steps=8000,
    ramp_kimg=64.0,
    dash_epoch_kimg=4.0,
    flip=True,
    bn_momentum=0.01,
    ema_decay=0.999,
    view_steps=4,
    prefetch=2,
    eval_every=400,
    log_every=100,
    checkpoint_every=1000,
)


def _preset(base: Config, **changes: object) -> Config:
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


_PRESETS: dict[str, Config] = {
    "digits-40": _preset(_DIGITS, labels=40),
    "digits-10": _preset(_DIGITS, labels=10, steps=1500),
    "digits-40-supervised": _preset(_DIGITS, labels=40, method="supervised"),
    "cifar10-40": _preset(_CIFAR10, labels=40, k=1, w_rot=2.0, ramp_kimg=8192.0),
    "cifar10-250": _preset(_CIFAR10, labels=250),
    "cifar10-1000": _preset(_CIFAR10, labels=1000),
    "cifar10-4000": _preset(_CIFAR10, labels=4000),
    "cifar100-2500": _preset(_CIFAR100, labels=2500),
    "cifar100-10000": _preset(_CIFAR100, labels=10000),
    "svhn-40": _preset(_SVHN, labels=40, k=1, w_rot=3.0),
    "svhn-250": _preset(_SVHN, labels=250),
    "svhn-1000": _preset(_SVHN, labels=1000),
    "svhn-4000": _preset(_SVHN, labels=4000),
    "svhn-extra-40": _preset(_SVHN, dataset="svhn-extra", labels=40, k=1, w_rot=3.0),
    "stl10-1000": _STL10,
    "stl10-1000-k1": _preset(_STL10, k=1),
    "fashion-100-small": _FASHION_SMALL,
    "fashion-100-small-supervised": _preset(_FASHION_SMALL, method="supervised"),
    # N_1 = 200 labels of the first class, 20 and 2 of the last one; the unlabeled images have the same ratio.
    "fashion-lt10-small": _preset(_FASHION_SMALL, labels=812, imbalance=10.0),
    "fashion-lt100-small": _preset(_FASHION_SMALL, labels=492, imbalance=100.0),
    "fashion-100": _preset(_FASHION, labels=100),
    "fashion-250": _preset(_FASHION, labels=250),
    "fashion-1000": _preset(_FASHION, labels=1000),
    "folder": Config(dataset="folder", split="all", network="auto", max_shift=-1, steps=2**16, eval_every=512),
}
PRESETS: dict[str, Config] = {name: dataclasses.replace(config, preset=name) for name, config in _PRESETS.items()}

PUBLISHED: dict[str, PublishedError] = {
    "cifar10-40": PublishedError(15.08, None, f"{_FEW}, a median"),
    "cifar10-250": PublishedError(6.27, 0.34, _REALISTIC),
    "cifar10-1000": PublishedError(5.73, 0.16, _REALISTIC),
    "cifar10-4000": PublishedError(5.14, 0.04, _REALISTIC),
    "svhn-40": PublishedError(3.48, None, _FEW),
    "svhn-250": PublishedError(3.10, 0.50, _REALISTIC),
    "svhn-1000": PublishedError(2.83, 0.30, _REALISTIC),
    "svhn-4000": PublishedError(2.42, 0.09, _REALISTIC),
    "svhn-extra-40": PublishedError(2.81, None, _FEW),
    "stl10-1000": PublishedError(6.18, 1.24, _STL),
    "stl10-1000-k1": PublishedError(6.77, 1.66, _STL),
}


def preset(name: str) -> Config:
    """Return the preset of a name.

    Raises:
        UserError: Unknown preset; the message suggests the nearest names.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise unknown("preset", name, PRESETS)


def of_data_set(name: str) -> Config:
    """Return a configuration for a data set alone, with the split rule of its presets."""
    known = "folder" if name.startswith("folder:") else name
    rule = next((each.split for each in PRESETS.values() if each.dataset == known), Config().split)
    return Config(dataset=name, split=rule, network="auto", max_shift=-1)


def command(config: Config) -> list[str]:
    """Return the arguments of `remixmatch` that train exactly this configuration: `train PRESET --flag value ...`.

    The flags are the fields that differ from the preset, with `--method` applied to it if the method differs.

    Raises:
        UserError: The preset or method of the configuration is unknown.
    """
    base = preset(config.preset)
    words = ["train", config.preset]
    if config.method != base.method:
        base = with_method(base, config.method)
        words += ["--method", config.method]
    for field in dataclasses.fields(Config):
        name, value = field.name, getattr(config, field.name)
        if value != getattr(base, name) and name != "preset":
            words += flag_with_value(name, value)
    return words
