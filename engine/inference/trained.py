"""Loading of a run's trained model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config.config import Config, run_identity
from engine.errors import UserError
from engine.models.build import make_network
from engine.models.wide_resnet import TwoHeadNetwork
from engine.runs import checkpoint
from engine.runs.folder import CHECKPOINTS, read_classes, run_config
from engine.training.execution import pick_device, set_numerics


@dataclass(frozen=True)
class Trained:
    """A run's trained model, which does not depend on the training data.

    Attributes:
        config: Configuration of the run.
        classes: Class names.
        sides: (H, W) of the images.
        network: The EMA model, in evaluation mode.
        device: Device of the network.
        step: Number of steps that the network has been trained.
    """

    config: Config
    classes: tuple[str, ...]
    sides: tuple[int, int]
    network: TwoHeadNetwork
    device: torch.device
    step: int


def load_ema_model(folder: Path) -> Trained:
    """Load the EMA model of a run's newest valid checkpoint, the one from which the run would resume.

    Raises:
        UserError: The folder contains no run or no valid checkpoint, or its split.json is damaged.
    """
    config = run_config(folder)
    classes, sides = read_classes(folder)
    device = pick_device(dataclasses.replace(config, device="auto"))
    set_numerics(config.deterministic)
    network = make_network(config, len(classes), device, sides, trained=True).eval()
    found = checkpoint.load_newest(folder / CHECKPOINTS, run_identity(config), network.state_dict())
    if found is None:
        raise UserError(f"{folder} has no valid checkpoint; train the run, or continue it with --resume")
    network.load_state_dict(found.content["state"]["ema_model"])
    return Trained(config, classes, sides, network, device, found.step)
