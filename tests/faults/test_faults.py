"""Fault injection at random moments of training: saved steps are never lost, and the results are bit-identical.

`make test` runs a few injections of each kind, `make test-faults` and `make test-long` hundreds.
"""

import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import pytest

from bench.emulator.run import compiler
from tests.faults.injections import SCENARIOS, campaign, jump
from tests.faults.victim import FLAGS
from tests.processes import finish, start

COUNTS = {
    "kill": 4, "kill a rank": 4, "stop a rank": 1, "pause": 2, "pause ranks": 2, "ask": 4, "ask ranks": 5, "disk": 5,
    "disk of ranks": 2, "removal": 3, "removal of ranks": 2, "damage": 6, "clock": 2, "torchrun": 2,
}  # fmt: skip
AT_ONCE = 12  # maximum number of injections per test
ON_A_DISK = ("disk", "disk of ranks")


def pytest_generate_tests(metafunc):
    if "scenario" not in metafunc.fixturenames:
        return
    total = metafunc.config.getoption("--faults", 0)
    drawn = {name: round(total * count / sum(COUNTS.values())) for name, count in COUNTS.items()} if total else COUNTS
    cases = []
    for name, count in drawn.items():
        marks = [pytest.mark.compiler] if name == "clock" else []
        for seed in range(-(-count // AT_ONCE)):
            some = min(AT_ONCE, count - seed * AT_ONCE)
            cases.append(pytest.param(name, seed, some, id=f"{name}-{seed}", marks=marks))
    metafunc.parametrize(("scenario", "seed", "count"), cases)


@pytest.fixture
def folder(tmp_path, scenario):
    """Folder for the victims of a scenario, on its own disk if the scenario fills it."""
    folder = tmp_path / "runs"
    folder.mkdir()
    if scenario not in ON_A_DISK:
        yield folder
        return
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], capture_output=True, text=True
        )
    except FileNotFoundError as error:
        pytest.skip(f"cannot mount a tmpfs here: {error}")
    if mounted.returncode:
        pytest.skip(f"may not mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--recursive", "--lazy", folder], check=True)


def build_shim(folder):
    """Build the library that sets the clock of processes that preload it."""
    library = folder / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler(), "-shared", "-fPIC", "-O1", "-o", library, "-x", "c", source], check=True)
    # Make sure that the library works; otherwise the test would prove nothing.
    (folder / "offset").write_bytes(struct.pack("<q", 10**9))
    environment = os.environ | {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(folder / "offset")}
    printing = [sys.executable, "-c", "import time; print(time.time())"]
    told = subprocess.run(printing, env=environment, capture_output=True, text=True, check=True)
    assert float(told.stdout) > time.time() + 0.9e9
    return library


def test_saved_steps_are_kept_and_results_identical(scenario, seed, count, folder, tmp_path, references, record):
    ranks, injections = SCENARIOS[scenario]
    if scenario == "clock":
        injections = [partial(jump, shim=build_shim(tmp_path))]
    number = zlib.crc32(f"{scenario} {seed}".encode())
    done = []
    try:
        campaign(injections, number, count, folder, references, done, ranks)
    finally:
        record.extend(done)
    assert len(done) >= count and all(outcome.survived for outcome in done)


def test_a_rank_ends_if_rank_0_accepts_its_connection_and_never_answers(tmp_path):
    """A process stopped during initialization behaves like this: its kernel still accepts connections."""
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as server:
        group = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.getsockname()[1]}
        process = start(log, "train", "digits-40", "--out", tmp_path / "run", *FLAGS, "--timeout", 2, **group)
        codes = finish([process], 60)
    assert codes == [75] and "no progress in joining the process group for 3 s" in log.read_text()
