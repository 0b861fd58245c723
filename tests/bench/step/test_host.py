"""The host bench: parts add up to totals, and probes reach the policy as in a run."""

import itertools

import pytest
import torch

from bench.step import host
from engine.errors import UserError
from engine.measuring import records
from pipelines.ctaugment import CTAugmentPolicy, initial_weights
from pipelines.plan import make_plan

TINY = dict(repeats=2, k=(1, 3), batch=(4, 6), steps=2, lag=3)


def test_writes_a_record_per_case_with_its_parts(tmp_path, capsys):
    out = tmp_path / "host.jsonl"
    host.main(host.HostOptions(out=out, **(TINY | dict(repeats=1))))
    written = records.read(out)
    assert [(record["k"], record["batch"]) for record in written] == [(1, 4), (3, 4), (1, 6), (3, 6)]
    output = capsys.readouterr().out
    for record in written:
        assert record["bench"] == "host" and record["lag"] == 3 and record["pinned"] == torch.cuda.is_available()
        assert record["device"].startswith("CPU")
        parts = {part: record[f"{part}_us"] for part in ("plan", "rows", "views", "policy", "to_device")}
        assert all(microseconds > 0 for microseconds in parts.values())
        assert record["planner_us"] == pytest.approx(parts["plan"] + parts["rows"] + parts["views"])
        assert record["main_us"] == pytest.approx(parts["policy"] + parts["to_device"])
        assert record["total_us"] == pytest.approx(record["planner_us"] + record["main_us"])
        assert f"K: {record['k']}; B: {record['batch']}; plan, us: {record['plan_us']:.0f}; " in output
    assert host.BENCH.tables["host"].markdown(written).count("\n") == 2 + len(written) + 1


def test_median_lies_between_the_quartiles(tmp_path):
    out = tmp_path / "host.jsonl"
    host.main(host.HostOptions(out=out, **TINY))
    for record in records.read(out):
        assert record["total_us_low"] < record["total_us"] < record["total_us_high"]


def test_plans_use_the_weights_updated_by_probes(monkeypatch):
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
def test_invalid_flags(flag, tmp_path):
    invalid = (0,) if flag in ("k", "batch") else 0
    with pytest.raises(UserError, match=f"--{flag} must be at least 1, got 0"):
        host.main(host.HostOptions(out=tmp_path / "host.jsonl", **(TINY | {flag: invalid})))
