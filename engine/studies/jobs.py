"""Many runs in one folder, trained by any number of workers, on one machine or on several that share the folder.

A job is one run. Its folder is named by a hash of its configuration, and holds, beside what every run has (see
`engine.run`):

    claims/1.json, claims/2.json, ...   who has worked on it, one after another; the last one counts
    log.txt                             what the run has printed
    failed.json                         why it failed, until it is tried again

A job is done once its summary.json is there. Whoever creates the next file in `claims` owns the job, until its claim
says that it was released, or is stale. Claims are never removed, so of two that take over the same stale claim exactly
one succeeds, however late the other comes: it asks for a name that is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from engine.config.config import PLACE, Config, changed_fields, config_json, load_config
from engine.distributed.launch import PARENT
from engine.distributed.watchdog import StopRequest
from engine.errors import UserError
from engine.measuring.process import search_path
from pipelines.files import read_json, write_text

RENEW_SECONDS = 10.0  # between signs of life in a claim
STALE_SECONDS = 300.0  # without one, after which a claim of another machine counts no more
POLL_SECONDS = 0.2
SHOW_SECONDS = 0.5
TAIL_LINES = 20  # of the log, kept in failed.json
_TAIL_BYTES = 8192
_HASH_DIGITS = 10

STATES = ("done", "running", "failed", "waiting")
# a child that ends so was asked to: by this worker, by whoever ended the whole group, or by the death of its worker
_CUT_OFF = {code for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for code in (-number, 128 + number)}


def identity(config: Config) -> dict[str, Any]:
    """The fields that make two configurations two jobs.

    Those that differ from the defaults of `Config` only: a field that a later version adds, with a default that leaves
    everything as it was, does not make weeks of finished runs unknown.
    """
    default = dataclasses.asdict(Config())
    return {
        # 75 and 75.0 are one weight
        name: float(value) if isinstance(default[name], float) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in PLACE and value != default[name]
    }


def digest(config: Config) -> str:
    """A hash of what makes a configuration a job of its own."""
    content = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:_HASH_DIGITS]


@dataclass(frozen=True)
class Job:
    """One run to be done.

    Attributes:
        label: the readable beginning of its folder's name.
        config: what is trained, complete: nothing in it is left to be found out from the data.
    """

    label: str
    config: Config

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the configuration."""
        return digest(self.config)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.label}-{self.digest}"


@dataclass(frozen=True)
class Status:
    """What is known of a job from its folder.

    Attributes:
        state: waiting is also what was begun and cut off.
        step: trained, as far as has been logged.
        summary: of a job that is done.
        reason: why it failed.
        host: of who works on it, or did last.
        commit: of the engine that worked on it last; "" if nobody did.
    """

    state: Literal["waiting", "running", "done", "failed"]
    step: int = 0
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    host: str = ""
    commit: str = ""


# Claims


@functools.cache
def machine() -> str:
    """What tells apart machines, their boots, and containers, whose process numbers mean different processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def started(pid: int) -> int:
    """When a process of this machine was started, in its clock ticks; 0 where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def newest_claim(folder: Path) -> Path | None:
    """The claim of a job's folder that counts."""
    try:
        numbers = [int(name.removesuffix(".json")) for name in os.listdir(folder / "claims") if name[:-5].isdecimal()]
    except OSError:
        return None
    return folder / "claims" / f"{max(numbers)}.json" if numbers else None


class Claim:
    """A job's folder that this process has claimed.

    Args:
        path: of its file, which is there.
        content: of the file.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self._content = path, content
        self._next = path.with_name(f"{int(path.stem) + 1}.json")

    def child(self, pid: int) -> None:
        """Notes the process that trains: while it lives the job is not free, even if this process is gone."""
        self._write(child=[pid, started(pid)])

    def renew(self) -> None:
        """Gives a sign of life, by the clock of the file system."""
        os.utime(self.path)

    def lost(self) -> bool:
        """Whether somebody else took this process for dead and has the job now."""
        return self._next.exists()

    def release(self) -> None:
        """Leaves the job to others."""
        self._write(released=True)

    def _write(self, **values: Any) -> None:
        self._content |= values
        write_text(self.path, json.dumps(self._content) + "\n")


def claim(folder: Path, commit: str = "") -> Claim | None:
    """Claims a job's folder, which is made if missing; None if somebody has it.

    Args:
        folder: of the job.
        commit: of the engine that will work on it, for the record.
    """
    (folder / "claims").mkdir(parents=True, exist_ok=True)
    newest = newest_claim(folder)
    if newest and not claimable(newest):
        return None
    path = folder / "claims" / f"{int(newest.stem) + 1 if newest else 1}.json"
    pid = os.getpid()
    content = {
        "host": socket.gethostname(), "machine": machine(), "worker": [pid, started(pid)], "child": [0, 0],
        "commit": commit, "time": time.strftime("%Y-%m-%d %H:%M:%S"), "released": False,
    }  # fmt: skip
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
    return Claim(path, content)


def claimable(path: Path) -> bool:
    """Whether a claim was released, or is stale.

    One of this machine is stale if neither its worker nor the child that trained for it lives. Numbers of processes are
    used again, so their starting times have to be the same. One of another machine is stale if there was no sign of
    life for some time.
    """
    content = read_json(path)
    if content.get("released"):
        return True
    if content.get("machine") == machine():
        owners = [content.get("worker"), content.get("child")]
        return not any(owner and owner[0] and started(owner[0]) == owner[1] for owner in owners)
    # of another machine; or not yet written, by somebody who was killed or is about to
    return _now(path.parents[1]) - path.stat().st_mtime > STALE_SECONDS


def _now(folder: Path) -> float:
    """Time by the clock of the file system, which may differ from this machine's."""
    probe = folder / f".clock-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now
    except OSError:  # of a folder that may only be read
        return time.time()


# What a folder tells


def status(root: Path, job: Job) -> Status:
    """What is known of a job, by its folder in `root` alone."""
    folder = root / job.name
    newest = newest_claim(folder)
    content = read_json(newest) if newest else {}
    known = {"host": content.get("host", ""), "commit": content.get("commit", "")}
    try:
        begun = load_config(folder / "config.json") if (folder / "config.json").exists() else None
    except UserError as error:
        return Status("failed", reason=f"{error}; move the folder away", **known)
    if begun and digest(begun) != job.digest:
        differing = changed_fields(begun, job.config, ignored=PLACE)
        reason = f"{folder} holds another configuration ({'; '.join(differing)}): move the folder away"
        return Status("failed", reason=reason, **known)
    if begun and (summary := read_json(folder / "summary.json")) and summary.get("steps") == job.config.steps:
        return Status("done", job.config.steps, summary, **known)
    step = last_step(folder / "metrics.jsonl")
    if newest and not claimable(newest):
        return Status("running", step, **known)
    if failure := read_json(folder / "failed.json"):
        return Status("failed", step, reason=str(failure.get("reason", "")), **known)
    return Status("waiting", step, **known)


def last_step(path: Path) -> int:
    """The step of the last whole row of a file of metrics, of which only the end is read; 0 without any."""
    for line in reversed(tail(path)):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["step"])
    return 0


def tail(path: Path) -> list[str]:
    """The last lines of a file, the first of them perhaps a part; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def forget_failures(root: Path, jobs: Sequence[Job]) -> None:
    """Lets failed jobs be tried again; what was known of each failure stays under another name."""
    for job in jobs:
        folder = root / job.name
        newest = newest_claim(folder)
        if newest and claimable(newest):
            with contextlib.suppress(FileNotFoundError):  # somebody else did
                (folder / "failed.json").rename(folder / f"failed-{newest.stem}.json")


# Working on them


class Stop(StopRequest):
    """A request to stop the work.

    Attributes:
        children: processes that train, and that the work ends after.
    """

    def __init__(self) -> None:
        super().__init__()
        self.children: set[int] = set()


def work(
    root: Path,
    jobs: Sequence[Job],
    environments: Sequence[Mapping[str, str]],
    commit: str,
    stop: Stop,
    show: Callable[[Sequence[Status]], None] = lambda statuses: None,
) -> list[Status]:
    """Trains jobs until none is left that is free, each in a process of its own.

    Failures are kept in the jobs' folders and stop nothing else. A job that another machine seems to work on is
    waited for until that one gives a sign of life or its claim is stale.

    Args:
        root: holds the folders of the jobs.
        jobs: in the order in which they are begun.
        environments: one for each worker: variables that its processes have beside this one's.
        commit: of the engine, for the record.
        stop: ends the work: running jobs save their step, and are resumed by the next worker.
        show: called every half second with the states of all jobs, and once at the end.

    Returns:
        The states of all jobs.

    Raises:
        OSError: the folder cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    tried: set[str] = set()  # what was cut off or lost is not begun again at once
    finished: dict[str, Status] = {}

    def look() -> list[Status]:
        for job in jobs:
            if job.name not in finished and (found := status(root, job)).state == "done":
                finished[job.name] = found
        return [finished.get(job.name) or status(root, job) for job in jobs]

    with stop.listening(), ThreadPoolExecutor(len(environments), "worker") as pool:
        workers = [pool.submit(_worker, root, jobs, each, commit, stop, tried) for each in environments]
        try:
            while not all(each.done() for each in workers):
                if any(each.done() and each.exception() for each in workers):
                    stop.ask(signal.SIGTERM)
                show(look())
                if stop.wait(SHOW_SECONDS):
                    time.sleep(POLL_SECONDS)  # the children save
        except BaseException:
            stop.ask(signal.SIGTERM)
            raise
    for each in workers:
        each.result()
    statuses = look()
    show(statuses)
    return statuses


def _worker(
    root: Path, jobs: Sequence[Job], environment: Mapping[str, str], commit: str, stop: Stop, tried: set[str]
) -> None:
    """Takes one job after another."""
    seen: dict[Path, float] = {}  # claims of other machines, and when they last gave a sign of life
    while not stop.number:
        for job in jobs:
            if job.name in tried or status(root, job).state != "waiting":
                continue
            owned = claim(root / job.name, commit)
            if owned is None:
                continue
            tried.add(job.name)
            try:
                # it may have been done between the look and the claim
                if _free(root, job):
                    _train(root / job.name, job, owned, environment, stop)
            finally:
                if not owned.lost():
                    owned.release()
            break
        else:
            if not _undecided(root, jobs, seen):
                return
            stop.wait(1.0)


def _free(root: Path, job: Job) -> bool:
    folder = root / job.name
    return not (folder / "failed.json").exists() and status(root, job).state != "done"


def _undecided(root: Path, jobs: Sequence[Job], seen: dict[Path, float]) -> bool:
    """Whether a claim of another machine may still turn out to be stale: it gave no sign of life since first seen."""
    for job in jobs:
        newest = newest_claim(root / job.name)
        if newest and read_json(newest).get("machine") != machine() and status(root, job).state == "running":
            changed = newest.stat().st_mtime
            if changed <= seen.setdefault(newest, changed):
                return True
    return False


def train_command(folder: Path, config: Config) -> list[str]:
    """What trains the run whose config.json is in the folder: the run is exactly the job, however it was begun."""
    return [sys.executable, "-m", "engine", "train", config.preset, "--out", str(folder), "--resume", "--quiet"]


def _train(folder: Path, job: Job, owned: Claim, environment: Mapping[str, str], stop: Stop) -> None:
    """Trains a claimed job in a process of its own, up to its end or until `stop` asks for the end."""
    begun = folder / "config.json"
    if not begun.exists():
        write_text(begun, config_json(job.config))
    variables = os.environ | {"PYTHONPATH": search_path(Path(__file__).parents[2]), PARENT: str(os.getpid())}
    with (folder / "log.txt").open("ab") as log:
        # written by the file's own handle: a run that resumes adds to what was said before
        code = _attend(train_command(folder, job.config), {**variables, **environment}, log, owned, stop)
    if code is None or (stop.number and code) or code in _CUT_OFF:
        return
    newest = read_json(folder / "summary.json")
    if code == 0 and newest.get("steps") == job.config.steps:
        return
    said = [line for line in tail(folder / "log.txt") if line.strip()][-TAIL_LINES:]
    why = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    if code == 0:
        why = "ended without a summary.json of all its steps"
    failure = {
        "reason": f"{why}: {said[-1].strip()}" if said else why, "exit_code": code, "last_lines": said,
        "host": socket.gethostname(), "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    write_text(folder / "failed.json", json.dumps(failure, indent=2) + "\n")


def _attend(
    command: Sequence[str], variables: Mapping[str, str], log: IO[bytes], owned: Claim, stop: Stop
) -> int | None:
    """Runs a command and renews its claim; returns its exit code, or None if the claim was lost."""
    process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    stop.children.add(process.pid)
    try:
        owned.child(process.pid)
        told, renewed = False, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_SECONDS)
            if stop.number and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            if time.monotonic() - renewed >= RENEW_SECONDS:
                renewed = time.monotonic()
                # this machine slept: two processes must not write to one folder
                if owned.lost():
                    return None
                owned.renew()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        stop.children.discard(process.pid)
