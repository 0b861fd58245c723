"""Two hosts, each with its torchrun: network namespaces of this machine, joined by a cable and by nothing else."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.runs import checkpoint
from engine.training.trainer import CHECKPOINTS
from tests.processes import ROOT, assert_same_bits, finish, start

# two micro-batches on one process are two ranks bit for bit, so that no tolerance is needed
FLAGS = [
    *("--steps", "12", "--batch", "16", "--width", "8", "--micro-batches", "2", "--device", "cpu"),
    *("--eval-every", "5", "--log-every", "1", "--checkpoint-every", "3"),
]


@dataclass(frozen=True)
class Host:
    """A network namespace, its end of the cable, and that end's address."""

    namespace: str
    link: str
    address: str

    def processes(self):
        """Numbers of the processes that run in here."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(number) for number in listed.stdout.split()]

    def workers(self):
        """Those of them that torchrun started as ranks."""
        return [pid for pid in self.processes() if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


def ip(*arguments):
    """Runs the tool of that name; skips the test with its complaint where it may not do that here."""
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"cannot make two hosts here: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot make two hosts here: ip {' '.join(arguments)}: {error.stderr.strip()}")


@pytest.fixture
def hosts():
    """Two hosts that see each other alone; whatever still runs in them at the end is killed."""
    number = os.getpid()
    network = f"10.{100 + number // 250 % 100}.{number % 250}"
    both = [Host(f"remixmatch-{number}-{i}", f"rm{number}-{i}", f"{network}.{i}") for i in (1, 2)]
    try:
        for host in both:
            ip("netns", "add", host.namespace)
        ends = [[host.link, "netns", host.namespace] for host in both]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for host in both:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.link)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            ip("-n", host.namespace, "link", "set", host.link, "up")
        yield both
    finally:
        for host in both:
            if Path("/run/netns", host.namespace).exists():
                for pid in host.processes():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                # the cable goes with its ends
                subprocess.run(["ip", "netns", "delete", host.namespace], check=True)


def start_hosts(hosts, logs, *arguments):
    """Starts one torchrun on each host; what it prints goes to a file."""
    first = hosts[0]
    # torchrun's own store keeps the addresses of workers from before a restart, which others then try to reach
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = []
    for host, log in zip(hosts, logs, strict=True):
        # both have one host name, which is no address of theirs, so they are told who they are
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--max-restarts", "1", "--local-addr", host.address, "--rdzv-id", "two-hosts"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.address}:29400"),
            *("--rdzv-conf", f"is_host={int(host is first)}"),
        ]
        with log.open("w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, *torchrun, "-m", "engine", *map(str, arguments)],
                cwd=ROOT,
                env=os.environ | environment | {"GLOO_SOCKET_IFNAME": host.link},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
    return started


def test_two_hosts_of_which_one_loses_its_rank_train_the_run_of_one_process(hosts, tmp_path):
    """Both hosts come back and go on from a checkpoint, though the first one's torchrun saw nothing fail."""
    one = start(tmp_path / "one.log", "train", "digits-40", "--out", tmp_path / "one", "--quiet", *FLAGS)
    assert finish([one]) == [0]
    folder, logs = tmp_path / "run", [tmp_path / "first.log", tmp_path / "second.log"]
    started = start_hosts(hosts, logs, "train", "digits-40", "--out", folder, *FLAGS)
    deadline = time.monotonic() + 240
    while not checkpoint.list_checkpoints(folder / CHECKPOINTS) and time.monotonic() < deadline:
        assert [process.poll() for process in started] == [None, None], logs[0].read_text() + logs[1].read_text()
        time.sleep(0.01)
    (worker,) = hosts[1].workers()
    os.kill(worker, signal.SIGKILL)
    codes = [process.wait(timeout=300) for process in started]
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], said[0] + said[1]
    assert f"resuming {folder} from step" in said[0]
    assert_same_bits(tmp_path / "one", folder)
