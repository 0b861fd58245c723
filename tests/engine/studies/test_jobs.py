"""Jobs: their identity, claims on them, and jobs that fail or are interrupted."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from engine.config.config import Config, config_json
from engine.config.presets import preset
from engine.studies import jobs
from engine.studies.jobs import Job, Stop, claim, claimable, digest, newest_claim, status, work
from pipelines.files import read_json

ROOT = Path(__file__).parents[3]
# Stands in for a training process, with arguments FOLDER STEPS; it executes the file `does` in the root folder.
CHILD = """
import json, os, pathlib, signal, sys, time
folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
with open(folder.parent / "ran.txt", "a") as file:
    file.write(folder.name + "\\n")
does = folder.parent / "does"
exec(does.read_text() if does.exists() else "")
(folder / "summary.json").write_text(json.dumps(SUMMARY | {"steps": steps}))
"""
SUMMARY = {
    "test_accuracy": 1.0, "median_last_20": 2.0, "train_seconds": 3.0, "images_per_second": 4.0, "device": "CPU",
    "versions": {},
}  # fmt: skip
CHILD = f"SUMMARY = {SUMMARY}\n{CHILD}"


def fake(folder, config):
    return [sys.executable, "-I", "-S", "-c", CHILD, str(folder), str(config.steps)]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a folder for jobs whose training process is CHILD."""
    monkeypatch.setattr(jobs, "train_command", fake)
    folder = tmp_path / "jobs"
    folder.mkdir()
    return folder


def some(count):
    return [Job(f"digits-seed{seed}", dataclasses.replace(preset("digits-40"), seed=seed)) for seed in range(count)]


def does(root, text):
    (root / "does").write_text(text)


def ran(root):
    return (root / "ran.txt").read_text().split()


def states(root, wanted):
    return [status(root, job).state for job in wanted]


def finish(root, wanted, workers=1, **options):
    return [each.state for each in work(root, wanted, [{}] * workers, "commit", options.pop("stop", Stop()), **options)]


def test_a_job_sends_its_metrics_to_the_logger_of_its_configuration(tmp_path):
    """A resumed run takes it from the command line alone."""
    command = jobs.train_command(tmp_path, dataclasses.replace(preset("digits-40"), log="wandb"))
    assert command[1:5] == ["-m", "engine", "train", "digits-40"] and command[-2:] == ["--log", "wandb"]


# Identity


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_the_hash_covers_every_field_that_can_change_results(field):
    base = preset("cifar10-250")
    value = getattr(base, field)
    other = {bool: lambda: not value, str: lambda: value + "x", tuple: lambda: (0.5, 0.5)}.get(
        type(value), lambda: value + 1
    )
    changed = dataclasses.replace(base, **{field: other()})
    same = {
        *("device", "mode", "views", "resident", "deterministic", "stem_channels", "tune", "view_steps", "prefetch"),
        *("view_threads", "log_every", "checkpoint_every", "keep", "log", "cudnn_plans", "convolutions"),
    }
    assert (digest(changed) == digest(base)) == (field in same)


def test_the_hash_ignores_number_types_and_default_values():
    base = preset("cifar10-250")
    assert digest(dataclasses.replace(base, w_u=75)) == digest(dataclasses.replace(base, w_u=75.0))
    assert "k" not in jobs.identity(base) and jobs.identity(dataclasses.replace(base, k=1))["k"] == 1
    assert digest(base) == digest(Config(**json.loads(config_json(base)) | {"class_distribution": ()}))


def test_a_job_is_done_if_its_own_summary_exists(root):
    (job,) = some(1)
    folder = root / job.name
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"steps": job.config.steps}))
    assert states(root, [job]) == ["waiting"], "no configuration"
    (folder / "config.json").write_text(config_json(dataclasses.replace(job.config, device="cpu", keep=1)))
    assert states(root, [job]) == ["done"]
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"steps": 7}))
    assert states(root, [job]) == ["waiting"]
    (folder / "summary.json").write_text('{"steps":')
    assert states(root, [job]) == ["waiting"]


def test_a_changed_configuration_is_another_job(root):
    (job,) = some(1)
    assert finish(root, [job]) == ["done"]
    changed = dataclasses.replace(job, config=dataclasses.replace(job.config, lr=0.003))
    assert states(root, [changed]) == ["waiting"] and changed.name != job.name
    assert finish(root, [job, changed]) == ["done", "done"] and ran(root) == [job.name, changed.name]


def test_a_folder_with_another_configuration_is_left_alone(root):
    (job,) = some(1)
    folder = root / job.name
    folder.mkdir()
    (folder / "config.json").write_text(config_json(dataclasses.replace(job.config, k=5, device="cpu")))
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"steps": job.config.steps}))
    assert finish(root, [job]) == ["failed"] and not (root / "ran.txt").exists()
    assert "has a different configuration (k 5 -> 2); move the folder away" in status(root, job).reason
    (folder / "config.json").write_text("{")
    assert "not a configuration of this version" in status(root, job).reason


# Claims


def race(folder, number):
    """Claim as many folders as possible, while other processes do the same."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    (folder / f"ready-{number}").touch()
    while not (folder / "go").exists():
        pass
    got = [path.name for path in folders if claim(path)]
    (folder / f"got-{number}").write_text("\n".join(got))


def gone():
    """Return process ID and start time of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    found = [process.pid, jobs.started(process.pid)]
    assert found[1] > 0
    process.communicate()
    assert jobs.started(found[0]) == 0
    return found


def leave_claim(folder, **values):
    """Write a claim of this machine with a dead worker, or with the given values, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    owned = claim(folder)
    owned._write(**({"worker": [2**22 + 1, 1]} | values))
    return owned.path


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_several_racing_processes_gets_a_job(tmp_path, stale):
    for number in range(300):
        folder = tmp_path / f"job-{number:03}"
        folder.mkdir()
        if stale:
            leave_claim(folder)
    script = (
        "import sys, pathlib; from tests.engine.studies.test_jobs import race; "
        "race(pathlib.Path(sys.argv[1]), sys.argv[2])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    racers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(number)], env=environment)
        for number in (1, 2, 3)
    ]
    while len(list(tmp_path.glob("ready-*"))) < len(racers):
        time.sleep(0.01)
        assert all(racer.poll() is None for racer in racers)
    (tmp_path / "go").touch()
    assert [racer.wait(60) for racer in racers] == [0] * len(racers)
    got = [name for path in tmp_path.glob("got-*") for name in path.read_text().split()]
    assert sorted(got) == [f"job-{number:03}" for number in range(300)]


def test_a_claim_lasts_as_long_as_its_worker_or_its_child(tmp_path):
    mine = [os.getpid(), jobs.started(os.getpid())]
    for number, (worker, child, free) in enumerate([
        (mine, [0, 0], False),
        (gone(), [0, 0], True),
        ([mine[0], mine[1] + 1], [0, 0], True),  # The process ID was reused.
        (gone(), mine, False),
        (gone(), [mine[0], mine[1] - 1], True),
    ]):  # fmt: skip
        path = leave_claim(tmp_path / str(number), worker=worker, child=child)
        os.utime(path, (1, 1))
        assert claimable(path) == free, number
        owned = claim(tmp_path / str(number))
        assert (owned is not None) == free
        assert newest_claim(tmp_path / str(number)) == (owned.path if owned else path)


def test_a_claim_of_another_machine_lasts_while_it_sends_heartbeats(tmp_path, monkeypatch):
    path = leave_claim(tmp_path, machine="another")
    assert not claimable(path)
    for clock in (-1e6, 1e6):  # This machine's clock does not matter.
        with monkeypatch.context() as context:
            context.setattr(jobs.time, "time", partial(float, time.time() + clock))
            assert not claimable(path)
    old = time.time() - jobs.STALE_SECONDS
    os.utime(path, (old + 60, old + 60))
    assert not claimable(path)
    os.utime(path, (old - 60, old - 60))
    assert claimable(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["claims"], "the probe of the clock is removed"
    path.write_text("")  # Its owner was killed before writing it.
    assert not claimable(path)
    os.utime(path, (old - 60, old - 60))
    assert claimable(path)


def test_a_released_claim_is_free_and_names_its_last_owner(root):
    (job,) = some(1)
    owned = claim(root / job.name, "abc")
    assert claim(root / job.name) is None and status(root, job).state == "running"
    owned.release()
    found = status(root, job)
    assert found.state == "waiting" and found.commit == "abc" and found.host
    assert claim(root / job.name).path.name == "2.json" and owned.lost()


# Work


def test_any_number_of_workers_does_each_job_once_and_in_order(root):
    wanted = some(12)
    assert finish(root, wanted, workers=1) == ["done"] * 12 and ran(root) == [job.name for job in wanted]
    more = some(30)
    script = (
        "import sys, pathlib; from tests.engine.studies import test_jobs as t; t.jobs.train_command = t.fake\n"
        "t.finish(pathlib.Path(sys.argv[1]), t.some(30), workers=2)"
    )
    command = [sys.executable, "-c", script, str(root)]
    others = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(2)]
    assert [other.wait(120) for other in others] == [0, 0]
    assert states(root, more) == ["done"] * 30 and sorted(ran(root)) == sorted(job.name for job in more)


def test_each_worker_has_its_environment_variables(root):
    does(root, "(folder / 'seen').write_text(os.environ['CUDA_VISIBLE_DEVICES'])")
    wanted = some(1)
    work(root, wanted, [{"CUDA_VISIBLE_DEVICES": "7"}], "commit", Stop())
    assert (root / wanted[0].name / "seen").read_text() == "7"


def test_a_failed_job_says_why_and_does_not_stop_others(root):
    does(root, "if 'seed1' in folder.name: print('much\\nremixmatch: no memory'); sys.exit(2)")
    wanted = some(3)
    assert finish(root, wanted) == ["done", "failed", "done"]
    assert status(root, wanted[1]).reason == "exit code 2: remixmatch: no memory"
    kept = json.loads((root / wanted[1].name / "failed.json").read_text())
    assert kept["exit_code"] == 2 and kept["last_lines"] == ["much", "remixmatch: no memory"]
    assert finish(root, wanted) == ["done", "failed", "done"] and len(ran(root)) == 3, (
        "failed jobs are not retried automatically"
    )
    does(root, "")
    jobs.forget_failures(root, wanted)
    assert states(root, wanted) == ["done", "waiting", "done"]
    assert finish(root, wanted) == ["done"] * 3 and len(ran(root)) == 4
    assert (root / wanted[1].name / "failed-1.json").exists()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("sys.exit(0)", "ended without a summary.json of all its steps"),
        ("1 / 0", "exit code 1: ZeroDivisionError: division by zero"),
    ],
)
def test_failures_have_a_reason(root, what, reason):
    does(root, what)
    wanted = some(1)
    assert finish(root, wanted) == ["failed"] and status(root, wanted[0]).reason == reason


def test_stopped_jobs_can_be_resumed(root):
    does(root, "(folder / 'up').touch(); time.sleep(60)")
    wanted, stop = some(3), Stop()

    def ask():
        while not (root / wanted[0].name / "up").exists():
            time.sleep(0.01)
        stop.ask(signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    assert finish(root, wanted, stop=stop) == ["waiting"] * 3 and ran(root) == [wanted[0].name]
    asking.join()
    assert not stop.children and read_claim(root, wanted[0])["released"]
    does(root, "")
    assert finish(root, wanted) == ["done"] * 3


def read_claim(root, job):
    return read_json(newest_claim(root / job.name))


def test_a_child_that_was_asked_to_stop_is_not_restarted_immediately(root):
    does(root, "sys.exit(143)")
    wanted = some(2)
    assert finish(root, wanted) == ["waiting"] * 2 and len(ran(root)) == 2


def test_a_worker_that_lost_its_claim_stops(root, monkeypatch):
    """This happens if its machine was suspended and another one took over the job."""
    monkeypatch.setattr(jobs, "RENEW_SECONDS", 0.1)
    does(root, "(folder / 'claims' / '2.json').write_text('{\"released\": true}'); time.sleep(60)")
    (job,) = some(1)
    began = time.monotonic()
    assert finish(root, [job]) == ["waiting"] and time.monotonic() - began < 30
    assert newest_claim(root / job.name).name == "2.json" and not (root / job.name / "failed.json").exists()
    assert not read_json(root / job.name / "claims" / "1.json")["released"]


def test_a_job_that_was_finished_just_before_the_claim_is_not_repeated(root, monkeypatch):
    (job,) = some(1)

    def late(folder, commit):
        with monkeypatch.context() as context:
            context.setattr(jobs, "claim", claim)
            assert finish(root, [job]) == ["done"]
        return claim(folder, commit)

    monkeypatch.setattr(jobs, "claim", late)
    assert finish(root, [job]) == ["done"] and ran(root) == [job.name]


@pytest.mark.parametrize("alive", [False, True])
def test_a_job_of_another_machine_is_awaited_until_that_sends_a_heartbeat(root, monkeypatch, alive):
    monkeypatch.setattr(jobs, "STALE_SECONDS", 4.0 if alive else 1.0)
    first, other = some(2)
    path = leave_claim(root / other.name, machine="another")
    end = threading.Event()

    def live():
        while not end.wait(0.3):
            os.utime(path)

    living = threading.Thread(target=live)
    if alive:
        living.start()
    try:
        assert finish(root, [first, other]) == ["done", "running" if alive else "done"]
    finally:
        end.set()
        if alive:
            living.join()


def test_a_folder_that_is_not_writable_raises_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        finish(tmp_path / "file", some(1))


def test_the_last_step_is_that_of_the_last_complete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert jobs.last_step(path) == 0
    path.write_text("".join(json.dumps({"step": n, "loss": "x" * 50}) + "\n" for n in range(1, 999)) + '{"step": 99')
    assert jobs.last_step(path) == 998 and jobs.last_value(path, "step_ms") == 0
    with path.open("a") as file:
        file.write('9}\n{"step": 1000, "step_ms": 12.5}\n{"step": 1001, "loss": 1.0}\n')
    assert jobs.last_step(path) == 1001 and jobs.last_value(path, "step_ms") == 12.5
