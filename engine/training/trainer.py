"""The training loop: steps, and what is written on the way: log, evaluations, checkpoints; with signals and ranks."""

from __future__ import annotations

import hashlib
import logging
import math
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
from engine.inference.evaluation import evaluate, median_of_last
from engine.method.losses import LOSSES
from engine.runs import checkpoint
from engine.runs.health import Health, Observation, compared_images
from engine.runs.history import History, guessed_images, named_bins
from engine.runs.progress import MetricsLog, ProgressLine
from engine.runs.setup import RunSetup, write_run_files
from engine.training import ranges
from engine.training.cuda_graph import make_step
from engine.training.diagnostics import agreement, guess_quality
from engine.training.execution import Execution, keep_freed_memory, set_numerics
from engine.training.feed import Feed
from engine.training.state import TrainState, make_state
from engine.training.step import StepOutput
from engine.training.step_input import StepInput
from pipelines.cache import take_images

CHECKPOINTS = "checkpoints"
log = logging.getLogger(__name__)


class Trainer:
    """One run, from its first or its resumed step to its last.

    Args:
        setup: of the run; `checkpoints/` in its folder is read and written.
        progress: shows how far the run is.
        timeout: seconds after which a rank that waits for another one ends.
        check_ranks: steps between comparisons of all ranks' states, bit for bit; 0 for none.
    """

    def __init__(
        self, setup: RunSetup, progress: ProgressLine, timeout: float = math.inf, check_ranks: int = 0
    ) -> None:
        config, data, split = setup.config, setup.data, setup.split
        self.config, self.data, self.progress = config, data, progress
        self.folder = setup.folder or Path()
        self.execution = Execution.pick(config, data.train_images.shape)
        set_numerics(config.deterministic)
        keep_freed_memory(self.execution.device)
        self.feed = Feed(config, data, split, self.execution, self._log_step)
        self.micro_batches = config.micro_batches_of(collectives.ranks())
        self.state: TrainState = make_state(config, len(data.classes), self.execution.device, data.sides)
        self.identity = run_identity(config)
        self.saver = checkpoint.Saver(
            self.folder / CHECKPOINTS, config.keep, lambda: _keep_run_files(setup), self.identity
        )
        self.timeout, self.check_ranks = timeout, check_ranks
        counts = np.bincount(data.train_labels[split], minlength=len(data.classes))
        self.health = Health(config, data.classes, counts, self.feed.images_per_step)
        self.guessed = guessed_images(config, data, split, self.feed.images_per_step)
        self.accuracies: list[float] = []
        self.train_seconds = self.cpu_seconds = 0.0
        self.step = 0
        self.execute: Callable[[StepInput], StepOutput] | None = None
        self._log: MetricsLog | None = None
        self._history: History | None = None
        self._shown: dict[str, float] = {}
        self._stop = StopRequest()
        self._stop_at: int | None = None  # the step before which all ranks stop

    def resume(self) -> bool:
        """Takes up the newest good checkpoint, which rank 0 reads for all; says whether there was one."""
        found = collectives.run_on_rank_0(lambda: checkpoint.load_newest(self.folder / CHECKPOINTS, self.identity))
        if found is None:
            return False
        content = found.content
        before = content["micro_batches"]
        if self.config.bn == "joint" and before != self.micro_batches:
            log.warning(
                f"ranks were {before} and are {self.micro_batches} now: with --bn joint each normalises its own rows, "
                "so the run goes on with other statistics (not with --bn split, --bn sync, or enough --micro-batches)"
            )
        self.state.load_state_dict(content["state"])
        self.feed.policy.load_state_dict(_map_leaves(content["policy"], torch.Tensor, lambda t: t.numpy()))
        self.health.load_state_dict(content["health"])
        self.accuracies = list(content["accuracies"])
        self.train_seconds, self.cpu_seconds = content["train_seconds"], content["cpu_seconds"]
        self.step = found.step
        return True

    def save(self, last: bool = False) -> None:
        """Writes a checkpoint of the present step, on rank 0; what cannot be written is told, and tried again later.

        Args:
            last: nothing goes on after this one.

        Raises:
            UserError: the parameters are not finite; the last one cannot be written. Earlier ones are untouched.
        """
        self.feed.drain(self.step)
        if self._log:
            self._log.catch_up()  # no row may be missing before the step that a run is resumed from
        if self._history:
            self._history.catch_up()
        if not all(bool(p.isfinite().all()) for p in self.state.network.parameters()):
            raise self._diverged(self.step - 1, "the update left parameters that are not finite")
        content = {
            "state": self.state.state_dict(),
            "policy": _map_leaves(self.feed.policy.state_dict(), np.ndarray, torch.from_numpy),
            "health": self.health.state_dict(),
            "accuracies": self.accuracies,
            "train_seconds": self.train_seconds,
            "cpu_seconds": self.cpu_seconds,
            "micro_batches": self.micro_batches,
        }
        if last:
            collectives.run_on_rank_0(lambda: self.saver.save_last(self.step, content))
        elif collectives.rank() == 0:
            self.saver.save(self.step, content)

    def _diverged(self, step: int, what: str) -> UserError:
        return UserError(f"training diverged at step {step}: {what}; {self.saver.last_good()}")

    def run(self) -> None:
        """Trains up to the configuration's last step, with evaluations, metrics and checkpoints on the way.

        Raises:
            UserError: the loss is not finite, or something cannot be written; what was saved stays.
            Stopped: SIGTERM, SIGINT or SIGHUP came, to some rank; the step reached is saved.
        """
        if collectives.rank() == 0:
            c = self.config
            self._log = MetricsLog(self.folder, self.step, c.log, asdict(c))
            self._history = History(self.folder, self.step, c.eval_every)
        begin, cpu_begin = time.monotonic() - self.train_seconds, time.process_time() - self.cpu_seconds
        several = collectives.ranks() > 1
        guard = Watchdog(self.timeout, collectives.rank(), self._stop) if several else nullcontext()
        try:
            with self._stop.listening(), guard as watchdog:
                if self.execution.mode != "eager":
                    log.info("compiling the step: a minute or so the first time, less from torch's cache")
                self.begin()
                self.progress.start(self.step, self.feed.images_per_step)  # what compiling takes is not speed
                while self.step < self.config.steps and not self._stopping():
                    if watchdog:
                        watchdog.alive(f"step {self.step}")
                    self.advance()
                    self.train_seconds, self.cpu_seconds = time.monotonic() - begin, time.process_time() - cpu_begin
                    self._after_step()
                if self.step < self.config.steps:
                    self.save(last=True)
                    number = self._stop.number or signal.SIGTERM  # of another rank's signal one knows no more than that
                    name = signal.Signals(number).name
                    raise Stopped(f"{name}: step {self.step} is saved in {self.folder}; go on with --resume", number)
        finally:
            self.end()
            if self._history:
                self._history.catch_up()
            if self._log:
                self._log.close()

    def _stopping(self) -> bool:
        """Whether this step is the one before which all ranks stop.

        A request travels with the metrics of a step and is known everywhere once that step has been drained, which is
        certain `lag` steps later.
        """
        if collectives.ranks() == 1:
            return self._stop.number != 0
        return self._stop_at is not None and self.step >= self._stop_at

    def begin(self) -> None:
        """Makes everything ready for `advance`: the step, captured where that is the mode, and the first views."""
        ranges.enter("prepare")
        self.execute = make_step(self.config, self.state, self.feed.layout, self.execution, self.feed.example)
        self.feed.begin(self.step)
        ranges.leave()

    def advance(self) -> None:
        """Trains one step. Returns when it is on its way."""
        assert self.execute is not None, "advance follows begin"
        self.feed.put(self.execute(self.feed.next(stop=self._stop.number != 0)))
        self.step += 1

    def end(self) -> None:
        """Waits for what is being made and releases it."""
        self.feed.end()
        self.execute = None  # NCCL does not release a group whose collectives a graph still holds

    def _log_step(self, step: int, values: dict[str, float]) -> None:
        """Logs a step's metrics; see `Feed`."""
        if values.pop("stop") and self._stop_at is None:
            self._stop_at = step + self.config.lag
        if not all(map(math.isfinite, values.values())):
            terms = ", ".join(f"{name} {values[name]:.4g}" for name in LOSSES)
            raise self._diverged(step, f"the loss is not finite ({terms})")
        self.health.add(values)
        if (step + 1) % self.config.log_every == 0:
            if self._log:
                self._log.add(step + 1, **values)
            losses = {name: values[name] for name in LOSSES}
            self.progress.update(step + 1, self._shown | losses)

    def _after_step(self) -> None:
        c, last = self.config, self.step == self.config.steps
        if last or self.step % c.eval_every == 0:
            self.feed.drain(self.step)
            accuracy, loss = evaluate(
                self.state.ema_model, self.data.test_images, self.data.test_labels, self.execution.device
            )
            self.accuracies.append(accuracy)
            self._shown = {"test %": accuracy}
            if self._log:
                self._log.add(self.step, test_accuracy=accuracy, test_loss=loss)
            marginals = torch.stack([self.state.targets.p_model, self.state.targets.label_marginal]).tolist()
            if self.health.due(self.step):
                self._check_health(*marginals)
            self._log_history(*marginals)
        if self.check_ranks and self.step % self.check_ranks == 0:
            self._compare_ranks()
        if last or self.step % c.checkpoint_every == 0 or self.saver.due:
            self.save(last)

    def _check_health(self, p_model: list[float], label_marginal: list[float]) -> None:
        """Warns where the run does not learn. All ranks see the same, and all take part in what they compare."""
        state, compared = self.state, None
        if self.health.comparing(self.step):
            images = compared_images(self.data.train_images, self.health.images)
            compared = agreement(state.network, state.ema_model, images, self.execution.device)
        for warning in self.health.check(Observation(self.step, p_model, label_marginal, compared)):
            log.warning(warning)

    def _log_history(self, p_model: list[float], label_marginal: list[float]) -> None:
        """Adds to the history what a report shows of this moment. All ranks take part in the guesses."""
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
        """Raises UserError where a bit of a rank's state is not as on rank 0."""
        self.feed.drain(self.step)
        first, *others = collectives.all_gather_object(
            digests(self.state.state_dict() | {"policy": self.feed.policy.state_dict()})
        )
        for rank, other in enumerate(others, 1):
            differing = [name for name in first if first[name] != other.get(name)]
            if differing:
                more = f" and {len(differing) - 1} more" if differing[1:] else ""
                raise UserError(
                    f"ranks differ after step {self.step - 1}: rank {rank} has another {differing[0]}{more} than rank 0"
                )

    def summary(self) -> dict[str, Any]:
        """Results so far, for summary.json: accuracies in percent, times in seconds, that of the CPU in all threads."""
        return {
            "steps": self.step,
            "test_accuracy": self.accuracies[-1],
            "median_last_20": median_of_last(self.accuracies),
            "train_seconds": self.train_seconds,
            "cpu_seconds": self.cpu_seconds,
            "images_per_second": self.step * self.feed.images_per_step / self.train_seconds,
        }


def _keep_run_files(setup: RunSetup) -> None:
    """Makes anew what the folder should hold beside checkpoints and metrics, if it has gone."""
    if setup.folder and not (setup.folder / "config.json").exists():
        write_run_files(setup)


def digests(tree: Any, name: str = "") -> dict[str, str]:
    """Hashes of the leaves of nested dictionaries and lists, under names like `network.stem.weight`."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: digest for key, value in items for path, digest in digests(value, f"{name}.{key}").items()}
    if isinstance(tree, (Tensor, np.ndarray)):
        content = np.ascontiguousarray(torch.as_tensor(tree).cpu().numpy()).tobytes()
    else:
        content = repr(tree).encode()
    return {name.removeprefix("."): hashlib.blake2b(content, digest_size=16).hexdigest()}


def _map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Applies a function to the leaves of one type in nested dictionaries and lists."""
    if isinstance(tree, dict):
        return {key: _map_leaves(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_leaves(value, kind, function) for value in tree]
    return function(tree) if isinstance(tree, kind) else tree
