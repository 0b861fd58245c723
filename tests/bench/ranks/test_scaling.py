"""Scaling: groups of ranks are launched and timed, collective sizes match a real step, records are consistent."""

import dataclasses
import json
import pickle
import socket
import subprocess

import numpy as np
import pytest
import torch

from bench.ranks import scaling, scaling_worker
from bench.ranks.scaling import Group
from bench.ranks.scaling_worker import CaseSpec, Job
from bench.step.throughput import base_config
from engine.config.presets import preset
from engine.distributed import collectives
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.steps import TimedSteps
from tests.processes import gloo_threads

CPU = torch.device("cpu")
ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="uses CPU sizes")


def tiny(name="", cuda=False):
    return dataclasses.replace(preset("digits-40"), batch=4, k=1, width=8, view_steps=1, lag=4)


@pytest.fixture
def cheap(monkeypatch):
    """Train a tiny configuration."""
    monkeypatch.setattr("bench.ranks.scaling.base_config", lambda name, cuda: base_config("", True) if cuda else tiny())


def in_this_process(monkeypatch, job):
    """Run a job on one rank in this process, which saves the imports of another."""
    with socket.socket() as s, monkeypatch.context() as environment:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": s.getsockname()[1], "RANK": 0, "WORLD_SIZE": 1}
        for name, value in address.items():
            environment.setenv(name, str(value))
        s.close()
        try:
            return scaling_worker.work(pickle.loads(pickle.dumps(job)))
        finally:
            collectives.stop()


def run(tmp_path, **options):
    out = tmp_path / "scaling.jsonl"
    small = dict(out=out, ranks=(1, 2), rounds=1, repeats=2, steps=1, views="synthetic")
    scaling.main(scaling.ScalingOptions(**(small | options)))
    return records.read(out)


@ON_A_CPU
def test_a_worker_ends_the_threads_of_its_group(tmp_path):
    """Otherwise they could abort the worker while Python exits."""
    specs = (CaseSpec(4, grouped=False), CaseSpec(4), CaseSpec(4, reduced=False))
    (tmp_path / "job").write_bytes(pickle.dumps(Job(tiny(), "synthetic", specs, (2**12,), 1, 1)))
    joined, left = gloo_threads("from bench.ranks.scaling_worker import main; main(Path(sys.argv[1]))", tmp_path)
    assert joined > 0 and left == 0


@ON_A_CPU
def test_two_ranks_train_and_records_are_consistent(tmp_path, cheap, monkeypatch, capsys):
    launch = scaling.launch
    monkeypatch.setattr(scaling, "_REDUCED_SIZES", (2**12, 2**20))
    monkeypatch.setattr(
        scaling,
        "launch",
        lambda r, threads, job: in_this_process(monkeypatch, job) if r == 1 else launch(r, threads, job),
    )
    written = run(tmp_path)
    names = [(record["ranks"], record["scaling"], record["ddp"], record["batch"]) for record in written]
    assert names == [
        (1, "one rank", False, 4), (1, "one rank", True, 4), (1, "one rank, its share", True, 2),
        (2, "weak", True, 8), (2, "strong", True, 4),
    ]  # fmt: skip
    gradients, _ = scaling.step_collectives(tiny())
    one = written[0]["images_per_second"]
    for record in written:
        assert record["bench"] == "scaling" and record["mode"] == "eager" and record["precision"] == "float32"
        assert record["samples"] == 2 and record["step_ms_low"] <= record["step_ms"] <= record["step_ms_high"]
        assert record["images_per_second"] == pytest.approx(5 * record["batch"] / record["step_ms"] * 1e3)
        assert (
            record["commit"] and record["versions"]["torch"] and f", {record['threads']} threads of" in record["device"]
        )
        assert "predicted" not in json.dumps(record)
        if record["batch"] == 2:
            assert "efficiency" not in record
            continue
        assert record["one_rank_images_per_second"] == pytest.approx(one)
        assert record["efficiency"] == pytest.approx(record["images_per_second"] / (record["ranks"] * one))
        assert record["efficiency_by_round"] == pytest.approx([record["efficiency"]])
    assert written[1]["ddp_overhead_percent"] == pytest.approx(
        100 * (written[1]["step_ms"] / written[0]["step_ms"] - 1)
    )
    for record in written[3:]:
        assert record["all_reduce_bytes"] == gradients.fixed_bytes and record["gradient_buckets"] == 1
        assert 0 < record["all_reduce_ms_low"] <= record["all_reduce_ms"] <= record["all_reduce_ms_high"]
        assert (
            record["unreduced_step_ms"] > 0
            and record["beside_step_ms"] > 0
            and 0 <= record["overlap"] <= 1
            and record["backend"] == "gloo"
        )
        assert record["other_collectives"] == 2 and record["other_total_bytes"] == sum(record["other_bytes"].values())
    output = capsys.readouterr().out
    assert (
        "CPU: torch sees no GPU here" in output
        and f"; DDP overhead: {written[1]['ddp_overhead_percent']:+.1f} %" in output
    )
    assert "model, calibrated in this run" in output and "2 ranks, weak: predicted" in output
    assert "predicted, not measured: WRN-28-2 on 32x32, K = 8, B = 64, 5.87 MB of gradients" in output
    table = scaling.BENCH.tables["scaling"].markdown(written).splitlines()
    assert len([line for line in table if line.startswith("| digits-40 | 1 |")]) == 5


@pytest.mark.parametrize("method", ["remixmatch", "supervised"])
def test_collective_sizes_match_a_step(monkeypatch, method):
    """One process acts as the first of two ranks; its collectives are recorded and replaced by local results."""
    recorded = []

    def all_gather(gathered, local):
        recorded.append(("all-gather", gathered.nbytes))
        gathered.copy_(torch.cat([local, local]))

    monkeypatch.setattr(collectives, "ranks", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", all_gather)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t: recorded.append(("all-reduce", t.nbytes)))
    config = dataclasses.replace(tiny(), method=method)
    case = TimedSteps.begin(config, "synthetic")
    try:
        case.advance(2)
        trained = [p for p in case.state.network.parameters() if p.requires_grad]
    finally:
        case.end()
    gradients, others = scaling.step_collectives(config)
    assert sorted(recorded) == sorted(2 * [(each.kind, each.bytes(config.batch)) for each in others])
    assert gradients.bytes(config.batch) == 4 * sum(p.numel() for p in trained)


# All views of a step, which every rank used to gather: (K + 3) B images of 32x32 pixels and 3 bytes.
VIEWS = {2: 4_325_376, 8: 17_301_504, 64: 138_412_032}


@pytest.mark.parametrize("ranks", VIEWS)
def test_bytes_that_a_rank_receives_in_a_step_of_the_paper(ranks):
    """Logits of pseudo-labels and probes, batch norm's statistics and losses: no pixels."""
    paper = base_config("", True)
    batch = ranks * paper.batch
    _, others = scaling.step_collectives(paper)
    by_name = {each.name: each.bytes(batch) for each in others}
    assert by_name["logits"] == 2 * 10 * 4 * batch
    assert sorted(by_name) == ["buffers and metrics", "logits"] and by_name["buffers and metrics"] < 20_000
    assert VIEWS[ranks] == (paper.k + 3) * batch * 32 * 32 * 3
    assert sum(by_name.values()) < 0.006 * VIEWS[ranks]


def test_case_specs():
    both = ("weak", "strong")
    assert scaling.case_specs(64, 1, 1, both) == [CaseSpec(64, grouped=False), CaseSpec(64)]
    assert scaling.case_specs(64, 1, 8, both)[2:] == [CaseSpec(8)]
    assert scaling.case_specs(64, 1, 8, ("weak",))[2:] == []
    assert [(spec.batch, spec.reduced) for spec in scaling.case_specs(64, 4, 8, both)] == [
        (256, True), (256, False), (64, True), (64, True), (64, False), (16, True),
    ]  # fmt: skip
    assert [spec.batch for spec in scaling.case_specs(64, 4, 8, both) if not spec.grouped] == [64, 16]


def group(ranks, **steps):
    facts = {"mode": "eager", "precision": "float32", "rows_per_image": 5, "backend": "gloo", "gradient_buckets": 1}
    return Group(ranks, {}, {}, facts)


def test_records_by_hand():
    moved = gradients, _ = scaling.step_collectives(tiny())
    one, two = group(1), group(2)
    one.steps = {CaseSpec(4, grouped=False): [0.010, 0.020], CaseSpec(4): [0.011, 0.022]}
    apart = {CaseSpec(4, grouped=False): [0.012, 0.014]}
    two.steps = {CaseSpec(8): [0.020, 0.040], CaseSpec(8, reduced=False): [0.0195, 0.0395]} | apart
    two.reduces = {gradients.fixed_bytes: [0.001, 0.001]}
    alone, grouped, weak = scaling.make_records([one, two], 4, moved, {"rounds": 2})
    assert alone["efficiency"] == 1 and alone["images_per_second"] == pytest.approx(20 / 0.015)
    assert grouped["ddp_overhead_percent"] == pytest.approx(10) == grouped["ddp_overhead_low"]
    assert grouped["efficiency"] == pytest.approx(1 / 1.1)
    assert weak["efficiency"] == pytest.approx(0.5) and weak["efficiency_by_round"] == pytest.approx([0.5, 0.5])
    assert weak["beside_step_ms"] == pytest.approx(13)
    # Not reducing saves half of the 1 ms, but the quartiles of the steps differ by 10 ms.
    assert weak["overlap"] == pytest.approx(0.5) and weak["overlap_noise"] == "noise"
    two.steps = {CaseSpec(8): [0.0201, 0.0201], CaseSpec(8, reduced=False): [0.0191, 0.0193]} | apart
    assert scaling.make_records([two], 4, moved, {"rounds": 1})[0]["overlap"] == pytest.approx(0.1)
    two.steps[CaseSpec(8, reduced=False)] = [0.0150, 0.0150]
    (record,) = scaling.make_records([two], 4, moved, {"rounds": 1})
    assert record["overlap"] == 0 and record["overlap_noise"] == "" and "efficiency" not in record


def test_a_failed_group_is_listed_and_not_launched_again(tmp_path, cheap, monkeypatch, capsys):
    launched = []

    def launch(ranks, threads, job):
        launched.append(ranks)
        if ranks == 2:
            raise RuntimeError("no route to itself")
        return {"steps": {spec: [0.01] for spec in job.cases}, "reduces": {}, "facts": group(1).facts}

    monkeypatch.setattr(scaling, "launch", launch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="failed: 2 ranks"):
        run(tmp_path, rounds=3)
    assert launched == [1, 2, 1, 1]
    assert [record["samples"] for record in records.read(tmp_path / "scaling.jsonl")] == [3, 3, 3]
    assert "no route to itself" in capsys.readouterr().err


def test_a_failed_launch_shows_its_output(monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match=r"false -m torch.distributed.run .* ended with exit code 1"):
        scaling.launch(2, 1, Job(tiny(), "dali", (), (), 1, 1))


def test_an_interrupt_terminates_the_launcher(monkeypatch):
    started = []
    real = subprocess.Popen

    class Interrupted(real):
        def __init__(self, command, **kwargs):
            super().__init__(["sleep", "60"], **kwargs)
            started.append(self)

        def communicate(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr("bench.ranks.scaling.subprocess.Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        scaling.launch(2, 1, Job(tiny(), "dali", (), (), 1, 1))
    assert started[0].returncode == -15


def throughput_record(k, step_ms, device="NVIDIA H200", **more):
    paper = base_config("", True)
    common = {"preset": paper.preset, "k": k, "batch": paper.batch, "mode": "graph", "views": "fused"}
    return common | {"precision": "bfloat16", "optimizer": "torch", "step_ms": step_ms, "device": device} | more


def test_the_step_of_one_gpu_is_assumed_if_none_was_measured():
    paper = base_config("", True)
    moved = gradients, _ = scaling.step_collectives(paper)
    assert gradients.fixed_bytes == pytest.approx(4 * 1.47e6, rel=0.01)

    def cost(*measured):
        work, source = scaling.assumed_work(moved, measured, paper)
        return 1e3 * work.fixed, 1e3 * (work.fixed + 64 * work.per_image), source

    others = [
        throughput_record(8, 50.0, "CPU, slow"),
        throughput_record(8, 20.0, mode="eager"),
        throughput_record(1, 2.0),
    ]
    fixed, step, source = cost(*others)
    assert (fixed, step) == pytest.approx((1.5, 6.0)) and "assumed, the design target of 6 ms" in source
    fixed, step, source = cost(throughput_record(8, 4.0))
    assert (fixed, step) == pytest.approx((1.0, 4.0)) and "NVIDIA H200, 25% of it assumed" in source
    line = [throughput_record(k, 1.0 + 0.3 * (k + 4 + 2 / 3)) for k in (1, 8, 16)]
    fixed, step, source = cost(*others[:2], *line)
    assert (fixed, step) == pytest.approx((1.0, 4.8)) and source.endswith("H200, fitted over K = 1, 8, 16")


@ON_A_CPU
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (0, 1)}, "--ranks must be at least 1, got 0"),
        ({"scaling": ("wide",)}, "--scaling: unknown scaling 'wide'; choose from weak, strong"),
        ({"scaling": ()}, "--scaling needs at least one of weak, strong"),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"views": "pil"}, "--views: unknown view 'pil'; choose from fused, dali, dali-graph, synthetic"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"batch": 3}, "--batch 3 cannot be shared by 2 ranks"),
        ({"k": 0}, "--k must be at least 1, got 0"),
        ({"mode": "graph"}, "--mode graph captures a CUDA graph and requires a GPU"),
    ],
)
def test_invalid_options(options, message, tmp_path, cheap):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)


def test_more_ranks_than_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.ranks.scaling.bench_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--ranks must be at most the number of GPUs \\(1\\), got 2"):
        run(tmp_path)


@ON_A_CPU
def test_default_ranks_are_powers_of_two_up_to_the_cores(tmp_path, cheap, monkeypatch, capsys):
    launched = []

    def launch(ranks, threads, job):
        launched.append((ranks, threads))
        samples = [0.01 + 0.001 * n for n in range(job.repeats)]
        timed = {"steps": dict.fromkeys(job.cases, samples), "reduces": dict.fromkeys(job.sizes, samples)}
        return timed | {"facts": group(1).facts}

    monkeypatch.setattr(scaling, "launch", launch)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    written = run(tmp_path, ranks=(), rounds=2)
    assert launched == [(1, 1), (2, 1), (4, 1)] * 2
    assert [record["samples"] for record in written] == [4] * 7
    assert np.allclose([record["efficiency"] for record in written if record["scaling"] == "weak"], 1)
    assert "groups of 1, 2, 4 ranks, 1 threads per rank" in capsys.readouterr().out
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run(tmp_path, ranks=(2,))
    assert launched[-1] == (2, 3)
