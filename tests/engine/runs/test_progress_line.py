"""The progress line: what fits at each width, when it is drawn, and what replaces it without a terminal."""

import builtins
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from engine.api import train
from engine.errors import UserError
from engine.runs import progress
from engine.runs.progress import ProgressLine, duration
from tests.terminals import ROOT, on_terminal

VALUES = {"test %": 75.6, "loss": 1.25, "loss_x": 0.5, "loss_u": 0.7, "loss_u1": 0.3, "loss_rot": 0.2}


# Steps of a line that is drawn in another process.
DRAWN = """
import sys
from engine.runs.progress import ProgressLine
line = ProgressLine({steps})
line.start(0, images_per_step=100)
line.advance(2)
line.close()
"""


@pytest.fixture
def clock(replace_clock):
    return replace_clock(progress, "monotonic", 50.0)


def texts(line, width):
    """Return the words of the line for a width, and the width of its bar."""
    (bar,) = [cell for column in line._line(width).columns for cell in column.cells if not isinstance(cell, str)]
    cells = [cell for column in line._line(width).columns for cell in column.cells if isinstance(cell, str)]
    return cells, bar.width


def test_steps_bar_and_time_left_are_shown_at_every_width(clock):
    """At least 10 columns of bar from 40 columns on, and more words the more there is room."""
    line = ProgressLine(2500, quiet=True)
    line.start(0, images_per_step=96)
    clock.now += 100.0  # The first step is not counted: it initializes much.
    line.advance(1)
    clock.now += 30.0
    line.update(601, VALUES)  # 20 steps per second; 1899 steps are left.
    shown = {}
    for width in (40, 80, 100, 120, 160, 200):
        (count, left, *words), bar = texts(line, width)
        assert (count, left) == ("601/2500", "95 s left") and bar == (10 if width < 100 else 20)
        shown[width] = [word.strip() for word in words]
        assert len("  ".join([count, left, *shown[width]])) + bar + 1 <= width
    assert shown[40] == []
    assert shown[80] == ["20.00 steps/s", "test % 75.600", "loss 1.250"]
    assert shown[100] == [*shown[80], "1,920 images/s"]
    assert shown[120] == [*shown[100], "loss_x 0.500"]
    assert shown[160] == [*shown[120], "loss_u 0.700", "loss_u1 0.300", "loss_rot 0.200"] == shown[200]


def test_a_large_run_keeps_its_bar_at_80_columns(clock):
    line = ProgressLine(1048576, quiet=True)
    line.start(1000000, images_per_step=768)
    clock.now += 1.0
    line.advance(1000001)
    (count, left, *_), bar = texts(line, 80)
    assert (count, left, bar) == ("1000001/1048576", "13 h 30 min left", 10)


def test_the_time_left_is_known_after_the_first_step_and_falls_during_a_long_one(clock):
    line = ProgressLine(11, quiet=True)
    line.start(0, images_per_step=1)
    assert line._words() == ["0/11", "time left unknown"]
    clock.now += 60.0
    line.advance(1)
    assert line._words()[:3] == ["1/11", "10 min left", "0.02 steps/s"]
    clock.now += 6.0
    line.advance(2)
    assert line._words()[:2] == ["2/11", "54 s left"]
    clock.now += 4.0
    assert line._words()[:2] == ["2/11", "50 s left"]
    clock.now += 400.0
    assert line._words()[:2] == ["2/11", "0 s left"]
    line.advance(1)  # An earlier step changes nothing.
    assert line._words()[0] == "2/11"


def test_without_a_terminal_lines_become_rarer(clock, capsys):
    line = ProgressLine(100_000)
    line.start(0, images_per_step=10)
    for step in range(1, 401):
        clock.now += 1.0
        line.advance(step)
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.match(r"step (\d+)/", each)[1]) for each in lines] == [5, 10, 20, 40, 80, 140, 200, 260, 320, 380]
    assert lines[0] == "step 5/100000  27 h 47 min left  1.00 steps/s  10 images/s"


def test_the_last_step_is_always_shown_and_quiet_shows_nothing(clock, capsys):
    for quiet, count in ((False, 1), (True, 0)):
        line = ProgressLine(3, quiet)
        line.start(0, images_per_step=10)
        for step in (1, 2, 3):
            line.advance(step)
        line.close()
        text = capsys.readouterr().err
        assert text.count("step 3/3  0 s left") == count == text.count("step ")


def test_lines_are_log_messages_where_those_are_shown(clock, capsys, caplog):
    caplog.set_level(logging.INFO)
    line = ProgressLine(2)
    line.start(0, images_per_step=10)
    line.update(2, {"loss": 1.0})
    assert capsys.readouterr().err == "" and [each.startswith("step 2/2") for each in caplog.messages] == [True]


def test_a_notebook_updates_one_output_every_second(clock, monkeypatch):
    """Without ipywidgets, whose absence rich would warn about."""
    shown = []
    handle = SimpleNamespace(update=lambda content, raw: shown.append(content["text/plain"]))

    def display(content, raw, display_id):
        assert raw and display_id
        handle.update(content, raw)
        return handle

    class ZMQInteractiveShell:  # Rich recognizes a notebook by this name.
        pass

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=SimpleNamespace(display=display)))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    line = ProgressLine(100)
    line.start(0, images_per_step=10)
    for step in range(1, 41):
        clock.now += 0.1
        line.advance(step)
    line.close()
    assert 5 <= len(shown) <= 7 and shown[0].startswith("0/100") and shown[0].endswith("time left unknown")
    assert re.fullmatch(r"40/100 \S+ +6 s left  10.00 steps/s  100 images/s", shown[-1]), shown[-1]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_terminal_is_redrawn_without_metrics(width):
    """Every tenth of a second here, with neither metrics nor messages."""
    script = """
import time
from engine.runs import progress
progress.REDRAWS = 10
line = progress.ProgressLine(50)
line.start(0, images_per_step=100)
for step in range(1, 31):
    time.sleep(0.02)
    line.advance(step)
line.close()
"""
    printed = on_terminal(script, width)
    drawn = re.findall(r"(\d+)/50 \S*━\S* +(?:time left unknown|\d s left)", printed)
    assert drawn[0] == "0" and drawn[-1] == "30" and len(set(drawn)) >= 3, printed
    assert printed.count("\r\n") == 1, "the line was wrapped"


def test_a_dumb_terminal_and_a_file_get_plain_lines():
    script = DRAWN.format(steps=2)
    printed = on_terminal(script, TERM="dumb")
    assert re.fullmatch(r"step 2/2  0 s left  .*\r\n", printed) and "\x1b" not in printed
    # Colors forced by CI do not turn a file into a terminal.
    environment = {"FORCE_COLOR": "1", "TERM": "xterm", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.fullmatch(r"step 2/2  0 s left  .*\n", done.stderr) and "\x1b" not in done.stderr and not done.stdout


def test_no_color_leaves_out_colors():
    script = DRAWN.format(steps=4)
    assert "\x1b[" in on_terminal(script) and re.search(r"\x1b\[[0-9;]+m", on_terminal(script))
    printed = on_terminal(script, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]+m", printed) and "2/4 ━━━━━" in printed


def test_durations():
    seconds = (5, 119.4, 600, 7140, 7200, 36000, 360000)
    assert [duration(each) for each in seconds] == [
        "5 s", "119 s", "10 min", "119 min", "2 h 0 min", "10 h 0 min", "100 h 0 min",
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "quiet"), [({}, False), ({"progress": False}, True)])
def test_training_from_python_shows_progress_unless_silenced(tmp_path, monkeypatch, given, quiet):
    passed = {}
    monkeypatch.setattr("engine.run.train", lambda setup, **options: passed.update(options) or {})
    train("digits-40", out=tmp_path / "run", callback=print, **given)
    assert passed == {"quiet": quiet, "callback": print}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"callback": 5}, "callback must be a function of step and metrics, got int"),
        ({"progress": "rich"}, "progress"),
    ],
)
def test_progress_and_callback_are_checked_before_training(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        train("digits-40", out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("supervised", ["loss_x"]),
        ("fixmatch", ["loss_x", "loss_u"]),
        ("freematch", ["loss_x", "loss_u", "loss_fair"]),
        ("remixmatch", ["loss_x", "loss_u", "loss_u1", "loss_rot"]),
    ],
)
def test_terms_that_a_run_does_not_have_are_not_shown(tmp_path, monkeypatch, method, terms):
    shown = {}
    monkeypatch.setattr(ProgressLine, "update", lambda line, step, values: shown.update(values))
    train("digits-40", out=tmp_path / "run", steps=1, log_every=1, batch=4, width=8, method=method, mu=1)
    assert [name for name in shown if name.startswith("loss_")] == terms
