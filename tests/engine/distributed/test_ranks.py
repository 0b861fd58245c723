"""Runs on several ranks: equal results on any number of ranks, and errors."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine.commands import main as cli
from engine.distributed import collectives, launch
from engine.errors import UserError
from engine.runs.progress import ProgressLine, read_metrics
from engine.runs.setup import setup_run
from engine.training.trainer import Trainer, digests
from tests import processes
from tests.processes import ROOT, assert_close, assert_same_bits, finish, free_port, gloo_threads, start, start_ranks

# Double precision, since Adam at the preset's learning rate amplifies the rounding of single precision to 1e-3 within
# 30 steps.
FLAGS = [
    *("--precision", "fp64", "--bn", "split", "--bn-groups", "2", "--device", "cpu", "--quiet"),
    *("--eval-every", "5", "--log-every", "1", "--batch", "8", "--width", "8"),
]
# Single precision and the preset's own size, for tests of bitwise equality.
TWO_MICRO_BATCHES = ("--precision", "fp32", "--micro-batches", "2", "--batch", "16", "--width", "16")


def train(folder, ranks, *flags):
    """Train digits-40 on a number of ranks, which must succeed."""
    return processes.train(folder, ranks, *FLAGS, *flags)


@pytest.fixture(scope="module")
def steps(long):
    """Steps of the compared runs; a fifth of them is a multiple of --eval-every."""
    return 50 if long else 25


@pytest.fixture(scope="module")
def one(steps, tmp_path_factory):
    """A run on one rank."""
    return train(tmp_path_factory.mktemp("ranks") / "one", 1, "--steps", steps)


def test_two_ranks_give_the_losses_of_one(one, steps, tmp_path):
    two = train(tmp_path / "two", 2, "--steps", steps, "--check-ranks", 5)
    assert_close(one, two)
    assert [row["step"] for row in read_metrics(two / "metrics.jsonl") if "loss" in row] == list(range(1, steps + 1))


def train_with_resumes(folder, steps, ranks, *flags):
    """Train two, four and five fifths of a run, each on the given number of ranks."""
    for part, each in zip((2, 4, 5), ranks, strict=True):
        train(folder, each, *flags, "--steps", steps * part // 5, "--resume")


def test_a_run_resumes_on_another_number_of_ranks(one, steps, tmp_path):
    train_with_resumes(tmp_path / "run", steps, (1, 2, 1))
    assert_close(one, tmp_path / "run")


@pytest.fixture(scope="module")
def two_micro_batches(steps, tmp_path_factory):
    """A run on one rank with two micro-batches."""
    return train(tmp_path_factory.mktemp("ranks") / "micro", 1, *TWO_MICRO_BATCHES, "--steps", steps)


def test_two_ranks_equal_one_rank_with_two_micro_batches_bitwise(two_micro_batches, steps, tmp_path):
    assert_same_bits(two_micro_batches, train(tmp_path / "two", 2, *TWO_MICRO_BATCHES, "--steps", steps))


def test_pool_statistics_of_two_ranks_equal_those_of_two_micro_batches_bitwise(tmp_path):
    flags = (*TWO_MICRO_BATCHES, "--bn", "joint", "--bn-stats", "pool", "--bn-momentum", "0.1", "--steps", 3)
    assert_same_bits(train(tmp_path / "one", 1, *flags), train(tmp_path / "two", 2, *flags))


def test_a_run_with_micro_batches_resumes_bitwise_on_another_number_of_ranks(two_micro_batches, steps, tmp_path):
    train_with_resumes(tmp_path / "run", steps, (2, 1, 2), *TWO_MICRO_BATCHES)
    assert_same_bits(two_micro_batches, tmp_path / "run")


def test_ranks_reduce_the_gradients_of_all_their_micro_batches(tmp_path):
    flags = ("--bn", "joint", "--micro-batches", 4, "--steps", 8)
    assert_close(train(tmp_path / "one", 1, *flags), train(tmp_path / "two", 2, *flags, "--check-ranks", 1))


def test_two_ranks_of_the_supervised_baseline_give_the_losses_of_one(tmp_path):
    flags = ("--method", "supervised", "--steps", 10)
    assert_close(train(tmp_path / "one", 1, *flags), train(tmp_path / "two", 2, *flags))


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "fixmatch", "--mu", 2), ("--method", "mixmatch"), ("--ablate", "mean-guess"),
        ("--method", "mean-teacher"), ("--method", "adamatch"),
        ("--views", "fused", "--resident", "host"), ("--views", "dali-graph"),
    ],
)  # fmt: skip
def test_two_ranks_equal_two_micro_batches_bitwise_with_other_methods_and_views(tmp_path, flags):
    flags = (*flags, *TWO_MICRO_BATCHES, "--steps", 10)
    assert_same_bits(train(tmp_path / "one", 1, *flags), train(tmp_path / "two", 2, *flags))


@pytest.mark.parametrize(
    "method",
    [
        "flexmatch",
        "freematch",
        pytest.param("dash", marks=pytest.mark.long),
        pytest.param("softmatch", marks=pytest.mark.long),
    ],
)
def test_methods_with_a_state_resume_bitwise_on_another_number_of_ranks(tmp_path, method):
    # Dash's first ten epochs, of a step each, train on labeled images alone.
    flags = ("--method", method, "--mu", 2, "--k", 2, "--dash-epoch-kimg", 16 / 1024, "--blocks", 1, *TWO_MICRO_BATCHES)
    whole = train(tmp_path / "whole", 1, *flags, "--steps", 12)
    first = 5 if method != "dash" else 10
    train(tmp_path / "run", 2, *flags, "--steps", first, "--check-ranks", 1)
    assert_same_bits(whole, train(tmp_path / "run", 1, *flags, "--steps", 12, "--resume"))


@pytest.mark.parametrize("statistics", ["all", "pool"])
def test_synchronized_batch_norm_is_batch_norm_over_the_global_batch(tmp_path, statistics):
    flags = ("--bn-stats", statistics, "--bn-momentum", "0.1", "--steps", 10)
    joint = train(tmp_path / "joint", 1, "--bn", "joint", *flags)
    assert_close(joint, train(tmp_path / "sync", 2, "--bn", "sync", *flags))


@pytest.mark.compiler
@pytest.mark.long
def test_compiled_ranks_agree_with_eager_ones(tmp_path):
    flags = ("--precision", "fp32", "--steps", 3, "--scales", 1, "--blocks", 1, "--check-ranks", 1)
    eager, compiled = (train(tmp_path / mode, 2, *flags, "--mode", mode) for mode in ("eager", "compile"))
    eager, compiled = ([row for row in read_metrics(f / "metrics.jsonl") if "loss" in row] for f in (eager, compiled))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in eager], rel=1e-3)


def test_bf16_gradients_train_like_fp32_gradients(tmp_path):
    flags = ("--precision", "fp32", "--steps", 6)
    whole, half = (train(tmp_path / g, 2, *flags, "--gradients", g, "--check-ranks", 1) for g in ("fp32", "bf16"))
    whole, half = ([row["loss"] for row in read_metrics(f / "metrics.jsonl") if "loss" in row] for f in (whole, half))
    assert whole[0] == half[0] and whole[1:] != half[1:]
    assert half == pytest.approx(whole, rel=0.05)


def test_a_change_of_batch_statistics_on_resume_is_a_warning(tmp_path):
    folder = tmp_path / "run"
    train(folder, 1, "--bn", "joint", "--steps", 3)
    train(folder, 2, "--bn", "joint", "--steps", 6, "--resume")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line[:46] for line in lines if "changed from" in line] == ["remixmatch: micro-batches changed from 1 to 2 "]


def test_invalid_input_is_reported_once_by_all_ranks(one, tmp_path):
    log = tmp_path / "log"
    ranks = start_ranks(log, 2, "train", "digits-40", "--out", one, *FLAGS, "--steps", 50)
    assert finish(ranks) == [2, 2]
    (line,) = log.read_text().splitlines()
    assert line.startswith("remixmatch: ") and "already contains a run" in line


def test_differing_ranks_are_reported_with_step_and_field(tiny, tmp_path, monkeypatch):
    progress = ProgressLine(4, quiet=True)
    trainer = Trainer(setup_run(tiny(), tmp_path), progress, check_ranks=2)
    progress.start(0, trainer.feed.images_per_step)
    trainer.begin()
    try:
        trainer.advance()
        own = digests(trainer.state.state_dict() | {"policy": trainer.feed.policy.state_dict()})
        assert {
            "network.stem.weight",
            "p_model_history",
            "step",
            "policy.weights",
            "optimizer.state.0.exp_avg",
        } <= own.keys()
        with torch.no_grad():  # A bit of one element.
            trainer.state.network.stem.weight[0, 0, 0, 0] *= 1 + 2**-20
        changed = digests(trainer.state.state_dict() | {"policy": trainer.feed.policy.state_dict()})
        assert [name for name in own if own[name] != changed[name]] == ["network.stem.weight"]
        monkeypatch.setattr(collectives, "all_gather_object", lambda mine: [own, own, mine])
        with pytest.raises(UserError, match=r"differ after step 0: network.stem.weight on rank 2 differ"):
            trainer._compare_ranks()
        monkeypatch.setattr(collectives, "all_gather_object", lambda mine: [mine, mine])
        trainer._compare_ranks()
    finally:
        trainer.end()


def test_a_rank_without_progress_exits_with_a_message():
    script = (
        "import time\nfrom engine.distributed.watchdog import Watchdog\n"
        "with Watchdog(1.0, rank=3) as watchdog:\n"
        "    for step in range(8):\n        time.sleep(0.15)\n        watchdog.alive(f'step {step}')\n"
        "    print('alive', flush=True)\n    time.sleep(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75 and done.stdout == "alive\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("remixmatch: rank 3: no progress in step 7 for 1 s (--timeout)")


def test_a_rank_that_cannot_handle_a_signal_exits_with_a_message():
    """A rank that waits in native code, such as for a captured collective, never runs Python's signal handlers.

    The main thread waits on a native condition variable, which releases its mutex. The thread that then acquires the
    mutex knows that the main thread is in native code. It sends the signal and keeps the mutex, so the wait never ends.
    """
    script = (
        "import ctypes, os, signal, threading\nfrom engine.distributed import watchdog as module\n"
        "module.SIGNAL_TIMEOUT = 1.0\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # Under nohup it would be ignored.
        "stop, system = module.StopRequest(), ctypes.CDLL(None)\n"
        "mutex, condition = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)\n"
        "def ask():\n    system.pthread_mutex_lock(mutex)\n    os.kill(os.getpid(), signal.SIGHUP)\n"
        "with stop.listening(), module.Watchdog(250.0, 3, stop) as watchdog:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # This one is handled, so the process may take its time.
        "    assert stop.number == signal.SIGTERM\n"
        "    threading.Event().wait(2.5)\n"
        "    print('alive', flush=True)\n    stop.number = 0\n"
        "    watchdog.alive('step 7')\n    system.pthread_mutex_lock(mutex)\n"
        "    threading.Thread(target=ask, daemon=True).start()\n"
        "    system.pthread_cond_wait(condition, mutex)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGHUP and done.stdout == "alive\n", done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("remixmatch: rank 3: no progress in step 7 since SIGHUP 1 s ago: another rank hangs")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpus", "0"), "--gpus must be at least 1, got 0"),
        (("--gpus", "3"), "--batch 16 cannot be shared by 3 ranks"),
        (("--gpus", "2", "--bn", "split"), "--bn-groups must be a multiple of the 2 ranks"),
        (("--gpus", "2", "--labels", "45"), "positive multiple of 10 labels"),
        (("--max-restarts", "-1"), "--max-restarts must be at least 0, got -1"),
        (("--timeout", "0"), "--timeout must be more than 0 seconds, got 0.0"),
    ],
)
def test_invalid_flags_are_reported_before_ranks_start(capfd, tmp_path, flags, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "digits-40", "--out", str(tmp_path / "run"), *flags])
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


def test_torchrun_does_not_parse_the_flags_of_train(monkeypatch):
    """Without care it would read --log as an abbreviation of --log-dir."""
    parsed = []
    monkeypatch.setattr("torch.distributed.run.run", parsed.append)
    monkeypatch.setattr("os.environ", dict(os.environ))  # `launch` adds to it.
    before = signal.getsignal(signal.SIGINT)
    try:
        launch.launch(["train", "digits-40", "--log", "none"], 2, 0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert parsed[0].module and parsed[0].training_script == "engine"
    assert parsed[0].training_script_args == ["train", "digits-40", "--log", "none"]


@pytest.mark.parametrize("command", ["train", "profile"])
def test_leaving_the_group_ends_its_threads(tmp_path, command):
    """A thread of gloo that is still there when Python exits can abort the process."""
    small = ("--steps", 3, "--batch", 4, "--k", 1, "--width", 8, "--device", "cpu", "--quiet")
    statement = "from engine.commands.main import main; main(sys.argv[1:])"
    joined, left = gloo_threads(statement, command, "digits-40", *small, "--out", tmp_path / "run")
    assert joined > 0 and left == 0


def test_ranks_with_invalid_input_end_the_threads_of_their_group():
    statement = """
import contextlib, os
from engine.commands.main import main
os.environ["TORCHELASTIC_RUN_ID"] = "run"  # A rank of torchrun joins the group before it looks at its input.
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
    """
    joined, left = gloo_threads(statement, "train", "digits-40", "--labels", 45, "--device", "cpu")
    assert joined > 0 and left == 0


def test_more_ranks_than_gpus_are_an_error(capfd, tmp_path, monkeypatch):
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "digits-40", "--out", str(tmp_path / "run"), "--gpus", "2"])
    assert ended.value.code == 2
    assert "--gpus 2: torch sees only 1; --device cpu" in capfd.readouterr().err


def test_a_rank_without_the_data_reports_an_error(tmp_path):
    """Rank 0 sets up the run for all ranks. The others open the same data, which their machine may lack."""
    images = tmp_path / "pets"
    for number in range(24):
        path = images / ("train" if number < 16 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 10 * number, np.uint8)).save(path)
    here, log = str(tmp_path / "data"), tmp_path / "log"
    assert finish([start(log, "data", "prepare", images, "--size", 16, "--data-dir", here)]) == [0]
    words = ["train", "folder", "--data", images, "--out", tmp_path / "run", "--device", "cpu", "--width", 16]
    words += ["--batch", 4, "--k", 1, "--lag", 3, "--blocks", 1, "--steps", 2, "--timeout", 60]
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "run"}
    logs = [tmp_path / f"rank{rank}" for rank in range(2)]
    ranks = [
        start(logs[rank], *words, RANK=rank, LOCAL_RANK=rank, REMIXMATCH_DATA=data, **group)
        for rank, data in enumerate((here, str(tmp_path / "empty")))
    ]
    assert finish(ranks) == [1, 1]
    assert "rank 1: no prepared data in" in logs[1].read_text() and "rank 0: lost the other" in logs[0].read_text()
