"""What can happen to a run: each injection is a function of a victim, each scenario a sequence of them on one victim.

Moments and targets are drawn from the victim's seeded chance. What an injection finds amiss is an AssertionError.
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
from engine.training.trainer import CHECKPOINTS
from tests.faults.victim import FLAGS, INTERVAL, SPLIT, STEPS, Ended, Spawned, Victim
from tests.processes import finish, start

LOST = ("lost the other ranks", "nothing came of", "did not come together")
TIMEOUT = ("--timeout", 5)


# SIGKILL


def kill_starting(victim):
    """While it imports, reads the checkpoint, and makes its first views."""
    victim.fresh(*TIMEOUT)
    seconds = victim.chance.uniform(0, 0.8)
    time.sleep(seconds)
    _kill(victim, "SIGKILL while starting", f"{seconds:.2f} s after the start")


def kill_training(victim):
    """Between steps or within one."""
    victim.running()
    victim.reach(0, 8)
    _kill(victim, "SIGKILL while training")


def kill_writing(victim):
    """While a checkpoint is being written."""
    victim.running()
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
    """While it writes the last checkpoint, pictures, predictions, and the summary."""
    victim.running()
    # by what is there and not by a clock: how long an end takes depends on the machine
    name = victim.chance.choice([f"{CHECKPOINTS}/step-{STEPS:08d}.pt", "curves.png", "results.npz"])
    victim.wait((victim.run / name).exists, pause=0.002)
    seconds = victim.chance.uniform(0, 0.05)
    time.sleep(seconds)
    _kill(victim, "SIGKILL while ending", f"{seconds:.3f} s after {name} was there")


def _kill(victim, kind, moment=None):
    """Kills one of the processes; the others have to end by themselves, and to say why."""
    target = victim.chance.choice(victim.processes)
    of = f" of rank {victim.processes.index(target)}" if victim.ranks > 1 else ""
    outcome = victim.strike(kind + of, target.kill, moment)
    codes = victim.over()
    if target.exitcode != -signal.SIGKILL:
        victim.forget(outcome)
        raise Ended
    _check_left_alone(victim, [code for code in codes if code != -signal.SIGKILL])
    victim.dead(outcome)


def _check_left_alone(victim, codes):
    if codes and victim.newest() == STEPS and set(codes) == {0}:
        return  # the other one was past the last collective
    assert set(codes) <= {1, 75}, f"{codes}\n{victim.said()}"
    lines = [line for line in victim.said().splitlines() if any(words in line for words in LOST)]
    assert len(lines) == len(codes), victim.said()


# SIGSTOP


def stop_one_rank(victim):
    """For good: the other one ends by its clock."""
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
    outcome = victim.strike(name, partial(os.kill, target.pid, signal.SIGSTOP), "starting" if starting else None)
    others = [process for process in victim.processes if process is not target]
    for process in others:
        process.join(120)
    assert None not in [process.exitcode for process in others], f"stalled\n{victim.said()}"
    target.kill()
    codes = victim.over()
    _check_left_alone(victim, [code for code in codes if code != -signal.SIGKILL])
    victim.dead(outcome)


def stop_and_continue(victim):
    """A pause of some or all processes, after which nothing is different."""
    victim.running()
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
    outcome = victim.strike(f"SIGSTOP, SIGCONT of {len(targets)} of {victim.ranks}", lambda: states.extend(pause()))
    if set(states) != {"T"}:
        victim.forget(outcome)
        raise Ended
    outcome.after = outcome.before


# SIGTERM and SIGINT


def ask(victim, number, everyone=False):
    """The wish for an end: the step reached is saved."""
    victim.running()
    victim.reach(1, 8, latest=STEPS - 15)
    targets = victim.processes if everyone else [victim.chance.choice(victim.processes)]

    def send():
        for target in targets:
            os.kill(target.pid, number)

    who = "" if victim.ranks == 1 else " to all" if everyone else f" to rank {victim.processes.index(targets[0])}"
    outcome = victim.strike(f"{number.name}{who}", send)
    ranks = victim.processes
    codes = victim.over()
    if codes == [0] * victim.ranks:
        victim.forget(outcome)
        raise Ended
    assert codes == [128 + (number if rank in targets else signal.SIGTERM) for rank in ranks], victim.said()
    assert f": step {victim.seen()} is saved in {victim.run}" in victim.said(), victim.said()
    assert victim.newest() == victim.seen(), victim.said()
    victim.dead(outcome, allowed=0)


def ask_starting(victim):
    """Before there is anything to save."""
    victim.fresh(*TIMEOUT)
    seconds = victim.chance.uniform(0, 0.8)
    time.sleep(seconds)
    target = victim.chance.choice(victim.processes)
    send = partial(os.kill, target.pid, signal.SIGTERM)
    outcome = victim.strike("SIGTERM while starting", send, f"{seconds:.2f} s after the start")
    codes = victim.over()
    assert target.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM), f"{codes}\n{victim.said()}"
    others = [process.exitcode for process in victim.processes if process is not target]
    assert set(others) <= {1, 75, 128 + signal.SIGTERM}, f"{codes}\n{victim.said()}"
    victim.dead(outcome, allowed=0)


def ask_twice(victim):
    """The second SIGINT ends a process at once, wherever it is."""
    victim.running()
    victim.reach(1, 8, latest=STEPS - 15)
    target = victim.chance.choice(victim.processes)
    seconds = victim.chance.uniform(0.001, 0.03)

    def send():
        for _ in range(2):
            os.kill(target.pid, signal.SIGINT)
            time.sleep(seconds)

    outcome = victim.strike("SIGINT twice", send)
    codes = victim.over()
    # it may have saved and ended between the two
    allowed = {-signal.SIGINT, 128 + signal.SIGINT}
    assert target.exitcode in allowed, f"{codes}\n{victim.said()}"
    others = [code for process, code in zip(victim.processes, codes, strict=True) if process is not target]
    assert set(others) <= {1, 75, 128 + signal.SIGTERM}, f"{codes}\n{victim.said()}"
    victim.dead(outcome)


# disks and folders


def fill_disk(victim):
    """The disk is full for a while: training says so, goes on, and saves again."""
    _trouble(victim, "full disk", _fill, _make_room)


def read_only(victim):
    """The checkpoints' folder, or the run's, cannot be written for a while."""
    where = victim.chance.choice([Path(), Path(CHECKPOINTS)])
    _trouble(
        victim, f"read-only {where.name or 'run folder'}",
        lambda victim: _freeze(victim.run / where), lambda victim: _thaw(victim.run / where),
    )  # fmt: skip


def _trouble(victim, kind, begin, end):
    victim.running()
    victim.reach(INTERVAL, 9, latest=STEPS - 20)
    outcome = victim.strike(kind, partial(begin, victim))
    try:
        victim.wait_for_words("cannot write the checkpoint")
        time.sleep(victim.chance.uniform(0, 0.4))
    finally:
        end(victim)
    victim.wait_for_words("checkpoints can be written again")
    assert victim.alive() and "training goes on" in victim.said(), victim.said()
    outcome.after = victim.newest()
    assert outcome.after >= outcome.before


def fill_disk_and_kill(victim):
    """The disk is full, and then the process is killed, or as soon as it has saved again."""
    victim.running()
    victim.reach(INTERVAL, 9, latest=STEPS - 20)
    outcome = victim.strike("full disk, then SIGKILL", partial(_fill, victim))
    try:
        victim.wait_for_words("cannot write the checkpoint")
        if victim.chance.random() < 0.5:
            outcome.kind += " when it can save again"
            _make_room(victim)
            victim.wait_for_words("checkpoints can be written again")
        for process in victim.processes:
            process.kill()
        victim.over()
        victim.dead(outcome, allowed=2 * INTERVAL)
    finally:
        _make_room(victim)


def fill_disk_for_good(victim):
    """A disk that stays full: the run ends in one line, and goes on where there is room again."""
    _trouble_at_the_end(victim, "full disk to the end", _fill, _make_room)


def read_only_for_good(victim):
    """A folder that stays read-only, likewise."""
    folder = victim.run / CHECKPOINTS
    _trouble_at_the_end(victim, "read-only to the end", lambda victim: _freeze(folder), lambda victim: _thaw(folder))


def _trouble_at_the_end(victim, kind, begin, end):
    victim.running()
    target = STEPS - victim.chance.randint(2, 5)
    victim.wait(lambda: victim.training() and victim.seen() >= target)
    outcome = victim.strike(kind, partial(begin, victim))
    try:
        codes = victim.over()
        if codes == [0] * victim.ranks:
            victim.forget(outcome)
            raise Ended
        assert codes == [2] * victim.ranks, f"{codes}\n{victim.said()}"
        last = victim.said().splitlines()[-1]
        assert last.startswith("remixmatch: ") and "--resume" in last, victim.said()
        victim.dead(outcome, allowed=2 * INTERVAL)
    finally:
        end(victim)


def _fill(victim):
    room = victim.chance.randrange(0, 56, 4) * 1024  # less than a checkpoint needs
    # a disk cannot be made smaller than what is in it, which may have grown since it was asked
    _retry(lambda: ["mount", "-o", f"remount,size={shutil.disk_usage(victim.folder).used + room}", victim.folder])


def _make_room(victim):
    subprocess.run(["mount", "-o", "remount,size=256m", victim.folder], check=True)


def _freeze(folder):
    # an own mount of the same folder, since nothing can be remounted that is open for writing
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        # a mount is busy while a file is written in it
        _retry(lambda: ["mount", "-o", "remount,ro,bind", folder])
    except AssertionError:
        _thaw(folder)
        raise


def _retry(command):
    """Runs the command that it gives until that succeeds."""
    for _ in range(200):
        done = subprocess.run(command(), capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.005)
    raise AssertionError(done.stderr)


def _thaw(folder):
    subprocess.run(["umount", "--lazy", folder], check=True)


def remove_checkpoints(victim):
    """Somebody removes the checkpoints: new ones are written."""
    _remove(victim, "checkpoints removed", CHECKPOINTS)


def remove_run(victim):
    """Somebody removes the whole run: it is there again with the next checkpoint."""
    _remove(victim, "run folder removed", "")


def _remove(victim, kind, name):
    victim.running()
    victim.reach(INTERVAL, 9, latest=STEPS - 20)
    gone = victim.folder / "gone"
    # at once, whatever is being written in there
    outcome = victim.strike(kind, partial(os.rename, victim.run / name, gone))
    shutil.rmtree(gone)
    victim.wait(lambda: victim.newest() > 0 and (victim.run / "config.json").exists())
    outcome.after = victim.newest()


# damage after a kill


def truncate(path, chance, foreign):
    """Cuts it anywhere."""
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def flip_bits(path, chance, foreign):
    """Turns one to 64 bits of it over."""
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 64)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def empty(path, chance, foreign):
    """Leaves nothing in it."""
    path.write_bytes(b"")


def fill_with_garbage(path, chance, foreign):
    """As many random bytes."""
    path.write_bytes(chance.randbytes(path.stat().st_size))


def exchange(path, chance, foreign):
    """Puts a good checkpoint of another run in its place, of the same shapes or of others."""
    shutil.copy(foreign, path)


DAMAGES = [truncate, flip_bits, empty, fill_with_garbage, exchange]


def damage(victim, how):
    """The newest checkpoint is not what it was: it is passed over with a line, at the cost of an interval."""
    _kill_with_a_checkpoint(victim)
    newest = checkpoint.list_checkpoints(victim.run / CHECKPOINTS)[-1]
    before, seen = victim.newest(), victim.seen()
    how(newest, victim.chance, victim.references.foreign(victim.chance.choice(["--seed", "--width"])))
    victim.begin()
    kind = f"{how.__name__.replace('_', ' ')}: newest checkpoint after SIGKILL"
    outcome = victim.strike(kind, lambda: None, f"step {seen}")
    victim.wait(victim.training)
    said = victim.said()
    passed_over = str(newest) in said
    # bits that nothing is stored in do no harm
    assert passed_over or how is flip_bits, said
    resumed = victim.said_resumed()
    expected = before - INTERVAL * passed_over
    assert resumed == expected, said
    outcome.before, outcome.after, outcome.lost = before, resumed, max(seen - resumed, 0)
    assert outcome.lost <= 2 * INTERVAL, outcome


def _kill_with_a_checkpoint(victim):
    """Kills it at a moment when it has a checkpoint and one before it."""
    victim.running()
    victim.reach(2 * INTERVAL + 2, 12)
    for process in victim.processes:
        process.kill()
    codes = victim.over()
    victim.processes = []
    if 0 in codes:
        raise Ended


def leave_remains(victim):
    """What an earlier process or a stranger left: a part of a checkpoint, a foreign file, half a line of metrics."""
    _kill_with_a_checkpoint(victim)
    seen, before = victim.seen(), victim.newest()
    folder = victim.run / CHECKPOINTS
    (folder / f".step-{victim.chance.randint(1, 99):08d}.pt.partial").write_bytes(victim.chance.randbytes(999))
    (folder / "notes.txt").write_text("not a checkpoint")
    with (victim.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 49, "loss": 1.2345'[: victim.chance.randint(1, 27)])
    victim.begin()
    outcome = victim.strike("remains of others after SIGKILL", lambda: None, f"step {seen}")
    victim.wait(victim.training)
    resumed = victim.said_resumed()
    assert resumed == before, victim.said()
    outcome.before = outcome.after = resumed
    outcome.lost = max(seen - resumed, 0)
    assert outcome.lost <= INTERVAL, outcome


# clocks


def jump(victim, shim):
    """The machine's clock is set, by days, forward and backward."""
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

    outcome = victim.strike(f"clock set {seconds / 86400:+.1f} days", set_clock)
    outcome.after = outcome.before


# torchrun


def torchrun(victim):
    """Begins a real torchrun with two ranks, if it does not run."""
    if not victim.processes:
        flags = [*FLAGS, *SPLIT, "--gpus", 2, "--max-restarts", 3]
        victim.begin(start=lambda log: [start(log, "train", "digits-40", "--out", victim.run, "--resume", *flags)])


def running_still(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill_rank_of_torchrun(victim):
    """The group comes back by itself."""
    torchrun(victim)
    victim.reach(INTERVAL + 1, 12, latest=STEPS - 15)
    (parent,) = victim.processes
    target = victim.chance.choice(sorted(ranks_of(parent.pid)))
    said = victim.said().count("resuming")
    outcome = victim.strike("SIGKILL of a rank of torchrun", partial(os.kill, target, signal.SIGKILL))
    seen = victim.seen()
    victim.wait(lambda: victim.said().count("resuming") > said)
    outcome.after = victim.said_resumed()
    outcome.lost = max(seen - outcome.after, 0)
    assert outcome.before <= outcome.after and outcome.lost <= INTERVAL, outcome
    victim.wait(lambda: victim.seen() > outcome.after)


def kill_torchrun(victim):
    """The ranks save and end by themselves."""
    torchrun(victim)
    victim.reach(0, 8, latest=STEPS - 15)
    (parent,) = victim.processes
    ranks = ranks_of(parent.pid)
    assert len(ranks) == 2
    outcome = victim.strike("SIGKILL of torchrun", parent.kill)
    finish(victim.processes)
    deadline = time.monotonic() + 120
    while any(map(running_still, ranks)):
        assert time.monotonic() < deadline, f"ranks train on without torchrun\n{victim.said()}"
        time.sleep(0.02)
    victim.check_words()
    assert f"SIGHUP: step {victim.newest()} is saved" in victim.said(), victim.said()
    assert victim.newest() == victim.seen()
    victim.dead(outcome, allowed=0)


# scenarios: ranks, and what happens to one victim in turn

SCENARIOS = {
    "kill": (1, [kill_starting, kill_training, kill_writing, kill_ending, kill_training, kill_writing]),
    "kill a rank": (2, [kill_training, kill_writing, kill_starting, kill_ending]),
    "stop a rank": (2, [stop_one_rank]),
    "pause": (1, [stop_and_continue]),
    "pause ranks": (2, [stop_and_continue]),
    "ask": (1, [partial(ask, number=signal.SIGTERM), partial(ask, number=signal.SIGINT), ask_twice, ask_starting]),
    "ask ranks": (
        2,
        [
            *(partial(ask, number=signal.SIGTERM), partial(ask, number=signal.SIGINT)),
            *(partial(ask, number=signal.SIGTERM, everyone=True), partial(ask, number=signal.SIGINT, everyone=True)),
            *(ask_twice, ask_starting),
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
    """Does so many injections to runs in a folder, in turn, and sees the last of them to its end.

    Args:
        injections: functions of a victim.
        seed: of all moments and targets.
        count: injections.
        folder: an empty one.
        references: what the runs are compared with.
        record: a list that gets the outcome of each, also where the campaign fails.
        ranks: processes of a run.
        flags: further ones of its command line.
    """
    victim = Victim(folder, random.Random(seed), references, ranks, flags)
    try:
        early = 0
        while len(victim.outcomes) < count:
            try:
                injections[len(victim.outcomes) % len(injections)](victim)
            except Ended:
                early += 1
                assert early <= 5 + count, "runs end before their moment too often"
                victim.complete()
        victim.complete()
    finally:
        record.extend(victim.outcomes)
        victim.close()
