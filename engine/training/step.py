"""One training step of ReMixMatch, in the order of the paper's algorithm 1.

Symbols as in the paper: B labeled and B unlabeled images over all ranks, K strong views, L classes, R ranks. Images
arrive as uint8 views that are already augmented, every random number as a tensor of the plan; nothing in here draws
random numbers or waits for the host. Which rows of the batch are which is drawn in `engine/method/batch_layout.py`.
Sections in comments are the paper's (arXiv 1911.09785).

Other methods (`engine/config/methods.py`) are the same step with other fields of the configuration: other rows, another
guess, another loss of unlabeled rows. There are U = mu B unlabeled images then, for FixMatch's mu.

Gradient accumulation: the networks take the rows in M micro-batches over all ranks, by default one a rank. A rank that
has several computes what as many ranks compute together: the same statistics, guesses and gradients, for M = 2 bit for
bit.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.config.config import Config
from engine.distributed import collectives
from engine.method.batch_layout import BatchLayout
from engine.method.losses import LOSSES, Samples, ramp_up, total_loss
from engine.training import ranges
from engine.training.execution import compiler
from engine.training.state import TrainState
from engine.training.step_input import StepInput
from kernels.assemble import assemble_batch

_BUCKETS = 2  # of gradients: the later layers' are on their way while the earlier layers' are computed
_BUCKET_BYTES = 2**20, 25 * 2**20  # least, which torch.compile takes for granted, and most, as is usual
# rank 0's running statistics are not sent to all before every pass: newer versions of torch have another name for that
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
METRICS = (*LOSSES, "confidence", "guesses_used", "alignment_gap", "omega", "stop")


@dataclass(frozen=True)
class StepOutput:
    """What a step tells the host.

    Attributes:
        metrics: (len(METRICS),) float32, in their order: means over the global batch, "stop" over the ranks.
        omega: (B,) float32, how well f_ema classifies each labeled image's CTAugment probe, in the order of the batch;
            none where CTAugment does not learn.
    """

    metrics: Tensor
    omega: Tensor


class Step:
    """The step of one run: what never changes between steps, bound to the function that does the work.

    Args:
        config: the run's configuration.
        state: changed in place by every call.
        layout: this rank's rows.
        precision: dtype of the network's input and of autocast, which float32 and float64 switch off.
        compiled: whether the networks, targets, losses and metrics go through torch.compile.
        inductor: see `Execution`.
        concurrent: see `Execution`.
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        layout: BatchLayout,
        precision: torch.dtype,
        compiled: bool = False,
        inductor: Mapping[str, Any] | None = None,
        concurrent: bool = True,
    ) -> None:
        self.config = config
        self.state = state
        self.precision = precision
        device = state.device
        self.device = device

        def on_device(array) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.guess_order, self.probe_order = on_device(layout.guess_order), on_device(layout.probe_order)
        self.class_weights, self.rotation_weights = on_device(layout.class_weights), on_device(layout.rotation_weights)
        self.accumulation_steps = layout.accumulation_steps  # M / R
        guessed, probed = layout.guess_order.size // layout.ranks, len(layout.probe_order) // layout.ranks
        self.pass_sizes = len(layout.target_index), guessed, probed  # rows of each
        # a micro-batch begins with its pool; models of timm do not know this argument
        pool_rows = len(layout.pool) // layout.accumulation_steps
        self.statistics = {"stats_rows": pool_rows} if config.bn_stats == "pool" else {}
        self.mean = torch.tensor(state.network.mean, device=device)
        self.std = torch.tensor(state.network.std, device=device)
        self.update_ema = get_ema_multi_avg_fn(config.ema_decay)
        full = precision in (torch.float32, torch.float64)
        self.rows_dtype = torch.float32 if full else precision
        self.autocast = torch.autocast(device.type, torch.bfloat16 if full else precision, enabled=not full)
        # passes whose results are needed late run beside the training pass, where there are any; but not where two
        # passes exchange statistics, since collectives of two streams have no common order on all ranks
        self.probe_stream = self.guess_stream = None
        if device.type == "cuda" and concurrent:
            if probed:
                self.probe_stream = torch.cuda.Stream(device)
            if guessed and config.bn != "sync":
                self.guess_stream = torch.cuda.Stream(device)
        compile_ = compiler(config, device, inductor) if compiled else lambda function: function
        self.guess_model: nn.Module = compile_(state.network)
        self.train_model: nn.Module = self.guess_model
        self.ema_model: nn.Module = compile_(state.ema_model)
        self.make_targets = compile_(self.make_targets)  # type: ignore[method-assign]
        self.losses = compile_(self.losses)  # type: ignore[method-assign]
        self.finish = compile_(self.finish)  # type: ignore[method-assign]
        # with one pass on one rank, running statistics are where they belong when it is done
        self.one_pass = self.accumulation_steps == 1 and collectives.ranks() == 1
        self.loss_gradient = torch.tensor(1 / self.accumulation_steps, device=device)
        if collectives.grouped():
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

        # 1. Views (section 3.2), mixed, rotated and normalised as planned: uint8 to the network's rows in one pass
        ranges.enter("copy plan")
        data = data.to(self.device)
        ranges.enter("exchange")
        views = collectives.gather(data.views)  # (V, H, W, 3) uint8
        ranges.enter("assemble")
        rows = assemble_batch(
            views,
            data.source,
            data.partner,
            data.lam,
            data.rotations,
            self.mean,
            self.std,
            self.rows_dtype,
            c.stem_channels,
        ).to(self.precision)  # (N, 3, H, W)
        trained, weak, probes = rows.split(self.pass_sizes)

        # 2. CTAugment's probes on f_ema (3.2.2), and the guess q = f(u_weak), both beside the training pass
        probe_logits = guess_logits = None
        if len(probes):
            with _on(self.probe_stream):
                ranges.enter("probes")
                probe_logits = self._logits(self.ema_model, probes)
        if len(weak):
            with _on(self.guess_stream):
                ranges.enter("guess")
                guess_logits = self._logits(partial(self.guess_model, track=False), weak)

        losses: list[Tensor] = []
        new_stats: list[Tensor] = []
        saved_stats = None if self.one_pass else state.network.running_statistics()
        accumulated = self.accumulation_steps
        rotations = data.rotations[: len(trained)].chunk(accumulated)
        for number, micro_batch in enumerate(trained.chunk(accumulated)):
            with self._without_sync(number + 1 < accumulated):
                ranges.enter("forward")
                with self.autocast:
                    logits, rotation_logits = self.train_model(micro_batch, **self.statistics)

                # 3. Alignment (3.1), sharpening, and mixup of the targets as of the images (MixMatch, 3.3), for all
                # micro-batches: the first losses are the first to need them
                if number == 0:
                    ranges.enter("exchange")
                    _wait_for(self.guess_stream)
                    probe_logits, guess_logits = self._exchange(probe_logits, guess_logits)
                    ranges.enter("targets")
                    targets, guesses = self.make_targets(guess_logits, data)

                # 4. Losses (3.3) and their gradients, accumulated over the micro-batches
                ranges.enter("losses")
                mixed = targets.chunk(accumulated)[number]
                loss, terms = self.losses(logits, rotation_logits, mixed, rotations[number])
                ranges.enter("backward")
                state.scaler.scale(loss).backward(self.loss_gradient)
            losses.append(terms)
            if saved_stats is not None:
                new_stats.append(state.network.running_statistics())
                state.network.set_running_statistics(saved_stats)  # every pass moves them from the same values

        # 5. Update of the parameters: Adam, decoupled weight decay
        ranges.enter("update")
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()

        with torch.no_grad():
            # 6. Exponential moving average; running statistics are those of the live network
            ranges.enter("ema")
            _wait_for(self.probe_stream)
            mean_losses, stop = losses[0], data.stop
            if not self.one_pass:
                local = torch.cat([_mean(new_stats), _mean(losses), data.stop])
                ranges.enter("exchange")
                reduced = collectives.mean(local)
                ranges.enter("ema")
                stats, mean_losses, stop = reduced.split([len(new_stats[0]), len(LOSSES), 1])
                state.network.set_running_statistics(stats)
            state.ema_model.copy_running_statistics(state.network)
            self.update_ema(list(state.ema_model.parameters()), list(state.network.parameters()), 0)

            # 7. The label marginal p(y) that the next step's alignment reads (3.1), and what the host is told
            ranges.enter("metrics")
            return StepOutput(*self.finish(mean_losses, stop, probe_logits, guesses, data.labels))

    def _logits(self, network: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
        """Class logits without gradient, micro-batch by micro-batch: (n, 3, H, W) to (n, L)."""
        with torch.no_grad(), self.autocast:
            logits = [network(part)[0] for part in rows.chunk(self.accumulation_steps)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _exchange(self, *logits: Tensor | None) -> tuple[Tensor | None, ...]:
        """All ranks' logits of the probes and of the guess, rank by rank, by one exchange."""
        there = [part for part in logits if part is not None]
        if collectives.ranks() == 1 or not there:
            return logits
        _wait_for(self.probe_stream)
        gathered = collectives.gather(torch.cat(there)).unflatten(0, (collectives.ranks(), -1))
        parts = iter([part.flatten(0, 1) for part in gathered.split([len(part) for part in there], dim=1)])
        return tuple(None if part is None else next(parts) for part in logits)

    def _without_sync(self, accumulating: bool) -> contextlib.AbstractContextManager:
        """Keeps gradients this rank's while it accumulates: the last micro-batch exchanges the sum."""
        return self.train_model.no_sync() if accumulating and collectives.grouped() else contextlib.nullcontext()  # type: ignore

    def make_targets(self, logits: Tensor | None, data: StepInput) -> tuple[Tensor, Tensor]:
        """Make the pseudo-labels, and mix all targets as the images are (sections 3.1 and 3.2.1; MixMatch, 3.3).

        Args:
            logits: (g U, L) over all ranks, rank by rank: of u_weak, or of all g views of an image; None without
                unlabeled data.
            data: the step's.

        Returns:
            Targets of this rank's trained rows, (n M / R, L) float32. And the pseudo-labels, (U, L) float32, times
            their weights: zeros where one is left out; or without any the labels, (B, L).
        """
        state = self.state
        known = pseudo_labels = F.one_hot(data.labels, state.network.head.out_features).float()  # (B, L)
        if logits is not None:
            pseudo_labels, weights = state.targets(logits[self.guess_order].float(), state.step)  # (U, L), (U,)
            if weights is not None:
                pseudo_labels = pseudo_labels * weights[:, None]
            known = torch.cat([known, pseudo_labels])
        lam = data.lam[: len(data.target_index), None]
        return lam * known[data.target_index] + (1 - lam) * known[data.partner_target_index], pseudo_labels

    def losses(
        self, logits: Tensor, rotation_logits: Tensor, targets: Tensor, rotations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss and its terms for one micro-batch: see `engine.method.losses`."""
        shares = self.class_weights, self.rotation_weights
        samples = Samples(self.config, logits, rotation_logits, targets, rotations, *shares)
        return total_loss(samples, ramp_up(self.config, self.state.step))

    def finish(
        self, losses: Tensor, stop: Tensor, probe_logits: Tensor | None, guesses: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Moves p(y) and the step, and puts together what the host is told: see `StepOutput`.

        Args:
            losses: (len(LOSSES),) float32, means over the global batch.
            stop: (1,) float32, likewise over the ranks.
            probe_logits: (B, L) over all ranks, rank by rank; None without probes.
            guesses: (U, L) float32, zeros where one is left out; without unlabeled data the labels.
            labels: (B,) int64.
        """
        state = self.state
        one_hot = F.one_hot(labels, guesses.shape[1]).float()
        omega = losses.new_zeros(0)
        if probe_logits is not None:
            omega = 1 - (probe_logits[self.probe_order].float().softmax(-1) - one_hot).abs().sum(-1) / 2  # (B,)
        alignment_gap = (state.targets.label_marginal - state.targets.p_model).abs().sum() / 2
        used = guesses.sum(-1).mean()
        confidence = guesses.amax(-1).mean()
        if state.targets.selects:  # of those that count
            confidence = confidence / used.clamp(min=1e-9)
        others = torch.stack([confidence, used, alignment_gap, omega.mean() if len(omega) else used.new_zeros(())])
        state.targets.observe_labels(one_hot)
        state.step.add_(1)
        return torch.cat([losses, others, stop]).float(), omega


def _mean(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0]) / len(tensors)


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is within is done on a stream, after all earlier work of the present one; on a CPU at once."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def _wait_for(stream: torch.cuda.Stream | None) -> None:
    """Later work of the present stream is done after all that a stream has been given."""
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
