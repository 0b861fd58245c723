"""Plain PyTorch implementation of ReMixMatch, a rival of `bench baseline`.

This is good everyday code: all of algorithm 1, run eagerly under autocast and channels-last, with fused AdamW, an EMA
from torch.optim.swa_utils, and a DataLoader with a worker per core that makes a weak and K RandAugment views per image
with torchvision v2. Batches are pinned uint8, normalized on the device. It omits one thing that the engine does:
RandAugment does not learn, so there are no probes. The network is the engine's, since networks are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from bench.rivals.loaders import EndlessLoader
from bench.step.pipelines import randaugment
from engine.config.config import Config
from engine.models.wide_resnet import WideResNet
from engine.training.state import decayed_parameters
from pipelines.data.cache import DataSet

Transform = Callable[[Image.Image], Tensor]


def make_item(
    data: DataSet, split: np.ndarray, k: int, weak: Transform, strong: Transform, index: int
) -> tuple[Tensor, int, Tensor, Tensor]:
    """Return a strong view of a random labeled image, its class, and a weak and K strong views of image `index`."""
    labeled = split[int(torch.randint(len(split), ()))]
    x = strong(Image.fromarray(data.train_images[labeled]))
    image = Image.fromarray(data.train_images[index])
    views = torch.stack([strong(image) for _ in range(k)])
    return x, int(data.train_labels[labeled]), weak(image), views


class PlainStep:
    """Network, EMA, optimizer and marginals, with the step that updates them.

    Args:
        config: B, K, the network and the method's constants.
        data: Data set to train on.
        split: Indices of the labeled training images; unused, since the loader draws them.
        device: Device to train on.
    """

    def __init__(self, config: Config, data: DataSet, split: np.ndarray, device: torch.device) -> None:
        classes = len(data.classes)
        self.config, self.device, self.classes = config, device, classes
        network = WideResNet(classes, config.scales, config.blocks, config.width, bn_momentum=config.bn_momentum)
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema_model = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        kernels, others = decayed_parameters(self.network)
        self.optimizer = torch.optim.AdamW(
            [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            fused=True,
        )
        self.p_model_history = torch.full((128, classes), 1 / classes, device=device)
        self.p_data = torch.full((classes,), 1 / classes, device=device)
        alpha = torch.tensor(config.mixup_alpha, device=device)
        self.beta = torch.distributions.Beta(alpha, alpha)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        self.steps = 0

    def step(self, batch: Sequence[Tensor]) -> Tensor:
        """Train one step.

        Args:
            batch: x (B, 3, H, W) uint8, y (B,) int64, weak (B, 3, H, W) and strong (B, K, 3, H, W) uint8.

        Returns:
            The loss, a scalar.
        """
        c = self.config
        x, y, weak, strong = (t.to(self.device, non_blocking=True) for t in batch)
        pool = torch.cat([x, weak, *strong.unbind(1)])
        pool = pool.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1
        x, weak, u1 = pool[: len(x)], pool[len(x) : 2 * len(x)], pool[2 * len(x) : 3 * len(x)]

        with torch.no_grad():
            with self.autocast:
                logits, _ = self.network(weak, track=False)
            q = logits.float().softmax(-1)
            guess = q * (self.p_data + 1e-6) / (self.p_model_history.mean(0) + 1e-6)
            guess = guess / guess.sum(-1, keepdim=True)
            guess = guess ** (1 / c.temperature)
            guess = guess / guess.sum(-1, keepdim=True)
            one_hot = F.one_hot(y, self.classes).float()
            self.p_model_history[self.steps % 128] = q.mean(0)
            self.p_data.lerp_(one_hot.mean(0), 1 - c.marginal_decay)

        targets = torch.cat([one_hot] + [guess] * (1 + c.k))
        lam = self.beta.sample((len(pool),))
        lam = torch.maximum(lam, 1 - lam)
        perm = torch.randperm(len(pool), device=self.device)
        lam_images = lam[:, None, None, None]
        mixed = lam_images * pool + (1 - lam_images) * pool[perm]
        targets = lam[:, None] * targets + (1 - lam[:, None]) * targets[perm]
        quarters = [u1[k::4].rot90(k, (2, 3)) for k in range(4)]
        rotated = torch.cat(quarters)
        rotations = torch.cat(
            [torch.full((len(quarter),), k, device=self.device) for k, quarter in enumerate(quarters)]
        )

        inputs = torch.cat([mixed, u1, rotated]).contiguous(memory_format=torch.channels_last)
        with self.autocast:
            logits, rotation_logits = self.network(inputs)
            b = len(x)
            labeled, unlabeled, logits_u1, _ = logits.float().split([b, len(pool) - b, b, b])
            ramp = min(1.0, self.steps * c.batch / (1024 * c.ramp_kimg))
            loss = (
                F.cross_entropy(labeled, targets[: len(x)])
                + c.w_u * ramp * F.cross_entropy(unlabeled, targets[len(x) :])
                + c.w_u1 * ramp * F.cross_entropy(logits_u1, guess)
                + c.w_rot * F.cross_entropy(rotation_logits[-len(u1) :].float(), rotations)
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema_model.update_parameters(self.network)
        self.steps += 1
        return loss.detach()


def loaders(
    config: Config, data: DataSet, split: np.ndarray, device: torch.device, workers: int
) -> list[EndlessLoader]:
    """Return the loader of `make_item`, as a list."""
    side = data.train_images.shape[1]
    weak = v2.Compose([
        v2.RandomCrop(side, padding=config.max_shift, padding_mode="reflect"),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
    ])  # fmt: skip
    make = partial(make_item, data, split, config.k, weak, randaugment(side))
    return [EndlessLoader(make, len(data.train_images), config.batch, workers, pinned=device.type == "cuda")]
