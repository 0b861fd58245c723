"""The training loop: steps, logging, evaluation, checkpoints, signals and ranks."""

from __future__ import annotations

import hashlib
import logging
import math
import shlex
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config.config import run_identity
from engine.distributed import collectives
from engine.distributed.watchdog import StopRequest, Watchdog
from engine.errors import Stopped, UserError
from engine.inference.confusion import balanced_accuracy, geometric_mean
from engine.inference.evaluation import class_recalls, evaluate
from engine.method.losses import LOSSES, used_terms
from engine.runs import checkpoint
from engine.runs.folder import CHECKPOINTS
from engine.runs.headline import median_of_last, planned_evaluations
from engine.runs.health import Health, Observation, compared_images
from engine.runs.history import History, guessed_images, named_bins
from engine.runs.progress import MetricsLog, ProgressLine
from engine.runs.setup import RunSetup, write_run_files
from engine.runs.throughput import Throughput
from engine.training import ranges
from engine.training.cuda_graph import make_step
from engine.training.diagnostics import agreement, guess_quality
from engine.training.execution import Execution, keep_freed_memory, set_numerics
from engine.training.feed import Feed
from engine.training.state import TrainState, make_state
from engine.training.step import StepOutput
from engine.training.step_input import StepInput
from pipelines.data.cache import take_images

log = logging.getLogger(__name__)

Callback = Callable[[int, dict[str, float]], object]


class Trainer:
    """Trains one run, from its first step or from a checkpoint.

    Args:
        setup: The run's setup. Checkpoints are read from and written to `checkpoints/` in its folder.
        progress: The progress line.
        timeout: Seconds without progress after which a rank that waits for another one exits.
        check_ranks: Steps between bitwise comparisons of all ranks' states; 0 disables them.
        callback: Called on rank 0 with the step and the metrics of each new line of metrics.jsonl, between two steps.
            If it raises an exception, the current step is saved.
    """

    def __init__(
        self,
        setup: RunSetup,
        progress: ProgressLine,
        timeout: float = math.inf,
        check_ranks: int = 0,
        callback: Callback | None = None,
    ) -> None:
        config, data, split = setup.config, setup.data, setup.split
        self.config, self.data, self.progress = config, data, progress
        self.folder = setup.folder or Path()
        self.execution = Execution.pick(config, data.train_images.shape)
        set_numerics(config.deterministic, self.execution.cudnn_plans)
        keep_freed_memory(self.execution.device)
        self.feed = Feed(config, data, split, self.execution, self._log_step)
        self.micro_batches = config.micro_batches_of(collectives.ranks())
        self.state: TrainState = make_state(
            config, len(data.classes), self.execution.device, data.sides, self.feed.spec.unlabeled_images
        )
        self.identity = run_identity(config)
        self.saver = checkpoint.Saver(
            self.folder / CHECKPOINTS, config.keep, lambda: _keep_run_files(setup), asdict(config)
        )
        self.timeout, self.check_ranks, self.callback = timeout, check_ranks, callback
        counts = data.class_counts(split)
        if config.marginal == "labels":
            self.state.targets.label_marginal.copy_(torch.from_numpy(counts / counts.sum()))
        self.health = Health(config, data.classes, counts, self.feed.images_per_step)
        self.guessed = guessed_images(config, data, split, self.feed.images_per_step)
        self.throughput = Throughput(self.feed.images_per_step, config.lr, self.execution.device)
        self.accuracies: list[float] = []
        self.recalls: list[float | None] = []  # of the last evaluation
        self.train_seconds = self.cpu_seconds = 0.0
        self.step = 0
        self.execute: Callable[[StepInput], StepOutput] | None = None
        self._log: MetricsLog | None = None
        self._unreported: list[tuple[int, dict[str, float]]] = []  # metrics that the callback has not received
        self._history: History | None = None
        self._shown: dict[str, float] = {}
        self._stop = StopRequest()
        self._stop_at: int | None = None  # The step before which all ranks stop.

    def resume(self) -> bool:
        """Load the newest valid checkpoint (read by rank 0). Returns whether one was found.

        Raises:
            UserError: See `engine.runs.checkpoint.load_newest`.
        """
        folder, network = self.folder / CHECKPOINTS, self.state.network.state_dict()
        newest = collectives.run_on_rank_0(lambda: checkpoint.load_newest(folder, self.identity, network))
        if newest is None:
            return False
        content = newest.content
        before = content["micro_batches"]
        if self.config.bn == "joint" and before != self.micro_batches:
            log.warning(
                f"micro-batches changed from {before} to {self.micro_batches} with the number of ranks: --bn joint "
                "normalizes each micro-batch separately, so the run continues with different batch statistics "
                "(--bn split, --bn sync or enough --micro-batches avoid this)"
            )
        self.state.load_state_dict(content["state"])
        self.feed.policy.load_state_dict(_map_leaves(content["policy"], torch.Tensor, lambda t: t.numpy()))
        self.health.load_state_dict(content["health"])
        self.accuracies = list(content["accuracies"])
        self.recalls = list(content.get("recalls", ()))  # missing in checkpoints of earlier versions
        self.train_seconds, self.cpu_seconds = content["train_seconds"], content["cpu_seconds"]
        self.step = newest.step
        return True

    def save(self, last: bool = False) -> None:
        """Save a checkpoint of the current step (on rank 0). Write failures are reported and retried.

        Args:
            last: Whether this is the run's last checkpoint, whose write failure is an error.

        Raises:
            UserError: The parameters are not finite, or the last checkpoint cannot be written. Earlier checkpoints are
                left untouched.
        """
        self.feed.drain(self.step)
        if self._log:
            self._log.catch_up()  # A resumed run needs all metrics up to the checkpoint.
        if self._history:
            self._history.catch_up()
        if not all(bool(p.isfinite().all()) for p in self.state.network.parameters()):
            raise self._diverged(self.step - 1, "the update produced parameters that are not finite")
        content = {
            "state": self.state.state_dict(),
            "policy": _map_leaves(self.feed.policy.state_dict(), np.ndarray, torch.from_numpy),
            "health": self.health.state_dict(),
            "accuracies": self.accuracies,
            "recalls": self.recalls,
            "train_seconds": self.train_seconds,
            "cpu_seconds": self.cpu_seconds,
            "micro_batches": self.micro_batches,
        }
        if last:
            collectives.run_on_rank_0(lambda: self.saver.save_last(self.step, content))
        elif collectives.rank() == 0:
            self.saver.save(self.step, content)

    def _diverged(self, step: int, reason: str) -> UserError:
        return UserError(f"training diverged at step {step}: {reason}; {self.saver.last_good()}")

    def run(self) -> None:
        """Train up to the last step, with evaluation, logging and checkpoints.

        Raises:
            UserError: The loss is not finite, or a file cannot be written. Saved files are left intact.
            Exception: Any exception of the callback. The current step is saved.
            Stopped: A rank received SIGTERM, SIGINT or SIGHUP. The current step is saved.
        """
        if collectives.rank() == 0:
            c = self.config
            self._log = MetricsLog(self.folder, self.step, c.log, asdict(c))
            self._history = History(self.folder, self.step, c.eval_every)
        begin, cpu_begin = time.monotonic() - self.train_seconds, time.process_time() - self.cpu_seconds
        several = collectives.ranks() > 1
        watching = Watchdog(self.timeout, collectives.rank(), self._stop) if several else nullcontext()
        try:
            with self._stop.listening(), watching as watchdog:
                if self.execution.mode != "eager":
                    log.info("compiling the step: a minute or two the first time, less with torch's cache")
                self.begin()
                self.progress.start(self.step, self.feed.images_per_step)  # Started here to exclude the compile time.
                self.throughput.start(self.step)
                while self.step < self.config.steps and not self._stopping():
                    if watchdog:
                        watchdog.alive(f"step {self.step}")
                    self.advance()
                    if self._log and self.step % self.config.log_every == 0:
                        self.throughput.launched()
                    self.progress.advance(self.step)
                    self.train_seconds, self.cpu_seconds = time.monotonic() - begin, time.process_time() - cpu_begin
                    self._after_step()
                    if self._unreported:
                        self._report()
                if self.step < self.config.steps:
                    self.save(last=True)
                    number = self._stop.number or signal.SIGTERM  # The other rank's signal is unknown.
                    name = signal.Signals(number).name
                    again = f"--resume --out {shlex.quote(str(self.folder))}"
                    raise Stopped(f"{name}: saved step {self.step} in {self.folder}; use {again} to continue", number)
        finally:
            self.end()
            if self._history:
                self._history.catch_up()
            if self._log:
                self._log.close()

    def _stopping(self) -> bool:
        """Return whether to stop before this step.

        With several ranks, a request to stop is part of the metrics of a step. Every rank knows it once it has drained
        that step, at the latest `lag` steps later, and all ranks stop then.
        """
        if collectives.ranks() == 1:
            return self._stop.number != 0
        return self._stop_at is not None and self.step >= self._stop_at

    def begin(self) -> None:
        """Prepare for `advance`: make the step, captured in graph mode, and start making views."""
        ranges.enter("prepare")
        self.execute = make_step(self.config, self.state, self.feed.layout, self.execution, self.feed.example)
        self.feed.begin(self.step)
        ranges.leave()

    def advance(self) -> None:
        """Launch one training step asynchronously."""
        assert self.execute is not None, "call begin before advance"
        self.feed.put(self.execute(self.feed.next(stop=self._stop.number != 0)))
        self.step += 1

    def end(self) -> None:
        """Wait for pending views, and release the loader and the step."""
        self.feed.end()
        self.execute = None  # NCCL cannot release a group while a graph holds its collectives.

    def _log_step(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a drained step; see `Feed`."""
        if values.pop("stop") and self._stop_at is None:
            self._stop_at = step + self.config.lag
        if not all(map(math.isfinite, values.values())):
            terms = ", ".join(f"{name} {values[name]:.4g}" for name in LOSSES)
            raise self._diverged(step, f"the loss is not finite ({terms})")
        self.health.add(values)
        if (step + 1) % self.config.log_every == 0:
            self._add_metrics(step + 1, values)
            if self._log:
                self._add_metrics(step + 1, self.throughput.measure(step + 1))
            self._shown |= {name: values[name] for name in ("loss", *used_terms(self.config))}
            self.progress.update(step + 1, self._shown)

    def _add_metrics(self, step: int, values: dict[str, float]) -> None:
        if self._log:
            self._log.add(step, **values)
            if self.callback:
                self._unreported.append((step, values))

    def _report(self) -> None:
        """Pass new metrics to the callback. Called between two steps, where the run can be saved if it fails."""
        rows, self._unreported = self._unreported, []
        assert self.callback is not None
        try:
            with self.throughput.paused():
                for step, values in rows:
                    self.callback(step, values)
        except BaseException:
            self.save(last=True)
            raise

    def _after_step(self) -> None:
        c, last = self.config, self.step == self.config.steps
        evaluates = last or self.step % c.eval_every == 0
        compares = self.check_ranks > 0 and self.step % self.check_ranks == 0
        saves = last or self.step % c.checkpoint_every == 0 or self.saver.due
        if not (evaluates or compares or saves):
            return
        self.feed.drain(self.step)  # This wait for the device is training time, and what follows is not.
        with self.throughput.paused():
            if evaluates:
                self._evaluate()
            if compares:
                self._compare_ranks()
            if saves:
                self.save(last)

    def _evaluate(self) -> None:
        """Evaluate the EMA model, check the run's health, and add an entry to its history."""
        labels = self.data.test_labels
        accuracy, loss, predicted = evaluate(self.state.ema_model, self.data.test_images, labels, self.execution.device)
        self.accuracies.append(accuracy)
        self.recalls = class_recalls(predicted, labels, len(self.data.classes))
        self._shown = {"test %": accuracy} | self._shown | {"test %": accuracy}  # The first item is shown first.
        self.progress.update(self.step, self._shown)
        self._add_metrics(self.step, {"test_accuracy": accuracy, "test_loss": loss, **_recall_means(self.recalls)})
        marginals = torch.stack([self.state.targets.p_model, self.state.targets.label_marginal]).tolist()
        if self.health.due(self.step):
            self._check_health(*marginals)
        self._log_history(*marginals)

    def _check_health(self, p_model: list[float], label_marginal: list[float]) -> None:
        """Warn if the run does not learn. All ranks call this together and see the same values."""
        state, compared = self.state, None
        if self.health.comparing(self.step):
            images = compared_images(self.data.train_images, self.health.images)
            compared = agreement(state.network, state.ema_model, images, self.execution.device)
        for warning in self.health.check(Observation(self.step, p_model, label_marginal, compared)):
            log.warning(warning)

    def _log_history(self, p_model: list[float], label_marginal: list[float]) -> None:
        """Add an entry to the history that reports are made from. All ranks call this together."""
        values: dict[str, Any] = {}
        if self.config.unlabeled:
            values["p_model"], values["label_marginal"] = (
                [round(p, 5) for p in each] for each in (p_model, label_marginal)
            )
        if self.feed.policy.learn:
            values["bins"] = named_bins(self.feed.policy.weights)
        if self.guessed.due(self.step, self.config):
            images = take_images(self.data.train_images, self.guessed.rows)
            labels = self.data.train_labels[self.guessed.rows]
            values["guesses"] = guess_quality(self.state, images, labels, self.execution.device)
        if self._history:
            self._history.add(self.step, values)

    def _compare_ranks(self) -> None:
        """Compare the states of all ranks bit by bit.

        Raises:
            UserError: The state of a rank differs from that of rank 0.
        """
        first, *rest = collectives.all_gather_object(
            digests(self.state.state_dict() | {"policy": self.feed.policy.state_dict()})
        )
        for rank, other in enumerate(rest, 1):
            differing = [name for name in first if first[name] != other.get(name)]
            if differing:
                more = f" and {len(differing) - 1} more" if differing[1:] else ""
                raise UserError(
                    f"ranks differ after step {self.step - 1}: {differing[0]}{more} on rank {rank} differ from rank 0"
                )

    def summary(self) -> dict[str, Any]:
        """Return the results for summary.json: accuracies in percent, times in seconds, CPU time over all threads."""
        return {
            "steps": self.step,
            "test_accuracy": self.accuracies[-1],
            "median_last_20": median_of_last(self.accuracies),
            **_recall_means(self.recalls),
            **({"recall": dict(zip(self.data.classes, self.recalls, strict=True))} if self.recalls else {}),
            "evaluations": len(self.accuracies),
            # Without that at the end of a shorter run that was given more steps.
            "evaluations_after_ramp": planned_evaluations(self.config, self.step).after_ramp,
            "train_seconds": self.train_seconds,
            "cpu_seconds": self.cpu_seconds,
            "images_per_second": self.step * self.feed.images_per_step / self.train_seconds,
        }


def _recall_means(recalls: list[float | None]) -> dict[str, float]:
    """Return both means of the recalls, in percent; empty if they are unknown."""
    return (
        {"balanced_accuracy": balanced_accuracy(recalls), "geometric_mean": geometric_mean(recalls)} if recalls else {}
    )


def _keep_run_files(setup: RunSetup) -> None:
    """Restore the run's other files if they were deleted."""
    if setup.folder and not (setup.folder / "config.json").exists():
        write_run_files(setup)


def digests(tree: Any, name: str = "") -> dict[str, str]:
    """Return hashes of the leaves of nested dictionaries and lists, by names like `network.stem.weight`."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: digest for key, value in items for path, digest in digests(value, f"{name}.{key}").items()}
    if isinstance(tree, (Tensor, np.ndarray)):
        content = np.ascontiguousarray(torch.as_tensor(tree).cpu().numpy()).tobytes()
    else:
        content = repr(tree).encode()
    return {name.removeprefix("."): hashlib.blake2b(content, digest_size=16).hexdigest()}


def _map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of one type in nested dictionaries and lists."""
    if isinstance(tree, dict):
        return {key: _map_leaves(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_leaves(value, kind, function) for value in tree]
    return function(tree) if isinstance(tree, kind) else tree
