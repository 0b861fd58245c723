"""One training step of ReMixMatch, in the order of the paper's Algorithm 1 (arXiv 1911.09785).

Section numbers in comments are the paper's. So are the symbols: B labeled and B unlabeled images per step over all
ranks, K strong views, L classes. R is the number of ranks.

The input of a step is augmented uint8 views and a plan that holds all random numbers. The step itself draws none, and
never synchronizes with the host. `engine/method/batch_layout.py` shows which input of the network is which.

Other methods (`engine/config/methods.py`) run the same step with other settings: other inputs, pseudo-labels and
losses. They may have U = mu B unlabeled images per step instead of B.

Gradient accumulation: the global batch is split into M micro-batches, by default one per rank. One rank with several
micro-batches computes the same batch statistics, pseudo-labels and gradients as that many ranks, bit for bit if M = 2.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
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
from engine.training.concurrency import Place, new_place, start
from engine.training.execution import compiler
from engine.training.state import TrainState
from engine.training.step_input import StepInput
from kernels.assemble import assemble_batch

_BUCKETS = 2  # Gradient buckets: the later layers' gradients are reduced while the earlier layers' are computed.
_BUCKET_BYTES = 2**20, 25 * 2**20  # Smallest size, which torch.compile assumes, and largest, which is torch's default.
# The option that keeps DDP from broadcasting rank 0's running statistics before every pass. Newer versions of torch
# renamed it.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
METRICS = (*LOSSES, "confidence", "guesses_used", "alignment_gap", "omega", "stop")


@dataclass(frozen=True)
class StepOutput:
    """The results of a step that the host reads.

    Attributes:
        metrics: (len(METRICS),) float32, in the order of METRICS: means over the global batch; "stop" over the ranks.
        omega: (B,) float32, how well f_ema classifies the CTAugment probe of each labeled image, in batch order. Empty
            if CTAugment does not learn.
    """

    metrics: Tensor
    omega: Tensor


class Step:
    """The training step of a run, as a callable.

    Args:
        config: The run's configuration.
        state: The training state, updated in place by every call.
        layout: This rank's batch layout.
        precision: Dtype of the network's input and of autocast; float32 and float64 disable autocast.
        compiled: Whether networks, targets, losses and metrics are compiled by torch.compile.
        inductor: See `Execution`.
        concurrent: See `Execution`.
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
        self.labeled_order, self.labeled_index = on_device(layout.labeled_order), on_device(layout.labeled_index)
        guess_inputs, probe_inputs = layout.guess_inputs, len(layout.probe_order) // layout.ranks
        trained_inputs = len(layout.target_index)
        # The inputs that pseudo-labels are made from follow the training inputs, so one pass can include both.
        self.joint_guesses = guess_inputs if config.guess_pass == "joint" else 0
        guess_inputs -= self.joint_guesses
        self.pass_sizes = trained_inputs + self.joint_guesses, guess_inputs, probe_inputs
        # The pool comes first in every micro-batch. timm models do not have this argument.
        self.pool_inputs = len(layout.pool) // layout.accumulation_steps
        self.stats_options = {"stats_samples": self.pool_inputs} if config.bn_stats == "pool" else {}
        self.mean = torch.tensor(state.network.mean, device=device)
        self.std = torch.tensor(state.network.std, device=device)
        # Listed once, since walking the modules takes longer than averaging the parameters of a small network.
        self.parameters, self.ema_parameters = list(state.network.parameters()), list(state.ema_model.parameters())
        self.update_ema = get_ema_multi_avg_fn(config.ema_decay)
        full = precision in (torch.float32, torch.float64)
        self.assemble_dtype = torch.float32 if full else precision
        dtype = torch.bfloat16 if full else precision
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=not full)
        # Probes and guess run concurrently with the training pass, since their results are needed later. The guess does
        # not with --bn sync: concurrent collectives have no common order across ranks. In a thread neither may use what
        # threads share: compiled code, autocast's cache, and the buffers of a timm model, which a guess exchanges.
        streams = concurrent and device.type == "cuda"
        threads = concurrent and device.type == "cpu" and full and not compiled
        self.probe_place: Place | None = None
        self.guess_place: Place | None = None
        if probe_inputs and (streams or threads):
            self.probe_place = new_place(device)
        if guess_inputs and config.bn != "sync" and (streams or (threads and not config.backbone)):
            self.guess_place = (threads and self.probe_place) or new_place(device)  # One thread for both, two streams.
        compile_ = compiler(config, device, inductor) if compiled else lambda function: function
        self.network: nn.Module = compile_(state.network)
        self.train_model: nn.Module = self.network
        guess_network = state.guess_network()
        self.guess_model: nn.Module = self.network if guess_network is state.network else compile_(guess_network)
        self.ema_model: nn.Module = compile_(state.ema_model)
        self.make_targets = compile_(self.make_targets)  # type: ignore[method-assign]
        self.losses = compile_(self.losses)  # type: ignore[method-assign]
        self.finish = compile_(self.finish)  # type: ignore[method-assign]
        # With a single pass on a single rank, losses and running statistics need no averaging.
        self.one_pass = self.accumulation_steps == 1 and collectives.ranks() == 1
        self.loss_gradient = torch.tensor(1 / self.accumulation_steps, device=device)
        if collectives.grouped():
            gradient_bytes = sum(p.nbytes for p in self.parameters if p.requires_grad)
            self.train_model = DistributedDataParallel(
                self.train_model,
                # DDP's static graph does not support no_sync(), which gradient accumulation uses.
                static_graph=self.accumulation_steps == 1,
                gradient_as_bucket_view=True,
                bucket_cap_mb=float(np.clip(gradient_bytes / _BUCKETS, *_BUCKET_BYTES)) / 2**20,  # type: ignore[arg-type]
                **{_KEEP_BUFFERS: False},  # type: ignore[arg-type]
            )
            if config.gradients == "bf16":
                self.train_model.register_comm_hook(None, bf16_compress_hook)

    def __call__(self, data: StepInput) -> StepOutput:
        """Train one step, updating the state in place.

        Args:
            data: This rank's views and plan.

        Returns:
            Metrics and omega of the global batch, on the device.
        """
        c, state = self.config, self.state

        # 1. Views (section 3.2) to network inputs. One kernel mixes the images of the pool (mixup, 3.3), rotates copies
        # of u_1 (3.3), and normalizes. Mixup spans the global batch: the rank has made its partners' views, too.
        ranges.enter("copy plan")
        data = data.to(self.device)
        ranges.enter("assemble")
        inputs = assemble_batch(
            data.views,
            data.source,
            data.partner,
            data.lam,
            data.rotations,
            self.mean,
            self.std,
            self.assemble_dtype,
            c.stem_channels,
        ).to(self.precision)  # (N, 3, H, W)
        trained, weak, probes = inputs.split(self.pass_sizes)

        # 2. Label guessing q = softmax(f(u_weak)) (3.1), and CTAugment's probes f_ema(x_probe) (3.2.2). Only the logits
        # are computed here, without gradient and concurrently with the training pass, unless it makes the guess.
        probe_logits = guess_logits = None
        if len(probes):
            compute_probes = partial(self._logits, self.ema_model, probes)
            wait_for_probes = start(self.probe_place, "probes", compute_probes)
        if len(weak):
            compute_guess = partial(self._logits, partial(self.guess_model, track=False), weak)
            wait_for_guess = start(self.guess_place, "guess", compute_guess)

        # 3. Training pass over the mixed pool, u_1 and the rotated u_1, one micro-batch after another.
        losses: list[Tensor] = []
        new_stats: list[Tensor] = []
        saved_stats = None if self.one_pass else state.network.running_statistics()
        accumulated = self.accumulation_steps
        rotations = data.rotations[: len(data.target_index)].chunk(accumulated)
        weights = data.interpolation.chunk(accumulated) if c.interpolate_logits else [None] * accumulated
        for number, micro_batch in enumerate(trained.chunk(accumulated)):
            with self._without_sync(number + 1 < accumulated):
                ranges.enter("forward")
                with self.autocast():
                    logits, rotation_logits = self.train_model(micro_batch, **self.stats_options)
                    # Random logit interpolation (AdaMatch, 3.3) adds a pass over the labeled samples alone, which
                    # updates no running statistics. DistributedDataParallel need not know: its hooks see one gradient.
                    alone = self.network(self._labeled(micro_batch), track=False)[0] if c.interpolate_logits else None
                if c.guess_pass == "trained" and c.unlabeled:
                    guess_logits = logits.detach()[: self.pool_inputs]
                if self.joint_guesses:
                    # No loss uses these logits. Batch norm's gradient still passes through their inputs' activations.
                    guess_logits = logits.detach()[-self.joint_guesses :]

                # 4. Targets, for all micro-batches at once, just before the first loss needs them: distribution
                # alignment q~ = Normalize(q p(y) / p~(y)) (3.1), sharpening Normalize(q~^(1/T)), and mixup with the
                # weights and partners of the images (MixMatch, 3.3). All K + 1 views of an image share one target:
                # augmentation anchoring (3.2.1).
                if number == 0:
                    ranges.enter("exchange")
                    if len(weak):
                        guess_logits = wait_for_guess()
                    if len(probes) and collectives.ranks() > 1:
                        probe_logits = wait_for_probes()
                    probe_logits, guess_logits = self._exchange(probe_logits, guess_logits)
                    ranges.enter("targets")
                    targets, pseudo_labels = self.make_targets(guess_logits, data)

                # 5. Loss (3.3): CE(X') + ramp (w_u CE(U') + w_u1 CE(u_1)) + w_rot CE(rotation of u_1). Its gradients
                # accumulate over the micro-batches.
                ranges.enter("losses")
                mixed = targets.chunk(accumulated)[number]
                loss, terms = self.losses(logits, rotation_logits, mixed, rotations[number], alone, weights[number])
                ranges.enter("backward")
                state.scaler.scale(loss).backward(self.loss_gradient)
            losses.append(terms)
            if saved_stats is not None:
                new_stats.append(state.network.running_statistics())
                state.network.set_running_statistics(saved_stats)  # Every pass starts from the same values.

        # 6. Update of the parameters: Adam with decoupled weight decay.
        ranges.enter("update")
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()

        with torch.no_grad():
            # 7. Exponential moving average f_ema of the parameters. Running statistics are copied from f, where they
            # are the mean over all micro-batches.
            ranges.enter("ema")
            if len(probes) and collectives.ranks() == 1:
                probe_logits = wait_for_probes()
            mean_losses, stop = losses[0], data.stop
            if not self.one_pass:
                local = torch.cat([_mean(new_stats), _mean(losses), data.stop])
                ranges.enter("exchange")
                reduced = collectives.mean(local)
                ranges.enter("ema")
                stats, mean_losses, stop = reduced.split([len(new_stats[0]), len(LOSSES), 1])
                state.network.set_running_statistics(stats)
            state.ema_model.copy_running_statistics(state.network)
            self.update_ema(self.ema_parameters, self.parameters, 0)

            # 8. Results: the metrics, CTAugment's omega for its bin weights (3.2.2), and p(y) for the next step (3.1).
            ranges.enter("metrics")
            return StepOutput(*self.finish(mean_losses, stop, probe_logits, pseudo_labels, data.labels))

    def _logits(self, network: Callable[[Tensor], tuple[Tensor, Tensor]], inputs: Tensor) -> Tensor:
        """Compute class logits without gradient, one micro-batch at a time: (n, 3, H, W) to (n, L)."""
        with torch.no_grad(), self.autocast():
            logits = [network(part)[0] for part in inputs.chunk(self.accumulation_steps)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _labeled(self, inputs: Tensor) -> Tensor:
        """Select the labeled samples of a micro-batch: (n, 3, H, W) to (n_x, 3, H, W)."""
        return inputs.index_select(0, self.labeled_index).contiguous(memory_format=torch.channels_last)

    def _exchange(self, *logits: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gather the ranks' logits of probes and guess in one collective; each result is concatenated rank by rank."""
        present = [part for part in logits if part is not None]
        if collectives.ranks() == 1 or not present:
            return logits
        gathered = collectives.gather(torch.cat(present)).unflatten(0, (collectives.ranks(), -1))
        parts = iter([part.flatten(0, 1) for part in gathered.split([len(part) for part in present], dim=1)])
        return tuple(None if part is None else next(parts) for part in logits)

    def _without_sync(self, accumulating: bool) -> contextlib.AbstractContextManager:
        """Skip the gradient all-reduce while accumulating; the last micro-batch reduces the sum."""
        return self.train_model.no_sync() if accumulating and collectives.grouped() else contextlib.nullcontext()  # type: ignore

    def make_targets(self, logits: Tensor | None, data: StepInput) -> tuple[Tensor, Tensor]:
        """Make the pseudo-labels and mix all targets like the images (sections 3.1 and 3.2.1; MixMatch, 3.3).

        Args:
            logits: Logits over all ranks, concatenated rank by rank, with those of the g views that an image's
                pseudo-label is made from and, if the rule uses them, of the labeled images. None without unlabeled
                data.
            data: The input of the step.

        Returns:
            Targets of this rank's training inputs, (n M / R, L) float32. And the pseudo-labels times their weights,
            (U, L) float32: zeros where one is not used. Without unlabeled data the labels, (B, L).
        """
        state = self.state
        known = pseudo_labels = F.one_hot(data.labels, state.network.head.out_features).float()  # (B, L)
        if logits is not None:
            images = data.images if state.targets.uses_images else None
            labeled = logits[self.labeled_order].float() if len(self.labeled_order) else None  # (B, L)
            guessed = logits[self.guess_order].float()  # (g, U, L)
            pseudo_labels, weights = state.targets(guessed, state.step, images, labeled)  # (U, L), (U,)
            if weights is not None:
                pseudo_labels = pseudo_labels * weights[:, None]
            known = torch.cat([known, pseudo_labels])
        lam = data.lam[: len(data.target_index), None]
        return lam * known[data.target_index] + (1 - lam) * known[data.partner_target_index], pseudo_labels

    def losses(
        self,
        logits: Tensor,
        rotation_logits: Tensor,
        targets: Tensor,
        rotations: Tensor,
        alone: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and its terms for one micro-batch; see `engine.method.losses.total_loss`.

        Args:
            logits: (n, L), or more with a joint guess.
            rotation_logits: (n, 4), likewise.
            targets: (n, L).
            rotations: (n,) int64.
            alone: (n_x, L), logits of the labeled samples from a pass over these alone.
            weights: (n_x, L), weights of their other logits in the random interpolation.
        """
        if self.joint_guesses:
            logits, rotation_logits = logits[: len(targets)], rotation_logits[: len(targets)]
        if alone is not None and weights is not None:
            logits = logits.float()
            difference = alone.float() - logits.index_select(0, self.labeled_index)
            logits = logits.index_add(0, self.labeled_index, (1 - weights) * difference)
        shares = self.class_weights, self.rotation_weights
        fair_target = self.state.targets.fair_target
        samples = Samples(self.config, logits, rotation_logits, targets, rotations, *shares, fair_target)
        return total_loss(samples, ramp_up(self.config, self.state.step))

    def finish(
        self, losses: Tensor, stop: Tensor, probe_logits: Tensor | None, pseudo_labels: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update the method's state, count the step, and compute metrics and omega; see `StepOutput`.

        Args:
            losses: (len(LOSSES),) float32, means over the global batch.
            stop: (1,) float32, mean over the ranks.
            probe_logits: (B, L) over all ranks, concatenated rank by rank. None without probes.
            pseudo_labels: (U, L) float32, zeros where one is not used. Without unlabeled data the labels.
            labels: (B,) int64.
        """
        state = self.state
        one_hot = F.one_hot(labels, pseudo_labels.shape[1]).float()
        omega = losses.new_zeros(0)
        if probe_logits is not None:
            omega = 1 - (probe_logits[self.probe_order].float().softmax(-1) - one_hot).abs().sum(-1) / 2  # (B,)
        alignment_gap = (state.targets.label_marginal - state.targets.p_model).abs().sum() / 2
        weights = pseudo_labels.sum(-1)
        used = weights.mean()
        confidence = pseudo_labels.amax(-1).mean()
        if state.targets.selects:  # Mean over the pseudo-labels that are used.
            confidence = confidence / used.clamp(min=1e-9)
            used = used / weights.amax().clamp(min=1)  # Dash's weights have a mean of 1.
        metrics = torch.stack([confidence, used, alignment_gap, omega.mean() if len(omega) else used.new_zeros(())])
        state.targets.observe(one_hot, losses)
        state.step.add_(1)
        return torch.cat([losses, metrics, stop]).float(), omega


def _mean(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0]) / len(tensors)
