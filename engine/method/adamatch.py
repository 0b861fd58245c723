"""Pseudo-labels of AdaMatch (Berthelot et al., 2021, arXiv 2106.04732)."""

from __future__ import annotations

from torch import Tensor

from engine.method.targets import P_MODEL_STEPS, Targets
from kernels.guess import EPSILON


class AdaMatchTargets(Targets):
    """Pseudo-labels aligned with the predictions for labeled images, and a threshold relative to their confidence.

    Both rules are those of section 3.3 of the paper, whose expectations are running averages in the authors' code: over
    128 steps for the unlabeled images, and with decay 0.999 for the labeled ones. Both include the current step.

    Attributes:
        label_marginal: (L,) float32, running average of the predictions for labeled images, or the distribution that
            --marginal or --class-distribution sets.
    """

    uses_labeled = True

    def forward(
        self, logits: Tensor, step: Tensor, images: Tensor | None = None, labeled: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Make the pseudo-labels of a step and update both running averages; see `Targets.forward`."""
        assert labeled is not None, "the layout has the labeled images among the guess's inputs"
        c = self.config
        q, of_labeled = logits.softmax(-1).mean(0), labeled.softmax(-1)  # (U, L), (B, L)
        self.p_model_history.index_copy_(0, (step % P_MODEL_STEPS).reshape(1), q.mean(0, keepdim=True))
        if self.runs_marginal:
            self.label_marginal.lerp_(of_labeled.mean(0), 1 - c.marginal_decay)
        if c.align:
            q = q * (self.label_marginal + EPSILON) / (self.p_model + EPSILON)
            q = q / q.sum(-1, keepdim=True)
        targets, _ = self.select(q)
        return targets, q.amax(-1) >= c.threshold * of_labeled.amax(-1).mean()

    def observe(self, one_hot: Tensor, losses: Tensor) -> None:
        """Keep the state: it depends on predictions, and `forward` has updated it."""
