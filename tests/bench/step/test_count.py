"""`remixmatch bench count`: launches of the compiled step compared with the budget, predictions and records."""

import dataclasses
import json

import pytest
import torch

from bench.step import count
from bench.step.count import BUDGET, TARGETS, Count, CountOptions, Launch
from engine.config.presets import preset
from engine.errors import UserError
from engine.measuring import records

LAUNCHES = (
    Launch("assemble", "remixmatch::assemble_batch", 300, 0),
    Launch("forward", "triton triton_red_fused_0", 4000, 0),
    Launch("forward", "aten::convolution", 2000, 73_728, (1, 8, 8, 8, 8, 3, 1, 1)),
    Launch("backward", "aten::convolution_backward", 5000, 147_456, (1, 8, 8, 8, 8, 3, 1, 2)),
    Launch("backward", "triton triton_poi_fused_1", 1000, 0),
    Launch("update", "aten::_fused_adamw_", 700, 0),
)
CASE = {"preset": "cifar10-250", "k": 8, "batch": 64, "target": "sm_90", "precision": "bf16"}


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("k", "convolutions"),
    [
        (8, "cudnn"),
        (8, "triton"),
        pytest.param(1, "cudnn", marks=pytest.mark.long),
        pytest.param(1, "triton", marks=pytest.mark.long),
    ],
)
def test_the_step_is_within_its_budget(k, convolutions):
    """If a change of the counts is intended, update `bench/budget.json` with `bench count --budget FILE --update`."""
    budget = json.loads(BUDGET.read_text())
    if budget["torch"] != torch.__version__.split("+")[0]:
        pytest.skip(f"the budget is for torch {budget['torch']}, installed is {torch.__version__}")
    config = dataclasses.replace(preset("cifar10-250"), k=k, precision="bf16", convolutions=convolutions)
    counted = count.count(config, "sm_90", (32, 10)).by_part()
    case = CASE | {"k": k} | ({} if convolutions == "cudnn" else {"convolutions": convolutions})
    assert count.compare_budget(BUDGET, case, counted) == []
    networks = [counted[part] for part in count.NETWORKS]
    if convolutions == "triton":
        assert sum(part[kind] for part in counted.values() for kind in count.KINDS) <= 300
        assert sum(part["bytes"] for part in counted.values()) <= {8: 8.5e9, 1: 3.9e9}[k]
        assert sum(part["library"] for part in networks) <= 30, "only stem, strided shortcuts and heads are cuDNN's"
        return
    if k == 8:
        assert counted["backward"]["bytes"] <= 6.6e9 and sum(part["bytes"] for part in networks) <= 12.3e9
    assert sum(part["triton"] for part in networks) <= 340
    outside = [part for name, part in counted.items() if name not in (*count.NETWORKS, "update")]
    assert sum(part[kind] for part in outside for kind in count.KINDS) <= 40
    assert sum(part[kind] for part in counted.values() for kind in count.KINDS) <= 580


@pytest.mark.compiler
def test_counts_are_reproducible_and_depend_on_inductor_options(tmp_path):
    config = dataclasses.replace(
        preset("digits-40"), k=1, batch=8, scales=1, width=16, precision="bf16", lag=16, view_steps=1,
        convolutions="cudnn",  # Measured times of the emulated device would decide otherwise.
    )  # fmt: skip
    one, other = (count.count(config, "sm_80", (16, 10)) for _ in range(2))
    assert one == other
    # By hand: a pool of 8 labeled and 16 unlabeled views, 8 u_1, 8 rotated u_1; a network with one block of width 16.
    convolutions = [launch for launch in one.launches if launch.part == "forward" and launch.kind == "library"]
    images, pixels = 40, 256
    each = [2 * images * pixels * 9 * inputs * 16 for inputs in (3, 16, 16)]
    assert [launch.flops for launch in convolutions] == [*each, 2 * images * 16 * 10, 2 * images * 16 * 4]
    first = 2 * (images * pixels * (3 + 16) + 9 * 3 * 16)
    assert convolutions[0].bytes == first, "images and weights read, result written, in bf16"
    backward = [launch for launch in one.launches if launch.name == "aten::convolution_backward"]
    assert [launch.shape for launch in convolutions[:3]] == [(images, c, 16, 16, 16, 3, 1, 1) for c in (3, 16, 16)]
    assert [launch.shape for launch in backward] == [
        (images, c, 16, 16, 16, 3, 1, p) for c, p in ((16, 2), (16, 2), (3, 1))
    ]
    compiled = sum(launch.bytes for launch in one.launches if launch.kind != "operator")
    assert compiled == pytest.approx(one.graph_bytes, rel=0.01), "the total differs from Inductor's own"
    path = tmp_path / "budget.json"
    case = CASE | {"preset": "digits-40", "k": 1, "target": "sm_80"}
    count.write_budget(path, case, one.by_part())
    assert count.compare_budget(path, case, other.by_part()) == []
    assert "has no budget for" in count.compare_budget(path, case | {"convolutions": "triton"}, other.by_part())[0]
    changed = count.count(config, "sm_80", (16, 10), {"combo_kernels": False})
    lines = count.compare_budget(path, case, changed.by_part())
    assert len(changed.launches) > len(one.launches)
    assert any("forward: triton" in line for line in lines) and "--update" in lines[-1]


@pytest.mark.compiler
@pytest.mark.long
def test_generated_kernels_are_compiled_for_the_target():
    config = dataclasses.replace(
        preset("digits-40"), k=1, batch=8, scales=1, width=16, precision="bf16", convolutions="cudnn"
    )
    counted = count.count(config, "sm_90", (16, 10), cubins=True)
    names = {launch.name.removeprefix("triton ") for launch in counted.launches if launch.kind == "triton"}
    assert names <= counted.kernels.keys()
    for tried in counted.kernels.values():
        assert tried and all(0 < one["registers"] <= 255 and one["spilled_bytes"] >= 0 for one in tried)


def test_parts_add_up_and_least_bytes_are_those_of_library_calls():
    by_part = Count(LAUNCHES).by_part()
    assert list(by_part) == ["assemble", "forward", "backward", "update"]
    assert by_part["forward"] == {
        "triton": 1, "library": 1, "operator": 0, "bytes": 6000, "flops": 73_728, "least_bytes": 2000
    }  # fmt: skip
    assert by_part["update"]["operator"] == 1 and by_part["update"]["least_bytes"] == 700


def test_writes_records_a_table_and_a_budget(tmp_path, monkeypatch, capsys):
    seen = []

    def counted(config, target, images, inductor=None, cubins=False):
        seen.append((config.k, config.batch, target, images, cubins))
        kernels = {"one": [{"registers": 40, "spilled_bytes": 0}, {"registers": 90, "spilled_bytes": 8}]}
        return Count(LAUNCHES, kernels=kernels if cubins else {})

    monkeypatch.setattr("bench.step.count.count", counted)
    out, budget = tmp_path / "count.jsonl", tmp_path / "budget.json"
    count.main(CountOptions(out=out, k=(1, 4), batch=32, target="sm_90", budget=budget, update=True, cubins=True))
    assert seen == [(1, 32, "sm_90", (32, 10), True), (4, 32, "sm_90", (32, 10), True)]
    printed = capsys.readouterr().out
    assert "predicted, not measured, for H100" in printed and "launches: 6; " in printed
    assert "most registers: 90, one\nkernels with a configuration that spills: 1\n  one\n" in printed
    first, second = records.read(out)
    assert (first["k"], second["k"], first["launches"], first["bytes"]) == (1, 4, 6, 13000)
    assert first["predicted_ms_h100"] > 0 and first["predicted_ms_h200"] > 0
    parts = first["predicted_parts_ms_h100"]
    assert {"forward convolutions", "weight gradients", "input gradients", "forward", "backward"} <= parts.keys()
    assert f"| weight gradients | {parts['weight gradients']:.2f} | " in printed
    count.main(CountOptions(out=out, k=(4,), batch=32, budget=budget))
    with pytest.raises(SystemExit, match="has no budget for"):
        count.main(CountOptions(out=out, k=(8,), batch=32, budget=budget))
    more = (*LAUNCHES, Launch("metrics", "aten::add", 8, 0))
    monkeypatch.setattr("bench.step.count.count", lambda *given, **named: Count(more))
    with pytest.raises(SystemExit, match="K = 4, sm_90, metrics: operator 0 -> 1, bytes 0 -> 8"):
        count.main(CountOptions(out=out, k=(4,), batch=32, budget=budget))


def test_predictions_of_fused_convolutions_vary_their_rate_and_take_their_issue_slots(tmp_path, monkeypatch):
    name, sizes = "remixmatch::norm_act_conv", (768, 16, 32, 32, 32, 3, 1)
    launches = [Launch("forward", name + end, 10**8, 10**11, (*sizes, 1)) for end in ("", "_weight_grad")]
    monkeypatch.setattr("bench.step.count.count", lambda *given, **named: Count(tuple(launches)))
    out, issue = tmp_path / "count.jsonl", tmp_path / "issue.jsonl"
    for kernel, seconds in (("convolution_forward", 7e-3), ("guess_labels", 1), ("convolution_weight_grad", 2e-3)):
        records.append(issue, {"kernel": kernel, "sizes": sizes, "issue_seconds": seconds})
    count.main(CountOptions(out=out, k=(8,), convolutions="triton", issue=issue))
    (one,) = records.read(out)
    shares = one["predicted_ms_h100_by_share"]
    assert list(shares) == ["0.3", "0.5", "0.8"] and shares["0.5"] == one["predicted_ms_h100"]
    assert shares["0.3"] - shares["0.5"] == pytest.approx(2 * 1e14 * (1 / 0.3 - 1 / 0.5) / 798e12)
    assert one["predicted_ms_h100_with_issue"] == pytest.approx(7 + 2, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(preset="cifar"), "unknown preset 'cifar'"),
        (dict(preset="folder"), "use --side and --classes"),
        (dict(update=True), "--update requires --budget"),
        (dict(k=(0,)), "--k must be at least 1"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        count.main(CountOptions(**options))


def test_a_compiler_is_required(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.emulator.run.ROOT", tmp_path)
    monkeypatch.setattr("bench.emulator.run.compiler", lambda: None)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        count.count(preset("digits-40"), "sm_90", (16, 10))


def test_a_checkout_is_required(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.emulator.run.HERE", tmp_path)
    with pytest.raises(UserError, match="the emulated device needs a checkout of the project"):
        count.count(preset("digits-40"), "sm_90", (16, 10))


def test_a_broken_budget_is_a_user_error(tmp_path):
    (tmp_path / "budget.json").write_text("{")
    with pytest.raises(UserError, match=r"budget.json is not a budget"):
        count.compare_budget(tmp_path / "budget.json", CASE, {})


def test_every_target_has_devices():
    for name, target in TARGETS.items():
        assert name == f"sm_{target.capability}" and target.devices
