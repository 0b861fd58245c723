"""The plain PyTorch baseline: it trains, in the shapes that it says, and stands beside the engine."""

import dataclasses

import pytest
import torch

from bench import baseline, records
from bench.images import NOISE_32
from engine.errors import UserError
from pipelines.datasets import DATASETS
from pipelines.splits import balanced

CPU = torch.device("cpu")


def tiny(k=2, batch=6):
    return dataclasses.replace(baseline.step_config(k, CPU), batch=batch, width=8)


def one_batch(config):
    data = DATASETS[NOISE_32]()
    split = balanced(data, config.labels, 0)
    return next(iter(baseline.loader(config, data, split, CPU, workers=0)))


def test_a_batch_has_the_views_of_a_step():
    x, y, weak, strong = one_batch(tiny())
    assert x.shape == weak.shape == (6, 3, 32, 32) and strong.shape == (6, 2, 3, 32, 32) and y.shape == (6,)
    assert x.dtype == weak.dtype == strong.dtype == torch.uint8


def test_a_step_moves_network_ema_model_and_marginals():
    trained = baseline.Baseline(tiny(), 10, CPU)
    before = [p.clone() for p in trained.network.parameters()]
    batch = one_batch(tiny())
    losses = [trained.step(*batch) for _ in range(2)]
    assert trained.steps == 2 and all(loss.isfinite() for loss in losses)
    assert all((p != b).any() for p, b in zip(trained.network.parameters(), before, strict=True) if p.ndim > 1)
    averaged = [p for p in trained.ema_model.parameters() if p.ndim > 1]
    assert all((p != b).any() for p, b in zip(averaged, [b for b in before if b.ndim > 1], strict=True))
    assert (trained.p_model_history[:2].sum(1) - 1).abs().max() < 1e-5 and (trained.p_model_history[2:] == 0.1).all()
    assert (trained.p_model_history[:2] != 0.1).any() and trained.p_data.sum().item() == pytest.approx(1)


def run(tmp_path, **options):
    out = tmp_path / "baseline.jsonl"
    small = dict(out=out, repeats=1, k=(1,), steps=1, batch=2, workers=1)
    baseline.main(baseline.BaselineOptions(**(small | options)))
    return records.read(out)


def test_rows_stand_beside_the_engine(tmp_path, known_ceilings, monkeypatch, capsys):
    asked = []

    def measure(config, steps, data="real"):
        asked.append((config.k, config.batch, steps, data))
        return {"steps_per_second": 1000.0, "images_per_second": 10_000.0, "floor_ms": 0.5}

    monkeypatch.setattr("bench.throughput.measure", measure)
    rows = run(tmp_path, repeats=2)
    assert asked == [(1, 2, 2, "synthetic"), (1, 2, 2, "real")]
    assert [(row["data"], row["workers"]) for row in rows] == [("synthetic", 0), ("real", 1)]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(10 * row["steps_per_second"])
        assert row["engine_ratio"] == pytest.approx(1000 / row["steps_per_second"])
        assert row["floor_ratio"] == pytest.approx(row["step_ms"] / 0.5)
    assert "images/s; engine 1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ("fake",)}, "--data: there is no 'fake'; there are real, synthetic"),
        ({"k": (0,)}, "--k must be at least 1, got 0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_mistakes(options, message, tmp_path, known_ceilings):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)
