"""The engine's throughput bench: every case trains, rows hold what they promise, costs are counted right."""

import dataclasses

import pytest
import torch

from bench.step import throughput
from engine.config.config import Config
from engine.errors import UserError
from engine.measuring import records


@pytest.fixture(autouse=True)
def cheap(monkeypatch, known_ceilings):
    """A bench of a network that costs next to nothing."""
    tiny = dataclasses.replace(throughput.base_config("digits-40", False), batch=4, width=8, view_steps=2, lag=6)
    monkeypatch.setattr("bench.step.throughput.base_config", lambda name, cuda: tiny)
    monkeypatch.setattr("bench.step.throughput.ceilings", lambda device: known_ceilings)
    return tiny


def run(tmp_path, **options):
    out = tmp_path / "throughput.jsonl"
    small = dict(out=out, repeats=1, k=(1, 2, 3), modes=("eager",), views=("dali", "synthetic"), steps=1)
    throughput.main(throughput.ThroughputOptions(**(small | options)))
    return records.read(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes of a CPU")
def test_a_row_a_case_and_the_ratios(tmp_path, capsys):
    rows = run(tmp_path, soak=2)
    names = [(row["k"], row["mode"], row["views"]) for row in rows]
    assert names == [(k, "eager", views) for k in (1, 2, 3) for views in ("dali", "synthetic")]
    for row in rows:
        assert row["bench"] == "throughput" and row["batch"] == 4 and row["precision"] == "float32"
        assert row["steps_per_second"] == pytest.approx(1e3 / row["step_ms"])
        assert row["images_per_second"] == pytest.approx(row["steps_per_second"] * 4 * (row["k"] + 4))
        assert row["floor_ratio"] == pytest.approx(row["step_ms"] / row["floor_ms"])
        assert row["soak_steps"] == 2 and abs(row["memory_growth_mib"]) < 100
        assert row["commit"] and row["versions"]["torch"] and row["device"].startswith("CPU")
    said = capsys.readouterr().out
    assert "CPU: torch sees no GPU here" in said and "K=2 eager dali: views cost" in said
    assert "eager dali:" in said and "K ms a step, off by at most" in said


def test_micro_batches_are_compared_with_one_pass(tmp_path, capsys):
    rows = run(tmp_path, k=(2,), views=("synthetic",), micro_batches=(1, 2))
    assert [row["micro_batches"] for row in rows] == [1, 2]
    said = capsys.readouterr().out
    assert "K=2 eager synthetic in 2 parts: " in said and "times as long as in one pass" in said


def test_the_cost_of_the_papers_network_is_that_of_the_design():
    macs, elements = throughput.network_cost(Config(), (32, 32))
    assert macs == pytest.approx(0.214e9, rel=0.01)
    assert elements == pytest.approx(1.2e6, rel=0.1)


def test_measure_takes_a_configuration(cheap):
    for views in ("fused", "synthetic"):
        row = throughput.measure(cheap, 2, views, repeats=1)
        assert row["images_per_second"] == pytest.approx(row["steps_per_second"] * 24) and row["floor_ms"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ("graf",)}, "--modes: unknown 'graf'; choose from eager, compile, graph"),
        ({"views": ("pil",)}, "--views: unknown 'pil'; choose from fused, dali, synthetic"),
        ({"micro_batches": (0,)}, "--micro-batches must be at least 1, got 0"),
        ({"k": (0,)}, "--k must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is no mistake with a GPU")
def test_graphs_need_a_gpu(tmp_path):
    with pytest.raises(UserError, match="--modes graph needs a GPU"):
        run(tmp_path, modes=("graph",))
