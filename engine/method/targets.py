"""What unlabeled samples are trained towards: pseudo-labels, and how much each of them counts.

`Targets` turns the logits of a step into targets (U, L) and weights (U,). Its buffers are the method's state: what is
registered as one is saved, resumed, compared between ranks, and restored after a capture's warm-up, without being named
anywhere else. A method with another rule is a subclass, entered in TARGETS under the method's name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config.config import Config
from kernels.guess import guess_labels

P_MODEL_STEPS = 128  # whose mean is p~(y)


class Targets(nn.Module):
    """Pseudo-labels of ReMixMatch: distribution alignment, then sharpening (sections 3.1 and 3.2.1 of the paper).

    With `hard_labels` or a `threshold`, those of FixMatch, UDA and pseudo-labeling.

    Args:
        config: of the run.
        classes: L.

    Attributes:
        p_model_history: (128, L) float32, batch means of q of the last 128 steps, whose mean is p~(y).
        label_marginal: (L,) float32, p(y), running or given.
        selects: whether `select` is asked; its input is not sharpened then.
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
        """Make the targets of a step, and move the state.

        Args:
            logits: (g, U, L) float32 of all ranks: of u_weak (g = 1), or of all g views of an image.
            step: () int64, steps done.

        Returns:
            Targets (U, L) float32, each row a distribution: for all K + 1 views of an image the same one, which is
            augmentation anchoring. Weights (U,), float32 or bool, by which the samples count; None where each counts
            fully.
        """
        c = self.config
        # the logarithm of the mean prediction has that prediction as its softmax; of one view, logits are as good
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
        """Turn aligned predictions into targets and weights.

        Args:
            q: (U, L) float32, each row a distribution.
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
        """Move p(y) by the labels of a step that is over: (B, L) float32, of all ranks."""
        if not self.config.class_distribution:
            self.label_marginal.lerp_(one_hot.mean(0), 1 - self.config.marginal_decay)

    @torch.no_grad()
    def predict(self, logits: Tensor) -> Tensor:
        """Make the pseudo-labels of single views as `forward` does, and leave the state as it is.

        Hard labels are those before they became hard.

        Args:
            logits: (n, L).

        Returns:
            (n, L) float32, each row a distribution.
        """
        c = self.config
        temperature = 1.0 if c.hard_labels else c.temperature
        slot = torch.zeros((), dtype=torch.int64, device=logits.device)
        return guess_labels(
            logits.float(), self.p_model_history.clone(), slot, self.label_marginal, temperature, c.align
        )

    @property
    def p_model(self) -> Tensor:
        """p~(y): (L,) float32."""
        return self.p_model_history.mean(0)


# methods whose targets follow another rule than the one above
TARGETS: dict[str, type[Targets]] = {}


def make_targets(config: Config, classes: int) -> Targets:
    """Make the targets of a run's method."""
    return TARGETS.get(config.method, Targets)(config, classes)
