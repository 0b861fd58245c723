"""Runs in processes of their own: how tests start them, and what makes two of them the same.

`start` has a server that imports everything once and is forked for every process, so that one starts in a tenth of a
second instead of ten. It is the same code and a real process, to be killed, stopped and sent signals.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch

from engine.runs import checkpoint
from engine.runs.progress import read_metrics
from engine.training.trainer import CHECKPOINTS, digests
from tests.logs import no_warnings

ROOT = Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *(
            "engine.commands.main",
            "engine.run",
            "engine.distributed.launch",
            "engine.runs.pictures",
            "pipelines.dali",
            "torch._inductor.utils",
        ),
        *("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"),
        "tests.processes",
    ]
)


def command(*arguments):
    """The command line of `remixmatch` with this interpreter."""
    return [sys.executable, "-m", "engine", *map(str, arguments)]


def start(log, *arguments, patch=None, **environment):
    """Starts `remixmatch ARGUMENTS` and returns the process.

    Args:
        log: a file, to which what it prints is added.
        arguments: of the command line.
        patch: values of module attributes by name, such as {"engine.runs.checkpoint.RETRY_SECONDS": 0.2}.
        environment: variables that it has beside those of the server.
    """
    process = _context.Process(
        target=_command, args=(str(log), [str(a) for a in arguments], patch or {}, _texts(environment))
    )
    process.start()
    return process


def call(log, function, *arguments, **environment):
    """Calls a function in a process of its own and returns its exit code; log and environment as in `start`."""
    process = _context.Process(target=_function, args=(str(log), _texts(environment), function, arguments))
    process.start()
    (code,) = finish([process])
    return code


def _texts(values):
    return {name: str(value) for name, value in values.items()}


def _function(log, environment, function, arguments):
    _prepare(log, environment)
    function(*arguments)


def _prepare(log, environment):
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)


def _command(log, arguments, patch, environment):
    _prepare(log, environment)
    # as in a terminal: nohup has SIGHUP ignored, and a shell has SIGINT for what it starts in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in patch.items():
        module, attribute = name.rsplit(".", 1)
        setattr(importlib.import_module(module), attribute, value)
    from engine.commands import main as cli

    cli.main(arguments)


def as_it_is(network, **options):
    """In place of torch.compile, where compiling is not what is tested and would take most of the time."""
    return network


def start_ranks(log, ranks, *arguments, patch=None, **environment):
    """Starts so many ranks of one group, each as `start` does."""
    group = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    group |= environment
    return [start(log, *arguments, patch=patch, RANK=rank, LOCAL_RANK=rank, **group) for rank in range(ranks)]


def train(folder, ranks, *flags, patch=None, **environment):
    """Trains digits-40 on so many ranks, which have to succeed, and returns the folder."""
    log = folder.with_name(folder.name + ".log")
    arguments = ("train", "digits-40", "--out", folder, *flags)
    processes = start_ranks(log, ranks, *arguments, patch=patch, **environment)
    assert finish(processes) == [0] * ranks, log.read_text()
    return folder


def finish(processes, seconds=300):
    """Waits for processes of `start` and returns their exit codes; one that does not end is killed, and has None."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def final_state(folder):
    """Step and content of a run's newest checkpoint, which has to be good."""
    with no_warnings():
        found = checkpoint.load_newest(folder / CHECKPOINTS)
    return found.step, found.content


def assert_close(one, two, tolerance=1e-5):
    """Equal runs but for the order of sums: every row of metrics, and what the newest checkpoint holds."""
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert len(rows) == len(others)
    for a, b in zip(rows, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), (a["step"], name)
    (step, a), (other, b) = final_state(one), final_state(two)
    assert step == other == a["state"]["step"] == b["state"]["step"]
    for name, value in a["state"]["network"].items():
        torch.testing.assert_close(value, b["state"]["network"][name], atol=10 * tolerance, rtol=10 * tolerance)
    torch.testing.assert_close(a["policy"]["weights"], b["policy"]["weights"], atol=1e-6, rtol=0)


def assert_same_bits(one, two):
    """Equal runs bit for bit; the test loss is left out, since ranks sum up the rows of a test set by shares."""
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    for row in rows + others:
        row.pop("test_loss", None)
    assert rows == others
    assert digests(final_state(one)[1]["state"]) == digests(final_state(two)[1]["state"])
