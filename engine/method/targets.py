"""Pseudo-labels of the unlabeled samples and their weights in the loss.

`Targets` turns the logits of a step into targets (U, L) and weights (U,). Its buffers are the state of the method.
Registering a buffer is all it takes: buffers are saved in checkpoints, compared between ranks, and restored after the
warm-up of a CUDA graph. A method with a different rule is a subclass, registered in TARGETS under the method's name.
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

    Attributes:
        p_model_history: (128, L) float32, batch means of q in the last 128 steps. Their mean is p~(y).
        label_marginal: (L,) float32, p(y): a running average, or the given class distribution.
        selects: Whether `select` makes the targets, from predictions that are aligned but not sharpened.
    """

    p_model_history: Tensor
    label_marginal: Tensor

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        self.config = config
        self.selects = config.hard_labels or config.threshold > 0
        self.register_buffer("p_model_history", torch.full((P_MODEL_STEPS, classes), 1.0 / classes))
        self.register_buffer("label_marginal", torch.tensor(config.class_distribution or [1.0 / classes] * classes))

    def forward(self, logits: Tensor, step: Tensor) -> tuple[Tensor, Tensor | None]:
        """Make the pseudo-labels of a step and update the history of p~(y).

        Args:
            logits: (g, U, L) float32 over all ranks, of u_weak (g = 1) or of all g views of an image.
            step: () int64, number of steps done.

        Returns:
            Targets (U, L) float32, one distribution per image. All K + 1 views of an image share it: this is
            augmentation anchoring. And weights (U,), float32 or bool, or None if all are 1.
        """
        c = self.config
        # guess_labels applies softmax, which maps the log of a sum of predictions to their mean.
        q = logits[0] if len(logits) == 1 else logits.log_softmax(-1).logsumexp(0)  # (U, L)
        targets = guess_labels(
            q,
            self.p_model_history,
            step % P_MODEL_STEPS,
            self.label_marginal,
            1.0 if self.selects else c.temperature,
            c.align,
        )
        return self.select(targets) if self.selects else (targets, None)

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

    def observe_labels(self, one_hot: Tensor) -> None:
        """Update p(y) with the labels of a finished step, (B, L) float32 over all ranks."""
        if not self.config.class_distribution:
            self.label_marginal.lerp_(one_hot.mean(0), 1 - self.config.marginal_decay)

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


# Methods with targets of their own, by name. All others use `Targets`.
TARGETS: dict[str, type[Targets]] = {}


def make_targets(config: Config, classes: int) -> Targets:
    """Make the targets of the configured method."""
    return TARGETS.get(config.method, Targets)(config, classes)
