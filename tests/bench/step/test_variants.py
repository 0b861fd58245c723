"""The variants and convolutions benches at CPU sizes, and how they process a device's timings."""

import os
from pathlib import Path

import pytest
import torch

from bench import report
from bench.step import convolutions, variants
from bench.step.convolutions import ConvolutionsOptions, Shape
from bench.step.variants import BASELINE, ROOT, VARIANTS, VariantsOptions
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.timing import Ceilings
from engine.measuring.trace import by_kind

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="uses CPU sizes")


@CPU
def test_variants_and_an_earlier_checkout_are_timed(tmp_path, capsys):
    """The earlier checkout is a copy of this one, made of symlinks."""
    before = tmp_path / "before"
    before.mkdir()
    for package in ("engine", "kernels", "pipelines", "bench"):
        (before / package).symlink_to(ROOT / package)
    out = tmp_path / "variants.jsonl"
    variants.main(
        VariantsOptions(out=out, before=before, variants=("one stream",), k=1, batch=4, repeats=2, steps=1, profile=1)
    )
    written = records.read(out)
    assert [record["variant"] for record in written] == [BASELINE, "before", "one stream"]
    assert written[0]["ratio"] == 1 and all(record["step_ms"] > 0 and record["k"] == 1 for record in written)
    replay = records.read(tmp_path / "replay.jsonl")
    assert {"convolutions, products", "gaps"} <= {record["kind"] for record in replay}
    assert "variant: one stream; step, ms: " in capsys.readouterr().out


@CPU
def test_a_failed_variant_is_listed_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    broken = variants.Variant(config={"precision": "no such"})
    monkeypatch.setattr("bench.step.variants.VARIANTS", {BASELINE: VARIANTS[BASELINE], "broken": broken})
    options = VariantsOptions(
        out=tmp_path / "records.jsonl", variants=("broken",), k=1, batch=4, repeats=1, steps=1, profile=0
    )
    with pytest.raises(SystemExit, match="failed: broken"):
        variants.main(options)
    assert [record["variant"] for record in records.read(options.out)] == [BASELINE]
    assert "broken: failed\n" in (said := capsys.readouterr().err) and "the step ended with exit code" in said


def test_rounds_alternate_their_order():
    order = []

    class Process:
        def __init__(self, name):
            self.name = name

        def ask(self, what):
            order.append((self.name, what))
            return len(order)

    found = variants.sample_interleaved({name: Process(name) for name in "abc"}, repeats=2, steps=5)
    assert [name for name, _ in order] == ["a", "b", "c", "c", "b", "a"] and order[0][1] == "sample 5"
    assert found == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


def test_time_by_kind_counts_overlapping_kernels_and_gaps():
    def kernel(name, begin, end):
        return {"name": name, "begin": begin, "end": end}

    events = [
        kernel("sm90_xmma_fprop_implicit_gemm", 0, 100), kernel("triton_red_fused_1", 50, 150),  # They overlap.
        kernel("triton_poi_fused_2", 200, 300), kernel("Memcpy DtoD", 300, 310), kernel("strange", 310, 400),
    ]  # fmt: skip
    found = by_kind(events, steps=2)
    assert found["convolutions, products"] == {"ms": 0.05, "kernels": 0.5, "share": 0.25}
    assert found["reductions (batch norm)"]["ms"] == 0.05 and found["others"]["ms"] == 0.045
    assert found["gaps"]["ms"] == pytest.approx(0.025) and found["gaps"]["share"] == pytest.approx(50 / 400)
    assert by_kind([], 1) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(repeats=0), "--repeats must be at least 1"),
        (dict(at_once=0), "--at-once must be at least 1"),
        (dict(variants=("fast",)), "--variants: unknown variant 'fast'"),
        (dict(before=Path("nowhere")), "--before nowhere is not a checkout"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        variants.main(VariantsOptions(**options))


def test_shapes_are_those_of_the_network_of_the_paper():
    counts = convolutions.shapes()
    assert sum(counts.values()) == 28 and counts[Shape(3, 16, 32, 3, 1)] == 1
    # Each group has 4 blocks of 2 convolutions; the first one's input differs.
    assert counts[Shape(32, 32, 32, 3, 1)] == 7 and counts[Shape(64, 64, 16, 3, 1)] == 7
    assert counts[Shape(64, 128, 16, 3, 2)] == 1 and counts[Shape(64, 128, 16, 1, 2)] == 1


def test_every_shape_and_pass_is_timed(tmp_path, monkeypatch):
    limit = Ceilings(copy_bytes_per_second=1e10, matmul_flops_per_second=1e12)
    monkeypatch.setattr("bench.step.convolutions.ceilings", lambda device: limit)
    few = {Shape(3, 16, 32, 3, 1): 1, Shape(32, 64, 32, 1, 2): 1}
    monkeypatch.setattr("bench.step.convolutions.shapes", lambda: few)
    out = tmp_path / "convolutions.jsonl"
    convolutions.main(ConvolutionsOptions(out=out, rows=2, repeats=1))
    written = records.read(out)
    assert [record["pass"] for record in written] == [*convolutions.PASSES] * 3
    strided = written[3]
    itemsize = 2 if torch.cuda.is_available() else 4
    assert strided["shape"] == "32->64 32x32, 1x1/2" and strided["flops"] == 2 * 2 * 64 * 16 * 16 * 32
    assert strided["bytes"] == itemsize * (2 * 32 * 32 * 32 + 64 * 32 + 2 * 64 * 16 * 16)
    assert written[6]["shape"] == "8->16 32x32, 3x3/1" and written[6]["in_network"] == 0
    for record in written:
        assert record["floor_ratio"] == pytest.approx(record["microseconds"] / record["floor_microseconds"])
    with pytest.raises(UserError, match="--rows must be at least 0"):
        convolutions.main(ConvolutionsOptions(rows=-1))


def test_cudnn_stays_enabled(monkeypatch):
    """`cudnn.flags` disables cuDNN by default, and PyTorch's own kernels are a hundred times slower."""
    seen = []

    def measure(functions, *args, **kwargs):
        cudnn = torch.backends.cudnn
        seen.append((cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32))
        return {}

    monkeypatch.setattr("bench.step.convolutions.measure", measure)
    monkeypatch.setattr("bench.step.convolutions.ceilings", lambda device: Ceilings(1e10, 1e12))
    for benchmark in (True, False):
        list(convolutions._time(Shape(3, 16, 8, 3, 1), 2, torch.device("cpu"), benchmark, 1))
    assert seen == [(True, True, 0, False), (True, False, 0, False)]


def test_predictions_are_compared_with_measurements():
    count = dict(preset="cifar10-250", k=8, batch=64, predicted_ms_h100=6.0, predicted_ms_h200=5.0)
    common = dict(k=8, batch=64, device="NVIDIA H200", step_ms=7.5)
    measured = [
        dict(common, bench="variants", variant="baseline"),
        dict(common, bench="variants", variant="one stream"),
        dict(common, bench="throughput", mode="graph", views="fused"),
        dict(common, bench="throughput", mode="graph", views="synthetic", k=4),
        dict(common, bench="throughput", mode="graph", views="synthetic", device="CPU"),
    ]
    others = [dict(count, ablate="no-rotation"), dict(count, method="mixmatch")]
    (line,) = report.predictions([count, *others], measured)
    assert line == ("K = 8, B = 64, NVIDIA H200 (variants): predicted 5.00 ms, measured 7.50 ms, 1.50 times as long")
    another_k = dict(count, k=4, ablate="k=4", predicted_ms_h200=6.0)
    assert len(report.predictions([count, *others, another_k], measured)) == 2


def test_a_variant_runs_in_its_checkout(monkeypatch):
    seen = {}

    class Popen:
        def __init__(self, command, env, cwd, **others):
            seen.update(command=command, path=env["PYTHONPATH"], safe=env["PYTHONSAFEPATH"], cwd=cwd)

    monkeypatch.setattr("engine.measuring.step_worker.subprocess.Popen", Popen)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    variants._worker(variants.Variant(checkout=Path("/there")), {"k": 2})
    assert seen["path"] == os.pathsep.join(["/there", "elsewhere"]) and str(seen["cwd"]) == "/there"
    assert seen["safe"] == "1" and '"k": 2' in seen["command"][-1]
