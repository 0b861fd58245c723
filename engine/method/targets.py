"""Pseudo-labels of the unlabeled samples and their weights in the loss.

`Targets` turns the logits of a step into targets (U, L) and weights (U,). Its buffers are the state of the method.
Registering a buffer is all it takes: buffers are saved in checkpoints, compared between ranks, and restored after the
warm-up of a CUDA graph. A method with a different rule is a subclass, registered in `engine.method.registry`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config.config import Config
from kernels.guess import guess_labels

P_MODEL_STEPS = 128  # Steps that p~(y) is averaged over.


class Targets(nn.Module):
    """Pseudo-labels of ReMixMatch: distribution alignment, then sharpening (sections 3.1 and 3.2.1 of the paper).

    With `hard_labels` or a `threshold`, the pseudo-labels are those of FixMatch, UDA or pseudo-labeling.

    Args:
        config: The run's configuration.
        classes: L.
        unlabeled_images: Size of the unlabeled set.

    Attributes:
        uses_images: Whether `forward` needs the positions of the images. A step only carries them if it does.
        uses_labeled: Whether `forward` needs the logits of the labeled images. A step only predicts them if it does.
        p_model_history: (128, L) float32, batch means of q in the last 128 steps. Their mean is p~(y).
        label_marginal: (L,) float32, p(y): a running average, or the given class distribution.
        runs_marginal: Whether p(y) is a running average.
        selects: Whether `select` makes the targets, from predictions that are aligned but not sharpened.
    """

    uses_images = False
    uses_labeled = False
    p_model_history: Tensor
    label_marginal: Tensor

    def __init__(self, config: Config, classes: int, unlabeled_images: int = 0) -> None:
        super().__init__()
        self.config = config
        self.selects = config.hard_labels or config.threshold > 0
        self.runs_marginal = config.marginal == "running" and not config.class_distribution
        self.register_buffer("p_model_history", torch.full((P_MODEL_STEPS, classes), 1.0 / classes))
        self.register_buffer("label_marginal", torch.tensor(config.class_distribution or [1.0 / classes] * classes))

    def forward(
        self, logits: Tensor, step: Tensor, images: Tensor | None = None, labeled: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Make the pseudo-labels of a step and update the state of the method.

        Args:
            logits: (g, U, L) float32 over all ranks, of u_weak (g = 1) or of all g views of an image.
            step: () int64, number of steps done.
            images: (U,) int64 over all ranks, position of each image in the unlabeled set, if the class `uses_images`.
            labeled: (B, L) float32 over all ranks, logits of the labeled images, if the class `uses_labeled`.

        Returns:
            Targets (U, L) float32, one distribution per image. All K + 1 views of an image share it: this is
            augmentation anchoring. And weights (U,), float32 or bool, or None if all are 1.
        """
        q = self.guess(logits, step)
        return self.select(q) if self.selects else (q, None)

    def guess(self, logits: Tensor, step: Tensor) -> Tensor:
        """Predict the class of each image, and update the history of p~(y).

        Args:
            logits: See `forward`, also for the next.
            step: () int64.

        Returns:
            (U, L) float32, one distribution per image: aligned if `align` is set, and sharpened unless `selects`.
        """
        # guess_labels applies softmax, which maps the log of a sum of predictions to their mean.
        q = logits[0] if len(logits) == 1 else logits.log_softmax(-1).logsumexp(0)  # (U, L)
        return guess_labels(
            q,
            self.p_model_history,
            step % P_MODEL_STEPS,
            self.label_marginal,
            1.0 if self.selects else self.config.temperature,
            self.config.align,
        )

    def select(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Turn aligned predictions into targets and weights, shaped like the results of `forward`.

        Args:
            q: (U, L) float32, one distribution per image.
        """
        c = self.config
        largest, classes = q.max(-1, keepdim=True)
        if c.hard_labels:
            targets = torch.zeros_like(q).scatter(-1, classes, 1.0)
        else:
            sharpened = q.pow(1 / c.temperature)
            targets = sharpened / sharpened.sum(-1, keepdim=True)
        return targets, (largest >= c.threshold)[:, 0]

    def observe(self, one_hot: Tensor, losses: Tensor) -> None:
        """Update the state at the end of a step; here p(y).

        Args:
            one_hot: (B, L) float32 over all ranks, the labels of the step.
            losses: (len(LOSSES),) float32 in the order of `engine.method.losses.LOSSES`, means over all ranks.
        """
        if self.runs_marginal:
            self.label_marginal.lerp_(one_hot.mean(0), 1 - self.config.marginal_decay)

    @property
    def fair_target(self) -> Tensor | None:
        """The class distribution that the fairness term compares with, (L,) float32; None for other methods."""
        return None

    @torch.no_grad()
    def predict(self, logits: Tensor) -> Tensor:
        """Make the pseudo-labels of single views like `forward`, without changing the state.

        With `hard_labels` the result is the distribution that the hard label is taken from.

        Args:
            logits: (n, L).

        Returns:
            (n, L) float32, one distribution per view.
        """
        c = self.config
        temperature = 1.0 if c.hard_labels else c.temperature
        slot = torch.zeros((), dtype=torch.int64, device=logits.device)
        return guess_labels(
            logits.float(), self.p_model_history.clone(), slot, self.label_marginal, temperature, c.align
        )

    @property
    def p_model(self) -> Tensor:
        """The marginal p~(y) of the model's predictions, (L,) float32."""
        return self.p_model_history.mean(0)
