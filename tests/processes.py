"""Start runs in subprocesses and compare runs.

`start` forks each process from a server that has imported everything, which takes a tenth of a second instead of ten.
The processes run the same code as the command and can be killed, stopped and sent signals.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
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
    """Return the command line of `remixmatch` with this interpreter."""
    return [sys.executable, "-m", "engine", *map(str, arguments)]


def start(log, *arguments, patch=None, **environment):
    """Start `remixmatch ARGUMENTS` and return the process.

    Args:
        log: File to which its output is appended.
        arguments: Command-line arguments.
        patch: Values of module attributes by name, such as {"engine.runs.checkpoint.RETRY_SECONDS": 0.2}.
        environment: Additional environment variables.
    """
    process = _context.Process(
        target=_command, args=(str(log), [str(a) for a in arguments], patch or {}, _texts(environment))
    )
    process.start()
    return process


def call(log, function, *arguments, **environment):
    """Call a function in a subprocess and return its exit code. Log and environment are as in `start`."""
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
    # Reset signals as in a terminal: nohup ignores SIGHUP, and a shell ignores SIGINT in background processes.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in patch.items():
        module, attribute = name.rsplit(".", 1)
        setattr(importlib.import_module(module), attribute, value)
    from engine.commands import main as cli

    cli.main(arguments)


def skip_compilation(network, **options):
    """Replacement for torch.compile in tests that do not test compilation, which would take most of their time."""
    return network


def start_ranks(log, ranks, *arguments, patch=None, **environment):
    """Start the ranks of one process group. See `start`."""
    group = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    group |= environment
    return [start(log, *arguments, patch=patch, RANK=rank, LOCAL_RANK=rank, **group) for rank in range(ranks)]


def train(folder, ranks, *flags, patch=None, **environment):
    """Train digits-40 on `ranks` ranks, check that they succeed, and return the folder."""
    log = folder.with_name(folder.name + ".log")
    arguments = ("train", "digits-40", "--out", folder, *flags)
    processes = start_ranks(log, ranks, *arguments, patch=patch, **environment)
    assert finish(processes) == [0] * ranks, log.read_text()
    return folder


def gloo_threads(statement, *arguments):
    """Count gloo's threads before and after a process leaves a process group of one rank.

    The process is new, since whether the group is destroyed depends on what was imported before it was made.

    Args:
        statement: Python code that joins and leaves the group through `engine.distributed.collectives`.
        arguments: The process's arguments.
    """
    code = f"{_COUNT_GLOO_THREADS}\n{statement}\nprint_count()"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return tuple(int(line.split()[0]) for line in process.stdout.splitlines() if line.endswith(" threads of gloo"))


_COUNT_GLOO_THREADS = """
import functools, sys
from pathlib import Path
from engine.distributed import collectives

def print_count():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print(sum("gloo" in name for name in names), "threads of gloo")

def stop(stop=collectives.stop):
    print_count()
    stop()

collectives.start, collectives.stop = functools.partial(collectives.start, alone=True), stop
"""


def finish(processes, seconds=300):
    """Wait for processes of `start` and return their exit codes. A process that times out is killed, with code None."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def free_port():
    """Return a free port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def final_state(folder):
    """Return step and content of a run's newest checkpoint, which must be valid."""
    with no_warnings():
        found = checkpoint.load_newest(folder / CHECKPOINTS)
    return found.step, found.content


def repeatable_metrics(folder):
    """Return the lines of metrics.jsonl that are equal for equal runs: all except those with the throughput."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if "step_ms" not in row]


def assert_close(one, two, tolerance=1e-5):
    """Check that the metrics and newest checkpoints of two runs agree up to the order of sums."""
    records, others = (repeatable_metrics(folder) for folder in (one, two))
    assert len(records) == len(others)
    for a, b in zip(records, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), (a["step"], name)
    (step, a), (other, b) = final_state(one), final_state(two)
    assert step == other == a["state"]["step"] == b["state"]["step"]
    for name, value in a["state"]["network"].items():
        torch.testing.assert_close(value, b["state"]["network"][name], atol=10 * tolerance, rtol=10 * tolerance)
    torch.testing.assert_close(a["policy"]["weights"], b["policy"]["weights"], atol=1e-6, rtol=0)


def assert_same_bits(one, two):
    """Check that two runs are bit-identical, except for the test loss, whose sum depends on the number of ranks."""
    records, others = (repeatable_metrics(folder) for folder in (one, two))
    for record in records + others:
        record.pop("test_loss", None)
    assert records == others
    assert digests(final_state(one)[1]["state"]) == digests(final_state(two)[1]["state"])
