"""Results of `remixmatch reproduce`: titles, statistics, the papers' errors, and records written and read."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from engine.config.methods import ABLATIONS, METHODS
from engine.config.presets import PRESETS
from engine.errors import UserError
from engine.measuring import records
from engine.studies import charts, paper_tables, reproduce, statistics, table_results
from tests.engine.studies.made_jobs import entries, finish

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_titles_name_deviations_from_the_paper():
    assert table_results.title("cifar10", entries("cifar10")) == "cifar10: test error in percent"
    found = entries("cifar10", steps_scale=0.01)
    words = "cifar10: test error in percent; REHEARSAL with 10,486 steps instead of 1,048,576"
    assert table_results.title("cifar10", found, 0.01) == words
    found = entries("cifar10", "--width", "8", "--no-flip", "--device", "cpu", steps_scale=0.01)
    assert (
        table_results.title("cifar10", found, 0.01)
        == f"{words}; settings changed from the presets: flip False, width 8"
    )
    found = entries("digits", "--steps", "100", "--eval-every", "5")
    assert table_results.title("digits", found) == (
        "digits: test error in percent; REHEARSAL with 100 steps instead of 2,500; "
        "settings changed from the presets: eval_every 5"
    )
    more = entries("digits", steps_scale=2.0)
    assert table_results.title("digits", more, 2.0) == "digits: test error in percent; 5,000 steps instead of 2,500"


# Statistics

# Student's t, two-sided 95 %, from a textbook, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_statistics_agree_with_the_textbook(seeds):
    generator = torch.Generator().manual_seed(seeds)
    ours, full = ((5 + torch.rand(seeds, generator=generator, dtype=torch.float64)).tolist() for _ in range(2))
    total = 0.0
    for value in ours:
        total += value
    mean = total / seeds
    squares = 0.0
    for value in ours:
        squares += (value - mean) ** 2
    found = statistics.spread(ours)
    assert found.mean == pytest.approx(mean) and found.deviation == pytest.approx(math.sqrt(squares / (seeds - 1)))
    apart = []
    for one, other in zip(ours, full, strict=True):
        apart.append(one - other)
    middle = sum(apart) / seeds
    variance = sum((value - middle) ** 2 for value in apart) / (seeds - 1)
    half = STUDENT[seeds - 1] * math.sqrt(variance / seeds)
    # In another order, and with seeds that the other lacks.
    by_seed = dict(reversed(list(enumerate(ours)))) | {77: 3.0}
    found = statistics.difference(by_seed, dict(enumerate(full)) | {99: 1.0})
    assert found.seeds == tuple(range(seeds)) and found.mean == pytest.approx(middle)
    assert (found.low, found.high) == (pytest.approx(middle - half, rel=1e-3), pytest.approx(middle + half, rel=1e-3))


def test_one_seed_is_marked_and_has_no_interval():
    assert statistics.spread([]) is None and statistics.spread([3.0]) == statistics.Spread(3.0, None)
    assert statistics.difference({1: 3.0}, {2: 1.0}) is None
    assert statistics.difference({1: 3.0, 2: 4.0}, {2: 1.0}) == statistics.Difference(3.0, None, None, (2,))
    assert statistics.difference({1: 3.0, 2: 4.0}, {1: 2.0, 2: 3.0}) == statistics.Difference(1.0, 1.0, 1.0, (1, 2))
    run = statistics.Result(6.0, 6.5, 100, "paper")
    full = statistics.line("remixmatch", "p", (1, 2, 3), {1: run}, None, None)
    other = statistics.line("uda", "p", (1,), {1: dataclasses.replace(run, median=7.5)}, {1: run}, None)
    text = statistics.markdown("title", [full, other], "remixmatch")
    assert "| p | remixmatch | 1 of 3 (1) | 6.00, one seed | 6.50, one seed |  |  |  | 100 | paper |" in text
    assert "| p | uda | 1 (1) | 7.50, one seed | 6.50, one seed |  |  | +1.50 (one seed) | 100 | paper |" in text


def test_minutes_are_the_median_and_cpu_time_on_a_cpu():
    runs = {
        seed: statistics.Result(6.0, 6.5, 100, "paper", seconds) for seed, seconds in ((1, 60.0), (2, 600.0), (3, 90.0))
    }
    timed, unknown = (
        statistics.line(row, "p", (1, 2, 3), of_row, None, None)
        for row, of_row in (("remixmatch", runs), ("uda", {1: statistics.Result(6.0, 6.5, 100, "paper")}))
    )
    rows = statistics.markdown("title", [timed, unknown], "remixmatch").splitlines()
    assert "| minutes per run | steps |" in rows[2] and "| 1.5 | 100 |" in rows[4] and "|  |  | 100 |" in rows[5]
    assert table_results._seconds({"device": "CPU, one", "train_seconds": 9.0, "cpu_seconds": 5.0}) == 5
    assert table_results._seconds({"device": "CPU, one", "train_seconds": 9.0, "cpu_seconds": None}) is None
    assert table_results._seconds({"device": "NVIDIA H100", "train_seconds": 9.0, "cpu_seconds": 5.0}) == 9


def test_differences_are_compared_with_those_of_the_paper():
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
    for name, worse in {"same": (1.0, 1.1, 0.9), "opposite": (-1.0, -1.1, -0.9), "n.s.": (1.0, -1.0, 0.5)}.items():
        runs = {seed: statistics.Result(full[seed] + worse[seed - 1], 0.0, 1, "paper") for seed in full}
        of_full = {seed: statistics.Result(error, 0.0, 1, "paper") for seed, error in full.items()}
        signs[name] = statistics.line("l2", "p", (1, 2, 3), runs, of_full, None, papers_difference=11.34)
    assert [line.sign for line in signs.values()] == list(signs)
    text = statistics.markdown("title", list(signs.values()), "remixmatch")
    assert "| difference in the paper, pp | sign |" in text and ", n = 3 | +11.34 | opposite |" in text


# Results


def test_a_table_is_compared_with_the_paper(tmp_path, capsys):
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
    assert ", n = 2 | 0.2 | 1,048,576 | paper |" in rows[1]
    assert f"Not in the table: {found[5].job.name}, waiting" in text and "Trained on a device; torch 9.9" in text
    kept = json.loads((out / "table.json").read_text())
    assert [line["row"] for line in kept["lines"]] == ["remixmatch", "mixmatch"]
    assert kept["lines"][0]["paper"]["source"].endswith("table 1") and kept["lines"][1]["to_full"]["seeds"] == [1, 2]
    job = kept["cells"][0]
    assert job["config"]["k"] == 8 and job["summary"]["test_accuracy"] == 94.0 and job["commit"] == "unknown"

    path = tmp_path / "rows.jsonl"
    for _ in range(2):  # Existing records are not appended again.
        reproduce.main([*words, "--collect", str(path), "--out", str(out)])
    rows = records.read(path)
    assert len(rows) == 5 and rows[1]["changes"].items() >= {"method": "mixmatch", "k": 2, "seed": 1}.items()
    assert rows[1]["command"] == "remixmatch train cifar10-250 --method mixmatch --seed 1"
    reproduce.main([*words, "--from", str(path), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "table.md").read_text() == text
    path.write_text("{}\n")
    with pytest.raises(UserError, match="not a file written by --collect"):
        reproduce.main([*words, "--from", str(path)])


def test_tables_of_unequal_classes_have_recalls(tmp_path, capsys):
    out = tmp_path / "out"
    found = entries("imbalance", rows=("remixmatch", "marginal=uniform"), presets=("fashion-lt10-small",), seeds=(1, 2))
    recalls = [(90.0, 40.0, None), (80.0, 50.0, None), (80.0, 60.0, None), (60.0, 70.0, None)]
    for entry, of_each in zip(found, recalls, strict=True):
        finish(out, entry, sum(of_each[:2]) / 2)
        path = out / entry.job.name / "summary.json"
        more = {
            "recall": dict(zip(("cat", "dog", "emu"), of_each, strict=True)),
            "balanced_accuracy": sum(of_each[:2]) / 2,
            "geometric_mean": math.sqrt(of_each[0] * of_each[1]),
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    words = ["imbalance", "--methods", "remixmatch", "marginal=uniform", "--preset", "fashion-lt10-small"]
    reproduce.main([*words, "--seeds", "1", "2", "--tables", "--out", str(out)])
    text = (out / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| fashion-lt10-small")]
    # Jobs are sorted by seed, so a method has the first and the third.
    assert rows[0].startswith("| fashion-lt10-small | remixmatch | 2 (1 2) |")
    assert "| 67.50 ± 3.54 | 64.64 ± 6.56 |" in rows[0] and "| 65.00 ± 0.00 | 64.03 ± 1.10 |" in rows[1]
    assert "difference in balanced accuracy, pp (95 % CI)" in text and "| -2.50 [-34.27, +29.27], n = 2 |" in rows[1]
    assert rows[2:] == [
        "| fashion-lt10-small | remixmatch | 85.0 | 50.0 |",
        "| fashion-lt10-small | marginal=uniform | 70.0 | 60.0 |",
    ]
    kept = json.loads((out / "table.json").read_text())["lines"][0]
    assert kept["recalls"] == {"cat": 85.0, "dog": 50.0} and kept["balanced"]["mean"] == 67.5
    path = tmp_path / "rows.jsonl"
    reproduce.main([*words, "--seeds", "1", "2", "--collect", str(path), "--out", str(out)])
    assert records.read(path)[0]["recall"]["emu"] is None
    reproduce.main([*words, "--seeds", "1", "2", "--from", str(path), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "table.md").read_text() == text


def test_tables_over_k_compare_with_one_view(tmp_path):
    out = tmp_path / "out"
    found = entries("k", rows=("fixmatch-k1", "fixmatch-k4", "softmatch-k1", "softmatch-k4"), seeds=(1,))
    for entry, accuracy in zip(found, (90.0, 92.0, 80.0, 79.0), strict=True):
        finish(out, entry, accuracy)
    reproduce.main(["k", "--methods", *(entry.row for entry in found), "--seeds", "1", "--tables", "--out", str(out)])
    text = (out / "table.md").read_text()
    rows = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| digits-40")}
    assert "difference from K = 1, pp" in text
    assert "| -2.00" in rows["fixmatch-k4"] and "| +1.00" in rows["softmatch-k4"]
    assert not any(sign in rows["softmatch-k1"] for sign in ("| +", "| -"))


def test_tables_of_equal_classes_have_no_recalls(tmp_path):
    out = tmp_path / "out"
    (entry,) = entries("digits", rows=("remixmatch",), seeds=(1,))
    for apart, shown in ((0.0, False), (1.0, True)):  # Classes may also be unequal in the test set.
        finish(out / str(apart), entry, 90.0)
        path = out / str(apart) / entry.job.name / "summary.json"
        more = {
            "recall": {"cat": 90.0 - apart, "dog": 90.0},
            "balanced_accuracy": 90 - apart / 2,
            "geometric_mean": 9.0,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        words = ["digits", "--methods", "remixmatch", "--seeds", "1", "--tables", "--out", str(out / str(apart))]
        reproduce.main(words)
        text = (out / str(apart) / "table.md").read_text()
        assert ("balanced accuracy" in text) == shown and ("| preset | method | cat | dog |" in text) == shown


def test_ablations_are_compared_with_the_split_of_the_paper():
    found = entries("ablation")
    lines = table_results.make_lines("ablation", found, {})
    errors = {line.row: line.paper.error for line in lines if line.paper}
    assert errors["remixmatch"] == 5.94 and errors["no-weak"] == 29.36 and len(errors) == 11
    assert not any(
        line.paper for line in table_results.make_lines("ablation", entries("ablation", presets=("cifar10-40",)), {})
    )
    for known in (paper_tables.PUBLISHED_ERRORS, paper_tables.PUBLISHED_ABLATIONS):
        for name, row in known:
            assert name in PRESETS and (row in METHODS or row in ABLATIONS)


def test_a_table_over_k_has_a_chart(tmp_path, monkeypatch):
    """The chart shows means, deviations and paired differences, worked out by hand for two seeds."""
    shown = {}

    def look(figure, title, path):
        for side, axes in zip(("errors", "differences"), figure.axes, strict=True):
            for container in axes.containers:
                line, _, (bars,) = container.lines
                shown[side, container.get_label()] = (
                    [round(math.exp2(round(math.log2(x)))) for x in line.get_xdata()],
                    line.get_ydata().tolist(),
                    [(low, high) for (_, low), (_, high) in bars.get_segments()],
                )
        save(figure, title, path)

    save = charts._save
    monkeypatch.setattr(charts, "_save", look)
    accuracies = {("fixmatch", 1): (90, 94), ("fixmatch", 4): (93, 95), ("softmatch", 8): (96, 96)}
    names = [f"{method}-k{k}" for method, k in accuracies]
    jobs = entries("k", seeds=(0, 1), rows=names)
    for entry in jobs:
        method, k = entry.row.split("-k")
        finish(tmp_path, entry, accuracies[method, int(k)][entry.seed] + 1, accuracies[method, int(k)][entry.seed])
    reproduce.main(["k", "--tables", "--out", str(tmp_path), "--seeds", "0", "1", "--methods", *names])
    ks, means, bars = shown["errors", "fixmatch, digits-40"]
    assert ks == [1, 4] and means == pytest.approx([8, 6])
    for (low, high), mean, deviation in zip(bars, means, (math.sqrt(8), math.sqrt(2)), strict=True):
        assert (low, high) == (pytest.approx(mean - deviation), pytest.approx(mean + deviation))
    assert shown["errors", "softmatch, digits-40"][:2] == ([8], [pytest.approx(4)])
    # Differences of -3 and -1: their mean is -2, their standard error 1.
    ks, means, bars = shown["differences", "fixmatch, digits-40"]
    assert ks == [4] and means == pytest.approx([-2])
    assert bars[0] == (pytest.approx(-2 - STUDENT[1], rel=1e-3), pytest.approx(-2 + STUDENT[1], rel=1e-3))
    assert ("differences", "softmatch, digits-40") not in shown
    assert Image.open(tmp_path / "chart.png").size[0] > 500


def test_other_tables_have_no_chart(tmp_path):
    job, *_ = entries("digits", seeds=(0,), rows=("uda",))
    finish(tmp_path, job, 90)
    reproduce.main(["digits", "--tables", "--out", str(tmp_path), "--seeds", "0", "--methods", "uda"])
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.json", job.job.name}
