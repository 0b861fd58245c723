"""The network of a configuration."""

from __future__ import annotations

import torch

from engine.config.config import Config
from engine.models.wide_resnet import TwoHeadNetwork, WideResNet


def make_network(
    config: Config, classes: int, device: torch.device, sides: tuple[int, int] = (32, 32), trained: bool = False
) -> TwoHeadNetwork:
    """The network of a configuration, at its initial weights, in training mode and channels-last.

    Args:
        config: names it.
        classes: L.
        device: where it goes.
        sides: (H, W) of the images.
        trained: its weights are loaded next, so that none are fetched.

    Raises:
        UserError: see `Backbone`.
    """
    network: TwoHeadNetwork
    if backbone := config.backbone:
        from engine.models.timm_backbone import Backbone  # of an optional package

        fetched = (False, "") if trained else (config.pretrained, config.weights)
        network = Backbone(backbone, classes, sides, config.seed, config.bn_momentum, *fetched)
    else:
        rows_per_group = config.batch // config.bn_groups if config.bn == "split" else None
        network = WideResNet(
            classes,
            config.scales,
            config.blocks,
            config.width,
            config.seed,
            config.bn_momentum,
            rows_per_group,
            over_ranks=config.bn == "sync",
        )
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
