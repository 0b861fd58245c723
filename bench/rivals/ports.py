"""The ReMixMatch step of TorchSSL and USB with K = 2, a rival of `bench baseline`.

It is rewritten from the sources of these two popular PyTorch libraries (TorchSSL at f26e1d4, USB at 1ef4cbe) for a
single device. It uses no code of the engine except `Config`, for sizes and loss weights. As in these libraries:

- Labeled images are augmented weakly; an unlabeled image has a weak and two strong views. PIL makes them in the workers
  of two DataLoaders, whose batches are normalized floats in pageable memory. The first strong view is also rotated
  there.
- Each batch of B inputs has its own forward pass with its own batch-norm statistics: u_weak for the guess, the K + 2
  parts of the mixed pool, u_1, rotated u_1. Only the first part of the pool updates the running statistics, which are
  saved and restored around the other passes. In USB this part is the labeled images; TorchSSL interleaves all parts.
- p~(y) is a moving average that includes the current batch; p(y) is the class distribution of the labeled images.
- Mixup has one lambda for the whole batch, drawn on the host.
- The optimizer is SGD with Nesterov momentum and a cosine schedule. The EMA is updated one parameter at a time, and the
  host reads the losses of every step.
- On a GPU, the step uses fp16 autocast with a loss scaler (their option `amp`). Tensors are not channels-last.

Omitted, in favor of the libraries: two forward passes in USB whose logits no loss uses, copies of the EMA into a second
network, synchronization before and after a step for logging, and logging itself. The network has the engine's
architecture. In their networks, the first convolution of a block that changes the width takes the input before batch
norm.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision import transforms

from bench.rivals.loaders import EndlessLoader
from engine.config.config import Config
from pipelines.data.cache import DataSet

K = 2
LR, MOMENTUM, WEIGHT_DECAY = 0.03, 0.9, 5e-4
_COSINE = 7 / 16  # Fraction of half a cosine period over the whole training.
_WARM_UP = 1 / 64  # Fraction of the training over which the unlabeled losses ramp up.
_P_MODEL_DECAY = 0.999

# FixMatch's RandAugment: 3 of these operations in sequence, each with a value between its bounds, then cutout.
_OPERATIONS: tuple[tuple[Callable[[Image.Image, float], Image.Image], float, float], ...] = (
    (lambda image, _: ImageOps.autocontrast(image), 0, 1),
    (lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.05, 0.95),
    (lambda image, v: ImageEnhance.Color(image).enhance(v), 0.05, 0.95),
    (lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.05, 0.95),
    (lambda image, _: ImageOps.equalize(image), 0, 1),
    (lambda image, _: image, 0, 1),
    (lambda image, v: ImageOps.posterize(image, int(v)), 4, 8),
    (lambda image, v: image.rotate(v), -30, 30),
    (lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.05, 0.95),
    (lambda image, v: _affine(image, (1, v, 0, 0, 1, 0)), -0.3, 0.3),
    (lambda image, v: _affine(image, (1, 0, 0, v, 1, 0)), -0.3, 0.3),
    (lambda image, v: ImageOps.solarize(image, int(v)), 0, 256),
    (lambda image, v: _affine(image, (1, 0, v * image.width, 0, 1, 0)), -0.3, 0.3),
    (lambda image, v: _affine(image, (1, 0, 0, 0, 1, v * image.height)), -0.3, 0.3),
)
_OPERATIONS_PER_VIEW = 3
_LARGEST_CUTOUT = 0.5  # Fraction of the image's side.
_GRAY = (125, 123, 114)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def randaugment(image: Image.Image) -> Image.Image:
    """Return a strong view of an RGB image, drawn with Python's `random`, which each worker seeds differently."""
    for operation, low, high in random.choices(_OPERATIONS, k=_OPERATIONS_PER_VIEW):
        image = operation(image, random.uniform(low, high))
    side = random.uniform(0, _LARGEST_CUTOUT) * image.width
    left, top = (max(0.0, random.uniform(0, length) - side / 2) for length in image.size)
    image = image.copy()
    ImageDraw.Draw(image).rectangle((left, top, min(left + side, image.width), min(top + side, image.height)), _GRAY)
    return image


def _views(side: int, config: Config) -> tuple[transforms.Compose, transforms.Compose]:
    """Return the weak and the strong augmentation: PIL image to (3, side, side) float32 in [-1, 1]."""
    weak = [transforms.RandomCrop(side, padding=config.max_shift, padding_mode="reflect")]
    if config.flip:
        weak.append(transforms.RandomHorizontalFlip())
    to_tensor = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    strong = [*weak, transforms.Lambda(randaugment), *to_tensor]
    return transforms.Compose([*weak, *to_tensor]), transforms.Compose(strong)


def _labeled_item(data: DataSet, split: np.ndarray, weak: transforms.Compose, index: int) -> tuple[Tensor, int]:
    """Return a labeled image's weak view, (3, H, W) float32, and its class."""
    image = split[index]
    return weak(Image.fromarray(data.train_images[image])), int(data.train_labels[image])


def _unlabeled_item(
    data: DataSet, weak: transforms.Compose, strong: transforms.Compose, index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return the views of an unlabeled image and its rotation.

    Returns:
        A weak view, two strong views, the first strong view rotated, (3, H, W) float32 each, and the number of quarter
        turns.
    """
    image = Image.fromarray(data.train_images[data.unlabeled_indices[index]])
    u_weak, u1, u2 = weak(image), strong(image), strong(image)
    quarters = random.randrange(4)
    return u_weak, u1, u2, transforms.functional.rotate(u1, 90 * quarters), quarters


def loaders(
    config: Config, data: DataSet, split: np.ndarray, device: torch.device, workers: int
) -> list[EndlessLoader]:
    """Return the loaders of labeled and unlabeled images. The first makes one view per image and gets one worker."""
    weak, strong = _views(data.sides[0], config)
    labeled, unlabeled = partial(_labeled_item, data, split, weak), partial(_unlabeled_item, data, weak, strong)
    return [
        EndlessLoader(labeled, len(split), config.batch, min(workers, 1)),
        EndlessLoader(unlabeled, len(data.unlabeled_indices), config.batch, workers),
    ]


class _Block(nn.Module):
    """Pre-activation residual block with two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, activate_first: bool, momentum: float) -> None:
        super().__init__()
        self.activate_first = activate_first
        self.bn1 = nn.BatchNorm2d(inputs, eps=1e-3, momentum=momentum)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3, momentum=momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()
        self.relu = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        activated = self.relu(self.bn1(x))
        residual = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        return self.shortcut(activated if self.activate_first else x) + residual


class PortNetwork(nn.Module):
    """Wide ResNet with a second head for rotations, made of torch's layers; WRN-28-2 with the defaults of `Config`."""

    def __init__(self, classes: int, config: Config) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for number in range(config.scales * config.blocks):
            scale, block = divmod(number, config.blocks)
            outputs, stride = config.width << scale, 2 if scale and not block else 1
            blocks.append(_Block(channels, outputs, stride, number == 0, config.bn_momentum))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3, momentum=config.bn_momentum)
        self.relu = nn.LeakyReLU(0.1)
        self.head = nn.Linear(channels, classes)
        self.rotation_head = nn.Linear(channels, 4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, 3, H, W) to class logits (N, L) and rotation logits (N, 4)."""
        features = self.relu(self.bn(self.blocks(self.stem(images))))
        features = F.adaptive_avg_pool2d(features, 1).flatten(1)
        return self.head(features), self.rotation_head(features)


@contextlib.contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch norm on exit; passes still normalize by their own batch."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    saved = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        yield
    finally:
        for norm, buffers in zip(norms, saved, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = buffers


def interleave(batches: Sequence[Tensor]) -> list[Tensor]:
    """Swap part i of the first batch with part i of batch i, so that the first batch has samples of all n batches.

    Applying it twice restores the batches. Takes and returns n tensors (B, ...).
    """
    parts = [list(batch.tensor_split(len(batches))) for batch in batches]
    for i in range(1, len(batches)):
        parts[0][i], parts[i][i] = parts[i][i], parts[0][i]
    return [torch.cat(part) for part in parts]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of (N, L) logits with (N, L) target probabilities."""
    return torch.sum(-targets * F.log_softmax(logits.float(), dim=-1), dim=1).mean()


class PortStep:
    """Network, EMA, optimizer and marginals, with the step that updates them.

    Args:
        config: B, the network, total steps, loss weights, T and mixup's alpha.
        data: Data set to train on.
        split: Indices of the labeled training images.
        device: Device to train on.
        interleaved: Whether to interleave the mixed pool as TorchSSL does; USB does not.

    Attributes:
        ema: State dict with the EMA of the parameters and the network's current buffers.
        p_model: p~(y), (L,) float32; None before the first step.
    """

    def __init__(
        self, config: Config, data: DataSet, split: np.ndarray, device: torch.device, interleaved: bool = False
    ) -> None:
        self.config, self.device, self.interleaved = config, device, interleaved
        self.classes = len(data.classes)
        self.network: nn.Module = PortNetwork(self.classes, config).to(device)
        self.ema = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        weights = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, nesterov=True)
        cosine = _COSINE * math.pi / config.steps
        self.scheduler = LambdaLR(self.optimizer, lambda step: max(0.0, math.cos(cosine * step)))
        amp = device.type == "cuda"
        self.autocast = torch.autocast(device.type, torch.float16, enabled=amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp)
        counts = np.bincount(data.train_labels[split], minlength=self.classes)
        self.p_target = torch.tensor(counts / counts.sum(), dtype=torch.float32, device=device)
        self.p_model: Tensor | None = None
        self.steps = 0

    def step(self, labeled: Sequence[Tensor], unlabeled: Sequence[Tensor]) -> dict[str, float]:
        """Train one step.

        Args:
            labeled: x (B, 3, H, W) float32 and y (B,) int64.
            unlabeled: u_weak, u_1, u_2 and rotated u_1, (B, 3, H, W) float32 each, and (B,) int64 quarter turns.

        Returns:
            The loss and its unweighted terms.
        """
        c = self.config
        x, y = (t.to(self.device) for t in labeled)
        weak, u1, u2, rotated, quarters = (t.to(self.device) for t in unlabeled)
        with self.autocast:
            guess = self._guess(weak)
            one_hot = F.one_hot(y, self.classes).float()
            mixed, targets = self._mixup(torch.cat([x, u1, u2, weak]), torch.cat([one_hot, guess, guess, guess]))
            parts = list(mixed.split(len(x)))
            if self.interleaved:
                parts = interleave(parts)
            logits = [self.network(parts[0])[0]]
            with frozen_statistics(self.network):
                logits += [self.network(part)[0] for part in parts[1:]]
                logits_u1, _ = self.network(u1)
                _, logits_rot = self.network(rotated)
            if self.interleaved:
                logits = interleave(logits)
            loss_x = soft_cross_entropy(logits[0], targets[: len(x)])
            loss_u = soft_cross_entropy(torch.cat(logits[1:]), targets[len(x) :])
            loss_u1 = soft_cross_entropy(logits_u1, guess)
            loss_rot = F.cross_entropy(logits_rot.float(), quarters)
            ramp = min(1.0, self.steps / (_WARM_UP * c.steps))
            loss = loss_x + c.w_u * ramp * loss_u + c.w_u1 * ramp * loss_u1 + c.w_rot * loss_rot
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.network.zero_grad()
        self._update_ema()
        self.steps += 1
        terms = {"loss": loss, "loss_x": loss_x, "loss_u": loss_u, "loss_u1": loss_u1, "loss_rot": loss_rot}
        return {name: term.item() for name, term in terms.items()}

    @torch.no_grad()
    def _guess(self, weak: Tensor) -> Tensor:
        """Return aligned and sharpened labels (B, L) of weak views (B, 3, H, W)."""
        with frozen_statistics(self.network):
            logits, _ = self.network(weak)
        q = torch.softmax(logits.float(), dim=-1)
        if self.p_model is None:
            self.p_model = q.mean(0)
        else:
            self.p_model = _P_MODEL_DECAY * self.p_model + (1 - _P_MODEL_DECAY) * q.mean(0)
        q = q * (self.p_target + 1e-6) / (self.p_model + 1e-6)
        q = q / q.sum(dim=-1, keepdim=True)
        q = q ** (1 / self.config.temperature)
        return q / q.sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def _mixup(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix every image (N, 3, H, W) and target (N, L) with a random partner from the pool."""
        lam = np.random.beta(self.config.mixup_alpha, self.config.mixup_alpha)
        lam = max(lam, 1 - lam)
        partner = torch.randperm(len(images)).to(self.device)
        return lam * images + (1 - lam) * images[partner], lam * targets + (1 - lam) * targets[partner]

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = self.config.ema_decay
        for name, parameter in self.network.named_parameters():
            self.ema[name] = (1 - decay) * parameter + decay * self.ema[name]
        for name, buffer in self.network.named_buffers():
            self.ema[name] = buffer.clone()
