"""`remixmatch bench restart`: one kill of a real group, and a row that agrees with itself."""

import pytest

from bench.ranks import restart
from engine.errors import UserError
from engine.measuring import records


@pytest.mark.long
def test_a_kill_is_timed_and_where_its_time_goes(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    restart.main(restart.RestartOptions(out=out, repeats=1, checkpoint_every=5))
    (row,) = records.read(out)
    assert row["bench"] == "restart" and (row["preset"], row["ranks"], row["repeats"]) == ("digits-40", 2, 1)
    parts = row["regroup_seconds"] + row["load_seconds"] + row["first_step_seconds"]
    assert row["restart_seconds"] == row["most_restart_seconds"] == pytest.approx(parts) and row["import_seconds"] > 0
    # a checkpoint's interval, and what was trained until the kill came
    assert 0 <= row["lost_steps"] < 5 + 10
    assert "kill 1 of 1: " in capsys.readouterr().out


def test_flags_that_cannot_work():
    with pytest.raises(UserError, match="--repeats must be at least 1, got 0"):
        restart.main(restart.RestartOptions(repeats=0))
