"""What commands say on stderr: each message once, on one line, above a progress bar; and nothing of it in a library."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from engine.commands import main as cli
from engine.commands.output import OURS, messages_on_stderr, show_warnings_only
from engine.errors import RankError, Stopped, UserError

ROOT = Path(__file__).parents[3]
LONG = "a path [bold]/with :smile: and 100 % of %s/" + "deeper/" * 40 + " GET\tend"

log = logging.getLogger("engine.training.trainer")


def state():
    """What a command changes while it runs."""
    return [(list(each.handlers), each.level, each.propagate) for each in map(logging.getLogger, OURS)]


def test_each_message_is_one_line_as_it_was_given(capfd):
    with messages_on_stderr():
        log.info(LONG)
        log.warning(LONG)
        logging.getLogger("pipelines.sources").warning("two\nlines\r\nand\u2028more")
        logging.getLogger("bench.step.count").error("an error")
        log.debug("unheard")
    assert capfd.readouterr() == (
        "",
        f"{LONG}\nremixmatch: {LONG}\nremixmatch: two lines and more\nremixmatch: an error\n",
    )


def test_quiet_leaves_warnings_and_ends_with_the_command(capfd):
    with messages_on_stderr():
        show_warnings_only()
        log.info("unheard")
        log.warning("heard")
    with messages_on_stderr():
        log.info("heard again")
    assert capfd.readouterr().err == "remixmatch: heard\nheard again\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a mistake of all"), 2, ""),
        (Stopped("stopped", 15), 143, ""),
        (RankError("lost\nthe others"), 1, "remixmatch: rank 1: lost the others\n"),
    ],
)
def test_of_several_ranks_the_first_speaks_and_others_of_their_own_end_alone(capfd, monkeypatch, error, code, said):
    def command(argv):
        log.info("unheard")
        log.warning("unheard")
        raise error

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        cli.run_with_exit_codes(command, [])
    assert (ended.value.code, capfd.readouterr().err) == (code, said)


def test_other_libraries_and_the_users_own_logging_are_left_alone(capfd, caplog):
    before, other = state(), logging.getLogger("another_library")

    def command(argv):
        log.warning("of the engine")
        other.warning("of another")
        logging.getLogger("engineer").warning("of a similar name")

    for _ in range(3):  # nothing is left by one command for the next
        cli.run_with_exit_codes(command, [])
    assert capfd.readouterr().err == "remixmatch: of the engine\n" * 3
    assert caplog.messages == ["of another", "of a similar name"] * 3 and other.handlers == []
    assert state() == before == [([], logging.NOTSET, True)] * len(OURS)
    with pytest.raises(ZeroDivisionError):
        cli.run_with_exit_codes(lambda argv: 1 // 0, [])
    assert state() == before


def test_in_a_library_warnings_reach_the_users_logging_and_the_rest_is_silent():
    """Without any set up, as Python has it: a warning is its text on stderr."""
    script = """
import logging
from engine import api
log = logging.getLogger("engine.training.trainer")
log.info("unheard")
log.warning("heard")
logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
log.info("wanted")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "heard\nengine.training.trainer: wanted\n")


def test_messages_stand_above_the_bar_of_a_terminal():
    """Whole, though they are longer than its lines, and the bar is drawn again below."""
    script = f"""
import logging
from engine.commands.output import messages_on_stderr
from engine.runs.progress import ProgressLine
log = logging.getLogger("engine.training.trainer")
with messages_on_stderr():
    line = ProgressLine(steps=10)
    line.start(0, images_per_step=100)
    line.update(3, {{"loss": 1.25}})
    log.warning({LONG!r})
    log.info("a line")
    line.update(10, {{"loss": 0.75}})
    line.close()
    log.info("after it")
"""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=follower, env=plain | {"TERM": "xterm"})
    os.close(follower)
    printed = b""
    try:
        while content := os.read(leader, 4096):
            printed += content
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(leader)
    assert process.wait(60) == 0
    text = printed.decode()
    erased = re.escape("\r\x1b[2K")
    spaced = re.escape(LONG).replace(re.escape("\t"), r"\s+")  # rich gives tabs as spaces
    assert re.search(rf"{erased}remixmatch: {spaced}\r\n[^\n]*\d/10 ", text), text
    assert re.search(rf"{erased}a line\r\n[^\n]*\d/10 ", text) and re.search(r"10/10.*loss 0.750", text), text
    assert text.endswith("after it\r\n")
