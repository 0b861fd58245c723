"""`remixmatch bench restart`: one kill of a real group gives a consistent record."""

import pytest

from bench.ranks import restart
from engine.errors import UserError
from engine.measuring import records


@pytest.mark.long
def test_the_recovery_from_a_kill_is_timed_by_phase(tmp_path, capsys):
    out = tmp_path / "records.jsonl"
    restart.main(restart.RestartOptions(out=out, repeats=1, checkpoint_every=5))
    (record,) = records.read(out)
    assert record["bench"] == "restart" and (record["preset"], record["ranks"], record["repeats"]) == (
        "digits-40",
        2,
        1,
    )
    parts = record["regroup_seconds"] + record["load_seconds"] + record["first_step_seconds"]
    assert (
        record["restart_seconds"] == record["most_restart_seconds"] == pytest.approx(parts)
        and record["import_seconds"] > 0
    )
    # At most one checkpoint interval, and the steps trained before the kill.
    assert 0 <= record["lost_steps"] < 5 + 10
    assert "kill 1 of 1: " in capsys.readouterr().out


def test_invalid_flags():
    with pytest.raises(UserError, match="--repeats must be at least 1, got 0"):
        restart.main(restart.RestartOptions(repeats=0))
