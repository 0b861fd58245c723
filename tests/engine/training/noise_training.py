"""A training step on images of noise, for comparisons of two ways to execute or update it."""

import numpy as np
import torch

from engine.config.checks import validate
from engine.method.batch_layout import rank_plan
from engine.training.feed import plan_spec, rank_layout
from engine.training.state import make_state
from engine.training.step import Step
from engine.training.step_input import StepInput
from pipelines.ctaugment import initial_weights
from pipelines.data.cache import DataSet
from pipelines.plan import make_plan

CLASSES = 5
CPU = torch.device("cpu")


class NoiseTraining:
    """A step of one rank on a CPU, and its state.

    Args:
        config: The configuration.
        precision: See `Step`.
        side: H and W of the images.
        options: Further arguments of `Step`.
    """

    def __init__(self, config, precision=torch.float32, side=8, **options):
        validate(config)
        self.images = np.random.default_rng(0).integers(0, 256, (60, side, side, 3), dtype=np.uint8)
        self.labels = np.arange(60) % CLASSES
        data = DataSet("made up", tuple("abcde"), self.images, self.labels, self.images[:1], np.zeros(1, np.int64))
        self.spec = plan_spec(config, data, np.arange(20))
        self.layout = rank_layout(config, self.spec, 0, 1)
        self.state = make_state(config, CLASSES, CPU, (side, side), unlabeled_images=60)
        self.step = Step(config, self.state, self.layout, precision, **options)

    def advance(self, steps):
        """Train steps 0 to `steps` - 1 and return their outputs."""
        outputs = []
        for number in range(steps):
            plan = make_plan(self.spec, 0, number, initial_weights())
            views = torch.from_numpy(self.images[plan.views.image][self.layout.views])
            plan = rank_plan(self.layout, plan, self.labels[plan.labeled])
            outputs.append(self.step(StepInput.pack(views, plan, CPU)))
        return outputs
