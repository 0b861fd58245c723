"""Pseudo-labels of methods that adapt FixMatch's threshold: FlexMatch, Dash, FreeMatch and SoftMatch.

All choose pseudo-labels from one prediction per image, so all K strong views of an image share its label and weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config.config import Config
from engine.config.methods import DASH_STAGE, DASH_WARM_UP, dash_epoch_steps
from engine.method.losses import LOSSES
from engine.method.targets import Targets


class FlexMatchTargets(Targets):
    """FlexMatch: one threshold per class, lower for classes that are predicted less often (arXiv 2110.08263).

    The class of an image's last confident prediction is remembered. The threshold of class c is `threshold` times
    M(beta), where beta is the number of images remembered as c, relative to the largest class. With `flex_warmup` it is
    relative to the number of images without a confident prediction, as long as that is larger.

    Attributes:
        confident_classes: (N,) int64, class of the last confident prediction of each unlabeled image, -1 without one.
    """

    uses_images = True
    confident_classes: Tensor

    def __init__(self, config: Config, classes: int, unlabeled_images: int = 0) -> None:
        super().__init__(config, classes, unlabeled_images)
        self.selects = True
        self.register_buffer("confident_classes", torch.full((unlabeled_images,), -1))

    def forward(
        self, logits: Tensor, step: Tensor, images: Tensor | None = None, labeled: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Make the pseudo-labels of a step; see `Targets.forward`."""
        assert images is not None, "the step carries the images of methods that use them"
        q = self.guess(logits, step)
        targets, _ = self.select(q)
        largest, classes = q.max(-1)
        weights = largest > self.thresholds(q.shape[1])[classes]
        # An image occurs more than once in a batch that spans epochs. Its last confident prediction counts, which is
        # found by its place in the batch, since a write to an index that occurs twice has no order on a GPU.
        place = torch.arange(1, len(images) + 1, device=images.device)
        place = torch.where(largest > self.config.threshold, place, 0)
        last = torch.zeros_like(self.confident_classes).scatter_reduce(0, images, place, "amax")
        self.confident_classes.copy_(torch.where(last > 0, classes[(last - 1).clamp(min=0)], self.confident_classes))
        return targets, weights

    def thresholds(self, classes: int) -> Tensor:
        """Return the threshold of each class, (L,) float32 (equations 5 to 8 and 11 of the paper)."""
        numbers = torch.arange(classes, device=self.confident_classes.device)[:, None]
        counts = (self.confident_classes == numbers).sum(-1)  # sigma(c)
        most = counts.amax()
        if self.config.flex_warmup:
            most = torch.maximum(most, len(self.confident_classes) - counts.sum())
        beta = counts / most.clamp(min=1)
        return self.config.threshold * beta / (2 - beta)


class DashTargets(Targets):
    """Dash: pseudo-labels with a loss below a threshold that decays from the labeled loss (arXiv 2109.00650).

    The first ten epochs train on labeled images alone. rho^ is their mean loss in the last of these epochs. Then
    images are used whose prediction has a cross-entropy of less than rho = C gamma^-(t - 1) rho^ to its most probable
    class; t increases every nine epochs. Pseudo-labels are sharpened until rho reaches its minimum, and hard from there
    on. The loss is a mean over the images used. `dash_epoch_kimg` is the length of an epoch.

    Attributes:
        rho_hat: () float32, sum of the labeled losses counted so far, each divided by the steps of an epoch.
        counted: () bool, whether the labeled loss of the current step counts.
    """

    C, GAMMA, MINIMUM = 1.0001, 1.27, 0.05

    rho_hat: Tensor
    counted: Tensor

    def __init__(self, config: Config, classes: int, unlabeled_images: int = 0) -> None:
        super().__init__(config, classes, unlabeled_images)
        self.selects = True
        self.epoch = dash_epoch_steps(config)
        self.register_buffer("rho_hat", torch.zeros(()))
        self.register_buffer("counted", torch.tensor(False))

    def forward(
        self, logits: Tensor, step: Tensor, images: Tensor | None = None, labeled: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Make the pseudo-labels of a step; see `Targets.forward`."""
        q = self.guess(logits, step)
        done = step - DASH_WARM_UP * self.epoch
        self.counted.copy_((done >= -self.epoch) & (done < 0))
        # The integer division changes at the same steps on all devices.
        stage = torch.div(done.clamp(min=0), DASH_STAGE * self.epoch, rounding_mode="floor")
        rho = self.C * self.rho_hat * torch.pow(self.GAMMA, -stage.float())
        largest, classes = q.max(-1, keepdim=True)
        sharpened = q.pow(1 / self.config.temperature)
        sharpened = sharpened / sharpened.sum(-1, keepdim=True)
        hard = torch.zeros_like(q).scatter(-1, classes, 1.0)
        targets = torch.where(rho > self.MINIMUM, sharpened, hard)
        used = (-largest[:, 0].log() < rho.clamp(min=self.MINIMUM)) & (done >= 0)
        return targets, used * (len(used) / used.sum().clamp(min=1))

    def observe(self, one_hot: Tensor, losses: Tensor) -> None:
        """Add the labeled loss to rho^ in the last epoch of the warm-up; see `Targets.observe`."""
        super().observe(one_hot, losses)
        self.rho_hat.add_(torch.where(self.counted, losses[LOSSES.index("loss_x")] / self.epoch, 0.0))


class FreeMatchTargets(Targets):
    """FreeMatch: a global threshold and thresholds per class that follow the predictions (arXiv 2205.07246).

    Attributes:
        threshold: () float32, tau: running average of the mean confidence (equation 5).
        class_means: (L,) float32, p~: running average of the mean prediction (equation 6).
        class_shares: (L,) float32, h~: running average of the histogram of predicted classes (equation 10).
    """

    threshold: Tensor
    class_means: Tensor
    class_shares: Tensor

    def __init__(self, config: Config, classes: int, unlabeled_images: int = 0) -> None:
        super().__init__(config, classes, unlabeled_images)
        self.selects = True
        self.register_buffer("threshold", torch.tensor(1 / classes))
        self.register_buffer("class_means", torch.full((classes,), 1 / classes))
        self.register_buffer("class_shares", torch.full((classes,), 1 / classes))

    def select(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Update the averages with the predictions of the step, then apply the thresholds; see `Targets.select`."""
        targets, _ = super().select(q)
        weight = 1 - self.config.threshold_decay
        largest, classes = q.max(-1)
        predicted = torch.zeros_like(q).scatter(-1, classes[:, None], 1.0)
        self.threshold.lerp_(largest.mean(), weight)
        self.class_means.lerp_(q.mean(0), weight)
        self.class_shares.lerp_(predicted.mean(0), weight)
        thresholds = self.threshold * self.class_means / self.class_means.amax()  # (L,), equations 7 and 8.
        return targets, largest >= thresholds[classes]

    @property
    def fair_target(self) -> Tensor:
        """Return p~ / h~, normalized (equation 11); 0 for classes that have not been predicted for very long."""
        present = self.class_shares > 0
        ratio = torch.where(present, self.class_means / torch.where(present, self.class_shares, 1.0), 0.0)
        return ratio / ratio.sum()


class SoftMatchTargets(Targets):
    """SoftMatch: weights that fall off as a Gaussian below the mean confidence (arXiv 2301.10921).

    Confidence is that of predictions aligned to the uniform distribution. Pseudo-labels are not aligned.

    Attributes:
        class_means: (L,) float32, running average of the mean prediction, for the alignment.
        confidence_mean: () float32, running average of the mean confidence.
        confidence_variance: () float32, running average of its unbiased variance.
    """

    SIGMAS = 2  # The Gaussian's standard deviation is that of the confidence, divided by this.

    class_means: Tensor
    confidence_mean: Tensor
    confidence_variance: Tensor

    def __init__(self, config: Config, classes: int, unlabeled_images: int = 0) -> None:
        super().__init__(config, classes, unlabeled_images)
        self.selects = True
        self.register_buffer("class_means", torch.full((classes,), 1 / classes))
        self.register_buffer("confidence_mean", torch.tensor(1 / classes))
        self.register_buffer("confidence_variance", torch.tensor(1.0))

    def select(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Update the averages with the predictions of the step, then weight them; see `Targets.select`."""
        targets, _ = super().select(q)
        weight = 1 - self.config.threshold_decay
        self.class_means.lerp_(q.mean(0), weight)
        aligned = q / self.class_means.clamp(min=torch.finfo(q.dtype).tiny)
        confidence = (aligned / aligned.sum(-1, keepdim=True)).amax(-1)  # (U,)
        self.confidence_mean.lerp_(confidence.mean(), weight)
        self.confidence_variance.lerp_(confidence.var(correction=min(1, len(q) - 1)), weight)
        below = (confidence - self.confidence_mean).clamp(max=0)
        return targets, (-below.square() * self.SIGMAS**2 / (2 * self.confidence_variance)).exp()
