"""Every constant of the methods and presets against the values that the papers publish.

Written from the papers, not from the code: MixMatch (arXiv 1905.02249), ReMixMatch (arXiv 1911.09785), UDA (arXiv
1904.12848), FixMatch (arXiv 2001.07685), pseudo-labeling (Lee 2013), Oliver et al. 2018 (arXiv 1804.09170), FlexMatch
(arXiv 2110.08263), Dash (arXiv 2109.00650), FreeMatch (arXiv 2205.07246), SoftMatch (arXiv 2301.10921), the Pi model
(arXiv 1610.02242), Mean Teacher (arXiv 1703.01780) and AdaMatch (arXiv 2106.04732). All methods share ReMixMatch's
network, optimizer and EMA, so that only the methods differ.
"""

import dataclasses
import math

import pytest

from engine.config.config import Config
from engine.config.methods import ABLATIONS, METHODS, ablate, with_method
from engine.config.presets import PRESETS, preset

# ReMixMatch, section 4: T, mixup's Beta, the loss weights, K, Adam's learning rate, weight decay and the EMA. The ramp
# and the batch norm momentum are those of the authors' code.
REMIXMATCH = dict(
    k=8, batch=64, mu=1, anchor="trained", guess="anchor", guess_pass="separate", guess_network="network",
    interpolate_logits=False, ramp="linear", temperature=0.5, hard_labels=False,
    threshold=0.0, threshold_decay=0.999, flex_warmup=True, dash_epoch_kimg=64.0,
    align=True, class_distribution=(), marginal="running", marginal_decay=0.999, unlabeled_loss="cross-entropy",
    w_u=1.5, w_u1=0.5, w_rot=0.5, w_fair=0.0, ramp_kimg=1024.0, mixup_alpha=0.75, augment="ctaugment",
    ctaugment="paper", labeled_augment="strong", anchor_augment="weak",
)  # fmt: skip
SHARED = dict(
    lr=0.002, weight_decay=0.02, ema_decay=0.999, bn_momentum=0.001, width=32, blocks=4, scales=3, bn="joint",
    bn_stats="all", max_shift=4, flip=True, lag=8, network="wide-resnet", pretrained=False, weights="",
)  # fmt: skip
NO_EXTRAS = dict(align=False, w_u1=0.0, w_rot=0.0)  # Only ReMixMatch has these terms.
# FixMatch: tau = 0.95, lambda_u = 1, mu = 7, B = 64, hard labels; no ramp and no mixup.
FIXMATCH = dict(
    k=1, mu=7, anchor="guess-only", hard_labels=True, threshold=0.95, w_u=1.0, ramp_kimg=0.0, mixup_alpha=0.0,
    augment="ctaugment", labeled_augment="weak", **NO_EXTRAS,
)  # fmt: skip
PUBLISHED = {
    "remixmatch": {},
    "supervised": {},
    # MixMatch: K = 2 weakly augmented views, T = 0.5, alpha = 0.75, and an L2 loss with lambda_U = 75 on CIFAR-10,
    # ramped up linearly.
    "mixmatch": dict(k=2, anchor="none", guess="mean", temperature=0.5, mixup_alpha=0.75, unlabeled_loss="l2", w_u=75.0,
                     augment="none", labeled_augment="weak", **NO_EXTRAS),
    "fixmatch": FIXMATCH,
    # FlexMatch: FixMatch's tau of 0.95 is the largest threshold of a class, with warm-up.
    "flexmatch": FIXMATCH,
    # Dash: T = 0.5 until rho reaches its minimum. An epoch is 1 024 steps of 64 images: 64 kimg.
    "dash": FIXMATCH | dict(hard_labels=False, threshold=0.0, temperature=0.5),
    # FreeMatch: averages with a decay of 0.999; the weight of the fairness loss is that of the authors' configurations.
    "freematch": FIXMATCH | dict(threshold=0.0, w_fair=0.001),
    # SoftMatch: averages with a decay of 0.999; no threshold.
    "softmatch": FIXMATCH | dict(threshold=0.0),
    # Pi model: two views and their predictions as they are; Oliver et al. weigh their squared difference with 20 and
    # stop the gradient of one. With both gradients that is 10, and 40 for the squared difference from the mean.
    "pi-model": dict(k=2, mu=1, anchor="none", guess="mean", guess_pass="trained", temperature=1.0, unlabeled_loss="l2",
                     w_u=40.0, ramp="gaussian", mixup_alpha=0.0, augment="none", labeled_augment="weak", **NO_EXTRAS),
    # Mean Teacher: the weight of Oliver et al. is 8.
    "mean-teacher": dict(k=1, mu=1, anchor="guess-only", guess_network="ema", temperature=1.0, unlabeled_loss="l2",
                         w_u=8.0, ramp="gaussian", mixup_alpha=0.0, augment="none", labeled_augment="weak",
                         **NO_EXTRAS),
    # AdaMatch: tau = 0.9, uratio = 3, weight 1 after a cosine ramp over half of the run, here 1000 steps of 64 images.
    "adamatch": dict(k=1, mu=3, anchor="guess-only", hard_labels=True, threshold=0.9, interpolate_logits=True, w_u=1.0,
                     ramp="cosine", ramp_kimg=31.25, mixup_alpha=0.0, labeled_augment="both", align=True, w_u1=0.0,
                     w_rot=0.0),
    # UDA: T = 0.4, a confidence threshold of 0.8, lambda = 1, RandAugment and the KL divergence; mu as in FixMatch.
    "uda": dict(k=1, mu=7, anchor="guess-only", temperature=0.4, threshold=0.8, unlabeled_loss="kl", w_u=1.0,
                ramp_kimg=0.0, mixup_alpha=0.0, augment="randaugment", labeled_augment="weak", **NO_EXTRAS),
    # Pseudo-labeling as in Oliver et al.: a threshold of 0.95, and a coefficient of 1 that is ramped up.
    "pseudo-label": dict(k=1, anchor="none", guess="mean", hard_labels=True, threshold=0.95, w_u=1.0, mixup_alpha=0.0,
                         augment="none", labeled_augment="weak", **NO_EXTRAS),
}  # fmt: skip


@pytest.mark.parametrize("method", PUBLISHED)
def test_every_method_has_its_published_constants(method):
    config = with_method(Config(), method)
    expected = REMIXMATCH | SHARED | PUBLISHED[method] | {"method": method}
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_method_and_every_field_of_a_method_is_in_the_table():
    assert PUBLISHED.keys() == METHODS.keys()
    sections = {each.name for each in dataclasses.fields(Config) if each.metadata.get("section") == "method"}
    assert REMIXMATCH.keys() >= sections - {"method"}


def test_mixmatch_on_svhn_has_the_weight_of_its_paper():
    assert with_method(preset("svhn-250"), "mixmatch").w_u == 250.0
    assert with_method(preset("svhn-extra-40"), "mixmatch").w_u == 250.0


# Section 4.3 of ReMixMatch: the component that each row of the ablation removes or changes.
ABLATED = {
    "k=1": dict(k=1), "k=2": dict(k=2), "k=4": dict(k=4), "k=8": dict(k=8), "k=16": dict(k=16),
    "no-rotation": dict(w_rot=0.0), "no-premixup": dict(w_u1=0.0), "no-alignment": dict(align=False),
    "l2": dict(unlabeled_loss="l2", w_u=75.0), "no-strong": dict(augment="none"),
    "no-weak": dict(anchor_augment="strong"), "randaugment": dict(augment="randaugment"),
    "weak-only": dict(augment="none", guess="mean"), "mean-guess": dict(guess="mean"),
    "no-mixup": dict(mixup_alpha=0.0), "no-ema": dict(ema_decay=0.0), "bn-split": dict(bn="split"),
    "bn-stats-pool": dict(bn_stats="pool"), "ctaugment-code": dict(ctaugment="code"),
    "joint-guess": dict(guess_pass="joint"),
}  # fmt: skip


def test_ablations_change_what_their_names_say():
    base = preset("cifar10-250")
    found = {name: ablate(base, name) for name in ABLATIONS}
    assert found == {name: dataclasses.replace(base, **changes) for name, changes in ABLATED.items()}


# Section 4 of ReMixMatch, and its authors' scripts: labels, K, loss weights, ramp, network. 2^20 steps of 64 images are
# the 2^26 images of the paper.
PAPER_PRESETS = {
    "cifar10-40": dict(dataset="cifar10", labels=40, k=1, w_rot=2.0, ramp_kimg=8192.0),
    "cifar10-250": dict(dataset="cifar10", labels=250),
    "cifar10-1000": dict(dataset="cifar10", labels=1000),
    "cifar10-4000": dict(dataset="cifar10", labels=4000),
    "cifar100-2500": dict(dataset="cifar100", labels=2500),
    "cifar100-10000": dict(dataset="cifar100", labels=10000),
    "svhn-40": dict(dataset="svhn", labels=40, k=1, w_rot=3.0, flip=False),
    "svhn-250": dict(dataset="svhn", labels=250, flip=False),
    "svhn-1000": dict(dataset="svhn", labels=1000, flip=False),
    "svhn-4000": dict(dataset="svhn", labels=4000, flip=False),
    "svhn-extra-40": dict(dataset="svhn-extra", labels=40, k=1, w_rot=3.0, flip=False),
    "stl10-1000": dict(dataset="stl10", labels=1000, k=4, max_shift=12, anchor_augment="none", scales=4, width=64),
    "stl10-1000-k1": dict(
        dataset="stl10", labels=1000, k=1, max_shift=12, anchor_augment="none", scales=4, width=64
    ),
    "fashion-100": dict(dataset="fashion-mnist", labels=100),
    "fashion-250": dict(dataset="fashion-mnist", labels=250),
    "fashion-1000": dict(dataset="fashion-mnist", labels=1000),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_presets_of_the_paper(name):
    config = preset(name)
    expected = REMIXMATCH | SHARED | dict(steps=2**26 // 64, eval_every=1024, split="paper") | PAPER_PRESETS[name]
    assert {each: getattr(config, each) for each in expected} == expected
    assert config.eval_every * config.batch == 65_536 and math.isclose(config.steps * config.batch, 2**26)


def test_every_preset_is_the_papers_or_one_for_small_data():
    small = {"digits-40", "digits-10", "digits-40-supervised", "fashion-100-small", "fashion-100-small-supervised"}
    unequal = {"fashion-lt10-small", "fashion-lt100-small"}
    assert PRESETS.keys() == PAPER_PRESETS.keys() | small | unequal | {"folder"}
