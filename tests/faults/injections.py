"""Fault injections: an injection is a function of a victim, a scenario a sequence of injections on one victim.

Moments and targets are drawn from the victim's seeded random generator. Injections raise AssertionError on failure.
"""

import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from bench.ranks.restart import ranks_of
from engine.runs import checkpoint
from engine.runs.folder import CHECKPOINTS
from tests.faults.victim import FLAGS, INTERVAL, SPLIT, STEPS, Ended, Spawned, Victim
from tests.processes import finish, start

LOST = ("lost the other ranks", "no progress in", "could not connect")
TIMEOUT = ("--timeout", 5)


# SIGKILL


def kill_starting(victim):
    """SIGKILL while the run imports, reads the checkpoint, and makes its first views."""
    victim.start_fresh(*TIMEOUT)
    seconds = victim.chance.uniform(0, 0.8)
    time.sleep(seconds)
    _kill(victim, "SIGKILL while starting", f"{seconds:.2f} s after the start")


def kill_training(victim):
    """SIGKILL between steps or within one."""
    victim.ensure_running()
    victim.reach(0, 8)
    _kill(victim, "SIGKILL while training")


def kill_writing(victim):
    """SIGKILL while a checkpoint is being written."""
    victim.ensure_running()
    victim.reach(0, 6)
    folder = victim.run / CHECKPOINTS
    victim.wait(lambda: _partial(folder), pause=0)
    time.sleep(victim.chance.uniform(0, 0.002))
    _kill(victim, "SIGKILL while a checkpoint is written")


def _partial(folder):
    with suppress(FileNotFoundError):
        return any(entry.name.endswith(".partial") for entry in os.scandir(folder))
    return False


def kill_ending(victim):
    """SIGKILL while the run writes its last checkpoint, plots, predictions, and summary."""
    victim.ensure_running()
    # Wait for a file instead of a time, which depends on the machine.
    name = victim.chance.choice([f"{CHECKPOINTS}/step-{STEPS:08d}.pt", "curves.png", "results.npz"])
    victim.wait((victim.run / name).exists, pause=0.002)
    seconds = victim.chance.uniform(0, 0.05)
    time.sleep(seconds)
    _kill(victim, "SIGKILL while ending", f"{seconds:.3f} s after {name} was there")


def _kill(victim, kind, moment=None):
    """Kill one of the processes. The others must end by themselves and report why."""
    target = victim.chance.choice(victim.processes)
    of = f" of rank {victim.processes.index(target)}" if victim.ranks > 1 else ""
    outcome = victim.inject(kind + of, target.kill, moment)
    codes = victim.wait_for_exit()
    if target.exitcode != -signal.SIGKILL:
        victim.forget(outcome)
        raise Ended
    _check_left_alone(victim, [code for code in codes if code != -signal.SIGKILL])
    victim.record_exit(outcome)


def _check_left_alone(victim, codes):
    if codes and victim.newest_checkpoint() == STEPS and set(codes) == {0}:
        return  # the others were past the last collective
    assert set(codes) <= {1, 75}, f"{codes}\n{victim.output()}"
    lines = [line for line in victim.output().splitlines() if any(words in line for words in LOST)]
    assert len(lines) == len(codes), victim.output()


# SIGSTOP


def suspend_one_rank(victim):
    """SIGSTOP one rank permanently; the others must end by timeout."""
    if victim.processes:
        victim.complete()
    starting = victim.chance.random() < 0.25
    victim.begin(*TIMEOUT)
    if starting:
        time.sleep(victim.chance.uniform(0, 0.5))
    else:
        victim.reach(0, 8)
    target = victim.chance.choice(victim.processes)
    name = f"SIGSTOP of rank {victim.processes.index(target)}"
    outcome = victim.inject(name, partial(os.kill, target.pid, signal.SIGSTOP), "starting" if starting else None)
    others = [process for process in victim.processes if process is not target]
    for process in others:
        process.join(120)
    assert None not in [process.exitcode for process in others], f"stalled\n{victim.output()}"
    target.kill()
    codes = victim.wait_for_exit()
    _check_left_alone(victim, [code for code in codes if code != -signal.SIGKILL])
    victim.record_exit(outcome)


def suspend_and_continue(victim):
    """Pause some or all processes; the results must not change."""
    victim.ensure_running()
    victim.reach(0, 8)
    targets = victim.chance.sample(victim.processes, victim.chance.randint(1, victim.ranks))
    seconds = victim.chance.uniform(0.1, 0.5)

    def pause():
        for target in targets:
            os.kill(target.pid, signal.SIGSTOP)
        time.sleep(seconds)
        states = [Path(f"/proc/{target.pid}/stat").read_text().rpartition(")")[2].split()[0] for target in targets]
        for target in targets:
            os.kill(target.pid, signal.SIGCONT)
        return states

    states = []
    outcome = victim.inject(f"SIGSTOP, SIGCONT of {len(targets)} of {victim.ranks}", lambda: states.extend(pause()))
    if set(states) != {"T"}:
        victim.forget(outcome)
        raise Ended
    outcome.after = outcome.before


# SIGTERM and SIGINT


def request_stop(victim, number, everyone=False):
    """Send a stop signal; the run must save the step it has reached."""
    victim.ensure_running()
    victim.reach(1, 8, latest=STEPS - 15)
    targets = victim.processes if everyone else [victim.chance.choice(victim.processes)]

    def send():
        for target in targets:
            os.kill(target.pid, number)

    who = "" if victim.ranks == 1 else " to all" if everyone else f" to rank {victim.processes.index(targets[0])}"
    outcome = victim.inject(f"{number.name}{who}", send)
    ranks = victim.processes
    codes = victim.wait_for_exit()
    if codes == [0] * victim.ranks:
        victim.forget(outcome)
        raise Ended
    assert codes == [128 + (number if rank in targets else signal.SIGTERM) for rank in ranks], victim.output()
    assert f": saved step {victim.last_logged_step()} in {victim.run}" in victim.output(), victim.output()
    assert victim.newest_checkpoint() == victim.last_logged_step(), victim.output()
    victim.record_exit(outcome, allowed=0)


def stop_while_starting(victim):
    """Send SIGTERM before there is anything to save."""
    victim.start_fresh(*TIMEOUT)
    seconds = victim.chance.uniform(0, 0.8)
    time.sleep(seconds)
    target = victim.chance.choice(victim.processes)
    send = partial(os.kill, target.pid, signal.SIGTERM)
    outcome = victim.inject("SIGTERM while starting", send, f"{seconds:.2f} s after the start")
    codes = victim.wait_for_exit()
    assert target.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM), f"{codes}\n{victim.output()}"
    others = [process.exitcode for process in victim.processes if process is not target]
    assert set(others) <= {1, 75, 128 + signal.SIGTERM}, f"{codes}\n{victim.output()}"
    victim.record_exit(outcome, allowed=0)


def interrupt_twice(victim):
    """Send SIGINT twice; the second one must end a process at once."""
    victim.ensure_running()
    victim.reach(1, 8, latest=STEPS - 15)
    target = victim.chance.choice(victim.processes)
    seconds = victim.chance.uniform(0.001, 0.03)

    def send():
        for _ in range(2):
            os.kill(target.pid, signal.SIGINT)
            time.sleep(seconds)

    outcome = victim.inject("SIGINT twice", send)
    codes = victim.wait_for_exit()
    # The process may have saved and ended between the two signals.
    allowed = {-signal.SIGINT, 128 + signal.SIGINT}
    assert target.exitcode in allowed, f"{codes}\n{victim.output()}"
    others = [code for process, code in zip(victim.processes, codes, strict=True) if process is not target]
    assert set(others) <= {1, 75, 128 + signal.SIGTERM}, f"{codes}\n{victim.output()}"
    victim.record_exit(outcome)


# disks and folders


def fill_disk(victim):
    """Fill the disk for a while; training must report it, continue, and save again."""
    _trouble(victim, "full disk", _fill, _make_room)


def read_only(victim):
    """Make the folder of the run or of its checkpoints read-only for a while."""
    where = victim.chance.choice([Path(), Path(CHECKPOINTS)])
    _trouble(
        victim, f"read-only {where.name or 'run folder'}",
        lambda victim: _freeze(victim.run / where), lambda victim: _thaw(victim.run / where),
    )  # fmt: skip


def _trouble(victim, kind, begin, end):
    victim.ensure_running()
    victim.reach(INTERVAL, 9, latest=STEPS - 20)
    outcome = victim.inject(kind, partial(begin, victim))
    try:
        victim.wait_for_output("cannot write the checkpoint")
        time.sleep(victim.chance.uniform(0, 0.4))
    finally:
        end(victim)
    victim.wait_for_output("checkpoints can be written again")
    assert victim.alive() and "training continues" in victim.output(), victim.output()
    outcome.after = victim.newest_checkpoint()
    assert outcome.after >= outcome.before


def fill_disk_and_kill(victim):
    """Fill the disk, then kill the processes, either while it is full or after the next save."""
    victim.ensure_running()
    victim.reach(INTERVAL, 9, latest=STEPS - 20)
    outcome = victim.inject("full disk, then SIGKILL", partial(_fill, victim))
    try:
        victim.wait_for_output("cannot write the checkpoint")
        if victim.chance.random() < 0.5:
            outcome.kind += " when it can save again"
            _make_room(victim)
            victim.wait_for_output("checkpoints can be written again")
        for process in victim.processes:
            process.kill()
        victim.wait_for_exit()
        victim.record_exit(outcome, allowed=2 * INTERVAL)
    finally:
        _make_room(victim)


def fill_disk_for_good(victim):
    """Fill the disk until the run ends with one line; it must resume once there is space."""
    _trouble_at_the_end(victim, "full disk to the end", _fill, _make_room)


def read_only_for_good(victim):
    """Make the checkpoints' folder read-only until the run ends with one line."""
    folder = victim.run / CHECKPOINTS
    _trouble_at_the_end(victim, "read-only to the end", lambda victim: _freeze(folder), lambda victim: _thaw(folder))


def _trouble_at_the_end(victim, kind, begin, end):
    victim.ensure_running()
    target = STEPS - victim.chance.randint(2, 5)
    victim.wait(lambda: victim.training() and victim.last_logged_step() >= target)
    outcome = victim.inject(kind, partial(begin, victim))
    try:
        codes = victim.wait_for_exit()
        if codes == [0] * victim.ranks:
            victim.forget(outcome)
            raise Ended
        assert codes == [2] * victim.ranks, f"{codes}\n{victim.output()}"
        last = victim.output().splitlines()[-1]
        assert last.startswith("remixmatch: ") and "--resume" in last, victim.output()
        victim.record_exit(outcome, allowed=2 * INTERVAL)
    finally:
        end(victim)


def _fill(victim):
    room = victim.chance.randrange(0, 56, 4) * 1024  # less than a checkpoint needs
    # A disk cannot be made smaller than its content, which may grow between the two calls.
    _retry(lambda: ["mount", "-o", f"remount,size={shutil.disk_usage(victim.folder).used + room}", victim.folder])


def _make_room(victim):
    subprocess.run(["mount", "-o", "remount,size=256m", victim.folder], check=True)


def _freeze(folder):
    # Use a separate mount of the folder: a file system with files open for writing cannot be remounted.
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        # A mount is busy while a file in it is being written.
        _retry(lambda: ["mount", "-o", "remount,ro,bind", folder])
    except AssertionError:
        _thaw(folder)
        raise


def _retry(command):
    """Run the command returned by `command` until it succeeds."""
    for _ in range(200):
        done = subprocess.run(command(), capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.005)
    raise AssertionError(done.stderr)


def _thaw(folder):
    subprocess.run(["umount", "--lazy", folder], check=True)


def remove_checkpoints(victim):
    """Remove the checkpoints; the run must write new ones."""
    _remove(victim, "checkpoints removed", CHECKPOINTS)


def remove_run(victim):
    """Remove the run's folder; the next checkpoint must restore it."""
    _remove(victim, "run folder removed", "")


def _remove(victim, kind, name):
    victim.ensure_running()
    victim.reach(INTERVAL, 9, latest=STEPS - 20)
    gone = victim.folder / "gone"
    # Atomically, even while files in it are being written.
    outcome = victim.inject(kind, partial(os.rename, victim.run / name, gone))
    shutil.rmtree(gone)
    victim.wait(lambda: victim.newest_checkpoint() > 0 and (victim.run / "config.json").exists())
    outcome.after = victim.newest_checkpoint()


# damage after a kill


def truncate(path, chance, foreign):
    """Truncate the file at a random position."""
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def flip_bits(path, chance, foreign):
    """Flip 1 to 64 bits of the file."""
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 64)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def empty(path, chance, foreign):
    """Empty the file."""
    path.write_bytes(b"")


def fill_with_garbage(path, chance, foreign):
    """Replace the content with as many random bytes."""
    path.write_bytes(chance.randbytes(path.stat().st_size))


def exchange(path, chance, foreign):
    """Replace the file with a valid checkpoint of another run, with the same or other shapes."""
    shutil.copy(foreign, path)


DAMAGES = [truncate, flip_bits, empty, fill_with_garbage, exchange]


def damage(victim, how):
    """Damage the newest checkpoint; resuming must skip it with one warning and lose one interval."""
    _kill_with_a_checkpoint(victim)
    newest = checkpoint.list_checkpoints(victim.run / CHECKPOINTS)[-1]
    before, seen = victim.newest_checkpoint(), victim.last_logged_step()
    how(newest, victim.chance, victim.references.foreign(victim.chance.choice(["--seed", "--width"])))
    victim.begin()
    kind = f"{how.__name__.replace('_', ' ')}: newest checkpoint after SIGKILL"
    outcome = victim.inject(kind, lambda: None, f"step {seen}")
    victim.wait(victim.training)
    said = victim.output()
    passed_over = str(newest) in said
    # Flipped bits in unused parts of the file are harmless.
    assert passed_over or how is flip_bits, said
    resumed = victim.resumed_step()
    expected = before - INTERVAL * passed_over
    assert resumed == expected, said
    outcome.before, outcome.after, outcome.lost = before, resumed, max(seen - resumed, 0)
    assert outcome.lost <= 2 * INTERVAL, outcome


def _kill_with_a_checkpoint(victim):
    """Kill the run when it has at least two checkpoints."""
    victim.ensure_running()
    victim.reach(2 * INTERVAL + 2, 12)
    for process in victim.processes:
        process.kill()
    codes = victim.wait_for_exit()
    victim.processes = []
    if 0 in codes:
        raise Ended


def leave_remains(victim):
    """Leave a partial checkpoint, a foreign file and half a line of metrics; resuming must ignore them."""
    _kill_with_a_checkpoint(victim)
    seen, before = victim.last_logged_step(), victim.newest_checkpoint()
    folder = victim.run / CHECKPOINTS
    (folder / f".step-{victim.chance.randint(1, 99):08d}.pt.partial").write_bytes(victim.chance.randbytes(999))
    (folder / "notes.txt").write_text("not a checkpoint")
    with (victim.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 49, "loss": 1.2345'[: victim.chance.randint(1, 27)])
    victim.begin()
    outcome = victim.inject("remains of others after SIGKILL", lambda: None, f"step {seen}")
    victim.wait(victim.training)
    resumed = victim.resumed_step()
    assert resumed == before, victim.output()
    outcome.before = outcome.after = resumed
    outcome.lost = max(seen - resumed, 0)
    assert outcome.lost <= INTERVAL, outcome


# clocks


def jump(victim, shim):
    """Set the machine's clock forward or backward by days."""
    path = victim.folder / "clock"
    if not victim.processes:
        path.write_bytes(struct.pack("<q", 0))
        environment = {"LD_PRELOAD": str(shim), "CLOCK_OFFSET_FILE": str(path), "OMP_NUM_THREADS": "1"}

        def spawn(log):
            return [Spawned(log, "train", "digits-40", "--out", victim.run, "--resume", *FLAGS, **environment)]

        victim.begin(start=spawn)
    victim.reach(1, 15, latest=STEPS - 1)
    seconds = victim.chance.choice([-1, 1]) * victim.chance.randint(1, 20 * 86400)

    def set_clock():
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 8) as offset:
            offset[:] = struct.pack("<q", seconds)

    outcome = victim.inject(f"clock set {seconds / 86400:+.1f} days", set_clock)
    outcome.after = outcome.before


# torchrun


def torchrun(victim):
    """Start torchrun with two ranks unless it is running."""
    if not victim.processes:
        flags = [*FLAGS, *SPLIT, "--gpus", 2, "--max-restarts", 3]
        victim.begin(start=lambda log: [start(log, "train", "digits-40", "--out", victim.run, "--resume", *flags)])


def is_running(pid):
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill_rank_of_torchrun(victim):
    """Kill a rank of torchrun; the group must restart by itself."""
    torchrun(victim)
    victim.reach(INTERVAL + 1, 12, latest=STEPS - 15)
    (parent,) = victim.processes
    target = victim.chance.choice(sorted(ranks_of(parent.pid)))
    said = victim.output().count("resuming")
    outcome = victim.inject("SIGKILL of a rank of torchrun", partial(os.kill, target, signal.SIGKILL))
    seen = victim.last_logged_step()
    victim.wait(lambda: victim.output().count("resuming") > said)
    outcome.after = victim.resumed_step()
    outcome.lost = max(seen - outcome.after, 0)
    assert outcome.before <= outcome.after and outcome.lost <= INTERVAL, outcome
    victim.wait(lambda: victim.last_logged_step() > outcome.after)


def kill_torchrun(victim):
    """Kill torchrun; the ranks must save and end by themselves."""
    torchrun(victim)
    victim.reach(0, 8, latest=STEPS - 15)
    (parent,) = victim.processes
    ranks = ranks_of(parent.pid)
    assert len(ranks) == 2
    outcome = victim.inject("SIGKILL of torchrun", parent.kill)
    finish(victim.processes)
    deadline = time.monotonic() + 120
    while any(map(is_running, ranks)):
        assert time.monotonic() < deadline, f"ranks keep training without torchrun\n{victim.output()}"
        time.sleep(0.02)
    victim.check_output()
    assert f"SIGHUP: saved step {victim.newest_checkpoint()} in" in victim.output(), victim.output()
    assert victim.newest_checkpoint() == victim.last_logged_step()
    victim.record_exit(outcome, allowed=0)


# Scenarios: number of ranks, and the injections into one victim in turn

SCENARIOS = {
    "kill": (1, [kill_starting, kill_training, kill_writing, kill_ending, kill_training, kill_writing]),
    "kill a rank": (2, [kill_training, kill_writing, kill_starting, kill_ending]),
    "stop a rank": (2, [suspend_one_rank]),
    "pause": (1, [suspend_and_continue]),
    "pause ranks": (2, [suspend_and_continue]),
    "ask": (
        1,
        [
            partial(request_stop, number=signal.SIGTERM),
            partial(request_stop, number=signal.SIGINT),
            interrupt_twice,
            stop_while_starting,
        ],
    ),
    "ask ranks": (
        2,
        [
            *(partial(request_stop, number=signal.SIGTERM), partial(request_stop, number=signal.SIGINT)),
            *(
                partial(request_stop, number=signal.SIGTERM, everyone=True),
                partial(request_stop, number=signal.SIGINT, everyone=True),
            ),
            *(interrupt_twice, stop_while_starting),
        ],
    ),
    "disk": (1, [fill_disk, read_only, fill_disk_for_good, fill_disk_and_kill, read_only_for_good]),
    "disk of ranks": (2, [fill_disk_and_kill, read_only, fill_disk, fill_disk_for_good, read_only_for_good]),
    "removal": (1, [remove_checkpoints, kill_training, remove_run, kill_training]),
    "removal of ranks": (2, [remove_run, kill_training, remove_checkpoints, kill_training]),
    "damage": (1, [partial(damage, how=how) for how in DAMAGES] + [leave_remains]),
    "clock": (1, [jump]),
    "torchrun": (2, [kill_rank_of_torchrun, kill_torchrun]),
}


def campaign(injections, seed, count, folder, references, record, ranks=1, flags=()):
    """Inject faults into runs in a folder, in turn, and complete the last run.

    Args:
        injections: Functions of a victim.
        seed: Seed of all moments and targets.
        count: Number of injections.
        folder: An empty folder.
        references: Undisturbed runs for comparison.
        record: A list that receives all outcomes, even if the campaign fails.
        ranks: Processes of a run.
        flags: Additional command-line flags of the runs.
    """
    victim = Victim(folder, random.Random(seed), references, ranks, flags)
    try:
        early = 0
        while len(victim.outcomes) < count:
            try:
                injections[len(victim.outcomes) % len(injections)](victim)
            except Ended:
                early += 1
                assert early <= 5 + count, "runs end before the injection too often"
                victim.complete()
        victim.complete()
    finally:
        record.extend(victim.outcomes)
        victim.close()
