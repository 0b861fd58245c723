"""The baseline bench: plain PyTorch trains, samples are interleaved and start idle, records contain the speedups."""

import dataclasses
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from bench.rivals import baseline, plain
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.timing import Timing
from engine.runs.setup import setup_run
from engine.training import feed as feed_module
from engine.training.execution import Execution
from engine.training.feed import Feed

CPU = torch.device("cpu")


def opened(config):
    """Return the data set and split of a configuration."""
    setup = setup_run(config)
    return setup.data, setup.split


@pytest.fixture(autouse=True)
def known_bound(monkeypatch, known_ceilings):
    """Use constant ceilings for the engine's roofline bound."""
    monkeypatch.setattr("bench.step.throughput.ceilings", lambda device: known_ceilings)


def tiny(k=2, batch=6):
    return dataclasses.replace(baseline.step_config(k, CPU), batch=batch, width=8)


def options(**changes):
    return baseline.BaselineOptions(**(dict(repeats=1, k=(1,), steps=1, batch=2, workers=1) | changes))


def one_batch(config):
    (loader,) = plain.loaders(config, *opened(config), CPU, workers=0)
    return next(loader)


def test_a_batch_has_the_views_of_a_step():
    x, y, weak, strong = one_batch(tiny())
    assert x.shape == weak.shape == (6, 3, 32, 32) and strong.shape == (6, 2, 3, 32, 32) and y.shape == (6,)
    assert x.dtype == weak.dtype == strong.dtype == torch.uint8


def test_a_plain_step_updates_network_ema_model_and_marginals():
    trained = plain.PlainStep(tiny(), *opened(tiny()), CPU)
    before = [p.clone() for p in trained.network.parameters()]
    batch = one_batch(tiny())
    losses = [trained.step(batch) for _ in range(2)]
    assert trained.steps == 2 and all(loss.isfinite() for loss in losses)
    assert all((p != b).any() for p, b in zip(trained.network.parameters(), before, strict=True) if p.ndim > 1)
    averaged = [p for p in trained.ema_model.parameters() if p.ndim > 1]
    assert all((p != b).any() for p, b in zip(averaged, [b for b in before if b.ndim > 1], strict=True))
    assert (trained.p_model_history[:2].sum(1) - 1).abs().max() < 1e-5 and (trained.p_model_history[2:] == 0.1).all()
    assert (trained.p_model_history[:2] != 0.1).any() and trained.p_data.sum().item() == pytest.approx(1)


def run(tmp_path, **changes):
    out = tmp_path / "baseline.jsonl"
    baseline.main(options(out=out, **changes))
    return records.read(out)


def test_samples_of_rivals_and_engine_are_interleaved(tmp_path, monkeypatch):
    """Each kind of views is timed separately; the engine is timed twice with a rival of K = 2."""
    turns = []
    advance = baseline.TimedTrainer.advance

    def recorded(self, kind, steps):
        if kind != "networks":
            turns.append((self.name, self.config.k, kind, steps))
        advance(self, kind, steps)

    monkeypatch.setattr(baseline.TimedTrainer, "advance", recorded)
    written = run(tmp_path, k=(3,), repeats=2, steps=3)
    groups = [("plain", 3), ("engine", 3)], [("usb", 2), ("engine", 2), ("engine", 3)]
    rounds = [[(*who, data) for data in ("synthetic", "real") for who in group] for group in groups]
    timed = [turn[:3] for turn in turns if turn[3] == 3]  # Warm-up of a new trainer takes two steps.
    assert timed == [turn for round_ in rounds for turn in 3 * round_]  # The first of three rounds is a warm-up.
    cases = [(record["trainer"], record["k"], record["data"]) for record in written]
    assert cases == [(*who, data) for group in groups for data in ("real", "synthetic") for who in group]
    assert [record.get("beside") for record in written] == 2 * [None, "plain"] + 2 * [None, "usb", "usb"]
    assert [record["workers"] for record in written if "beside" not in record] == [1, 0, 1, 0]


def test_records_contain_medians_of_interleaved_samples(tmp_path, monkeypatch, capsys):
    seconds = {  # Of samples of two steps.
        "usb K=2 networks": (0.6, 1.2, 0.6),
        "engine K=2 networks": (0.2, 0.2, 0.2),
        "engine K=4 networks": (1.0, 1.0, 1.0),
        "usb K=2 synthetic": (1.0, 2.0, 1.0),
        "engine K=2 synthetic": (0.5, 0.5, 1.0),
        "engine K=4 synthetic": (2.0, 2.0, 2.0),
        "usb K=2 real": (1.2, 2.4, 1.2),
        "engine K=2 real": (0.6, 0.6, 0.6),
        "engine K=4 real": (2.0, 2.0, 2.0),
    }

    def measure(functions, device, repeats, warm_up, clock):
        assert list(functions) == list(seconds) and repeats == 3
        return {name: Timing(*np.percentile(s, (50, 25, 75)), 0.0, s) for name, s in seconds.items()}

    monkeypatch.setattr(baseline, "measure", measure)
    usb, engine, larger = (r for r in run(tmp_path, rivals=("usb",), k=(4,), repeats=3, steps=2) if r["data"] == "real")
    assert usb["step_ms"] == pytest.approx(600) and usb["step_ms_high"] == pytest.approx(900)
    assert usb["images_per_second"] == pytest.approx(2 * 6 / 0.6) and usb["floor_ratio"] > 0
    parts = {name: usb[f"{name}_ms"] for name in ("networks", "rest", "views")}
    assert parts == pytest.approx({"networks": 300, "rest": 200, "views": 100})
    assert engine["engine_ratio"] == engine["engine_images_ratio"] == pytest.approx(2)  # The median of 2, 4 and 2.
    assert (engine["engine_ratio_low"], engine["engine_ratio_high"]) == pytest.approx((2, 3))
    assert larger["engine_ratio"] == pytest.approx(0.6) and larger["engine_images_ratio"] == pytest.approx(0.8)
    shown = "engine speedup: 2.00; speedup quartiles: 2.00 to 3.00; speedup in images/s: 2.00"
    assert shown in capsys.readouterr().out


def test_parts_and_data_are_optional(tmp_path):
    written = run(tmp_path, rivals=("torchssl",), data=("synthetic",), parts=False)
    assert [record["trainer"] for record in written] == ["torchssl", "engine"]
    assert {record["data"] for record in written} == {"synthetic"}
    assert not any("networks_ms" in record or "views_ms" in record for record in written)


def test_the_engine_without_probes_in_cpu_time(tmp_path, monkeypatch):
    passes, clocks = [], []
    measure, network_passes = baseline.measure, baseline.network_passes
    monkeypatch.setattr(
        baseline, "measure", lambda *a, clock, **k: clocks.append(clock) or measure(*a, clock=clock, **k)
    )
    monkeypatch.setattr(baseline, "network_passes", lambda *a: passes.append(len(a[1])) or network_passes(*a))
    run(tmp_path, rivals=("plain",), data=("synthetic",))
    written = run(tmp_path, rivals=("plain",), data=("synthetic",), augment="randaugment", clock="cpu", mode="eager")
    plain_record, engine = written[-2:]
    assert passes == [1, 2, 1, 1]  # Plain and engine, with and without the probes.
    assert clocks == [time.perf_counter, time.process_time]
    assert [written[i]["clock"] for i in (1, 3)] == ["wall", "cpu"] and plain_record["clock"] == "cpu"
    assert engine["augment"] == "randaugment" and written[1]["augment"] == "ctaugment" and engine["mode"] == "eager"


def test_a_rivals_sample_ends_with_nothing_pending(monkeypatch):
    make_item = plain.make_item

    def slowly(*arguments):
        time.sleep(0.02)
        return make_item(*arguments)

    monkeypatch.setattr(plain, "make_item", slowly)
    with ExitStack() as closing:
        rival = baseline.make_rival("plain", tiny(), options(data=("real",)), CPU, closing)
        rival.advance("real", 2)
        assert [loader.pending for loader in rival.sources] == [0]


def test_the_engines_sample_ends_with_nothing_pending(monkeypatch):
    make_plan = feed_module.make_plan

    def slowly(*arguments):
        time.sleep(0.1)  # Longer than a step.
        return make_plan(*arguments)

    monkeypatch.setattr(feed_module, "make_plan", slowly)
    with ExitStack() as closing:
        engine = baseline.make_engine(tiny(), options(data=("real",)), closing)
        (feed,) = engine.sources
        assert feed._settled._pending == feed.config.prefetch == 2
        engine.advance("real", 3)
        assert feed._settled._pending == 0 and len(feed._settled._made) == 2
        assert feed._planning and all(plans.done() for plans in feed._planning)


def test_settling_does_not_change_views():
    config = dataclasses.replace(tiny(), steps=8)
    data, split = opened(config)
    execution = Execution.pick(config, data.train_images.shape)
    feeds = [kind(config, data, split, execution) for kind in (Feed, baseline.SettledFeed)]
    for feed in feeds:
        feed.begin(0)
    for step in range(config.steps):
        expected, found = (feed.next() for feed in feeds)
        for name in ("views", "lam", "labels"):
            assert torch.equal(getattr(expected, name), getattr(found, name)), (step, name)
        if step % 3 == 2:
            feeds[1].settle()
    for feed in feeds:
        feed.end()


def test_the_report_reads_old_and_new_records(tmp_path):
    committed = records.read(records.RESULTS / "baseline.jsonl")
    old = [record for record in committed if "trainer" not in record]
    assert len(old) == 4  # Not interleaved, and of plain PyTorch only.
    new = [record | {"device": old[0]["device"]} for record in run(tmp_path, data=("synthetic",))]
    table = baseline.BENCH.tables["baseline"].markdown([*old, *new]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")]
    shown = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    assert [line["trainer"] for line in shown] == 4 * [""] + ["plain", "engine", "usb", "engine"]
    assert [line["engine speedup"] for line in shown[:4]] == [f"{record['engine_ratio']:.2f}" for record in old]
    assert [line["engine speedup"] != "" for line in shown[4:]] == [False, True, False, True]
    assert all(float(line["step, ms"]) > 0 for line in shown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("fake",)}, "--data: unknown data 'fake'; choose from real, synthetic"),
        ({"rivals": ("mine",)}, "--rivals: unknown rival 'mine'; choose from plain, usb, torchssl"),
        ({"rivals": ()}, "--rivals needs at least one value"),
        ({"data": ()}, "--data needs at least one value"),
        ({"k": ()}, "--k needs at least one value"),
        ({"k": (0,)}, "--k must be at least 1, got 0"),
        ({"rivals": ("usb",), "k": (0,)}, "--k must be at least 1, got 0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_invalid_options(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **changes)
