"""What a run has trained, read back from its folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config.config import Config, load_config
from engine.errors import UserError
from engine.models.build import make_network
from engine.models.wide_resnet import TwoHeadNetwork
from engine.runs import checkpoint
from engine.runs.folder import read_classes
from engine.training.execution import pick_device, set_numerics
from engine.training.trainer import CHECKPOINTS


@dataclass(frozen=True)
class Trained:
    """What a run has trained; its data need not be there any more.

    Attributes:
        config: of the run.
        classes: names.
        sides: (H, W) of the images.
        network: the EMA model, in evaluation mode.
        device: where it is.
    """

    config: Config
    classes: tuple[str, ...]
    sides: tuple[int, int]
    network: TwoHeadNetwork
    device: torch.device


def load_ema_model(folder: Path) -> Trained:
    """The EMA model of a run's newest good checkpoint.

    Raises:
        UserError: the folder holds no run, or no good checkpoint, or its split.json is damaged.
    """
    config = load_config(folder / "config.json")
    found = checkpoint.load_newest(folder / CHECKPOINTS)
    if found is None:
        raise UserError(f"{folder} has no good checkpoint yet; train it, or go on with --resume")
    classes, sides = read_classes(folder)
    device = pick_device(dataclasses.replace(config, device="auto"))
    set_numerics(config.deterministic)
    network = make_network(config, len(classes), device, sides, trained=True).eval()
    network.load_state_dict(found.content["state"]["ema_model"])
    return Trained(config, classes, sides, network, device)
