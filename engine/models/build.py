"""Construction of the configured network."""

from __future__ import annotations

import torch

from engine.config.config import Config
from engine.models.wide_resnet import TwoHeadNetwork, WideResNet


def make_network(
    config: Config, classes: int, device: torch.device, sides: tuple[int, int] = (32, 32), trained: bool = False
) -> TwoHeadNetwork:
    """Make the configured network with its initial weights, in training mode and channels-last.

    Args:
        config: The configuration.
        classes: L.
        device: The device of the network.
        sides: (H, W) of the images.
        trained: Whether the caller loads weights, so that no pretrained weights are needed.

    Raises:
        UserError: See `Backbone`.
    """
    network: TwoHeadNetwork
    if backbone := config.backbone:
        from engine.models.timm_backbone import Backbone  # timm is optional.

        weights = (False, "") if trained else (config.pretrained, config.weights)
        network = Backbone(backbone, classes, sides, config.seed, config.bn_momentum, *weights)
    else:
        group_size = config.batch // config.bn_groups if config.bn == "split" else None
        network = WideResNet(
            classes,
            config.scales,
            config.blocks,
            config.width,
            config.seed,
            config.bn_momentum,
            group_size,
            over_ranks=config.bn == "sync",
        )
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
