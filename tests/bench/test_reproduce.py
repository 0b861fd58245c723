"""`remixmatch reproduce`: cells of the tables, statistics, results, and a rehearsal that is killed and goes on."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from torchvision import datasets as tv

from bench import cell_progress, cells, paper_tables, records, reproduce, table_results, tables
from bench.cell_progress import trained_rows
from bench.cells import Status, status
from bench.paper_tables import TABLES, make_entries
from engine.checkpoint import list_checkpoints
from engine.config import config_json
from engine.errors import UserError
from engine.methods import ABLATIONS, METHODS, with_method
from engine.presets import PRESETS, preset
from engine.progress import read_metrics
from pipelines import datasets, sources
from tests.pipelines.test_sources import cifar
from tests.processes import ROOT, command

SECONDS = 1200  # after which something hangs: a slow machine with other work takes minutes for twenty cells


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, and none of the user's data."""
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    datasets.prepared.cache_clear()
    yield
    datasets.prepared.cache_clear()


def entries(name, *flags, **options):
    return make_entries(TABLES[name], flags, **options)


def finish(out, entry, accuracy, median=None, step=None):
    """Leaves what a finished run leaves."""
    folder = out / entry.cell.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_json(entry.cell.config))
    summary = {
        "steps": entry.cell.config.steps, "test_accuracy": accuracy, "median_last_20": median or accuracy - 1,
        "train_seconds": 10.0, "device": "a device", "versions": {"torch": "9.9"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


# Cells


@pytest.mark.parametrize("name", TABLES)
def test_one_seed_of_everything_comes_before_the_second_of_anything(name):
    found = entries(name, seeds=(4, 7))
    assert [entry.seed for entry in found] == [4] * (len(found) // 2) + [7] * (len(found) // 2)
    first = found[: len(TABLES[name].presets)]
    assert [entry.row for entry in first] == ["remixmatch"] * len(first), "the full method first"
    assert [entry.preset for entry in first] == list(TABLES[name].presets)
    assert len({entry.cell.name for entry in found}) == len(found)
    for entry in found:
        assert entry.cell.config == entry.base and entry.base.seed == entry.seed
        assert entry.cell.name.startswith(f"{entry.preset}-{entry.row}-seed{entry.seed}-")


def test_tables_have_the_papers_rows_and_seeds():
    assert len(entries("cifar10")) == len(entries("svhn")) == 3 * 6 * 5
    assert {entry.row for entry in entries("digits")} == set(METHODS)
    assert [entry.seed for entry in entries("digits", rows=("uda",))] == [0, 1, 2, 3, 4]
    ablations = {entry.row for entry in entries("ablation")}
    assert ablations == {"remixmatch", *ABLATIONS} - {"k=8"} and {entry.seed for entry in entries("ablation")} == {3}
    small = entries("ablation", presets=("fashion-100-small",), seeds=(1, 2))
    assert {entry.row for entry in small} == {"remixmatch", *ABLATIONS} - {"k=2"}, "K is 2 there"
    mixmatch = entries("svhn", rows=("mixmatch",), seeds=(1,))
    assert {entry.cell.config.w_u for entry in mixmatch} == {250.0}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("scale", [0.01, 0.002])
def test_a_rehearsal_is_evaluated_as_often(name, scale):
    for entry in entries(name, steps_scale=scale, seeds=(1,)):
        config, base = entry.cell.config, entry.base
        assert config.steps == max(1, round(base.steps * scale)) and config.ramp_kimg == base.ramp_kimg * scale
        evaluations = math.ceil(config.steps / config.eval_every)
        assert evaluations >= min(20, config.steps)
        changed = {"steps", "ramp_kimg", "eval_every", "log_every", "checkpoint_every", "ema_decay", "bn_momentum"}
        assert dataclasses.replace(config, **{name: getattr(base, name) for name in changed}) == base
        assert min(config.eval_every, config.log_every, config.checkpoint_every) >= 1
    assert paper_tables.scaled(base, 1e-9).steps == 1 and paper_tables.scaled(base, 1) is base


def test_averages_of_a_rehearsal_reach_back_over_the_same_share_of_it():
    """After a tenth of the steps as much is left of what an average began with."""

    def config_of(scale, *flags):
        (entry,) = entries("digits", *flags, rows=("remixmatch",), seeds=(1,), steps_scale=scale)
        return entry.cell.config

    left, flags = {}, ("--steps", "8000", "--ema-decay", "0.999", "--bn-momentum", "0.01")
    for config in (config_of(1, *flags), config_of(0.25, *flags)):
        average = running = 1.0
        for _ in range(config.steps // 10):
            average *= config.ema_decay
            running -= config.bn_momentum * running
        left[config.steps] = average, running
    assert left[2000] == pytest.approx(left[8000], rel=1e-9) and left[8000][0] == pytest.approx(0.4491, abs=1e-4)
    assert config_of(0.25, "--ema-decay", "0").ema_decay == 0


def test_flags_are_part_of_every_cell_and_steps_are_scaled_after_them():
    (plain,) = entries("digits", seeds=(1,), rows=("fixmatch",))
    (entry,) = entries("digits", "--batch", "4", "--steps", "1000", seeds=(1,), rows=("fixmatch",), steps_scale=0.1)
    assert entry.cell.config.batch == 4 and entry.cell.config.steps == 100 and entry.base == plain.base
    assert entry.cell.config.mu == 7 and entry.cell.digest != plain.cell.digest


def test_titles_say_what_is_not_the_papers():
    assert table_results.title("cifar10", entries("cifar10")) == "cifar10: test error in percent"
    found = entries("cifar10", steps_scale=0.01)
    words = "cifar10: test error in percent; REHEARSAL with 10,486 steps instead of 1,048,576"
    assert table_results.title("cifar10", found, 0.01) == words
    found = entries("cifar10", "--width", "8", "--no-flip", "--device", "cpu", steps_scale=0.01)
    assert (
        table_results.title("cifar10", found, 0.01) == f"{words}; other settings than the presets': flip False, width 8"
    )
    found = entries("digits", "--steps", "100", "--eval-every", "5")
    assert table_results.title("digits", found) == (
        "digits: test error in percent; REHEARSAL with 100 steps instead of 2,500; "
        "other settings than the presets': eval_every 5"
    )
    more = entries("digits", steps_scale=2.0)
    assert table_results.title("digits", more, 2.0) == "digits: test error in percent; 5,000 steps instead of 2,500"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "reproduce needs a table"),
        (["cifar"], "reproduce takes one of cifar10, svhn, "),
        (["digits", "--methods", "fixmach"], "--methods: there is no method 'fixmach'; there are remixmatch, "),
        (["ablation", "--methods", "fixmatch"], "--methods: there is no ablation 'fixmatch'; there are remixmatch"),
        (["ablation", "--preset", "cifar"], "unknown preset 'cifar'"),
        (["ablation", "--methods", "k=8"], "no cell is left"),
        (["digits", "--seeds", "1", "1"], "--seeds names one of them twice: 1 1"),
        (["digits", "--seeds", "-1"], "digits-40-remixmatch-seed-1: --seed must be at least 0"),
        (["digits", "--steps-scale", "0"], "--steps-scale must be more than 0"),
        (["digits", "--steps-scale", "nan"], "--steps-scale must be more than 0"),
        (["digits", "--workers", "-1"], "--workers must be at least 0"),
        (["digits", "--gpus", "2"], "--gpus is 1, or 0"),
        (["digits", "--hours", "0"], "--hours must be more than 0"),
        (["digits", "--slurm", "account"], "--slurm takes NAME=VALUE, got 'account'"),
        (["digits", "--sedes", "1"], "nrecognized"),
        (["digits", "--", "--width", "4"], "digits-40-remixmatch-seed0: --width must be at least 8"),
        (["digits", "--", "--seed", "4"], "--seed after -- is not a setting that all cells can share"),
        (["digits", "--", "--method", "uda"], "--method after -- is not a setting"),
        (["digits", "--", "--ablate", "k=4"], "--ablate after -- is not a setting"),
        (["digits", "--", "--out", "x"], "--out after -- is not a setting"),
        (["digits", "--", "--gpus", "2"], "--gpus after -- is not a setting"),
        (["ablation", "--", "--k", "4"], "remixmatch-seed3 and cifar10-250-k=1-seed3 are one configuration"),
        (["digits", "--from", "none.jsonl"], "--from none.jsonl: there is no such file"),
        (["cifar10"], "remixmatch data prepare cifar10"),
        (["digits", "--", "--labels", "9999"], "digits-40-remixmatch-seed0: --labels: "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, told, tmp_path):
    with pytest.raises(UserError) as error:
        reproduce.main(words)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


# Statistics

# Student's t, two-sided 95 %, from a textbook: by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_statistics_are_those_of_the_textbook(seeds):
    generator = torch.Generator().manual_seed(seeds)
    ours, full = ((5 + torch.rand(seeds, generator=generator, dtype=torch.float64)).tolist() for _ in range(2))
    total = 0.0
    for value in ours:
        total += value
    mean = total / seeds
    squares = 0.0
    for value in ours:
        squares += (value - mean) ** 2
    found = tables.spread(ours)
    assert found.mean == pytest.approx(mean) and found.deviation == pytest.approx(math.sqrt(squares / (seeds - 1)))
    apart = []
    for one, other in zip(ours, full, strict=True):
        apart.append(one - other)
    middle = sum(apart) / seeds
    variance = sum((value - middle) ** 2 for value in apart) / (seeds - 1)
    half = STUDENT[seeds - 1] * math.sqrt(variance / seeds)
    # in another order, and with seeds that the other does not have
    by_seed = dict(reversed(list(enumerate(ours)))) | {77: 3.0}
    found = tables.difference(by_seed, dict(enumerate(full)) | {99: 1.0})
    assert found.seeds == tuple(range(seeds)) and found.mean == pytest.approx(middle)
    assert (found.low, found.high) == (pytest.approx(middle - half, rel=1e-3), pytest.approx(middle + half, rel=1e-3))


def test_one_seed_has_no_interval_and_says_so():
    assert tables.spread([]) is None and tables.spread([3.0]) == tables.Spread(3.0, None)
    assert tables.difference({1: 3.0}, {2: 1.0}) is None
    assert tables.difference({1: 3.0, 2: 4.0}, {2: 1.0}) == tables.Difference(3.0, None, None, (2,))
    assert tables.difference({1: 3.0, 2: 4.0}, {1: 2.0, 2: 3.0}) == tables.Difference(1.0, 1.0, 1.0, (1, 2))
    run = tables.Run(6.0, 6.5, 100, "paper")
    full = tables.line("remixmatch", "p", (1, 2, 3), {1: run}, None, None)
    other = tables.line("uda", "p", (1,), {1: dataclasses.replace(run, median=7.5)}, {1: run}, None)
    text = tables.markdown("title", [full, other], "remixmatch")
    assert "| p | remixmatch | 1 of 3 (1) | 6.00, one seed | 6.50, one seed |  |  |  | 100 | paper |" in text
    assert (
        "| p | uda | 1 (1) | 7.50, one seed | 6.50, one seed |  |  | +1.50, one seed: no interval | 100 | paper |"
        in text
    )


def test_minutes_are_the_median_and_of_the_cpu_where_that_trains():
    runs = {seed: tables.Run(6.0, 6.5, 100, "paper", seconds) for seed, seconds in ((1, 60.0), (2, 600.0), (3, 90.0))}
    timed, unknown = (
        tables.line(row, "p", (1, 2, 3), of_row, None, None)
        for row, of_row in (("remixmatch", runs), ("uda", {1: tables.Run(6.0, 6.5, 100, "paper")}))
    )
    rows = tables.markdown("title", [timed, unknown], "remixmatch").splitlines()
    assert "| minutes a run | steps |" in rows[2] and "| 1.5 | 100 |" in rows[4] and "|  |  | 100 |" in rows[5]
    assert table_results._seconds({"device": "CPU, one", "train_seconds": 9.0, "cpu_seconds": 5.0}) == 5
    assert table_results._seconds({"device": "CPU, one", "train_seconds": 9.0}) is None
    assert table_results._seconds({"device": "NVIDIA H100", "train_seconds": 9.0, "cpu_seconds": 5.0}) == 9


def test_differences_stand_beside_the_papers(tmp_path):
    assert paper_tables.papers_difference("l2", 8) == pytest.approx(11.34) == paper_tables.papers_difference("l2", 2)
    assert paper_tables.papers_difference("k=1", 8) == pytest.approx(1.38)
    assert paper_tables.papers_difference("k=1", 2) == pytest.approx(0.58)
    assert paper_tables.papers_difference("k=8", 2) == pytest.approx(-0.80)
    assert (
        paper_tables.papers_difference("mean-guess", 2) is None
        and paper_tables.papers_difference("remixmatch", 8) is None
    )
    full = {1: 10.0, 2: 12.0, 3: 11.0}
    signs = {}
    for name, worse in {"same": (1.0, 1.1, 0.9), "opposite": (-1.0, -1.1, -0.9), "not told": (1.0, -1.0, 0.5)}.items():
        runs = {seed: tables.Run(full[seed] + worse[seed - 1], 0.0, 1, "paper") for seed in full}
        of_full = {seed: tables.Run(error, 0.0, 1, "paper") for seed, error in full.items()}
        signs[name] = tables.line("l2", "p", (1, 2, 3), runs, of_full, None, papers_difference=11.34)
    assert [line.sign for line in signs.values()] == list(signs)
    text = tables.markdown("title", list(signs.values()), "remixmatch")
    assert "| difference in the paper | sign |" in text and "of 3 pairs | +11.34 | opposite |" in text


# Results


def test_a_table_stands_beside_the_papers_figures(tmp_path, capsys):
    out = tmp_path / "out"
    found = entries("cifar10", rows=("remixmatch", "mixmatch"), presets=("cifar10-250",), seeds=(1, 2, 3))
    for entry, accuracy in zip(found, (94.0, 90.0, 93.0, 88.0, 95.0), strict=False):
        finish(out, entry, accuracy)
    words = ["cifar10", "--methods", "mixmatch", "remixmatch", "--preset", "cifar10-250", "--seeds", "1", "2", "3"]
    reproduce.main([*words, "--tables", "--out", str(out)])
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("# cifar10: test error in percent\n")
    rows = [line for line in text.splitlines() if line.startswith("| cifar10-250")]
    assert rows[0] == (
        "| cifar10-250 | remixmatch | 3 (1 2 3) | 7.00 ± 1.00 | 6.00 ± 1.00 | 6.27 ± 0.34 | +0.73 |  | 0.2 "
        "| 1,048,576 | paper |"
    )
    assert rows[1].startswith(
        "| cifar10-250 | mixmatch | 2 of 3 (1 2) | 12.00 ± 1.41 | 11.00 ± 1.41 | 11.08 | +0.92 | +4.50 ["
    )
    assert "of 2 pairs | 0.2 | 1,048,576 | paper |" in rows[1]
    assert f"Not in the table: {found[5].cell.name}, waiting" in text and "Trained on a device; torch 9.9" in text
    kept = json.loads((out / "table.json").read_text())
    assert [line["row"] for line in kept["lines"]] == ["remixmatch", "mixmatch"]
    assert kept["lines"][0]["paper"]["source"].endswith("table 1") and kept["lines"][1]["to_full"]["seeds"] == [1, 2]
    cell = kept["cells"][0]
    assert cell["config"]["k"] == 8 and cell["summary"]["test_accuracy"] == 94.0 and cell["commit"] == "unknown"

    path = tmp_path / "rows.jsonl"
    for _ in range(2):  # what is there is not added again
        reproduce.main([*words, "--collect", str(path), "--out", str(out)])
    rows = records.read(path)
    assert len(rows) == 5 and rows[1]["changes"].items() >= {"method": "mixmatch", "k": 2, "seed": 1}.items()
    assert rows[1]["command"] == "remixmatch train cifar10-250 --method mixmatch --seed 1"
    reproduce.main([*words, "--from", str(path), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "table.md").read_text() == text
    path.write_text("{}\n")
    with pytest.raises(UserError, match="rows that --collect has not written"):
        reproduce.main([*words, "--from", str(path)])


def test_ablations_have_figures_of_their_own_split():
    found = entries("ablation")
    lines = table_results.make_lines("ablation", found, {})
    figures = {line.row: line.paper.error for line in lines if line.paper}
    assert figures["remixmatch"] == 5.94 and figures["no-weak"] == 29.36 and len(figures) == 11
    assert not any(
        line.paper for line in table_results.make_lines("ablation", entries("ablation", presets=("cifar10-40",)), {})
    )
    for known in (paper_tables.FIGURES, paper_tables.ABLATION_FIGURES):
        for name, row in known:
            assert name in PRESETS and (row in METHODS or row in ABLATIONS)


def test_states_are_shown_one_a_line(tmp_path, capsys):
    found = entries("digits", rows=("remixmatch", "uda"), seeds=(0, 1))
    done = Status("done", 2500, {"median_last_20": 96.5, "test_accuracy": 97.0, "train_seconds": 60.0})
    show = cell_progress.Progress([*found], 2)
    waiting = [Status("waiting")] * 4
    for statuses in (waiting, [Status("running", host="here"), *waiting[1:]], [Status("running", 50), *waiting[1:]]):
        show(statuses)
    show([done, Status("failed", reason="exit code 2: no [memory]"), *waiting[2:]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0] == f"[1 running, 3 waiting] {found[0].cell.name}: running on here"
    assert ": done, error 3.50 % (median of last 20), 3.00 % (last); about " in lines[1]
    assert ": failed: exit code 2: no [memory]" in lines[2]
    finish(tmp_path / "out", found[0], 97.0)
    reproduce.main(
        ["digits", "--methods", "remixmatch", "--seeds", "0", "1", "--status", "--out", str(tmp_path / "out")]
    )
    first, second, counts = capsys.readouterr().out.splitlines()
    assert first.endswith("done, error 4.00 % (median of last 20), 3.00 % (last)") and second.endswith(": waiting")
    assert counts == "1 done, 1 waiting; about 10 s left"
    grid = cell_progress.Progress(found, 1)._grid([done, *waiting[1:]])
    assert grid.row_count == 4 and "1 done, 3 waiting" in grid.title


def test_time_left_is_by_the_rows_that_were_trained():
    base = preset("cifar10-250")
    half = dataclasses.replace(base, steps=base.steps // 2)
    done = Status("done", base.steps, {"train_seconds": 100.0})
    assert cell_progress.time_left([base, half], [Status("waiting")] * 2, 1) is None
    assert cell_progress.time_left([base, half], [done, Status("waiting")], 1) == pytest.approx(50)
    assert cell_progress.time_left([base, half], [done, Status("running", base.steps // 4)], 2) == pytest.approx(12.5)
    assert cell_progress.time_left([base, half], [done, Status("failed")], 1) == 0
    assert trained_rows(base) == 64 * 12 and trained_rows(dataclasses.replace(base, method="supervised")) == 64
    assert trained_rows(dataclasses.replace(base, anchor="guess-only", mu=7, k=1, w_u1=0.0, w_rot=0.0)) == 64 * 8
    assert [cell_progress.duration(seconds) for seconds in (5, 600, 36000)] == ["5 s", "10 min", "10 h 0 min"]


def test_predicted_times_go_through_those_of_bench_count():
    rows = records.read(records.RESULTS / "count.jsonl")
    rows = [row for row in rows if not row.keys() & {"method", "ablate"}]  # K = 1 and 8
    base, one, three = (dataclasses.replace(preset("cifar10-250"), k=k, seed=5) for k in (8, 1, 3))
    known = {row["k"]: row["predicted_ms_h100"] for row in rows}
    hours = [cell_progress.predicted_hours(config, "h100", rows) for config in (one, three, base)]
    assert hours[0] == pytest.approx(known[1] * 2**20 / 3.6e6) and hours[2] == pytest.approx(known[8] * 2**20 / 3.6e6)
    assert hours[1] == pytest.approx(hours[0] + (hours[2] - hours[0]) * 2 / 7)
    # 8 B rows of FixMatch are counted; with K = 3 it has 22 B, and ReMixMatch from K = 1 to 8 has 7 B more
    fixmatch = with_method(base, "fixmatch")
    counted = {"bench": "count", "preset": "cifar10-250", "method": "fixmatch", "k": 1, "batch": 64}
    more = [*rows, counted | {"predicted_ms_h100": 9.0}]
    found = [cell_progress.predicted_hours(dataclasses.replace(fixmatch, k=k), "h100", more) for k in (1, 3)]
    expected = [9.0, 9.0 + 14 / 7 * (known[8] - known[1])]
    assert found == pytest.approx([ms * 2**20 / 3.6e6 for ms in expected])
    assert cell_progress.predicted_hours(preset("stl10-1000"), "h100", rows) is None
    assert cell_progress.predicted_hours(preset("digits-40"), "h100", rows) is None
    assert cell_progress.predicted_hours(base, "h100", []) is None


def test_the_plan_says_that_it_is_predicted(capsys):
    reproduce.main(["svhn", "--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 91 and lines[0].startswith("svhn-250-remixmatch-seed1-") and "not measured" in lines[-1]


def test_workers_share_gpus_or_cores(monkeypatch):
    found = entries("digits", seeds=(0,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert reproduce.devices(found) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 3")
    assert reproduce.environments(3, reproduce.devices(found)) == [{"CUDA_VISIBLE_DEVICES": n} for n in ("5", "3", "5")]
    assert len(reproduce.environments(0, ["0", "1"])) == 2
    assert reproduce.devices(entries("digits", "--device", "cpu", seeds=(0,))) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert reproduce.devices(found) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert reproduce.environments(0, []) == [{}]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert reproduce.environments(3, []) == [{"OMP_NUM_THREADS": "2"}] * 3


# Whole runs, each cell a process that trains


@pytest.fixture
def start():
    """Starts the command; what still runs when a test is over is killed, and with it its cells."""
    started = []

    def start(log, *words, **options):
        with open(log, "ab") as file:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            started.append(
                subprocess.Popen(command("reproduce", *words), env=environment, stdout=file, stderr=file, **options)
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition, process, log):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, f"ended before its moment\n{log.read_text()}"
        assert time.monotonic() < deadline, f"this never came\n{log.read_text()}"
        time.sleep(0.02)


def claims_of(out, entry):
    folder = out / entry.cell.name / "claims"
    return [cells.read_json(folder / f"{n + 1}.json") for n in range(len(list(folder.glob("*.json"))))]


@pytest.fixture
def made_up_cifar(tmp_path, monkeypatch):
    """CIFAR-10 in its archive's format, with a few hundred made-up images, prepared."""
    folder = tmp_path / "archives"
    folder.mkdir()
    batches = {f"data_batch_{n}": 60 for n in range(1, 6)} | {"test_batch": 40}
    cifar(folder, monkeypatch, tv.CIFAR10, batches, "batches.meta", "labels")
    sources.prepare("cifar10", folder, download=False)


# cells of 20 steps, each followed by an evaluation; batch norm over groups needs K + 2 labeled images
SMALL = ["--", *("--steps", "10000", "--eval-every", "512", "--checkpoint-every", "2000", "--batch", "10")]
SMALL += ["--width", "8", "--blocks", "1", "--scales", "1", "--device", "cpu"]


def test_a_rehearsal_of_the_ablations_is_killed_and_goes_on(made_up_cifar, tmp_path, start):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    words = ["ablation", "--steps-scale", "0.002", "--workers", "2", "--out", str(out), *SMALL]
    found = entries("ablation", *SMALL[1:], steps_scale=0.002)
    assert len(found) == 19 and {entry.cell.config.steps for entry in found} == {20}

    def states():
        return [status(out, entry.cell).state for entry in found]

    def checkpoints(entry):
        return list((out / entry.cell.name / "checkpoints").glob("step-*.pt"))

    def in_the_middle():
        running = [entry for entry in found if status(out, entry.cell).state == "running"]
        return states().count("done") >= 4 and any(map(checkpoints, running))

    process = start(log, *words, start_new_session=True)

    def held_in_the_middle():
        """Looks again at what no longer moves: a cell may have ended between two looks."""
        if not in_the_middle():
            return False
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        if in_the_middle():
            return True
        os.killpg(process.pid, signal.SIGCONT)
        return False

    until(held_in_the_middle, process, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {
        entry.cell.name: (out / entry.cell.name / "summary.json").stat().st_mtime_ns
        for entry, state in zip(found, states(), strict=True)
        if state == "done"
    }
    begun = [entry for entry in found if claims_of(out, entry) and entry.cell.name not in before]
    assert 4 <= len(before) < 19 and begun, states()
    saved = {entry.cell.name: min(checkpoints(entry)).stat().st_mtime_ns for entry in begun if checkpoints(entry)}
    assert saved

    process = start(log, *words)
    assert process.wait(SECONDS) == 0, log.read_text()
    assert states() == ["done"] * 19, log.read_text()
    for entry in found:
        folder, claims = out / entry.cell.name, claims_of(out, entry)
        # none lost, and none done twice
        assert len(claims) == (2 if entry in begun else 1)
        if entry.cell.name in before:
            assert (folder / "summary.json").stat().st_mtime_ns == before[entry.cell.name]
        evaluated = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "test_accuracy" in row]
        assert evaluated == list(range(1, 21))
        assert not (folder / "failed.json").exists()
        if entry.cell.name in saved:  # gone on with, and not begun again
            kept = {path.stat().st_mtime_ns for path in checkpoints(entry)}
            assert saved[entry.cell.name] in kept or min(kept) > saved[entry.cell.name]
            assert "starting from step 0" not in (folder / "log.txt").read_text()
    text = (out / "table.md").read_text()
    assert "REHEARSAL with 20 steps instead of 1,048,576; other settings than the presets': " in text.splitlines()[0]
    assert len([line for line in text.splitlines() if line.startswith("| cifar10-250 |")]) == 19
    assert "one seed: no interval" in text and "Not in the table" not in text


DIGITS = ["digits", "--seeds", "0", "--methods", "supervised"]
QUICK = [
    "--",
    *("--batch", "8", "--width", "8", "--device", "cpu", "--eval-every", "100", "--checkpoint-every", "9999"),
]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ends_with_its_worker_and_is_resumed(tmp_path, number, start):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    words = [*DIGITS, "--out", str(out), *QUICK, "--steps"]
    (entry,) = entries("digits", *QUICK[1:], "--steps", "800", seeds=(0,), rows=("supervised",))
    folder = out / entry.cell.name
    process = start(log, *words, "800")
    until(lambda: cells.last_step(folder / "metrics.jsonl") >= 40, process, log)
    os.kill(process.pid, number)
    code = process.wait(60)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    pid, began = claims_of(out, entry)[0]["child"]
    deadline = time.monotonic() + 60
    while cells.started(pid) == began:
        assert number == signal.SIGKILL and time.monotonic() < deadline, "it trains on"
        time.sleep(0.05)
    # nothing else would have saved it
    (saved,) = (int(path.stem.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints"))
    assert 40 <= saved < 800 and saved >= cells.last_step(folder / "metrics.jsonl")
    assert status(out, entry.cell).state == "waiting"
    if number == signal.SIGTERM:
        assert "1 waiting; what was running is saved" in log.read_text()
    reached = cells.last_step(folder / "metrics.jsonl")
    process = start(log, *words, "800")
    assert process.wait(SECONDS) == 0, log.read_text()
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(20, 801, 20)) and 40 <= reached < 800
    assert len(claims_of(out, entry)) == 2 and status(out, entry.cell).state == "done"


@pytest.mark.skipif(find_spec("submitit") is None, reason="needs submitit: pip install 'remixmatch-engine[slurm]'")
def test_jobs_of_submitit_share_the_cells_and_go_on_when_their_time_is_over(tmp_path):
    out = tmp_path / "out"
    flags = [*QUICK, "--steps", "800"]
    words = ["digits", "--seeds", "0", "1", "--methods", "supervised", "--out", str(out)]
    found = entries("digits", *flags[1:], seeds=(0, 1), rows=("supervised",))
    submit = [*words, "--submit", "local", "--workers", "2", "--gpus", "0", *flags]
    script = f"from bench.reproduce import main; main({submit!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = tmp_path / "said.txt"
    with said.open("wb") as file:  # no pipe, which the jobs would keep open
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, stdout=file, stderr=file, timeout=SECONDS
        )
    assert done.returncode == 0 and said.read_text().startswith("2 jobs: ") and "--status" in said.read_text()

    def states():
        return [status(out, entry.cell).state for entry in found]

    def logs():
        return "\n".join(path.read_text() for path in (out / "jobs").glob("*_log.*"))

    def wait(condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{states()}\n{logs()}"
            time.sleep(0.05)

    wait(lambda: cells.last_step(out / found[0].cell.name / "metrics.jsonl") >= 20)
    first = claims_of(out, found[0])[0]
    os.kill(first["worker"][0], signal.SIGUSR2)  # as Slurm does before a job's time is over
    wait(lambda: states() == ["done"] * 2)
    assert len(claims_of(out, found[0])) == 2 and "SIGTERM: step" in (out / found[0].cell.name / "log.txt").read_text()
    wait(lambda: len(list((out / "jobs").glob("*_result.pkl"))) == 2)
    assert len({claims_of(out, entry)[0]["worker"][0] for entry in found}) == 2
    assert "Traceback" not in logs(), logs()


def test_submitting_without_submitit_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'remixmatch-engine\[slurm\]'"):
        reproduce.main(["digits", "--submit", "local"])


@pytest.mark.skipif(find_spec("submitit") is None, reason="needs submitit: pip install 'remixmatch-engine[slurm]'")
@pytest.mark.parametrize(("cluster", "seen"), [("local", ["0", "1", "0"]), ("slurm", ["slurm's"] * 3)])
def test_jobs_of_one_machine_share_its_gpus(cluster, seen, monkeypatch):
    import submitit

    given = []

    class Executor:
        def __init__(self, **_):
            pass

        def update_parameters(self, **_):
            pass

        def submit_array(self, jobs):
            given.extend(jobs)
            return []

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reproduce.main(["digits", "--submit", cluster, "--workers", "3"])
    found = []
    monkeypatch.setattr(reproduce, "main", lambda *_: found.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    for job in given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "slurm's")
        job()
    assert found == seen
