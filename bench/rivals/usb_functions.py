"""Compare the engine's pseudo-labels and losses with those of USB's own functions on equal predictions.

`python -m bench.rivals.usb_functions` installs semilearn, USB's package, into a temporary folder, without its
dependencies. USB's hooks and the engine's targets receive the same random predictions for 200 steps, in which they
become more confident. The printed table has, over all steps, the largest differences of targets, weights and state or
loss, and the share of weights that differ. docs/protocol.md explains the lines that do not agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.config import Config
from engine.config.methods import DASH_WARM_UP, with_method
from engine.method.losses import Samples, fairness, unlabeled
from engine.method.registry import make_targets
from pipelines.processes import python_environment

PACKAGE = "semilearn==0.3.2"
STEPS, UNLABELED, LABELED, CLASSES, IMAGES = 200, 56, 8, 10, 300
# Subpackages whose own `__init__.py` would import USB's dependencies.
_BYPASSED = (
    "",
    ".algorithms",
    *(f".algorithms.{name}" for name in ("adamatch", "dash", "flexmatch", "freematch", "softmatch")),
)
DECAY = 0.9  # Of thresholds, so that they follow the predictions within so few steps.
_TINY = 1e-4  # USB adds 1e-6 to both distributions of an alignment.


class Batch(NamedTuple):
    """Predictions of one step.

    Attributes:
        weak: (U, L) logits of u_weak.
        labeled: (B, L) logits of labeled images.
        strong: (U, L) logits of a strong view.
        images: (U,) int64, positions of the images in the unlabeled set.
    """

    weak: Tensor
    labeled: Tensor
    strong: Tensor
    images: Tensor


class Result(NamedTuple):
    """What a rule computes in a step: targets (U, L), weights (U,), and values of any shape, its state or a loss."""

    targets: Tensor
    weights: Tensor
    values: Tensor


Rule = Callable[[Batch], Result]


class Usb:
    """USB's functions.

    Args:
        folder: Folder that contains the package.
    """

    def __init__(self, folder: str) -> None:
        for name in (*_BYPASSED, ".core", ".core.hooks", ".core.utils"):
            package = ModuleType(f"semilearn{name}")
            package.__path__ = [str(Path(folder, "semilearn", *name.split(".")[1:]))]
            sys.modules[package.__name__] = package
        sys.modules["semilearn.core"].AlgorithmBase = object  # type: ignore[attr-defined]
        registry = SimpleNamespace(register=lambda name: lambda algorithm: algorithm)
        sys.modules["semilearn.core.utils"].ALGORITHMS = registry  # type: ignore[attr-defined]
        sys.modules["semilearn.core.hooks"].Hook = import_module("semilearn.core.hooks.hook").Hook  # type: ignore
        self.hooks: Any = import_module("semilearn.algorithms.hooks")
        self.criterions: Any = import_module("semilearn.core.criterions")

    def of(self, method: str, module: str = "utils") -> Any:
        """Return a module of a method."""
        return import_module(f"semilearn.algorithms.{method}.{module}")

    def algorithm(self, **settings: Any) -> Any:
        """Return what the hooks use of USB's algorithm."""
        return SimpleNamespace(
            distributed=False,
            compute_prob=lambda logits: logits.softmax(-1),
            ce_loss=self.criterions.ce_loss,
            **settings,
        )

    def targets(self, algorithm: Any, probabilities: Tensor, **settings: Any) -> Tensor:
        """Return pseudo-labels of predictions as distributions."""
        labels = self.hooks.PseudoLabelingHook().gen_ulb_targets(algorithm, probabilities, **settings)
        return labels if labels.ndim == 2 else F.one_hot(labels, CLASSES).float()


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, PACKAGE]
        subprocess.run(install, check=True, env=python_environment())
        sys.path.insert(0, folder)
        print("| rule | targets | weights | state or loss | differing weights, % |\n| --- | --- | --- | --- | --- |")
        with contextlib.redirect_stdout(sys.stderr):  # USB prints distributions.
            lines = list(rules(Usb(folder)))
        for name, ours, theirs in lines:
            print(f"| {name} | {' | '.join(compare(ours, theirs))} |")


def compare(ours: Rule, theirs: Rule) -> list[str]:
    """Return the cells of a line of the table."""
    generator = torch.Generator().manual_seed(0)
    largest, differing = torch.zeros(3), 0.0
    prior = torch.linspace(1.0, -1.0, CLASSES)
    for step in range(STEPS):

        def logits(count: int, scale: float = 1 + 6 * step / STEPS) -> Tensor:
            return scale * torch.randn(count, CLASSES, generator=generator) + prior

        images = torch.randperm(IMAGES, generator=generator)[:UNLABELED]
        batch = Batch(logits(UNLABELED), logits(LABELED), logits(UNLABELED), images)
        pairs = list(zip(ours(batch), theirs(batch), strict=True))
        largest = torch.maximum(largest, torch.stack([(a.float() - b).abs().amax() for a, b in pairs]))
        differing += ((pairs[1][0].float() - pairs[1][1]).abs() > _TINY).float().mean().item() / STEPS
    return [f"{value:.0e}" if value else "0" for value in largest.tolist()] + [f"{100 * differing:.1f}"]


def engine_rule(method: str, state: Callable[[Any, Batch, Tensor], Tensor] | None = None, **settings: Any) -> Rule:
    """Return the engine's rule of a method.

    Args:
        method: The method.
        state: Computes the values to compare from (targets module, batch, weighted pseudo-labels); none by default.
        settings: Other settings.
    """
    config = dataclasses.replace(with_method(Config(batch=LABELED), method), **settings)
    module, step = make_targets(config, CLASSES, IMAGES), torch.tensor(0)

    def rule(batch: Batch) -> Result:
        targets, weights = module(batch.weak[None], step, images=batch.images, labeled=batch.labeled)
        step.add_(1)
        weights = torch.ones(UNLABELED) if weights is None else weights.float()
        values = torch.zeros(()) if state is None else state(module, batch, targets * weights[:, None])
        return Result(targets, weights, values)

    return rule


def dash_rule(rho_hat: float) -> Rule:
    """Return the engine's rule of Dash in the first stage after the warm-up, with a given labeled loss."""
    module: Any = make_targets(with_method(Config(batch=LABELED), "dash"), CLASSES, IMAGES)
    module.rho_hat.fill_(rho_hat)

    def first_stage(batch: Batch) -> Result:
        step = torch.tensor(DASH_WARM_UP * module.epoch)
        targets, weights = module(batch.weak[None], step)
        rho = torch.as_tensor(max(module.C * rho_hat, module.MINIMUM))
        return Result(targets, (weights > 0).float(), rho)  # The weights also divide by the share used.

    return first_stage


def samples(module: Any, batch: Batch, targets: Tensor) -> Samples:
    """Return a strong view of every unlabeled image, with weighted pseudo-labels, as the samples of a loss."""
    shares = torch.zeros(3, UNLABELED)
    shares[1] = 1 / UNLABELED
    nothing = torch.zeros(UNLABELED, dtype=torch.int64)
    return Samples(
        module.config, batch.strong, torch.zeros(UNLABELED, 4), targets, nothing, shares, shares[0], module.fair_target
    )


def loss(module: Any, batch: Batch, targets: Tensor) -> Tensor:
    """Return the loss of the unlabeled samples."""
    return unlabeled(samples(module, batch, targets))


def rules(usb: Usb) -> Iterator[tuple[str, Rule, Rule]]:
    """Yield the lines of the table: a description, the engine's rule and USB's."""

    def fixed(threshold: float, temperature: float | None, criterion: str = "ce") -> Rule:
        algorithm, masking = usb.algorithm(p_cutoff=threshold), usb.hooks.FixedThresholdingHook()

        def rule(batch: Batch) -> Result:
            mask = masking.masking(algorithm, batch.weak)
            targets = usb.targets(algorithm, batch.weak, use_hard_label=temperature is None, T=temperature or 1.0)
            return Result(targets, mask, usb.criterions.consistency_loss(batch.strong, targets, criterion, mask))

        return rule

    yield "FixMatch", engine_rule("fixmatch", loss), fixed(0.95, None)
    yield "UDA, cross-entropy", engine_rule("uda", loss, unlabeled_loss="cross-entropy"), fixed(0.8, 0.4)
    yield "Mean Teacher", engine_rule("mean-teacher", loss), fixed(0.0, 1.0, "mse")

    def flexmatch(warm_up: bool) -> Rule:
        algorithm = usb.algorithm(p_cutoff=0.95)
        masking = usb.of("flexmatch").FlexMatchThresholdingHook(IMAGES, CLASSES, warm_up)

        def rule(batch: Batch) -> Result:
            mask = masking.masking(algorithm, batch.weak.softmax(-1), batch.images, softmax_x_ulb=False)
            accuracy = masking.classwise_acc
            return Result(usb.targets(algorithm, batch.weak), mask, 0.95 * accuracy / (2 - accuracy))

        return rule

    for warm_up in (True, False):
        ours = engine_rule("flexmatch", lambda module, *_: module.thresholds(CLASSES), flex_warmup=warm_up)
        yield f"FlexMatch, with{'' if warm_up else 'out'} warm-up", ours, flexmatch(warm_up)

    def freematch(fair: bool, quantile: bool = False) -> Rule:
        algorithm = usb.algorithm(use_quantile=quantile, clip_thresh=False)
        masking = usb.of("freematch").FreeMatchThresholdingHook(CLASSES, DECAY)
        entropy = usb.of("freematch", "freematch").entropy_loss

        def rule(batch: Batch) -> Result:
            mask = masking.masking(algorithm, batch.weak)
            value = torch.cat([masking.time_p[None], masking.p_model, masking.label_hist])
            if fair:
                logits = batch.strong.requires_grad_()
                (value,) = torch.autograd.grad(entropy(mask, logits, masking.p_model, masking.label_hist)[0], logits)
            return Result(usb.targets(algorithm, batch.weak), mask, value)

        return rule

    def averages(module: Any, *_: Any) -> Tensor:
        return torch.cat([module.threshold[None], module.class_means, module.class_shares])

    def fair(module: Any, batch: Batch, targets: Tensor) -> Tensor:
        logits = batch.strong.requires_grad_()
        return torch.autograd.grad(fairness(samples(module, batch, targets)), logits)[0]

    yield "FreeMatch", engine_rule("freematch", averages, threshold_decay=DECAY), freematch(False)
    yield (
        "FreeMatch, USB with `use_quantile`",
        engine_rule("freematch", averages, threshold_decay=DECAY),
        freematch(False, quantile=True),
    )
    yield (
        "FreeMatch, gradient of the fairness loss",
        engine_rule("freematch", fair, threshold_decay=DECAY),
        freematch(True),
    )

    def softmatch(aligned_from_start: bool) -> Rule:
        algorithm, align = usb.algorithm(), usb.hooks.DistAlignEMAHook(CLASSES, DECAY)
        weighting = usb.of("softmatch").SoftMatchWeightingHook(CLASSES, momentum=DECAY)
        if aligned_from_start:
            align.p_model = torch.full((CLASSES,), 1 / CLASSES)

        def rule(batch: Batch) -> Result:
            weights = weighting.masking(algorithm, align.dist_align(algorithm, batch.weak.softmax(-1)), False)
            state = torch.stack([weighting.prob_max_mu_t, weighting.prob_max_var_t])
            return Result(usb.targets(algorithm, batch.weak), weights, state)

        return rule

    def gaussian(module: Any, *_: Any) -> Tensor:
        return torch.stack([module.confidence_mean, module.confidence_variance])

    yield (
        "SoftMatch, USB's average prediction from 1 / L",
        engine_rule("softmatch", gaussian, threshold_decay=DECAY),
        softmatch(True),
    )
    yield "SoftMatch", engine_rule("softmatch", gaussian, threshold_decay=DECAY), softmatch(False)

    def dash(rho_hat: float) -> Rule:
        # USB's counter selects the first stage at step 0. Here it follows a warm-up on labeled images.
        algorithm = usb.algorithm(rho_init=torch.tensor(rho_hat), T=0.5, it=0, num_iter_per_epoch=1)
        masking = usb.of("dash").DashThresholdingHook(0.05, 1.27, 1.0001)
        masking.update(algorithm)
        masking.rho, algorithm.it = torch.as_tensor(masking.rho), 1

        def rule(batch: Batch) -> Result:
            mask = masking.masking(algorithm, batch.weak)
            targets = usb.targets(algorithm, batch.weak, use_hard_label=algorithm.use_hard_label, T=0.5)
            return Result(targets, mask, masking.rho)

        return rule

    for rho_hat, labels in ((1.0, "soft"), (0.01, "hard")):
        yield f"Dash, {labels} labels", dash_rule(rho_hat), dash(rho_hat)

    def adamatch(batch: Batch) -> Result:
        weak, labeled = batch.weak.softmax(-1), batch.labeled.softmax(-1)
        aligned = align.dist_align(algorithm, weak, labeled)
        mask = masking.masking(algorithm, labeled, aligned, False, False)
        return Result(usb.targets(algorithm, aligned, softmax=False), mask, torch.zeros(()))

    algorithm, masking = usb.algorithm(p_cutoff=0.9), usb.of("adamatch").AdaMatchThresholdingHook()
    align = usb.hooks.DistAlignEMAHook(CLASSES, p_target_type="model")
    yield "AdaMatch, averages over 128 steps here and of decay 0.999 there", engine_rule("adamatch"), adamatch


if __name__ == "__main__":
    main()
