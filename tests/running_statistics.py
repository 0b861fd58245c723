"""Running statistics of batch norm by their definition, from what each batch norm of a network is given."""

import torch

from engine.models.batch_norm import BatchNorm


def moved_by_first_rows(network, images, first, momentum):
    """What they are after a training pass in which those of the first rows, group by group, move them.

    Args:
        network: a Wide ResNet in training mode; not changed.
        images: (N, 3, H, W).
        first: how many of its rows.
        momentum: of its batch norms.

    Returns:
        Means and variances of each batch norm in turn, as `running_statistics` gives them.
    """
    given = []
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda norm, args: given.append(args[0])) for norm in norms]
    with torch.no_grad():
        network(images, track=False)
    for hook in hooks:
        hook.remove()
    moved = []
    for norm, x in zip(norms, given, strict=True):
        groups = x[:first].split(norm.rows_per_group or first)
        mean = torch.stack([group.mean((0, 2, 3)) for group in groups]).mean(0)
        var = torch.stack([group.transpose(0, 1).flatten(1).var(1) for group in groups]).mean(0)
        moved += [norm.running_mean.lerp(mean, momentum), norm.running_var.lerp(var, momentum)]
    return torch.cat(moved)
