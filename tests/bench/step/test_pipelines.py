"""The pipelines bench: installed backends are compared with PIL, missing ones are reported."""

import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from bench.step import pipelines
from engine.errors import UserError
from engine.measuring import records
from pipelines import ctaugment

pytestmark = pytest.mark.usefixtures("known_ceilings")
TINY = dict(repeats=1, rows=16, side=16, batches=3, threads=1)


def bench(tmp_path, *backends, **changes):
    out = tmp_path / "pipelines.jsonl"
    pipelines.main(pipelines.PipelinesOptions(out=out, backends=backends, **(TINY | changes)))
    return records.read(out)


def test_backends_are_compared_with_pil(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kornia", None)
    pytest.importorskip("nvidia.dali")
    written = bench(tmp_path, "torchvision", "dali-cpu-1", "kornia")
    assert [record["backend"] for record in written] == ["pil", "torchvision", "dali-cpu-1"]
    assert written[0]["ratio_to_pil"] == 1
    for record in written:
        assert record["ratio_to_pil"] == pytest.approx(record["views_per_second"] / written[0]["views_per_second"])
        assert record["share_of_copy"] == pytest.approx(record["views_per_second"] * 2 * 3 * 16 * 16 / 1e10)
        assert record["views_per_second_low"] <= record["views_per_second"] <= record["views_per_second_high"]
    assert "kornia: skipped, kornia is not installed" in capsys.readouterr().out


def test_cpu_time_excludes_the_warm_up(tmp_path, monkeypatch):
    readings = iter([0.0, 100.0, 100.0, 103.0, 103.0, 105.0])  # Before and after: warm-up 100 s, samples 3 and 2 s.
    monkeypatch.setattr(pipelines, "_cpu_seconds", lambda: next(readings))
    (written,) = bench(tmp_path, "pil", repeats=2)
    assert written["cpu_us"] == pytest.approx(2.5e6 / (TINY["rows"] * TINY["batches"]))


def test_cpu_time_includes_living_children():
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    before = pipelines._cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"\n"
        assert pipelines._cpu_seconds() - before >= 0.4
        child.communicate(b"\n")


def test_plans_contain_only_strong_views():
    task = pipelines.make_task(64, 16, 2, torch.device("cpu"), 1)
    assert task.batch == 64 and len(task.plans) == 2
    for plan in task.plans:
        assert not plan.labeled.any()
        # Identity is one of 19 transformations, so few views draw it twice.
        assert ((plan.ops != ctaugment.IDENTITY).any(axis=1)).mean() > 0.9


def test_a_call_makes_every_batch(tmp_path, monkeypatch):
    from pipelines.dali import DaliViews  # Imported here: only this test requires DALI.

    made = []

    class Counting(DaliViews):
        def __init__(self, images, labeled, unlabeled, rows, max_shift, device, device_id, prefetch):
            super().__init__(images, labeled, unlabeled, rows, max_shift, prefetch=prefetch)

        def collect(self):
            views = super().collect()
            made.append(np.asarray(views.cpu()))
            return views

    monkeypatch.setitem(sys.modules, "pipelines.fused", types.SimpleNamespace(FusedViews=Counting))
    written = bench(tmp_path, "fused")
    assert [record["backend"] for record in written] == ["pil", "fused"]
    calls = len(made) // TINY["batches"]
    assert len(made) == calls * TINY["batches"] and calls >= 3  # First call, warm-up, one sample.
    for first, again in zip(made, made[TINY["batches"] :], strict=False):
        assert np.array_equal(first, again)


def test_missing_packages_are_skipped_and_broken_ones_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pipelines.fused", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "pipelines.dali", raising=False)
    broken = types.SimpleNamespace(FusedViews=None)  # Not callable.
    assert [record["backend"] for record in bench(tmp_path, "fused", "dali-cpu-1")] == ["pil"]
    output = capsys.readouterr().out
    assert "fused: skipped, pipelines.fused is not installed" in output and "dali-cpu-1: skipped, " in output
    monkeypatch.setitem(sys.modules, "pipelines.fused", broken)
    with pytest.raises(SystemExit, match="failed: fused"):
        bench(tmp_path, "fused")
    assert [record["backend"] for record in records.read(tmp_path / "pipelines.jsonl")] == ["pil", "pil"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 4}, "--rows must be at least 8, got 4"),
        ({"rows": 20}, "--rows must be a multiple of 8, got 20"),
        ({"side": 4}, "--side must be at least 5"),
        ({"batches": 0}, "--batches must be at least 1"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"repeats": 0}, "--repeats must be at least 1"),
    ],
)
def test_invalid_options(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        bench(tmp_path, "pil", **options)
    with pytest.raises(UserError, match="--backends: unknown backend 'dali'"):
        bench(tmp_path, "dali")
