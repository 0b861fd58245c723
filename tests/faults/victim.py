"""A training run for fault injection: started, observed, resumed, and compared with an undisturbed run."""

import json
import os
import re
import signal
import struct
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file

from engine.runs import checkpoint
from engine.runs.folder import CHECKPOINTS
from engine.runs.history import read_history, read_results
from engine.runs.progress import read_metrics
from tests.processes import ROOT, command, final_state, finish, repeatable_metrics, start, start_ranks

STEPS, INTERVAL = 48, 3
FLAGS = [
    *("--steps", STEPS, "--batch", 8, "--width", 8, "--scales", 1, "--device", "cpu"),
    # Metrics of a step are written when the next one starts, so at most one trained step is not logged.
    *("--lag", 2, "--view-steps", 1, "--prefetch", 1),
    *("--eval-every", 12, "--checkpoint-every", INTERVAL, "--log-every", 1),
]
SPLIT = ["--bn", "split", "--bn-groups", 2]
# Retry failed writes often, but only briefly at the end; small plots save time.
PATCH = {
    "engine.runs.checkpoint.RETRY_SECONDS": 0.2,
    "engine.runs.checkpoint.PATIENCE_SECONDS": 1.0,
    "engine.runs.pictures.GRID_ROWS": 1,
    "engine.runs.pictures.GRID_STRONG": 2,
}
LONG = 180  # seconds after which a run counts as stalled


class Ended(Exception):
    """The run ended before the injection."""


@dataclass
class Outcome:
    """Outcome of one injection.

    Attributes:
        kind: Description of the injection.
        moment: Description of its time.
        before: Step of the newest valid checkpoint before the injection, 0 if there is none.
        after: Step of the newest valid checkpoint after it.
        lost: Logged steps that were trained again.
        bits: Number of bits that differ at the run's end, or None if it has not ended.
    """

    kind: str
    moment: str
    before: int
    after: int = 0
    lost: int = 0
    bits: int | None = None

    @property
    def survived(self):
        return self.bits == 0


class Spawned:
    """A new Python process with the interface of the processes of `tests.processes.start`."""

    def __init__(self, log, *arguments, **environment):
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                command(*arguments), cwd=ROOT, stdout=file, stderr=file, env=os.environ | environment
            )
        self.pid = self._process.pid

    @property
    def exitcode(self):
        return self._process.poll()

    def is_alive(self):
        return self._process.poll() is None

    def join(self, seconds=None):
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self):
        self._process.kill()


class References:
    """Undisturbed runs, each trained once.

    Args:
        folder: Folder of the runs.
    """

    def __init__(self, folder):
        self._folder = folder

    def __call__(self, ranks):
        """Return the folder of the run with this number of ranks."""
        folder = self._folder / f"ranks{ranks}"
        if not folder.exists():
            log = self._folder / f"ranks{ranks}.log"
            assert finish(_start(log, ranks, folder), LONG) == [0] * ranks, log.read_text()
        return folder

    def foreign(self, flag):
        """Return a checkpoint of a run with another value for a flag."""
        folder = self._folder / f"foreign{flag}"
        if not folder.exists():
            log = self._folder / f"foreign{flag}.log"
            process = start(log, "train", "digits-40", "--out", folder, *FLAGS, flag, 16, "--steps", 3)
            assert finish([process], LONG) == [0], log.read_text()
        return checkpoint.list_checkpoints(folder / CHECKPOINTS)[-1]


def _start(log, ranks, folder, *flags):
    arguments = ["train", "digits-40", "--out", folder, "--resume", *FLAGS, *flags]
    if ranks == 1:
        return [start(log, *arguments, patch=PATCH)]
    return start_ranks(log, ranks, *arguments, *SPLIT, patch=PATCH)


class Victim:
    """Consecutive runs in a folder, with faults injected into each until it is complete.

    Args:
        folder: Folder of the runs; may be a mounted disk.
        chance: A random.Random that draws moments and targets.
        references: A `References`.
        ranks: Number of processes.
        flags: Additional command-line flags.
    """

    def __init__(self, folder, chance, references, ranks=1, flags=()):
        self.folder, self.chance, self.references, self.ranks, self.flags = folder, chance, references, ranks, flags
        self.outcomes = []
        self.processes = []
        self._runs = self._lives = 0
        self._start = None
        self._new_run()

    def _new_run(self):
        self._runs += 1
        self.run = self.folder / f"run{self._runs}"
        self._of_this_run = []
        self.processes = []

    # Starting

    def begin(self, *flags, start=None):
        """Start or resume the run.

        Args:
            flags: Additional flags.
            start: Function of the log file that starts the processes, instead of the default.
        """
        assert not self.processes
        self._lives += 1
        self.log = self.folder.parent / f"{self.folder.name}-{self._lives}.log"
        self.log.touch()
        self._start = start
        self.resumed = self.newest_checkpoint()
        self._rows = self._inode()
        flags = [*self.flags, *flags]
        self.processes = (start or (lambda log: _start(log, self.ranks, self.run, *flags)))(self.log)

    def ensure_running(self, *flags):
        """Start the run unless it is running."""
        if not self.processes:
            self.begin(*flags)

    def start_fresh(self, *flags):
        """Start the run now; complete the previous one first."""
        if self.processes:
            self.complete()
        self.begin(*flags)

    # Observing

    def alive(self):
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def output(self):
        """Return the output of all ranks since `begin`."""
        return self.log.read_text(errors="replace")

    def newest_checkpoint(self):
        """Return the step of the newest valid checkpoint, 0 if there is none."""
        identity = {}
        with suppress(OSError):
            identity = json.loads((self.run / "config.json").read_text())
            del identity["steps"], identity["class_distribution"]  # JSON has no tuples
        found = checkpoint.load_newest(self.run / CHECKPOINTS, identity)
        return found.step if found else 0

    def last_logged_step(self):
        """Return the last step in metrics.jsonl."""
        try:
            rows = read_metrics(self.run / "metrics.jsonl")
        except OSError:
            return 0
        return max((row["step"] for row in rows if "loss" in row), default=0)

    def _inode(self):
        try:
            return os.stat(self.run / "metrics.jsonl").st_ino
        except OSError:
            return None

    def training(self):
        """Return whether these processes have started training: they replace metrics.jsonl before that."""
        return self._inode() not in (None, self._rows)

    def wait(self, until, pause=0.01):
        """Wait for a condition and return its value.

        Raises:
            Ended: A process ended first.
        """
        deadline = time.monotonic() + LONG
        while not (found := until()):
            if not self.alive():
                raise Ended
            assert time.monotonic() < deadline, f"the condition never held, and the run did not end\n{self.output()}"
            time.sleep(pause)
        return found

    def wait_for_output(self, *words):
        """Wait until the output contains one of the texts."""
        return self.wait(lambda: any(each in self.output() for each in words))

    def reach(self, low, high, latest=STEPS - 6):
        """Wait until `low` to `high` steps after the current one, plus a random fraction of a step.

        If the chosen step is later than `latest`, complete the run and start the next one.
        """
        here = self.last_logged_step() if self.training() else self.resumed
        target = here + self.chance.randint(low, high)
        if target > latest:
            self.complete()
            self.begin(start=self._start)
            target = self.chance.randint(low, min(high, latest))
        self.wait(lambda: self.training() and self.last_logged_step() >= target)
        time.sleep(self.chance.uniform(0, 0.05))

    # Injecting

    def inject(self, kind, act, moment=None):
        """Inject a fault and record it.

        Raises:
            Ended: The run had already ended.
        """
        if not self.alive():
            raise Ended
        outcome = Outcome(kind, moment or f"step {self.last_logged_step()}", self.newest_checkpoint())
        act()
        self._of_this_run.append(outcome)
        self.outcomes.append(outcome)
        return outcome

    def forget(self, outcome):
        """Remove the record of an injection into a run that had already ended."""
        self.outcomes.remove(outcome)
        self._of_this_run.remove(outcome)

    def wait_for_exit(self):
        """Wait for the end of all processes and return their exit codes."""
        codes = finish(self.processes, LONG)
        assert None not in codes, f"stalled: {codes}\n{self.output()}"
        self.check_output()
        return codes

    def record_exit(self, outcome, allowed=INTERVAL):
        """Record the cost of an injection that ended all processes, after `wait_for_exit`.

        Args:
            outcome: Outcome of the injection.
            allowed: Number of steps that may be lost.
        """
        outcome.after = self.newest_checkpoint()
        assert outcome.after >= outcome.before, outcome
        if self.training():
            outcome.lost = max(self.last_logged_step() - outcome.after, 0)
        assert outcome.lost <= allowed, outcome
        self.processes = []

    def resumed_step(self):
        """Return the last step from which the processes reported to resume, 0 if none did."""
        return int(([0, *re.findall(r"resuming \S+ from step (\d+)", self.output())])[-1])

    def check_output(self):
        """Assert that there is no traceback and that the run started from the newest valid checkpoint."""
        said = self.output()
        assert "Traceback" not in said, said
        steps = re.findall(r"resuming \S+ from step (\d+)", said)
        # torchrun's ranks may report it only after a restart.
        assert not steps or int(steps[0]) == self.resumed or (self._start and int(steps[0]) > self.resumed), said

    def complete(self):
        """Wait until the run is finished, and compare it with the reference."""
        if not self.processes:
            self.begin()
        codes = self.wait_for_exit()
        assert set(codes) == {0}, f"{codes}\n{self.output()}"
        reference = self.references(self.ranks)
        expected, found = final_state(reference), final_state(self.run)
        bits = differing_bits(expected, found)
        for outcome in self._of_this_run:
            outcome.bits = bits
        assert bits == 0, f"{bits} bits differ after {self._of_this_run}"
        assert repeatable_metrics(self.run) == repeatable_metrics(reference)
        assert read_history(self.run) == read_history(reference) != []
        results, others = read_results(self.run), read_results(reference)
        for name in others.keys() - {"views", "captions"}:  # some processes draw fewer of these
            assert np.array_equal(results[name], others[name]), name
        check_finished(self.run, found[1])
        self._new_run()

    def close(self):
        """Kill the remaining processes."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.join()


def check_finished(run, content):
    """Assert that a finished run's folder contains all files, complete, and no partial ones."""
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json", "split.json", "metrics.jsonl", "tensorboard", "logged.json", "checkpoints", "summary.json",
        "curves.png", "views.png", "ema.safetensors", "history.jsonl", "results.npz",
    }  # fmt: skip
    for picture in ("curves.png", "views.png"):
        assert (run / picture).read_bytes().endswith(b"IEND\xaeB`\x82"), picture
    ema_model = load_file(run / "ema.safetensors")
    assert differing_bits(ema_model, {name: content["state"]["ema_model"][name] for name in ema_model}) == 0
    assert not list(run.rglob("*.partial"))


def differing_bits(a, b):
    """Count the bits that differ between nested containers of tensors and values, except for times."""
    if isinstance(a, dict) and isinstance(b, dict):
        return sum(
            differing_bits(a.get(key), b.get(key))
            for key in a.keys() | b.keys()
            if key not in ("train_seconds", "cpu_seconds")
        )
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return sum(differing_bits(x, y) for x, y in zip(a, b, strict=True))
    one, other = _bytes(a), _bytes(b)
    if len(one) != len(other):
        return 8 * max(len(one), len(other))
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).bit_count()


def _bytes(value):
    if isinstance(value, torch.Tensor):
        return repr((value.dtype, value.shape)).encode() + value.contiguous().numpy().tobytes()
    return struct.pack("<d", value) if isinstance(value, float) else repr(value).encode()
