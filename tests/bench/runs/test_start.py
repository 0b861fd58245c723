"""`remixmatch bench start`: the parts of a real start add up."""

from threading import Thread

import pytest

from bench.runs import start
from bench.runs.start_worker import PARTS
from bench.runs.step_ends import on_step_end
from engine.errors import UserError
from engine.measuring import records


def test_a_start_is_timed_by_part(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    start.main(start.StartOptions(out=out, repeats=1, flags="--cudnn-plans 10"))
    (row,) = records.read(out)
    assert (row["bench"], row["preset"], row["repeats"]) == ("start", "digits-40", 1)
    assert row["flags"] == "--cudnn-plans 10"
    parts = [row[f"{part}_seconds"] for part in PARTS]
    assert min(parts) > 0 and sum(parts) == pytest.approx(row["start_seconds"])
    assert row["cpu_seconds"] > 0 and row["help_seconds"] > 0
    assert f"command to first step, s: {row['start_seconds']:.2f}; interpreter: " in capsys.readouterr().out


def test_invalid_starts():
    with pytest.raises(UserError, match="--repeats must be at least 1, got 0"):
        start.main(start.StartOptions(repeats=0))
    with pytest.raises(RuntimeError, match="exit code 2: remixmatch: unknown preset 'digits-4'"):
        start.start("digits-4")
    with pytest.raises(RuntimeError, match="exit code 2: remixmatch: --cudnn-plans must be at least 0, got -1"):
        start.start("digits-40", "--cudnn-plans", "-1")


@pytest.mark.parametrize("step", [["exchange", "assemble", "metrics"], ["replay"]], ids=["eager", "captured"])
def test_the_end_of_a_step_is_detected(step):
    """A capture, plans drawn in between, and other threads do not count."""
    plans = ["", "plan", "wait for plan", "views"]
    captured = ["prepare", "copy plan", "assemble", "metrics", *plans, ""]
    first = ["wait for views", "drain", *plans, "copy plan", *step, "metrics", ""]
    second = ["copy plan", *step, "metrics", ""]
    heard, ends = [], []
    listener = on_step_end(lambda: ends.append(len(heard)))
    for part in [*captured, *first, *second]:
        thread = Thread(target=lambda: [listener(part) for part in ("metrics", "", "views")])
        thread.start()
        thread.join()
        heard.append(part)
        listener(part)
    assert ends == [len(captured + first), len(captured + first + second)]
