"""One training step of ReMixMatch, in the order of the paper's algorithm 1.

Symbols as in the paper: B labeled and B unlabeled images over all ranks, K strong views, L classes, R ranks. Images
arrive as uint8 views that are already augmented, every random number as a tensor of the plan; nothing in here draws
random numbers or waits for the host. Which rows of the batch are which is drawn in `engine/rows.py`. Sections in
comments are the paper's (arXiv 1911.09785).

Gradient accumulation: the networks take the rows in M micro-batches over all ranks, by default one a rank. A rank that
has several computes what as many ranks compute together: the same statistics, guesses and gradients, for M = 2 bit for
bit.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine import distributed, parts
from engine.config import Config
from engine.network import Classifier, WideResNet
from engine.optimizers import OPTIMIZERS, load_optimizer
from engine.rows import Rows, StepPlan
from kernels.assemble import assemble_batch
from kernels.guess import guess_labels
from pipelines.packed import Layout

P_MODEL_STEPS = 128
_BUCKETS = 2  # of gradients: the later layers' are on their way while the earlier layers' are computed
_BUCKET_BYTES = 2**20, 25 * 2**20  # least, which torch.compile takes for granted, and most, as is usual
# rank 0's running statistics are not sent to all before every pass: newer versions of torch have another name for that
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
LOSSES = ("loss", "loss_x", "loss_u", "loss_u1", "loss_rot")  # the sum and its terms; `Step._losses` computes them
METRICS = (*LOSSES, "confidence", "alignment_gap", "omega", "stop")


@dataclass
class TrainState:
    """All that a step reads and writes, and all that a checkpoint keeps.

    Attributes:
        network: f, in training mode.
        ema_model: f_ema, the exponential moving average of its parameters, in evaluation mode.
        optimizer: over the parameters of `network`.
        scaler: of the loss, enabled under fp16 alone.
        p_model_history: (128, L) float32, batch means of q of the last 128 steps, whose mean is p~(y).
        label_marginal: (L,) float32, p(y), running or given.
        step: () int64, steps done.
    """

    network: Classifier
    ema_model: Classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    p_model_history: Tensor
    label_marginal: Tensor
    step: Tensor

    def state_dict(self) -> dict:
        """Tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "ema_model": self.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "p_model_history": self.p_model_history,
            "label_marginal": self.label_marginal,
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes back what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.ema_model.load_state_dict(state["ema_model"])
        load_optimizer(self.optimizer, state["optimizer"], self.p_model_history.device)
        self.scaler.load_state_dict(state["scaler"])
        self.p_model_history.copy_(state["p_model_history"])
        self.label_marginal.copy_(state["label_marginal"])
        self.step.copy_(state["step"])


def decayed_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits parameters into weights of convolutions and linear layers, which decay, and the others, which do not."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    return weights, [p for p in network.parameters() if p.ndim <= 1]


def make_network(
    config: Config, classes: int, device: torch.device, sides: tuple[int, int] = (32, 32), trained: bool = False
) -> Classifier:
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
    network: Classifier
    if backbone := config.backbone:
        from engine.backbones import Backbone  # of an optional package

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


def make_state(config: Config, classes: int, device: torch.device, sides: tuple[int, int] = (32, 32)) -> TrainState:
    """The state before the first step: equal networks, uniform marginals."""
    network = make_network(config, classes, device, sides)
    ema_model = make_network(config, classes, device, sides, trained=True).eval().requires_grad_(False)
    ema_model.load_state_dict(network.state_dict())
    network.rotation_head.requires_grad_(config.unlabeled)  # which alone has a rotation task
    weights, others = decayed_parameters(network)
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return TrainState(
        network=network,
        ema_model=ema_model,
        optimizer=OPTIMIZERS[config.optimizer](groups, config.lr, device),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        p_model_history=torch.full((P_MODEL_STEPS, classes), 1.0 / classes, device=device),
        label_marginal=torch.tensor(config.class_distribution or [1.0 / classes] * classes, device=device),
        step=torch.zeros((), dtype=torch.int64, device=device),
    )


_layout = lru_cache(maxsize=4)(Layout)  # that of a run never changes


@dataclass(frozen=True)
class StepInput:
    """A step's data on the device: one rank's views, and `StepPlan`'s arrays and `stop`, parts of one buffer.

    Attributes:
        views: (V / R, H, W, 3) uint8, in the order of `Rows.views`.
        packed: (bytes,) uint8, the arrays of the plan end to end, so that one copy brings them all.
        stop: (1,) float32, 1 where this rank has been asked to stop: the step tells all ranks, so that they stop at
            the same one.
    """

    views: Tensor
    packed: Tensor
    source: Tensor
    partner: Tensor
    lam: Tensor
    rotations: Tensor
    target: Tensor
    partner_target: Tensor
    labels: Tensor
    stop: Tensor

    @classmethod
    def to_device(cls, views: Tensor, plan: StepPlan, device: torch.device, stop: bool = False) -> StepInput:
        """Copies a step's plan beside its views, and whether this rank has been asked to stop."""
        arrays = vars(plan) | {"stop": np.array([stop], np.float32)}
        layout = _layout(tuple((name, torch.from_numpy(array).dtype, array.shape) for name, array in arrays.items()))
        buffer = layout.allocate(pinned=device.type == "cuda")
        for name, part in layout.arrays(buffer).items():
            part[:] = arrays[name]
        return cls._of(views.to(device, non_blocking=True), buffer.to(device, non_blocking=True), layout)

    @classmethod
    def _of(cls, views: Tensor, buffer: Tensor, layout: Layout) -> StepInput:
        return cls(views=views, packed=buffer, **layout.tensors(buffer))

    def clone(self) -> StepInput:
        """The same, in memory of its own; the parts of `packed` stay parts of it."""
        parts = {name: part for name, part in vars(self).items() if name not in ("views", "packed")}
        layout = _layout(tuple((name, part.dtype, tuple(part.shape)) for name, part in parts.items()))
        return self._of(self.views.clone(), self.packed.clone(), layout)


@dataclass(frozen=True)
class StepOutput:
    """What a step tells the host.

    Attributes:
        metrics: (len(METRICS),) float32, in their order: means over the global batch, "stop" over the ranks.
        omega: (B,) float32, how well f_ema classifies each labeled image's CTAugment probe, in the order of the batch.
    """

    metrics: Tensor
    omega: Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets, mean over rows: (N, L) logits, (N, L) probabilities to ()."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


class Step:
    """The step of one run: what never changes between steps, bound to the function that does the work.

    Args:
        config: the run's configuration.
        state: changed in place by every call.
        rows: this rank's rows.
        precision: dtype of the network's input and of autocast, which float32 and float64 switch off.
        compiled: whether the networks go through torch.compile.
    """

    def __init__(
        self, config: Config, state: TrainState, rows: Rows, precision: torch.dtype, compiled: bool = False
    ) -> None:
        self.config = config
        self.state = state
        self.precision = precision
        device = state.p_model_history.device
        self.device = device

        def on_device(array) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.images = on_device(rows.images)
        self.guess_order = on_device(rows.guess_order)
        self.labeled_rows, self.unlabeled_rows = on_device(rows.labeled), on_device(rows.unlabeled)
        self.accumulation_steps = rows.accumulation_steps  # M / R
        self.local_batch = len(rows.images)  # B / R
        self.pool = len(rows.pool) // rows.accumulation_steps  # of a micro-batch
        self.mean = torch.tensor(state.network.mean, device=device)
        self.std = torch.tensor(state.network.std, device=device)
        self.update_ema = get_ema_multi_avg_fn(config.ema_decay)
        full = precision in (torch.float32, torch.float64)
        self.rows_dtype = torch.float32 if full else precision
        self.autocast = torch.autocast(device.type, torch.bfloat16 if full else precision, enabled=not full)
        self.guess_model: nn.Module = state.network
        self.train_model: nn.Module = state.network
        self.ema_model: nn.Module = state.ema_model
        if compiled:
            # each is called with one shape a pass: a graph for each is faster than one for any number of rows
            self.guess_model = torch.compile(state.network, dynamic=False)  # type: ignore[assignment]
            self.train_model = self.guess_model
            self.ema_model = torch.compile(state.ema_model, dynamic=False)  # type: ignore[assignment]
        if distributed.grouped():
            gradient_bytes = sum(p.nbytes for p in state.network.parameters() if p.requires_grad)
            self.train_model = DistributedDataParallel(
                self.train_model,
                # torch's static graph knows nothing of passes that are not exchanged
                static_graph=self.accumulation_steps == 1,
                gradient_as_bucket_view=True,
                bucket_cap_mb=float(np.clip(gradient_bytes / _BUCKETS, *_BUCKET_BYTES)) / 2**20,  # type: ignore[arg-type]
                **{_KEEP_BUFFERS: False},  # type: ignore[arg-type]
            )
            if config.gradients == "bf16":
                self.train_model.register_comm_hook(None, bf16_compress_hook)

    def __call__(self, data: StepInput) -> StepOutput:
        """Trains one step and changes the state in place.

        Args:
            data: this rank's views and numbers.

        Returns:
            Metrics and omega of the global batch, still on the device.
        """
        c, state = self.config, self.state
        classes = state.p_model_history.shape[1]

        # 1. Views (section 3.2), mixed, rotated and normalised as planned: uint8 to the network's rows in one pass
        parts.begin("assemble")
        views = distributed.gather(data.views)  # (V, H, W, 3) uint8
        rows = assemble_batch(
            views,
            data.source,
            data.partner,
            data.lam,
            data.rotations,
            self.mean,
            self.std,
            self.rows_dtype,
        ).to(self.precision)  # (N, 3, H, W)
        trained, probes = rows[: -self.local_batch], rows[-self.local_batch :]
        one_hot = F.one_hot(data.labels, classes).float()  # (B, L)

        # 2. CTAugment's probes on f_ema (3.2.2), and the guess q = f(u_weak): the ranks exchange both at once
        parts.begin("probes")
        passes = [self._logits(self.ema_model, probes)]
        if c.unlabeled:
            parts.begin("guess")
            trained, weak = trained[: -self.local_batch], trained[-self.local_batch :]
            passes.append(self._logits(partial(self.guess_model, track=False), weak))
        parts.begin("targets")
        logits = distributed.gather(torch.cat(passes, dim=1))[self.guess_order]  # (B, 2 L), or (B, L) of probes alone
        omega = 1 - (logits[:, :classes].softmax(-1) - one_hot).abs().sum(-1) / 2  # (B,)

        # 3. Distribution alignment (3.1) and sharpening: one target for all K + 1 views of an image, which is
        # augmentation anchoring (3.2.1). The mean of q becomes a row of p_model_history
        if c.unlabeled:
            guesses = guess_labels(
                logits[:, classes:],
                state.p_model_history,
                state.step % P_MODEL_STEPS,
                state.label_marginal,
                c.temperature,
                c.align,
            )  # (B, L)
            known = torch.cat([one_hot, guesses])
        else:
            guesses = known = one_hot

        # 4. Mixup of the targets (MixMatch, 3.3), as the plan has mixed the images
        accumulated = self.accumulation_steps
        lam = data.lam[: len(trained)].view(accumulated, -1)[:, : self.pool].reshape(-1, 1)
        targets = lam * known[data.target] + (1 - lam) * known[data.partner_target]  # (P / R, L)

        # 5. Losses (3.3) and their gradients, accumulated over the micro-batches
        inputs = trained, targets, guesses[self.images], data.rotations[: len(trained)]
        losses = torch.zeros(len(LOSSES), device=self.device)
        saved_stats = state.network.running_statistics()
        new_stats = torch.zeros_like(saved_stats)
        for number, micro_batch in enumerate(zip(*(i.chunk(accumulated) for i in inputs), strict=True), start=1):
            with self._unsynchronised(number < accumulated):
                terms = self._losses(*micro_batch)
                parts.begin("backward")
                state.scaler.scale(terms[0] / accumulated).backward()
            losses += terms.detach() / accumulated
            new_stats += state.network.running_statistics() / accumulated
            state.network.set_running_statistics(saved_stats)  # every pass moves them from the same values

        # 6. Update of the parameters: Adam, decoupled weight decay
        parts.begin("update")
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()

        with torch.no_grad():
            # 7. Exponential moving average; running statistics are those of the live network
            parts.begin("ema")
            sums = distributed.mean(torch.cat([new_stats, losses, data.stop]))
            new_stats, losses, stop = sums.split([len(new_stats), len(losses), 1])
            for network in (state.network, state.ema_model):
                network.set_running_statistics(new_stats)
            self.update_ema(list(state.ema_model.parameters()), list(state.network.parameters()), 0)

            # 8. The label marginal p(y) that the next step's alignment reads (3.1)
            parts.begin("metrics")
            alignment_gap = (state.label_marginal - state.p_model_history.mean(0)).abs().sum() / 2
            if not c.class_distribution:
                state.label_marginal.lerp_(one_hot.mean(0), 1 - c.marginal_decay)
            state.step += 1
            others = torch.stack([guesses.amax(-1).mean(), alignment_gap, omega.mean()])
        return StepOutput(torch.cat([losses, others, stop]).float(), omega)

    def _logits(self, network: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
        """Class logits without gradient, micro-batch by micro-batch: (n, 3, H, W) to (n, L) float32."""
        with torch.no_grad(), self.autocast:
            return torch.cat([network(part)[0].float() for part in rows.chunk(self.accumulation_steps)])

    def _unsynchronised(self, accumulating: bool) -> contextlib.AbstractContextManager:
        """Keeps gradients this rank's while it accumulates: the last micro-batch exchanges the sum."""
        return self.train_model.no_sync() if accumulating and distributed.grouped() else contextlib.nullcontext()  # type: ignore

    def _losses(self, rows: Tensor, targets: Tensor, guesses: Tensor, rotations: Tensor) -> Tensor:
        """The loss and its terms for one micro-batch of b of the B images (section 3.3).

        A term is added here and, for logs, in `LOSSES`.

        Args:
            rows: (n, 3, H, W), its pool, u_1 and rotated u_1.
            targets: (pool rows, L), mixed.
            guesses: (b, L), of u_1.
            rotations: (n,) int64.

        Returns:
            (len(LOSSES),) float32, in their order; 0 for a term that the method does not have.
        """
        c, pool = self.config, self.pool
        parts.begin("forward")
        with self.autocast:
            logits, rotation_logits = self.train_model(rows)
        parts.begin("losses")
        loss = loss_x = soft_cross_entropy(logits[self.labeled_rows], targets[self.labeled_rows])
        terms = {"loss_x": loss_x}
        if c.unlabeled:
            ramp = (self.state.step * (c.batch / (1024 * c.ramp_kimg))).clamp(max=1)
            u1, rotated = slice(pool, pool + len(guesses)), slice(pool + len(guesses), None)
            loss_u = soft_cross_entropy(logits[self.unlabeled_rows], targets[self.unlabeled_rows])
            loss_u1 = soft_cross_entropy(logits[u1], guesses)
            loss_rot = F.cross_entropy(rotation_logits[rotated].float(), rotations[rotated])
            loss = loss_x + c.w_u * ramp * loss_u + c.w_u1 * ramp * loss_u1 + c.w_rot * loss_rot
            terms |= {"loss_u": loss_u, "loss_u1": loss_u1, "loss_rot": loss_rot}
        terms["loss"] = loss
        zero = torch.zeros_like(loss)
        return torch.stack([terms.get(name, zero) for name in LOSSES])
