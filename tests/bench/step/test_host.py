"""The host bench: every part of every case timed, sums that agree, the policy fed as a run feeds it."""

import itertools

import pytest
import torch

from bench.step import host
from engine.errors import UserError
from engine.measuring import records
from pipelines.ctaugment import CTAugmentPolicy, initial_weights
from pipelines.plan import make_plan

TINY = dict(repeats=2, k=(1, 3), batch=(4, 6), steps=2, lag=3)


def test_a_row_a_case_with_its_parts(tmp_path, capsys):
    out = tmp_path / "host.jsonl"
    host.main(host.HostOptions(out=out, **(TINY | dict(repeats=1))))
    rows = records.read(out)
    assert [(row["k"], row["batch"]) for row in rows] == [(1, 4), (3, 4), (1, 6), (3, 6)]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["bench"] == "host" and row["lag"] == 3 and row["pinned"] == torch.cuda.is_available()
        assert row["device"].startswith("CPU")
        parts = {part: row[f"{part}_us"] for part in ("plan", "rows", "views", "policy", "to_device")}
        assert all(microseconds > 0 for microseconds in parts.values())
        assert row["planner_us"] == pytest.approx(parts["plan"] + parts["rows"] + parts["views"])
        assert row["main_us"] == pytest.approx(parts["policy"] + parts["to_device"])
        assert row["total_us"] == pytest.approx(row["planner_us"] + row["main_us"])
        assert f"K: {row['k']}; B: {row['batch']}; plan, us: {row['plan_us']:.0f}; " in printed
    assert host.BENCH.tables["host"].markdown(rows).count("\n") == 2 + len(rows) + 1


def test_quartiles_enclose_the_median(tmp_path):
    out = tmp_path / "host.jsonl"
    host.main(host.HostOptions(out=out, **TINY))
    for row in records.read(out):
        assert row["total_us_low"] < row["total_us"] < row["total_us_high"]


def test_plans_are_made_with_the_weights_that_probes_have_moved(monkeypatch):
    observed, planned = [], []

    class Watched(CTAugmentPolicy):
        def observe(self, step, *probes):
            observed.append(step)
            super().observe(step, *probes)

    def watching(spec, seed, step, weights):
        planned.append((step, bool((weights < initial_weights()).any())))
        return make_plan(spec, seed, step, weights)

    monkeypatch.setattr(host, "CTAugmentPolicy", Watched)
    monkeypatch.setattr(host, "make_plan", watching)
    steps = host.host_steps(k=1, batch=4, lag=3, device=torch.device("cpu"))
    assert all(times.keys() == set(host.PARTS) for times in itertools.islice(steps, 4))
    steps.close()
    assert observed == [0, 1, 2, 3] and planned == [(0, False), (1, True), (2, True), (3, True)]


@pytest.mark.parametrize("flag", ["repeats", "k", "batch", "steps", "lag"])
def test_flags_that_cannot_work(flag, tmp_path):
    wrong = (0,) if flag in ("k", "batch") else 0
    with pytest.raises(UserError, match=f"--{flag} must be at least 1, got 0"):
        host.main(host.HostOptions(out=tmp_path / "host.jsonl", **(TINY | {flag: wrong})))
