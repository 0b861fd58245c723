"""Reference implementation of batch norm's running statistics, from the inputs of each batch norm."""

import torch

from engine.models.batch_norm import BatchNorm


def statistics_of_first_samples(network, images, first, momentum):
    """Return the running statistics after a training pass in which only the first samples update them.

    Args:
        network: A Wide ResNet in training mode. It is not changed.
        images: (N, 3, H, W).
        first: Number of samples that update the statistics, group by group.
        momentum: Momentum of the batch norms.

    Returns:
        Mean and variance of each batch norm in order, in the format of `running_statistics`.
    """
    inputs = []
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0])) for norm in norms]
    with torch.no_grad():
        network(images, track=False)
    for hook in hooks:
        hook.remove()
    statistics = []
    for norm, x in zip(norms, inputs, strict=True):
        groups = x[:first].split(norm.group_size or first)
        mean = torch.stack([group.mean((0, 2, 3)) for group in groups]).mean(0)
        var = torch.stack([group.transpose(0, 1).flatten(1).var(1) for group in groups]).mean(0)
        statistics += [norm.running_mean.lerp(mean, momentum), norm.running_var.lerp(var, momentum)]
    return torch.cat(statistics)
