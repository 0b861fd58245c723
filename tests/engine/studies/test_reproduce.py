"""`remixmatch reproduce`: invalid input, workers and jobs, and a rehearsal that is killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torchvision import datasets as tv

from engine.errors import UserError
from engine.runs.checkpoint import list_checkpoints
from engine.runs.progress import read_metrics
from engine.studies import jobs, reproduce
from engine.studies.jobs import status
from pipelines.data import cache, sources
from pipelines.files import read_json
from tests.engine.studies.made_jobs import entries
from tests.pipelines.data.test_sources import cifar
from tests.processes import ROOT, command

SECONDS = 1200  # Timeout. A slow, busy machine takes minutes for twenty jobs.

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reproduce needs a table"),
        (["cifar"], "unknown table 'cifar'; did you mean cifar10?"),
        (["digits", "--methods", "fixmach"], "--methods: unknown method 'fixmach'; did you mean fixmatch"),
        (["ablation", "--methods", "fixmatch"], "--methods: unknown ablation 'fixmatch'; did you mean remixmatch"),
        (["ablation", "--preset", "cifar"], "unknown preset 'cifar'"),
        (["ablation", "--methods", "k=8"], "no jobs left: the preset already has"),
        (["digits", "--seeds", "1", "1"], "--seeds has a duplicate value: 1 1"),
        (["digits", "--seeds", "-1"], "--seeds must be from 0 to 4294967295, got -1"),
        (["digits", "--steps-scale", "0"], "--steps-scale must be more than 0"),
        (["digits", "--steps-scale", "nan"], "--steps-scale must be more than 0"),
        (["digits", "--workers", "-1"], "--workers must be at least 0"),
        (["digits", "--gpus", "2"], "--gpus must be 1, or 0"),
        (["digits", "--hours", "0"], "--hours must be more than 0"),
        (["digits", "--slurm", "account"], "--slurm expects NAME=VALUE, got 'account'"),
        (["digits", "--sedes", "1"], "unknown flag '--sedes'; did you mean --seeds?"),
        (["digits", "--", "--width", "4"], "digits-40-remixmatch-seed0: --width must be at least 8"),
        (["digits", "--", "--seed", "4"], "--seed after -- cannot be shared by all jobs"),
        (["digits", "--", "--method", "uda"], "--method after -- cannot be shared"),
        (["digits", "--", "--ablate", "k=4"], "--ablate after -- cannot be shared"),
        (["digits", "--", "--out", "x"], "--out after -- cannot be shared"),
        (["digits", "--", "--gpus", "2"], "--gpus after -- cannot be shared"),
        (["ablation", "--", "--k", "4"], "remixmatch-seed3 and cifar10-250-k=1-seed3 have the same configuration"),
        (["digits", "--from", "none.jsonl"], "--from none.jsonl: file not found"),
        (["cifar10"], "remixmatch data prepare cifar10"),
        (["digits", "--", "--labels", "9999"], "digits-40-remixmatch-seed0: --labels: "),
    ],
)  # fmt: skip
def test_invalid_input_gives_one_line(words, message, tmp_path):
    with pytest.raises(UserError) as error:
        reproduce.main(words)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_workers_share_gpus_or_cores(monkeypatch):
    found = entries("digits", seeds=(0,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert reproduce.devices(found) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 3")
    assert reproduce.environments(3, reproduce.devices(found)) == [{"CUDA_VISIBLE_DEVICES": n} for n in ("5", "3", "5")]
    assert len(reproduce.environments(0, ["0", "1"])) == 2
    assert reproduce.devices(entries("digits", "--device", "cpu", seeds=(0,))) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert reproduce.devices(found) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert reproduce.environments(0, []) == [{}]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert reproduce.environments(3, []) == [{"OMP_NUM_THREADS": "2", "REMIXMATCH_CORES": "2"}] * 3
    assert reproduce.environments(1, []) == [{"OMP_NUM_THREADS": "8"}]


# Whole runs, in which each job is a training process


@pytest.fixture
def start():
    """Start the command. Processes that are still running after the test are killed, and with them their jobs."""
    started = []

    def start(log, *words, **options):
        with open(log, "ab") as file:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            started.append(
                subprocess.Popen(command("reproduce", *words), env=environment, stdout=file, stderr=file, **options)
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition, process, log):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, f"the process ended too early\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the condition was never met\n{log.read_text()}"
        time.sleep(0.02)


def claims_of(out, entry):
    folder = out / entry.job.name / "claims"
    return [read_json(folder / f"{n + 1}.json") for n in range(len(list(folder.glob("*.json"))))]


@pytest.fixture
def made_up_cifar(tmp_path, monkeypatch):
    """Prepare a few hundred made-up images in the format of CIFAR-10's archive."""
    folder = tmp_path / "archives"
    folder.mkdir()
    batches = {f"data_batch_{n}": 60 for n in range(1, 6)} | {"test_batch": 40}
    cifar(folder, monkeypatch, tv.CIFAR10, batches, "batches.meta", "labels")
    sources.prepare("cifar10", folder, download=False)


# Jobs of 20 steps, each followed by an evaluation. Batch norm over groups needs K + 2 labeled images.
SMALL = ["--", *("--steps", "10000", "--eval-every", "512", "--checkpoint-every", "2000", "--batch", "10")]
SMALL += ["--width", "8", "--blocks", "1", "--scales", "1", "--device", "cpu"]


def test_a_killed_rehearsal_of_the_ablations_is_resumed(made_up_cifar, tmp_path, start):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    words = ["ablation", "--steps-scale", "0.002", "--workers", "2", "--out", str(out), *SMALL]
    found = entries("ablation", *SMALL[1:], steps_scale=0.002)
    assert len(found) == 20 and {entry.job.config.steps for entry in found} == {20}

    def states():
        return [status(out, entry.job).state for entry in found]

    def checkpoints(entry):
        return list((out / entry.job.name / "checkpoints").glob("step-*.pt"))

    def halfway():
        running = [entry for entry in found if status(out, entry.job).state == "running"]
        return states().count("done") >= 4 and any(map(checkpoints, running))

    process = start(log, *words, start_new_session=True)

    def suspended_halfway():
        """Check again after suspending the processes, because a job may have ended in between."""
        if not halfway():
            return False
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        if halfway():
            return True
        os.killpg(process.pid, signal.SIGCONT)
        return False

    until(suspended_halfway, process, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {
        entry.job.name: (out / entry.job.name / "summary.json").stat().st_mtime_ns
        for entry, state in zip(found, states(), strict=True)
        if state == "done"
    }
    begun = [entry for entry in found if claims_of(out, entry) and entry.job.name not in before]
    assert 4 <= len(before) < 20 and begun, states()
    saved = {entry.job.name: min(checkpoints(entry)).stat().st_mtime_ns for entry in begun if checkpoints(entry)}
    assert saved

    process = start(log, *words)
    assert process.wait(SECONDS) == 0, log.read_text()
    assert states() == ["done"] * 20, log.read_text()
    for entry in found:
        folder, claims = out / entry.job.name, claims_of(out, entry)
        # No job was lost or done twice.
        assert len(claims) == (2 if entry in begun else 1)
        if entry.job.name in before:
            assert (folder / "summary.json").stat().st_mtime_ns == before[entry.job.name]
        evaluated = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "test_accuracy" in row]
        assert evaluated == list(range(1, 21))
        assert not (folder / "failed.json").exists()
        if entry.job.name in saved:  # It was resumed, not restarted.
            kept = {path.stat().st_mtime_ns for path in checkpoints(entry)}
            assert saved[entry.job.name] in kept or min(kept) > saved[entry.job.name]
            assert "starting from step 0" not in (folder / "log.txt").read_text()
    text = (out / "table.md").read_text()
    assert "REHEARSAL with 20 steps instead of 1,048,576; settings changed from the presets: " in text.splitlines()[0]
    assert len([line for line in text.splitlines() if line.startswith("| cifar10-250 |")]) == 20
    assert "(one seed)" in text and "Not in the table" not in text


def test_a_short_table_of_unequal_classes(tmp_path, monkeypatch, capsys):
    """With made-up images in place of Fashion-MNIST, two steps and a quarter of the labels."""
    folder = tmp_path / "data" / "fashion-mnist-16"
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    with cache.writing(folder) as temporary:
        for part, count in (("train", 1500), ("test", 40)):
            images = cache.array(temporary, f"{part}_images", (count, 16, 16, 3))
            images[:] = np.random.default_rng(count).integers(0, 256, images.shape)
            cache.save(temporary, f"{part}_labels", np.arange(count) % 10)
        cache.finish(temporary, "fashion-mnist-16", tuple("abcdefghij"))
    small = ["--", *("--steps", "2", "--labels", "200", "--eval-every", "1", "--batch", "4", "--width", "8")]
    out = tmp_path / "out"
    names = ["remixmatch", "marginal=labels", "fixmatch"]
    words = ["imbalance", "--methods", *names, "--preset", "fashion-lt10-small", "--seeds", "1", "--workers", "2"]
    reproduce.main([*words, "--out", str(out), *small, "--blocks", "1", "--device", "cpu"])
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out and "Not in the table" not in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| fashion-lt10-small")]
    assert [row[1] for row in rows] == names * 2 and "| preset | method | a | b | c |" in text
    splits = [read_json(path) for path in out.glob("*/split.json")]
    assert len(splits) == 3 and len({split["sha256"] for split in splits}) == 1
    assert {split["labels_per_class"][0] for split in splits} == {50}
    assert {split["unlabeled_per_class"][0] for split in splits} == {150}


DIGITS = ["digits", "--seeds", "0", "--methods", "supervised"]
QUICK = [
    "--",
    *("--batch", "8", "--width", "8", "--device", "cpu", "--eval-every", "100", "--checkpoint-every", "9999"),
]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stops_with_its_worker_and_is_resumed(tmp_path, number, start):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    words = [*DIGITS, "--out", str(out), *QUICK, "--steps"]
    (entry,) = entries("digits", *QUICK[1:], "--steps", "800", seeds=(0,), rows=("supervised",))
    folder = out / entry.job.name
    process = start(log, *words, "800")
    until(lambda: jobs.last_step(folder / "metrics.jsonl") >= 40, process, log)
    os.kill(process.pid, number)
    code = process.wait(60)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    pid, began = claims_of(out, entry)[0]["child"]
    deadline = time.monotonic() + 60
    while jobs.started(pid) == began:
        assert number == signal.SIGKILL and time.monotonic() < deadline, "training did not stop"
        time.sleep(0.05)
    # This is the only checkpoint: the stop saved it.
    (saved,) = (int(path.stem.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints"))
    assert 40 <= saved < 800 and saved >= jobs.last_step(folder / "metrics.jsonl")
    assert status(out, entry.job).state == "waiting"
    if number == signal.SIGTERM:
        assert "1 waiting; running jobs are saved" in log.read_text()
        assert f"use --resume --out {folder} to continue" in (folder / "log.txt").read_text()
    reached = jobs.last_step(folder / "metrics.jsonl")
    process = start(log, *words, "800")
    assert process.wait(SECONDS) == 0, log.read_text()
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(20, 801, 20)) and 40 <= reached < 800
    assert len(claims_of(out, entry)) == 2 and status(out, entry.job).state == "done"


@pytest.mark.skipif(find_spec("submitit") is None, reason="needs submitit: pip install 'remixmatch-engine[slurm]'")
def test_submitit_jobs_share_the_work_and_resume_after_their_time_limit(tmp_path):
    out = tmp_path / "out"
    flags = [*QUICK, "--steps", "800"]
    words = ["digits", "--seeds", "0", "1", "--methods", "supervised", "--out", str(out)]
    found = entries("digits", *flags[1:], seeds=(0, 1), rows=("supervised",))
    submit = [*words, "--submit", "local", "--workers", "2", "--gpus", "0", *flags]
    script = f"from engine.studies.reproduce import main; main({submit!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = tmp_path / "output.txt"
    with output.open("wb") as file:  # Not a pipe, which the jobs would keep open.
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, stdout=file, stderr=file, timeout=SECONDS
        )
    assert done.returncode == 0 and output.read_text().startswith("2 jobs: ") and "--status" in output.read_text()

    def states():
        return [status(out, entry.job).state for entry in found]

    def logs():
        return "\n".join(path.read_text() for path in (out / "jobs").glob("*_log.*"))

    def wait(condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{states()}\n{logs()}"
            time.sleep(0.05)

    wait(lambda: jobs.last_step(out / found[0].job.name / "metrics.jsonl") >= 20)
    first = claims_of(out, found[0])[0]
    os.kill(first["worker"][0], signal.SIGUSR2)  # As Slurm does before a job's time limit.
    wait(lambda: states() == ["done"] * 2)
    assert (
        len(claims_of(out, found[0])) == 2
        and "SIGTERM: saved step" in (out / found[0].job.name / "log.txt").read_text()
    )
    wait(lambda: len(list((out / "jobs").glob("*_result.pkl"))) == 2)
    assert len({claims_of(out, entry)[0]["worker"][0] for entry in found}) == 2
    assert "Traceback" not in logs(), logs()


def test_without_submitit_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'remixmatch-engine\[slurm\]'"):
        reproduce.main(["digits", "--submit", "local"])


@pytest.mark.skipif(find_spec("submitit") is None, reason="needs submitit: pip install 'remixmatch-engine[slurm]'")
@pytest.mark.parametrize(("cluster", "seen"), [("local", ["0", "1", "0"]), ("slurm", ["slurm's"] * 3)])
def test_local_jobs_share_the_gpus(cluster, seen, monkeypatch):
    import submitit

    given = []

    class Executor:
        def __init__(self, **_):
            pass

        def update_parameters(self, **_):
            pass

        def submit_array(self, jobs):
            given.extend(jobs)
            return []

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reproduce.main(["digits", "--submit", cluster, "--workers", "3"])
    found = []
    monkeypatch.setattr(reproduce, "main", lambda *_: found.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    for job in given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "slurm's")
        job()
    assert found == seen
