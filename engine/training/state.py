"""The state of training, which a step updates and a checkpoint saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.config import Config
from engine.method.registry import make_targets
from engine.method.targets import Targets
from engine.models.build import make_network
from engine.models.wide_resnet import TwoHeadNetwork
from engine.training.optimizers import OPTIMIZERS, load_optimizer


@dataclass
class TrainState:
    """The state that a training step updates.

    Attributes:
        network: f, in training mode.
        ema_model: f_ema, the exponential moving average of the parameters of f, in evaluation mode.
        optimizer: Optimizer of the parameters of `network`.
        scaler: Loss scaler, enabled only with fp16.
        targets: The method's targets; their buffers are the state of the method.
        step: () int64, number of steps done.
    """

    network: TwoHeadNetwork
    ema_model: TwoHeadNetwork
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    targets: Targets
    step: Tensor

    def __post_init__(self) -> None:
        taken = self.targets.state_dict().keys() & vars(self).keys()
        if taken:
            raise ValueError(
                f"{type(self.targets).__name__}: buffer names {', '.join(sorted(taken))} are reserved; rename them"
            )

    def guess_network(self) -> TwoHeadNetwork:
        """Return the network that makes the pseudo-labels, in training mode: f, or one with the tensors of f_ema."""
        return self.ema_model.in_training_mode() if self.targets.config.guess_network == "ema" else self.network

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.step.device

    def state_dict(self) -> dict:
        """Return the state as a dictionary of tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "ema_model": self.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **self.targets.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.ema_model.load_state_dict(state["ema_model"])
        load_optimizer(self.optimizer, state["optimizer"], self.device)
        self.scaler.load_state_dict(state["scaler"])
        self.targets.load_state_dict({name: state[name] for name in self.targets.state_dict()})
        self.step.copy_(state["step"])

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the state once: parameters and buffers, the optimizer's state, and `step`."""
        tensors: list[Tensor] = []
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                tensors += [*part.parameters(), *part.buffers()]
            elif isinstance(part, torch.optim.Optimizer):
                # apex's flag for an overflow, which makes the next step skip its update.
                overflow = getattr(part, "_dummy_overflow_buf", None)
                tensors += _leaves([part.state, *part.param_groups, overflow])
            elif isinstance(part, Tensor):
                tensors.append(part)
        return list({id(tensor): tensor for tensor in tensors}.values())


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)


def decayed_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into those with weight decay (weights of convolutions and linear layers) and those without."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    return decayed, [p for p in network.parameters() if p.ndim <= 1]


def make_state(
    config: Config,
    classes: int,
    device: torch.device,
    sides: tuple[int, int] = (32, 32),
    unlabeled_images: int = 0,
) -> TrainState:
    """Make the state before the first step: f_ema equals f, and the marginals are uniform.

    Args:
        config: The run's configuration.
        classes: L.
        device: The device of all tensors.
        sides: Height and width of the images.
        unlabeled_images: Size of the unlabeled set, which FlexMatch remembers a class for each image of.
    """
    network = make_network(config, classes, device, sides)
    ema_model = make_network(config, classes, device, sides, trained=True).eval().requires_grad_(False)
    ema_model.load_state_dict(network.state_dict())
    network.rotation_head.requires_grad_(config.unlabeled and config.w_rot > 0)
    decayed, not_decayed = decayed_parameters(network)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return TrainState(
        network=network,
        ema_model=ema_model,
        optimizer=OPTIMIZERS[config.optimizer](groups, config.lr, device),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        targets=make_targets(config, classes, unlabeled_images).to(device),
        step=torch.zeros((), dtype=torch.int64, device=device),
    )
