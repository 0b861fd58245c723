"""Two hosts, each with its own torchrun, emulated by two network namespaces with a link between them."""

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
from engine.runs.folder import CHECKPOINTS
from tests.processes import ROOT, assert_same_bits, finish, start

# Two ranks equal one rank with two micro-batches bit for bit, so no tolerance is needed.
FLAGS = [
    *("--steps", "12", "--batch", "16", "--width", "8", "--micro-batches", "2", "--device", "cpu"),
    *("--eval-every", "5", "--log-every", "1", "--checkpoint-every", "3"),
]


@dataclass(frozen=True)
class Host:
    """A network namespace, its end of the link, and the address of that end."""

    namespace: str
    link: str
    address: str

    def processes(self):
        """Return the IDs of the processes in the namespace."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(number) for number in listed.stdout.split()]

    def workers(self):
        """Return the IDs of the processes that torchrun started as ranks."""
        return [pid for pid in self.processes() if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


def ip(*arguments):
    """Run the ip tool; skip the test with its error message if that fails."""
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"cannot emulate two hosts: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot emulate two hosts: ip {' '.join(arguments)}: {error.stderr.strip()}")


@pytest.fixture
def hosts():
    """Two hosts that can reach only each other. Their remaining processes are killed at the end."""
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
                # This deletes the link, too.
                subprocess.run(["ip", "netns", "delete", host.namespace], check=True)


def start_hosts(hosts, logs, *arguments):
    """Start one torchrun on each host, with its output in a log file."""
    first = hosts[0]
    # torchrun's store keeps the addresses of workers from before a restart, which others then try to reach.
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = []
    for host, log in zip(hosts, logs, strict=True):
        # Both hosts have the same host name, which does not resolve to their addresses, so pass the addresses.
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


def test_two_hosts_recover_from_a_killed_rank_with_the_results_of_one_process(hosts, tmp_path):
    """Both hosts restart from a checkpoint, though the first host's torchrun saw no failure."""
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
