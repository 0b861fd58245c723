"""Training runs in one folder, shared by any number of workers on one or more machines.

A job is one training run. The name of its folder ends in a hash of its configuration. In addition to the files of every
run (see `engine.run`), the folder holds:

    claims/1.json, claims/2.json, ...   successive owners; the last one counts
    log.txt                             output of the run
    failed.json                         why it failed, until it is retried

A job is done once its summary.json exists. A worker owns a job by creating the next file in `claims`, until it
releases the claim or the claim becomes stale. Claims are never deleted. So if two workers take over the same stale
claim, only one succeeds, however late the other comes: the file it wants to create already exists.
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

from engine.config.config import EXECUTION_FIELDS, Config, changed_fields, config_json, load_config
from engine.distributed.launch import PARENT
from engine.distributed.watchdog import StopRequest
from engine.errors import UserError
from engine.runs.folder import read_summary
from pipelines.files import read_json, write_text
from pipelines.processes import python_environment

RENEW_SECONDS = 10.0  # Interval of heartbeats in a claim.
STALE_SECONDS = 300.0  # A claim of another machine is stale after this time without a heartbeat.
POLL_SECONDS = 0.2
SHOW_SECONDS = 0.5
TAIL_LINES = 20  # Lines of the log kept in failed.json.
_TAIL_BYTES = 8192
_HASH_DIGITS = 10

_CLAIM = {  # Content of a claim; see `pipelines.files.fits`.
    "host?": str, "machine?": str, "worker?": [int], "child?": [int], "commit?": str, "time?": str, "released?": bool,
}  # fmt: skip
STATES = ("done", "running", "failed", "waiting")
# Exit codes of a child that was asked to stop: by this worker, with its process group, or when its worker died.
_CUT_OFF = {code for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for code in (-number, 128 + number)}


def identity(config: Config) -> dict[str, Any]:
    """Return the fields that identify a job.

    Fields with the default value of `Config` are left out. So when a later version adds a field whose default changes
    nothing, finished runs keep their identity.
    """
    default = dataclasses.asdict(Config())
    return {
        # 75 and 75.0 are the same weight.
        name: float(value) if isinstance(default[name], float) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in EXECUTION_FIELDS and value != default[name]
    }


def digest(config: Config) -> str:
    """Return a hash of the fields that identify a job."""
    content = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:_HASH_DIGITS]


@dataclass(frozen=True)
class Job:
    """One training run of a study.

    Attributes:
        label: Readable first part of the folder's name.
        config: Complete configuration; no field depends on the data any more.
    """

    label: str
    config: Config

    @functools.cached_property
    def digest(self) -> str:
        """The hash of its configuration."""
        return digest(self.config)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.label}-{self.digest}"


@dataclass(frozen=True)
class Status:
    """Status of a job, according to its folder.

    Attributes:
        state: State of the job; an interrupted job is waiting.
        step: Last logged step.
        summary: Summary of a finished job.
        reason: Why it failed.
        host: Machine of the current or last worker.
        commit: The engine's commit of the current or last worker; "" if there was none.
        step_ms: Last logged milliseconds per step of an unfinished job; 0 if unknown.
    """

    state: Literal["waiting", "running", "done", "failed"]
    step: int = 0
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    host: str = ""
    commit: str = ""
    step_ms: float = 0.0


# Claims


@functools.cache
def machine() -> str:
    """Return an identifier of this machine, boot and container: the scope in which a process ID is unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def started(pid: int) -> int:
    """Return the start time of a process of this machine in clock ticks; 0 if it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def newest_claim(folder: Path) -> Path | None:
    """Return the latest claim in a job's folder."""
    try:
        numbers = [int(name.removesuffix(".json")) for name in os.listdir(folder / "claims") if name[:-5].isdecimal()]
    except OSError:
        return None
    return folder / "claims" / f"{max(numbers)}.json" if numbers else None


class Claim:
    """A claim of this process on a job's folder.

    Args:
        path: The existing file of the claim.
        content: Content of the file.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self._content = path, content
        self._next = path.with_name(f"{int(path.stem) + 1}.json")

    def child(self, pid: int) -> None:
        """Record the training process. While it lives the job is not free, even if this process has died."""
        self._write(child=[pid, started(pid)])

    def renew(self) -> None:
        """Send a heartbeat, by the clock of the file system."""
        os.utime(self.path)

    def lost(self) -> bool:
        """Return whether another worker considered this claim stale and took over the job."""
        return self._next.exists()

    def release(self) -> None:
        """Release the job."""
        self._write(released=True)

    def _write(self, **values: Any) -> None:
        self._content |= values
        write_text(self.path, json.dumps(self._content) + "\n")


def claim(folder: Path, commit: str = "") -> Claim | None:
    """Claim a job's folder, which is created if missing; return None if another worker owns it.

    Args:
        folder: Folder of the job.
        commit: The engine's commit, for the record.
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
    """Return whether a claim was released or is stale.

    A claim of this machine is stale if neither its worker nor its training process is alive. Process IDs are reused, so
    start times are compared as well. A claim of another machine is stale after some time without a heartbeat.
    """
    content = read_json(path, _CLAIM)
    if content.get("released"):
        return True
    if content.get("machine") == machine():
        owners = [content.get("worker"), content.get("child")]
        return not any(owner and owner[0] and owner == [owner[0], started(owner[0])] for owner in owners)
    # It belongs to another machine, or has not been written yet: its owner was killed, or is about to write it.
    return _now(path.parents[1]) - path.stat().st_mtime > STALE_SECONDS


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, which may differ from this machine's."""
    probe = folder / f".clock-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now
    except OSError:  # The folder is read-only.
        return time.time()


# Status


def status(root: Path, job: Job) -> Status:
    """Return the status of a job, from its folder in `root` alone."""
    folder = root / job.name
    newest = newest_claim(folder)
    content = read_json(newest, _CLAIM) if newest else {}
    known = {"host": content.get("host", ""), "commit": content.get("commit", "")}
    try:
        found = load_config(folder / "config.json") if (folder / "config.json").exists() else None
    except UserError as error:
        return Status("failed", reason=f"{error}; move the folder away", **known)
    if found and digest(found) != job.digest:
        differing = changed_fields(found, job.config, ignored=EXECUTION_FIELDS)
        reason = f"{folder} has a different configuration ({'; '.join(differing)}); move the folder away"
        return Status("failed", reason=reason, **known)
    if found and (summary := read_summary(folder)) and summary.get("steps") == job.config.steps:
        return Status("done", job.config.steps, summary, **known)
    path = folder / "metrics.jsonl"
    step = last_step(path)
    if newest and not claimable(newest):
        return Status("running", step, step_ms=last_value(path, "step_ms"), **known)
    if failure := read_json(folder / "failed.json"):
        return Status("failed", step, reason=str(failure.get("reason", "")), **known)
    return Status("waiting", step, **known)


def last_step(path: Path) -> int:
    """Return the step of the last complete line of a metrics file; 0 without any."""
    return int(last_value(path, "step"))


def last_value(path: Path, name: str) -> float:
    """Return the last value of a metric in a metrics file, reading only its end; 0 without any."""
    for line in reversed(tail(path)):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return float(json.loads(line)[name])
    return 0.0


def tail(path: Path) -> list[str]:
    """Return the last lines of a file; the first may be incomplete. Returns none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def forget_failures(root: Path, jobs: Sequence[Job]) -> None:
    """Allow failed jobs to be retried. The record of each failure is kept under another name."""
    for job in jobs:
        folder = root / job.name
        newest = newest_claim(folder)
        if newest and claimable(newest):
            with contextlib.suppress(FileNotFoundError):  # Another process already did.
                (folder / "failed.json").rename(folder / f"failed-{newest.stem}.json")


# Work


class Stop(StopRequest):
    """A stop request from a signal or another thread.

    Attributes:
        children: Training processes that are still running.
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
    """Train jobs, each in its own process, until no job is free.

    Failures are recorded in the jobs' folders and do not stop other jobs. If another machine seems to be working on a
    job, wait until it sends a heartbeat or its claim is stale.

    Args:
        root: Folder that holds the jobs' folders.
        jobs: Jobs in the order in which to start them.
        environments: Additional environment variables of each worker's processes, one mapping per worker.
        commit: The engine's commit, for the record.
        stop: Stop request. Running jobs save their step, and the next worker resumes them.
        show: Called with the status of all jobs every half second, and once at the end.

    Returns:
        The status of all jobs.

    Raises:
        OSError: The folder is not writable.
    """
    root.mkdir(parents=True, exist_ok=True)
    # Do not restart interrupted or lost jobs immediately. The next call resumes them.
    tried: set[str] = set()
    finished: dict[str, Status] = {}

    def read_statuses() -> list[Status]:
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
                show(read_statuses())
                if stop.wait(SHOW_SECONDS):
                    time.sleep(POLL_SECONDS)  # The children are saving.
        except BaseException:
            stop.ask(signal.SIGTERM)
            raise
    for each in workers:
        each.result()
    statuses = read_statuses()
    show(statuses)
    return statuses


def _worker(
    root: Path, jobs: Sequence[Job], environment: Mapping[str, str], commit: str, stop: Stop, tried: set[str]
) -> None:
    """Train one job after another."""
    seen: dict[Path, float] = {}  # Claims of other machines, and their last heartbeats.
    while not stop.number:
        for job in jobs:
            if job.name in tried or status(root, job).state != "waiting":
                continue
            owned = claim(root / job.name, commit)
            if owned is None:
                continue
            tried.add(job.name)
            try:
                # Another worker may have finished it before this one claimed it.
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
    """Return whether a claim of another machine may be stale: no heartbeat since it was first seen."""
    for job in jobs:
        newest = newest_claim(root / job.name)
        if newest and read_json(newest).get("machine") != machine() and status(root, job).state == "running":
            changed = newest.stat().st_mtime
            if changed <= seen.setdefault(newest, changed):
                return True
    return False


def train_command(folder: Path, config: Config) -> list[str]:
    """Return the command that trains the run whose config.json is in the folder, from the start or resumed."""
    flags = ["--out", str(folder), "--resume", "--quiet", "--log", config.log]
    return [sys.executable, "-m", "engine", "train", config.preset, *flags]


def _train(folder: Path, job: Job, owned: Claim, environment: Mapping[str, str], stop: Stop) -> None:
    """Train a claimed job in its own process, until it ends or a stop is requested."""
    path = folder / "config.json"
    if not path.exists():
        write_text(path, config_json(job.config))
    variables = python_environment() | {PARENT: str(os.getpid())}
    with (folder / "log.txt").open("ab") as log:
        # Opened for appending: a resumed run adds to its earlier output.
        code = _attend(train_command(folder, job.config), {**variables, **environment}, log, owned, stop)
    if code is None or (stop.number and code) or code in _CUT_OFF:
        return
    newest = read_summary(folder)
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
    """Run a command while renewing its claim; return its exit code, or None if the claim was lost."""
    process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    stop.children.add(process.pid)
    try:
        owned.child(process.pid)
        signaled, renewed = False, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_SECONDS)
            if stop.number and not signaled:
                process.send_signal(signal.SIGTERM)
                signaled = True
            if time.monotonic() - renewed >= RENEW_SECONDS:
                renewed = time.monotonic()
                # If this machine was suspended, another may have taken over; two must not write to one folder.
                if owned.lost():
                    return None
                owned.renew()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        stop.children.discard(process.pid)
