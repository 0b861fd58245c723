"""Ctrl-C: one line with the advice for that command, and no process left behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from engine.commands import main as cli
from tests.processes import command

RESUME = "interrupted; use --resume to continue from the last checkpoint"
AGAIN = "interrupted; run the same command again to continue; "
LINES = {
    "train digits-40": RESUME,
    "data prepare pets": AGAIN + "decoded images are kept",
    "data info pets": "interrupted",
    "data list": "interrupted",
    "reproduce digits": AGAIN + "finished runs are kept",
    "ablate digits-40": AGAIN + "finished timings and runs are kept",
    "eval run": "interrupted",
    "predict run a.png": "interrupted",
    "export run": "interrupted",
    "profile digits-40": "interrupted",
    "report run": "interrupted",
    "bench throughput": "interrupted",
    "doctor": "interrupted",
    "completion bash": "interrupted",
    "version": "interrupted",
}


def test_every_command_is_listed():
    assert {line.split()[0] for line in LINES} == set(cli.COMMANDS)


@pytest.mark.parametrize("line", LINES)
def test_an_interrupt_is_one_line_with_the_advice_for_the_command(line, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.run_with_exit_codes(interrupted, line.split())
    assert (ended.value.code, capsys.readouterr().err) == (130, f"remixmatch: {LINES[line]}\n")
    with pytest.raises(SystemExit) as ended:
        cli.run_with_exit_codes(lambda argv: signal.raise_signal(signal.SIGTERM), line.split())
    assert (ended.value.code, capsys.readouterr().err) == (143, f"remixmatch: {LINES[line]}\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def descendants(pid):
    """Return the processes started by any thread of a process, and by those."""
    try:
        texts = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [each for child in " ".join(texts).split() for each in (int(child), *descendants(child))]


@pytest.mark.parametrize(
    ("line", "children", "said"),
    [
        ("ablate digits-40 --time-only", 2, LINES["ablate digits-40"]),
        # The second line is that of an interrupt before the first job is waited for, as on a busy machine.
        ("reproduce digits --out here", 1, ("repeat the command to resume them", LINES["reproduce digits"])),
        ("train digits-40 --out here --quiet --gpus 2", 2, RESUME),
    ],
)
def test_ctrl_c_in_a_terminal_ends_all_processes_and_prints_one_line(line, children, said, tmp_path):
    process = subprocess.Popen(
        command(*line.split()), cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell starts background commands with SIGINT ignored, which the tests may have inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(started := descendants(process.pid)) < children and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(started) == children
        time.sleep(0.5)  # They are importing, when Python would print a traceback.
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    announced, _, last = err.rpartition("remixmatch: ")
    endings = (said,) if isinstance(said, str) else said
    assert process.returncode == 130 and last.endswith(tuple(f"{each}\n" for each in endings)), err
    assert last.count("\n") == 1, err
    assert announced.count("\n") <= 1 and "Traceback" not in announced, "the command may say what it will do"
    assert not [each for each in started if Path(f"/proc/{each}").exists()]
