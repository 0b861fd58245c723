"""Messages of commands on stderr: once each, on one line, above a progress bar; and no handlers in library use."""

import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.commands import main as cli
from engine.commands.output import PACKAGES, messages_on_stderr, show_warnings_only
from engine.errors import RankError, Stopped, UserError
from tests.processes import command
from tests.terminals import on_terminal

ROOT = Path(__file__).parents[3]
LONG = "a path [bold]/with :smile: and 100 % of %s/" + "deeper/" * 40 + " GET\tend"

log = logging.getLogger("engine.training.trainer")


def state():
    """Return the logging state that a command changes while it runs."""
    return [(list(each.handlers), each.level, each.propagate) for each in map(logging.getLogger, PACKAGES)]


def test_each_message_is_one_unchanged_line(capfd):
    with messages_on_stderr():
        log.info(LONG)
        log.warning(LONG)
        logging.getLogger("pipelines.data.sources").warning("two\nlines\r\nand\u2028more")
        logging.getLogger("bench.step.count").error("an error")
        log.debug("unheard")
    assert capfd.readouterr() == (
        "",
        f"{LONG}\nremixmatch: {LONG}\nremixmatch: two lines and more\nremixmatch: an error\n",
    )


def test_quiet_keeps_warnings_and_ends_with_the_command(capfd):
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
        (UserError("invalid on all ranks"), 2, ""),
        (Stopped("stopped", 15), 143, ""),
        (RankError("lost\nthe others"), 1, "remixmatch: rank 1: lost the others\n"),
    ],
)
def test_only_rank_0_logs_except_for_errors_of_one_rank(capfd, monkeypatch, error, code, said):
    def command(argv):
        log.info("unheard")
        log.warning("unheard")
        raise error

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        cli.run_with_exit_codes(command, [])
    assert (ended.value.code, capfd.readouterr().err) == (code, said)


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">&-", 0, ""),
        ("> /dev/full", 2, "remixmatch: cannot write the output (No space left on device)\n"),
    ],
)
def test_output_that_cannot_be_written(redirected, code, said):
    line = f"{shlex.join(command('data', 'list'))} {redirected}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


def test_logging_of_other_libraries_and_of_the_user_is_unchanged(capfd, caplog):
    before, other = state(), logging.getLogger("another_library")

    def command(argv):
        log.warning("of the engine")
        other.warning("of another")
        logging.getLogger("engineer").warning("of a similar name")

    for _ in range(3):  # Commands leave no handlers behind.
        cli.run_with_exit_codes(command, [])
    assert capfd.readouterr().err == "remixmatch: of the engine\n" * 3
    assert caplog.messages == ["of another", "of a similar name"] * 3 and other.handlers == []
    assert state() == before == [([], logging.NOTSET, True)] * len(PACKAGES)
    with pytest.raises(ZeroDivisionError):
        cli.run_with_exit_codes(lambda argv: 1 // 0, [])
    assert state() == before


def test_in_library_use_only_warnings_are_shown_by_default():
    """Without any logging setup, Python prints the text of warnings on stderr."""
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


def test_messages_appear_above_the_progress_bar_of_a_terminal():
    """Messages are not wrapped, and the bar is redrawn below them."""
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
    text = on_terminal(script)
    erased = re.escape("\r\x1b[2K")
    spaced = re.escape(LONG).replace(re.escape("\t"), r"\s+")  # rich replaces tabs with spaces.
    assert re.search(rf"{erased}remixmatch: {spaced}\r\n[^\n]*\d/10 ", text), text
    assert re.search(rf"{erased}a line\r\n[^\n]*\d/10 ", text) and re.search(r"10/10.*loss 0.750", text), text
    assert text.endswith("after it\r\n")
