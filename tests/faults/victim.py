"""A training run that faults are injected into: started, watched, resumed, and compared with an undisturbed one."""

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
from engine.runs.history import read_history, read_results
from engine.runs.progress import read_metrics
from engine.training.trainer import CHECKPOINTS
from tests.processes import ROOT, command, final_state, finish, start, start_ranks

STEPS, INTERVAL = 48, 3
FLAGS = [
    *("--steps", STEPS, "--batch", 8, "--width", 8, "--scales", 1, "--device", "cpu"),
    # the row of a step is written when the next one begins, so that no step trained goes unseen but that one
    *("--lag", 2, "--view-steps", 1, "--prefetch", 1),
    *("--eval-every", 12, "--checkpoint-every", INTERVAL, "--log-every", 1),
]
SPLIT = ["--bn", "split", "--bn-groups", 2]
# failed writes are tried again often, and at the end not for long; a small picture is as good as a large one
PATCH = {
    "engine.runs.checkpoint.RETRY_SECONDS": 0.2,
    "engine.runs.checkpoint.PATIENCE_SECONDS": 1.0,
    "engine.runs.pictures.GRID_ROWS": 1,
    "engine.runs.pictures.GRID_STRONG": 2,
}
LONG = 180  # seconds after which something hangs


class Ended(Exception):
    """The run came to its end before its moment."""


@dataclass
class Outcome:
    """One injection.

    Attributes:
        kind: what was done.
        moment: when, in words.
        before: step of the newest good checkpoint before it, 0 without one.
        after: that after it.
        lost: steps that had been seen trained and were trained again.
        bits: that differ at the run's end, or None where it has not come there.
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
    """A process with all its imports, under the interface of those of `tests.processes.start`."""

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
    """Runs that nothing was done to, each made once.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder):
        self._folder = folder

    def __call__(self, ranks):
        """The folder of the run of so many ranks."""
        folder = self._folder / f"ranks{ranks}"
        if not folder.exists():
            log = self._folder / f"ranks{ranks}.log"
            assert finish(_start(log, ranks, folder), LONG) == [0] * ranks, log.read_text()
        return folder

    def foreign(self, flag):
        """A checkpoint of a run with another value of a flag."""
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
    """Runs in a folder, one after another, with faults injected into each until it is complete.

    Args:
        folder: where they go; may be a mounted disk.
        chance: a random.Random, by which moments and targets are drawn.
        references: see there.
        ranks: processes.
        flags: further ones of the command line.
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

    # starting

    def begin(self, *flags, start=None):
        """Starts the run, or goes on with it.

        Args:
            flags: further ones.
            start: called with the log, starts the processes, instead of the usual.
        """
        assert not self.processes
        self._lives += 1
        self.log = self.folder.parent / f"{self.folder.name}-{self._lives}.log"
        self.log.touch()
        self._start = start
        self.resumed = self.newest()
        self._rows = self._inode()
        flags = [*self.flags, *flags]
        self.processes = (start or (lambda log: _start(log, self.ranks, self.run, *flags)))(self.log)

    def running(self, *flags):
        """Starts the run if it does not run."""
        if not self.processes:
            self.begin(*flags)

    def fresh(self, *flags):
        """Starts the run now, even if that takes the end of the one before."""
        if self.processes:
            self.complete()
        self.begin(*flags)

    # watching

    def alive(self):
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def said(self):
        """What all ranks printed since `begin`."""
        return self.log.read_text(errors="replace")

    def newest(self):
        """Step of the newest good checkpoint, 0 without one."""
        identity = {}
        with suppress(OSError):
            identity = json.loads((self.run / "config.json").read_text())
            del identity["steps"], identity["class_distribution"]  # JSON has no tuples
        found = checkpoint.load_newest(self.run / CHECKPOINTS, identity)
        return found.step if found else 0

    def seen(self):
        """The last step whose row stands in metrics.jsonl."""
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
        """Whether metrics.jsonl is that of these processes: they write it anew as a whole before they train."""
        return self._inode() not in (None, self._rows)

    def wait(self, until, pause=0.01):
        """Waits for a condition and returns its value.

        Raises:
            Ended: a process ended first.
        """
        deadline = time.monotonic() + LONG
        while not (found := until()):
            if not self.alive():
                raise Ended
            assert time.monotonic() < deadline, f"this never came, and no end either\n{self.said()}"
            time.sleep(pause)
        return found

    def wait_for_words(self, *words):
        """Waits until one of them has been said."""
        return self.wait(lambda: any(each in self.said() for each in words))

    def reach(self, low, high, latest=STEPS - 6):
        """Waits for a step between `low` and `high` steps from here, and a random part of a step more.

        A run that has got past `latest` is left to its end, and the next one is begun.
        """
        here = self.seen() if self.training() else self.resumed
        target = here + self.chance.randint(low, high)
        if target > latest:
            self.complete()
            self.begin(start=self._start)
            target = self.chance.randint(low, min(high, latest))
        self.wait(lambda: self.training() and self.seen() >= target)
        time.sleep(self.chance.uniform(0, 0.05))

    # injecting

    def strike(self, kind, act, moment=None):
        """Does it, and keeps the record of it.

        Raises:
            Ended: the run had ended before.
        """
        if not self.alive():
            raise Ended
        outcome = Outcome(kind, moment or f"step {self.seen()}", self.newest())
        act()
        self._of_this_run.append(outcome)
        self.outcomes.append(outcome)
        return outcome

    def forget(self, outcome):
        """Takes a record back: it turned out that the run had ended before."""
        self.outcomes.remove(outcome)
        self._of_this_run.remove(outcome)

    def over(self):
        """Waits for the end of all processes and returns their exit codes."""
        codes = finish(self.processes, LONG)
        assert None not in codes, f"stalled: {codes}\n{self.said()}"
        self.check_words()
        return codes

    def dead(self, outcome, allowed=INTERVAL):
        """Takes in what an injection cost that ended all processes, after `over`.

        Args:
            outcome: of the injection.
            allowed: steps that may be lost.
        """
        outcome.after = self.newest()
        assert outcome.after >= outcome.before, outcome
        if self.training():
            outcome.lost = max(self.seen() - outcome.after, 0)
        assert outcome.lost <= allowed, outcome
        self.processes = []

    def said_resumed(self):
        """The step that the processes said last that they go on from, 0 where they said none."""
        return int(([0, *re.findall(r"resuming \S+ from step (\d+)", self.said())])[-1])

    def check_words(self):
        """Nothing was said that should not be, and the start was from the newest good checkpoint."""
        said = self.said()
        assert "Traceback" not in said, said
        steps = re.findall(r"resuming \S+ from step (\d+)", said)
        # torchrun's ranks may say it only after a restart
        assert not steps or int(steps[0]) == self.resumed or (self._start and int(steps[0]) > self.resumed), said

    def complete(self):
        """Sees the run to its end, and compares it with the reference."""
        if not self.processes:
            self.begin()
        codes = self.over()
        assert set(codes) == {0}, f"{codes}\n{self.said()}"
        reference = self.references(self.ranks)
        expected, found = final_state(reference), final_state(self.run)
        bits = differing_bits(expected, found)
        for outcome in self._of_this_run:
            outcome.bits = bits
        assert bits == 0, f"{bits} bits differ after {self._of_this_run}"
        assert read_metrics(self.run / "metrics.jsonl") == read_metrics(reference / "metrics.jsonl")
        assert read_history(self.run) == read_history(reference) != []
        results, others = read_results(self.run), read_results(reference)
        for name in others.keys() - {"views", "captions"}:  # of which some processes draw fewer
            assert np.array_equal(results[name], others[name]), name
        check_finished(self.run, found[1])
        self._new_run()

    def close(self):
        """Kills what is left."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.join()


def check_finished(run, content):
    """A finished run's folder holds all that it should, whole, and nothing half."""
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
    """How many bits differ between nested containers of tensors and values; times alone may differ."""
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
