"""Several ranks: the run of one, on any number of them; settings that they have; what they do with a mistake."""

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
from tests.processes import ROOT, assert_close, assert_same_bits, finish, free_port, start, start_ranks

# double precision: at the preset's learning rate Adam makes 1e-3 of single precision's rounding within 30 steps
FLAGS = [
    *("--precision", "fp64", "--bn", "split", "--bn-groups", "2", "--device", "cpu", "--quiet"),
    *("--eval-every", "5", "--log-every", "1", "--batch", "8", "--width", "8"),
]
# of the preset's own size: equal bits are so at any
IN_TURN = ("--precision", "fp32", "--micro-batches", "2", "--batch", "16", "--width", "16")


def train(folder, ranks, *flags):
    """Trains digits-40 on so many ranks, which have to succeed."""
    return processes.train(folder, ranks, *FLAGS, *flags)


@pytest.fixture(scope="module")
def steps(long):
    """Of the runs that are compared; a fifth of them is a multiple of --eval-every."""
    return 50 if long else 25


@pytest.fixture(scope="module")
def one(steps, tmp_path_factory):
    """A run on one rank."""
    return train(tmp_path_factory.mktemp("ranks") / "one", 1, "--steps", steps)


def test_two_ranks_give_the_losses_of_one(one, steps, tmp_path):
    two = train(tmp_path / "two", 2, "--steps", steps, "--check-ranks", 5)
    assert_close(one, two)
    assert [row["step"] for row in read_metrics(two / "metrics.jsonl") if "loss" in row] == list(range(1, steps + 1))


def go_on(folder, steps, ranks, *flags):
    """Trains two, four and five fifths of a run on so many ranks each."""
    for part, each in zip((2, 4, 5), ranks, strict=True):
        train(folder, each, *flags, "--steps", steps * part // 5, "--resume")


def test_a_run_goes_on_with_another_number_of_ranks(one, steps, tmp_path):
    go_on(tmp_path / "run", steps, (1, 2, 1))
    assert_close(one, tmp_path / "run")


@pytest.fixture(scope="module")
def in_turn(steps, tmp_path_factory):
    """A run in single precision on one rank, which trains two micro-batches one after another."""
    return train(tmp_path_factory.mktemp("ranks") / "in_turn", 1, *IN_TURN, "--steps", steps)


def test_two_ranks_are_one_with_two_micro_batches_bit_for_bit(in_turn, steps, tmp_path):
    assert_same_bits(in_turn, train(tmp_path / "two", 2, *IN_TURN, "--steps", steps))


def test_two_ranks_have_the_pools_statistics_of_two_micro_batches_bit_for_bit(tmp_path):
    flags = (*IN_TURN, "--bn", "joint", "--bn-stats", "pool", "--bn-momentum", "0.1", "--steps", 3)
    assert_same_bits(train(tmp_path / "one", 1, *flags), train(tmp_path / "two", 2, *flags))


def test_a_run_of_micro_batches_goes_on_with_the_same_bits_on_another_number_of_ranks(in_turn, steps, tmp_path):
    go_on(tmp_path / "run", steps, (2, 1, 2), *IN_TURN)
    assert_same_bits(in_turn, tmp_path / "run")


def test_ranks_exchange_the_gradients_of_all_their_micro_batches(tmp_path):
    flags = ("--bn", "joint", "--micro-batches", 4, "--steps", 8)
    assert_close(train(tmp_path / "one", 1, *flags), train(tmp_path / "two", 2, *flags, "--check-ranks", 1))


def test_two_ranks_of_the_supervised_baseline_give_the_losses_of_one(tmp_path):
    flags = ("--method", "supervised", "--steps", 10)
    assert_close(train(tmp_path / "one", 1, *flags), train(tmp_path / "two", 2, *flags))


@pytest.mark.parametrize(
    "flags", [("--method", "fixmatch", "--mu", 2), ("--method", "mixmatch"), ("--ablate", "mean-guess")]
)
def test_two_ranks_of_other_methods_are_one_with_two_micro_batches_bit_for_bit(tmp_path, flags):
    flags = (*flags, *IN_TURN, "--steps", 10)
    assert_same_bits(train(tmp_path / "one", 1, *flags), train(tmp_path / "two", 2, *flags))


@pytest.mark.parametrize("statistics", ["all", "pool"])
def test_batch_norm_over_all_ranks_is_batch_norm_over_all_rows(tmp_path, statistics):
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


def test_gradients_in_half_of_the_bytes_train_alike(tmp_path):
    flags = ("--precision", "fp32", "--steps", 6)
    whole, half = (train(tmp_path / g, 2, *flags, "--gradients", g, "--check-ranks", 1) for g in ("fp32", "bf16"))
    whole, half = ([row["loss"] for row in read_metrics(f / "metrics.jsonl") if "loss" in row] for f in (whole, half))
    assert whole[0] == half[0] and whole[1:] != half[1:]
    assert half == pytest.approx(whole, rel=0.05)


def test_other_statistics_after_a_change_of_ranks_are_told(tmp_path):
    folder = tmp_path / "run"
    train(folder, 1, "--bn", "joint", "--steps", 3)
    train(folder, 2, "--bn", "joint", "--steps", 6, "--resume")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line[:38] for line in lines if "ranks were" in line] == ["remixmatch: ranks were 1 and are 2 now"]


def test_a_mistake_is_one_line_of_all_ranks(one, tmp_path):
    log = tmp_path / "log"
    ranks = start_ranks(log, 2, "train", "digits-40", "--out", one, *FLAGS, "--steps", 50)
    assert finish(ranks) == [2, 2]
    (line,) = log.read_text().splitlines()
    assert line.startswith("remixmatch: ") and "already contains a run" in line


def test_ranks_that_differ_are_told_with_step_and_field(tiny, tmp_path, monkeypatch):
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
        with torch.no_grad():  # a bit of one element
            trainer.state.network.stem.weight[0, 0, 0, 0] *= 1 + 2**-20
        changed = digests(trainer.state.state_dict() | {"policy": trainer.feed.policy.state_dict()})
        assert [name for name in own if own[name] != changed[name]] == ["network.stem.weight"]
        monkeypatch.setattr(collectives, "all_gather_object", lambda mine: [own, own, mine])
        with pytest.raises(UserError, match=r"differ after step 0: rank 2 has another network.stem.weight than rank 0"):
            trainer._compare_ranks()
        monkeypatch.setattr(collectives, "all_gather_object", lambda mine: [mine, mine])
        trainer._compare_ranks()
    finally:
        trainer.end()


def test_a_rank_that_waits_too_long_ends_with_a_message():
    """Without a sign of life; with one now and then it goes on."""
    script = (
        "import time\nfrom engine.distributed.watchdog import Watchdog\n"
        "with Watchdog(1.0, rank=3) as watchdog:\n"
        "    for step in range(8):\n        time.sleep(0.15)\n        watchdog.alive(f'step {step}')\n"
        "    print('alive', flush=True)\n    time.sleep(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75 and done.stdout == "alive\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("remixmatch: rank 3: nothing came of step 7 for 1 s (--timeout)")


def test_a_rank_that_cannot_hear_a_signal_ends_with_a_message():
    """As one does that waits for another rank's part in a captured collective: Python's handlers never run.

    The main thread waits on a native condition, which gives up its mutex: a thread that gets the mutex knows that the
    main thread is deaf, sends the signal, and keeps the mutex, so that the main thread never comes back.
    """
    script = (
        "import ctypes, os, signal, threading\nfrom engine.distributed import watchdog as guard\n"
        "guard.DEAF_SECONDS = 1.0\n"
        "stop, system = guard.StopRequest(), ctypes.CDLL(None)\n"
        "mutex, condition = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)\n"
        "def ask():\n    system.pthread_mutex_lock(mutex)\n    os.kill(os.getpid(), signal.SIGHUP)\n"
        "with stop.listening(), guard.Watchdog(250.0, 3, stop) as watchdog:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # one that is heard, and may take its time
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
    assert line.startswith("remixmatch: rank 3: SIGHUP came 1 s ago, and nothing of step 7 since: another rank hangs")


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
def test_mistakes_are_told_before_a_rank_is_started(capfd, tmp_path, flags, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "digits-40", "--out", str(tmp_path / "run"), *flags])
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


def test_torchrun_takes_none_of_our_flags_for_its_own(monkeypatch):
    """Its --log-dir and others begin like our --log."""
    taken = []
    monkeypatch.setattr("torch.distributed.run.run", taken.append)
    monkeypatch.setattr("os.environ", dict(os.environ))  # to which it adds
    before = signal.getsignal(signal.SIGINT)
    try:
        launch.launch(["train", "digits-40", "--log", "none"], 2, 0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert taken[0].module and taken[0].training_script == "engine"
    assert taken[0].training_script_args == ["train", "digits-40", "--log", "none"]


def test_more_ranks_than_gpus_are_told(capfd, tmp_path, monkeypatch):
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "digits-40", "--out", str(tmp_path / "run"), "--gpus", "2"])
    assert ended.value.code == 2
    assert "--gpus 2: torch sees only 1; --device cpu" in capfd.readouterr().err


def test_a_rank_without_the_data_says_so(tmp_path):
    """Rank 0 sets the run up for all; the others open the same data, which may not be on their machine."""
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
