"""The throughput bench: every case trains, records are consistent, network costs are correct."""

import dataclasses

import pytest
import torch

from bench.step import throughput
from engine.config.config import Config
from engine.errors import UserError
from engine.measuring import records


@pytest.fixture(autouse=True)
def cheap(monkeypatch, known_ceilings):
    """Replace the benched network by a tiny one."""
    tiny = dataclasses.replace(throughput.base_config("digits-40", False), batch=4, width=8, view_steps=2, lag=6)
    monkeypatch.setattr("bench.step.throughput.base_config", lambda name, cuda: tiny)
    monkeypatch.setattr("bench.step.throughput.ceilings", lambda device: known_ceilings)
    return tiny


def run(tmp_path, **options):
    out = tmp_path / "throughput.jsonl"
    small = dict(out=out, repeats=1, k=(1, 2, 3), modes=("eager",), views=("dali", "synthetic"), steps=1)
    throughput.main(throughput.ThroughputOptions(**(small | options)))
    return records.read(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="uses CPU sizes")
def test_writes_a_record_per_case_and_prints_ratios(tmp_path, capsys):
    written = run(tmp_path, soak=2)
    names = [(record["k"], record["mode"], record["views"]) for record in written]
    assert names == [(k, "eager", views) for k in (1, 2, 3) for views in ("dali", "synthetic")]
    for record in written:
        assert record["bench"] == "throughput" and record["batch"] == 4 and record["precision"] == "float32"
        assert record["steps_per_second"] == pytest.approx(1e3 / record["step_ms"])
        assert record["images_per_second"] == pytest.approx(record["steps_per_second"] * 4 * (record["k"] + 4))
        assert record["floor_ratio"] == pytest.approx(record["step_ms"] / record["floor_ms"])
        assert record["soak_steps"] == 2 and abs(record["memory_growth_mib"]) < 100
        assert record["commit"] and record["versions"]["torch"] and record["device"].startswith("CPU")
    output = capsys.readouterr().out
    assert "CPU: torch sees no GPU here" in output and "K=2 eager dali: views cost" in output
    assert "eager dali:" in output and "K ms per step, error at most" in output


def test_micro_batches_are_compared_with_a_single_pass(tmp_path, capsys):
    written = run(tmp_path, k=(2,), views=("synthetic",), micro_batches=(1, 2))
    assert [record["micro_batches"] for record in written] == [1, 2]
    output = capsys.readouterr().out
    assert "K=2 eager synthetic micro-batches=2: " in output and "x the time of a single pass" in output


def test_the_cost_of_the_network_of_the_paper():
    macs, elements = throughput.network_cost(Config(), (32, 32))
    assert macs == pytest.approx(0.214e9, rel=0.01)
    assert elements == pytest.approx(1.2e6, rel=0.1)


def test_measure_returns_speed_and_bound(cheap):
    for views in ("fused", "synthetic"):
        record = throughput.measure(cheap, 2, views, repeats=1)
        assert record["images_per_second"] == pytest.approx(record["steps_per_second"] * 24) and record["floor_ms"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ("graf",)}, "--modes: unknown mode 'graf'; choose from eager, compile, graph"),
        ({"views": ("pil",)}, "--views: unknown view 'pil'; choose from fused, dali, dali-graph, synthetic"),
        ({"micro_batches": (0,)}, "--micro-batches must be at least 1, got 0"),
        ({"k": (0,)}, "--k must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_invalid_options(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="valid with a GPU")
def test_graph_mode_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="--modes graph needs a GPU"):
        run(tmp_path, modes=("graph",))
