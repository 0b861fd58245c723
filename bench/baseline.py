"""`remixmatch bench baseline`: ReMixMatch as one would write it in PyTorch today, and the engine's ratio to it.

The yardstick is good everyday code: the whole of algorithm 1 eagerly under autocast, channels-last, a fused AdamW,
averages by torch.optim.swa_utils, weak and K RandAugment views of every image by torchvision v2 in a DataLoader with a
worker a core, bytes pinned and normalised on the device. It does less than the engine in one point: RandAugment
learns nothing, so there are no probes. The network is the engine's, since that is not what is compared.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from bench import records, throughput
from bench.images import NOISE_32
from bench.pipelines import randaugment
from bench.timing import Timing, bench_device, ceilings, measure
from engine.config import Config, validate
from engine.network import WideResNet
from engine.step import decayed_parameters
from pipelines.datasets import DATASETS, DataSet
from pipelines.splits import balanced


class Items(Dataset):
    """A labeled image, strongly augmented, and an unlabeled one with its weak and its K strong views."""

    def __init__(self, data: DataSet, split: np.ndarray, k: int, max_shift: int) -> None:
        self.data, self.split, self.k = data, split, k
        side = data.train_images.shape[1]
        self.strong = randaugment(side)
        self.weak = v2.Compose([
            v2.RandomCrop(side, padding=max_shift, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.data.train_images)

    def __getitem__(self, item: int) -> tuple[Tensor, int, Tensor, Tensor]:
        labeled = self.split[int(torch.randint(len(self.split), ()))]
        x = self.strong(Image.fromarray(self.data.train_images[labeled]))
        image = Image.fromarray(self.data.train_images[item])
        strong = torch.stack([self.strong(image) for _ in range(self.k)])
        return x, int(self.data.train_labels[labeled]), self.weak(image), strong


class Baseline:
    """Networks, optimiser and marginals, and the step that changes them."""

    def __init__(self, config: Config, classes: int, device: torch.device) -> None:
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
        self.steps = 0

    def step(self, x: Tensor, y: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
        """One step on uint8 views: x and weak (B, 3, H, W), y (B,), strong (B, K, 3, H, W). Returns its loss, ()."""
        c = self.config
        x, y, weak, strong = (t.to(self.device, non_blocking=True) for t in (x, y, weak, strong))
        pool = torch.cat([x, weak, *strong.unbind(1)])
        pool = pool.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1
        x, weak, u1 = pool[: len(x)], pool[len(x) : 2 * len(x)], pool[2 * len(x) : 3 * len(x)]
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

        with torch.no_grad():
            with autocast:
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
        images = lam[:, None, None, None]
        mixed = images * pool + (1 - images) * pool[perm]
        targets = lam[:, None] * targets + (1 - lam[:, None]) * targets[perm]
        quarters = [u1[k::4].rot90(k, (2, 3)) for k in range(4)]
        rotated = torch.cat(quarters)
        rotations = torch.cat(
            [torch.full((len(quarter),), k, device=self.device) for k, quarter in enumerate(quarters)]
        )

        batch = torch.cat([mixed, u1, rotated]).contiguous(memory_format=torch.channels_last)
        with autocast:
            logits, rotation_logits = self.network(batch)
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


def loader(config: Config, data: DataSet, split: np.ndarray, device: torch.device, workers: int) -> DataLoader:
    """Batches of `Items` without end."""
    items = Items(data, split, config.k, config.max_shift)
    return DataLoader(
        items,
        batch_size=config.batch,
        sampler=RandomSampler(items, replacement=True, num_samples=2**40),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )


def step_config(k: int, device: torch.device) -> Config:
    """The paper's training step for CIFAR-10's shape on a GPU; a small one on a CPU."""
    small = {} if device.type == "cuda" else {"batch": 8, "blocks": 1, "width": 8}
    return Config(preset="bench", dataset=NOISE_32, labels=250, k=k, **small)  # type: ignore[arg-type]


@dataclass
class BaselineOptions:
    """Times the step as one would write it without this engine, and the engine beside it."""

    out: Path = records.OUT / "baseline.jsonl"
    """Rows are added to this file."""
    repeats: int = 5
    """Samples; the median counts."""
    k: tuple[int, ...] = (1, 8)
    """Strong views of an unlabeled image."""
    steps: int | None = None
    """Steps a sample; by default 20 with a GPU and 2 without. The engine is given as many as all samples have."""
    batch: int | None = None
    """B; by default 64 with a GPU and 8 without."""
    data: tuple[str, ...] = ("real", "synthetic")
    """real: views made on the way. synthetic: views that lie on the device, for the step alone."""
    workers: int = len(os.sched_getaffinity(0))
    """DataLoader workers; by default one a core."""


def main(options: BaselineOptions) -> None:
    """Times both, by K and by where views come from.

    Raises:
        UserError: a flag that cannot work.
    """
    records.check_choice("--data", options.data, ("real", "synthetic"))
    records.check_least("--repeats", options.repeats, 1)
    records.check_least("--workers", options.workers, 1)
    device = bench_device()
    steps = options.steps if options.steps is not None else (20 if device.type == "cuda" else 2)
    records.check_least("--steps", steps, 1)
    print(ceilings(device).text())
    for k in options.k:
        config = step_config(k, device)
        if options.batch is not None:
            config = dataclasses.replace(config, batch=options.batch)
        validate(config)
        for data in sorted(options.data, reverse=True):  # synthetic first, while no worker is about
            t, memory = _time(config, data, device, steps, options.repeats, options.workers)
            rate = steps / t.seconds
            rows = config.batch * (k + 4)
            row = {
                "k": k,
                "batch": config.batch,
                "data": data,
                "precision": "bfloat16" if device.type == "cuda" else "float32",
                "workers": options.workers if data == "real" else 0,
                "steps_per_second": rate,
                "images_per_second": rate * rows,
                "step_ms": 1e3 / rate,
                "step_ms_low": 1e3 * t.low / steps,
                "step_ms_high": 1e3 * t.high / steps,
                "peak_memory_mib": memory,
            }
            engine = throughput.measure(config, steps * options.repeats, data)
            row |= {f"engine_{key}": engine[key] for key in ("steps_per_second", "images_per_second")}
            row["engine_ratio"] = engine["steps_per_second"] / rate
            row |= {"floor_ms": engine["floor_ms"], "floor_ratio": row["step_ms"] / engine["floor_ms"]}
            records.append(options.out, records.record("baseline", device, **row))
            beside = f"engine {engine['steps_per_second']:.4g} steps/s, {row['engine_ratio']:.2f} times"
            print(
                f"K={k} {data:9} {row['step_ms']:.2f} ms a step [{row['step_ms_low']:.2f}, {row['step_ms_high']:.2f}], "
                f"{rate:.4g} steps/s, {row['images_per_second']:.0f} images/s; {beside}",
                flush=True,
            )


def _time(
    config: Config, data: str, device: torch.device, steps: int, repeats: int, workers: int
) -> tuple[Timing, float | None]:
    """Times `steps` steps a sample; and the GPU's peak memory in MiB."""
    images = DATASETS[config.dataset]()
    split = balanced(images, config.labels, config.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    baseline = Baseline(config, len(images.classes), device)
    batches: Iterator[Any]
    if data == "real":
        batches = iter(loader(config, images, split, device, workers))
    else:
        one = [t.to(device) for t in next(iter(loader(config, images, split, device, 0)))]
        batches = iter(lambda: one, None)

    def run() -> None:
        for _ in range(steps):
            baseline.step(*next(batches))

    # samples follow one another without a pause in which workers would get ahead; they end with the loader, here
    t = measure({"baseline": run}, device, repeats, warm_up=3)["baseline"]
    return t, torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
