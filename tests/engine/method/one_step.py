"""One training step of a method on random views, for comparisons with an implementation from its paper."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from engine.config.checks import validate
from engine.method.batch_layout import rank_plan
from engine.training.feed import plan_spec, rank_layout
from engine.training.state import make_state
from engine.training.step import METRICS, Step
from engine.training.step_input import StepInput
from pipelines.ctaugment import initial_weights
from pipelines.data.cache import DataSet
from pipelines.plan import make_plan

CLASSES, START = 5, 40
CPU = torch.device("cpu")


class OneStep:
    """Train the step START in double precision, but keep the gradients instead of updating the parameters.

    Attributes:
        before: The state before the step.
        state: The state after it.
        plan: The plan of the step.
        metrics: The metrics by name.
        labeled: Blocks of labeled views in the order of the plan, (B, 3, 8, 8) float64.
        unlabeled: Blocks of unlabeled views, (mu B, 3, 8, 8) float64.
        labels: (B,) int64.
    """

    def __init__(self, config, compiled=False):
        validate(config)
        rng = torch.Generator().manual_seed(3)
        images = np.zeros((60, 8, 8, 3), np.uint8)
        data = DataSet("made up", tuple("abcde"), images, np.arange(60) % CLASSES, images[:1], np.zeros(1, np.int64))
        self.config, spec = config, plan_spec(config, data, np.arange(20))
        self.plan = make_plan(spec, 0, START, initial_weights())
        self.labels = torch.tensor(np.random.default_rng(1).integers(CLASSES, size=config.batch))
        self.state = state = make_state(config, CLASSES, CPU)
        for p in [*state.network.parameters(), *state.ema_model.parameters()]:
            p.data += 0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
        state.targets.p_model_history.copy_(torch.rand(128, CLASSES, generator=rng).softmax(-1))
        state.targets.label_marginal.copy_(torch.rand(CLASSES, generator=rng).softmax(-1))
        state.step.fill_(START)
        self.before = copy.deepcopy(state)
        views = torch.randint(0, 256, (config.batch * spec.blocks, 8, 8, 3), generator=rng, dtype=torch.uint8)
        layout = rank_layout(config, spec, 0, 1)
        precision = torch.float64 if config.precision == "fp64" else torch.float32
        step = Step(config, state, layout, precision, compiled)
        state.optimizer.step = state.optimizer.zero_grad = lambda: None
        output = step(StepInput.pack(views[layout.views], rank_plan(layout, self.plan, self.labels.numpy()), CPU))
        self.metrics = dict(zip(METRICS, output.metrics.tolist(), strict=True))
        x = (views.double() / 127.5 - 1).permute(0, 3, 1, 2)
        first, end = config.batch * spec.labeled_blocks.stop, config.batch * spec.strong_blocks.stop
        self.labeled = x[:first].split(config.batch)
        self.unlabeled = x[first:end].split(config.mu * config.batch)

    def network(self):
        """Return the network before the step."""
        return copy.deepcopy(self.before.network)

    @property
    def ramp_progress(self):
        """Return the progress of the ramp at the step, from 0 to 1."""
        return min(1.0, START * self.config.batch / (1024 * self.config.ramp_kimg))

    def gradients(self):
        """Return the gradient of every parameter."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.state.network.parameters()]

    def assert_same(self, network, loss_x, loss_u, loss):
        """Compare the losses, and the gradient of every parameter with that of `loss`."""
        loss.backward()
        for name, expected in (("loss_x", loss_x), ("loss_u", loss_u), ("loss", loss)):
            np.testing.assert_allclose(self.metrics[name], expected.item(), rtol=1e-5, atol=1e-6, err_msg=name)
        for mine, p in zip(self.gradients(), network.parameters(), strict=True):
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def cross_entropy(logits, labels):
    """Return the mean cross-entropy."""
    return F.cross_entropy(logits, labels)
