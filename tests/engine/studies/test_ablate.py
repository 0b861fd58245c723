"""Cost and benefit of components: variants by axis, prices, reuse of measurements, and the written files."""

import csv
import logging

import pytest
from PIL import Image

from engine.config.methods import ABLATIONS
from engine.errors import UserError
from engine.measuring import records
from engine.studies import ablate, reproduce, statistics
from engine.studies.ablate import AXES, AblationRow, variants_of
from engine.studies.paper_tables import TABLES, make_entries
from tests.engine.studies.made_jobs import finish

SMALL = ["--", "--batch", "8", "--width", "8", "--steps", "40", "--device", "cpu"]

COST = {"ratio_low": 0.4, "ratio_high": 0.6, "images_per_second": 100.0, "memory_mib": 500.0, "device": "CPU"}


def line(row, errors, full=None):
    runs = {seed: statistics.Result(error, error, 40, "balanced") for seed, error in errors.items()}
    of_full = {seed: statistics.Result(error, error, 40, "balanced") for seed, error in full.items()} if full else None
    return statistics.line(row, "digits-40", tuple(errors), runs, of_full, None)


def test_axes_name_every_ablation_once():
    assert variants_of(tuple(AXES)) == [name for names in AXES.values() for name in names]
    assert sorted(variants_of(tuple(AXES))) == sorted(ABLATIONS)
    assert variants_of(("no-rotation", "losses", "k=4")) == ["no-rotation", "no-premixup", "no-mixup", "l2", "k=4"]
    with pytest.raises(UserError, match="--axes: unknown axis or ablation 'loss'; did you mean losses"):
        variants_of(("loss",))


@pytest.mark.parametrize(
    ("ratio", "worse", "price"),
    [
        (0.5, 4.0, 2.5),  # The full method takes 10 ms more, and its error is 4 pp lower.
        (2.0, -5.0, 2.0),  # The variant takes 10 ms more, and its error is 5 pp lower.
        (0.5, -1.0, None),  # Faster and better.
        (2.0, 1.0, None),  # Slower and worse.
        (0.5, 0.0, None),
    ],
)
def test_the_price_is_the_slower_ones_additional_time_per_point(ratio, worse, price):
    full = {1: 20.0, 2: 22.0}
    compared = line("l2", {seed: error + worse for seed, error in full.items()}, full)
    # The ratio makes this 10 ms more or less than the full method's step.
    variant = AblationRow("l2", {"step_ms": 10.0 if ratio < 1 else 20.0, "ratio": ratio}, {}, compared)
    assert variant.price == (None if price is None else pytest.approx(price))
    assert AblationRow("l2", {}, {}, compared).price is None
    assert AblationRow("l2", {"step_ms": 10.0, "ratio": ratio}, {}, line("l2", full)).price is None


def own(low=0.98, high=1.03, errors=None):
    """Return the full method's own row, with a standard deviation of 1 pp unless other errors are given."""
    cost = {**COST, "step_ms": 20.0, "ratio": 1.0, "ratio_low": low, "ratio_high": high}
    return AblationRow("remixmatch", cost, {}, line("remixmatch", {1: 20, 2: 22, 3: 21} if errors is None else errors))


@pytest.mark.parametrize(
    ("errors", "cells"),
    [
        ({1: 23, 2: 21, 3: 22}, "| (+1.00 [-3.97, +5.97], n = 3) | (10.00) |"),  # Not significant: 3, -1 and 1 pp.
        ({1: 21, 2: 23, 3: 22}, "| (+1.00 [+1.00, +1.00], n = 3) | (10.00) |"),  # Significant, but within the noise.
        ({1: 23.5, 2: 25.5, 3: 24.5}, "| (+3.50 [+3.50, +3.50], n = 3) | (2.86) |"),
        ({1: 24, 2: 26, 3: 25}, "| +4.00 [+4.00, +4.00], n = 3 | 2.50 |"),
        ({1: 16, 2: 18, 3: 17}, "| -4.00 [-4.00, -4.00], n = 3 |  |"),
        (
            {1: 30, 2: 22, 3: 29},
            "| +6.00 [-7.14, +19.14], n = 3 | (1.67) |",
        ),  # Beyond it, but not significant: 10, 0, 8.
    ],
)
def test_differences_within_the_full_methods_noise_are_in_parentheses(errors, cells):
    """With s = 1 pp and n = 3 it is t(0.975, 2) s sqrt(2 / 3) = 4.303 * 0.8165 = 3.51 pp."""
    compared = line("k=1", errors, {1: 20, 2: 22, 3: 21})
    rows = [own(), AblationRow("k=1", {**COST, "step_ms": 10.0, "ratio": 0.5}, {}, compared)]
    table = ablate.markdown("a title", rows)
    assert cells in table
    assert "over 3 seeds, the full method has a standard deviation of 1.00 pp" in table and "up to 3.51 pp" in table


def test_the_noise_of_one_seed_is_unknown():
    compared = line("k=1", {1: 30}, {1: 20})
    rows = [own(errors={1: 20}), AblationRow("k=1", {**COST, "step_ms": 10.0, "ratio": 0.5}, {}, compared)]
    table = ablate.markdown("a title", rows)
    assert "| (+10.00 (one seed)) | (1.00) |" in table and "Noise of the errors: unknown" in table


@pytest.mark.parametrize(
    ("ratio", "low", "high", "cell"),
    [
        (1.02, 0.98, 1.03, "(1.02; 0.40 to 0.60)"),
        (0.98, 0.98, 1.03, "(0.98; 0.40 to 0.60)"),
        (1.04, 0.98, 1.03, "1.04 (0.40 to 0.60)"),
        (0.97, 0.98, 1.03, "0.97 (0.40 to 0.60)"),
        (1.01, 1.02, 1.05, "(1.01; 0.40 to 0.60)"),  # Between 1 and the quartiles.
    ],
)
def test_step_times_within_the_full_methods_noise_are_in_parentheses(ratio, low, high, cell):
    variant = AblationRow("k=1", {**COST, "step_ms": 10.0, "ratio": ratio}, {}, line("k=1", {}))
    table = ablate.markdown("a title", [own(low, high, errors={}), variant])
    assert f"| 10.00 | {cell} |" in table and f"| 20.00 | 1.00 ({low:.2f} to {high:.2f}) |" in table
    assert f"takes {min(low, 1):.2f} to {high:.2f} times its own" in table and "Noise of the errors" not in table


@pytest.fixture
def costs(monkeypatch):
    """Replace the timing by made-up times, and return the list of timed variants."""
    timed = []

    def time_step(config, full, options):
        timed.append((config.k, config.w_rot))
        if config.unlabeled_loss == "l2":
            raise RuntimeError("it ended\nwith exit code 1")
        ratio = config.k / full.k
        ranges = {"ratio_low": 0.9 * ratio, "ratio_high": 1.1 * ratio}
        return {"step_ms": 10 * ratio, "ratio": ratio, **ranges, "images_per_second": 100.0, "memory_mib": 500.0}

    monkeypatch.setattr(ablate, "time_step", time_step)
    return timed


def run(out, *words):
    ablate.main(["digits-40", "--axes", "k=1", "k=8", "l2", "--no-count", "--out", str(out), *words, *SMALL])


def test_time_only_trains_nothing_and_times_once(costs, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, "--time-only")
    assert costs == [(2, 0.5), (1, 0.5), (8, 0.5), (2, 0.5)]  # The full method first, l2 last.
    printed = capsys.readouterr().out
    assert [each.message for each in caplog.records if each.levelname == "WARNING"] == [
        "l2: cannot measure its cost (it ended with exit code 1)"
    ]
    said = [each.message for each in caplog.records if each.levelname == "INFO"]
    assert said[0] == "digits-40: timing the steps of 4 of 4 variants, 9 rounds each"
    assert said[1].startswith("timed 1 of 4 variants; about 0 s left") and "training" not in " ".join(said)
    assert not list(tmp_path.glob("*/config.json")), "nothing was trained"
    text = (tmp_path / "table.md").read_text()
    assert text in printed and "| k=8 | 40.00 | 4.00 (3.60 to 4.40) | 100 | 500 |" in text and "| l2 |  |" in text
    assert "error, %" not in text and "launches" not in text
    with (tmp_path / "ablate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 and {row["variant"] for row in rows} == {"remixmatch", "k=1", "k=8", "l2"}
    assert all(row["error_median"] == "" for row in rows) and rows[2]["ratio"] == "4.0" and rows[3]["ratio"] == ""
    assert Image.open(tmp_path / "chart.png").size[0] > 500

    del costs[:]
    run(tmp_path, "--time-only")
    assert costs == [(2, 0.5)], "only the failed measurement is repeated"
    kept = records.read(tmp_path / "measured.jsonl")
    assert [row["variant"] for row in kept] == ["remixmatch", "k=1", "k=8"] and kept[0]["device"].startswith("CPU")


def test_training_is_estimated_from_the_measured_step_times(costs, tmp_path, monkeypatch, caplog):
    """A step takes 10 ms for the full method, 5 for K = 1 and 40 for K = 8."""
    caplog.set_level(logging.INFO)
    long = [word.replace("40", "40000") if word == "40" else word for word in SMALL]
    found = ablations(long[1:], (1, 2), ("remixmatch", "k=1", "k=8"))
    finish(tmp_path, next(entry for entry in found if entry.row == "k=8"), 90.0)
    monkeypatch.setattr(reproduce, "work", _done)
    flags = ["--seeds", "1", "2", "--workers", "2", "--no-count", "--out", str(tmp_path)]
    ablate.main(["digits-40", "--axes", "k=1", "k=8", *flags, *long])
    # 40 000 steps for each of two seeds, and one of K = 8: 400 + 400 + 200 + 200 + 1600 s, two at a time.
    assert (
        "training 5 runs, 2 at a time: about 23 min at the measured step times, without evaluations" in caplog.messages
    )


def test_changed_settings_are_timed_again(costs, tmp_path):
    run(tmp_path, "--time-only")
    del costs[:]
    ablate.main(
        ["digits-40", "--axes", "k=1", "--no-count", "--time-only", "--out", str(tmp_path), *SMALL, "--w-rot", "2"]
    )
    assert costs == [(2, 2.0), (1, 2.0)]


def test_errors_are_paired_by_seed(costs, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    words = ["--axes", "k=1", "k=8", "--seeds", "1", "2", "3"]
    entries = ablations(SMALL[1:], (1, 2, 3), ("remixmatch", "k=1", "k=8"))
    accuracies = {"remixmatch": (90, 91, 92), "k=1": (85, 88, 88), "k=8": (91, 92, 93)}
    for entry in entries:
        finish(tmp_path, entry, float(accuracies[entry.row][entry.seed - 1]))
    monkeypatch.setattr(reproduce, "work", _done)
    ablate.main(["digits-40", *words, "--no-count", "--out", str(tmp_path), *SMALL])
    text = (tmp_path / "table.md").read_text()
    # Errors are 5, 3 and 4 pp higher for half of the step's 10 ms: 4 on average, with the textbook's interval.
    half = 4.303 * 1.0 / 3**0.5
    assert f"| 13.00 ± 1.73 | +4.00 [{4 - half:+.2f}, {4 + half:+.2f}], n = 3 | 1.25 |" in text
    assert (
        "| k=8 | 40.00 | 4.00 (3.60 to 4.40) | 100 | 500 | 8.00 ± 1.00 | (-1.00 [-1.00, -1.00], n = 3) | (30.00) |"
        in text
    )
    assert "over 3 seeds" in text
    assert caplog.messages[0] == (
        "digits-40: timing the steps of 3 of 3 variants, 9 rounds each, then training 0 of 9 runs (3 variants, 3 seeds)"
    )
    # `finish` makes the median 1 pp worse. With 40 steps there is one evaluation, so the last comes first.
    assert "those of the last evaluation" in text
    with (tmp_path / "ablate.csv").open() as file:
        rows = {(row["variant"], row["seed"]): row for row in csv.DictReader(file)}
    assert rows["k=1", "2"]["error_last"] == "12.0" and rows["k=1", "2"]["step_ms"] == "5.0"


def test_collected_records_rebuild_table_and_chart(costs, tmp_path, monkeypatch, capsys):
    words = ["--axes", "k=1", "k=8", "--seeds", "0", "1"]  # Times are those of the job with the preset's seed, 0.
    entries = ablations(SMALL[1:], (0, 1), ("remixmatch", "k=1", "k=8"))
    for number, entry in enumerate(entries[:5]):
        finish(tmp_path / "here", entry, 90.0 - number)
    monkeypatch.setattr(reproduce, "work", _done)
    monkeypatch.setattr(ablate, "_counted", lambda config: {"launches": 300.0 + config.k, "gigabytes": 1.5})
    ablate.main(["digits-40", *words, "--out", str(tmp_path / "here"), *SMALL])
    rows = tmp_path / "rows.jsonl"
    for _ in range(2):
        ablate.main(["digits-40", *words, "--out", str(tmp_path / "here"), "--collect", str(rows), *SMALL])
    assert [row["bench"] for row in records.read(rows)] == ["ablate"] * 3 + ["reproduce"] * 5, "none of them twice"

    monkeypatch.setattr(ablate, "time_step", None)
    monkeypatch.setattr(reproduce, "train", None)
    ablate.main(["digits-40", *words, "--out", str(tmp_path / "there"), "--from", str(rows), *SMALL])
    for name in ("table.md", "ablate.csv"):
        assert (tmp_path / "there" / name).read_text() == (tmp_path / "here" / name).read_text()
    assert "| 302 | 1.50 |" in (tmp_path / "there" / "table.md").read_text()
    assert (tmp_path / "there" / "chart.png").exists()
    with pytest.raises(UserError, match=r"--from .*none\.jsonl: file not found"):
        ablate.main(["digits-40", "--from", str(tmp_path / "none.jsonl"), *SMALL])


def ablations(flags, seeds, rows):
    return make_entries(TABLES["ablation"], flags, seeds, rows, ("digits-40",))


def _done(root, jobs, *_):
    from engine.studies.jobs import status

    return [status(root, job) for job in jobs]


def test_a_step_is_timed_in_alternation_with_the_full_methods():
    full, other = (entry.job.config for entry in ablations(SMALL[1:], (1,), ("remixmatch", "no-rotation")))
    options = ablate.AblateOptions(repeats=3, seconds=0.01)
    cost = ablate.time_step(other, full, options)
    assert cost["ratio_low"] <= cost["ratio"] <= cost["ratio_high"] and cost["step_ms"] > 0
    # 8 labeled images, and 8 each of u_weak, u_1, u_2 and the unmixed u_1.
    assert cost["images_per_second"] == pytest.approx(8 * 5 / (cost["step_ms"] / 1e3))
    assert 100 < cost["memory_mib"] < 20_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "ablate needs a preset"),
        (["digit-40"], "unknown preset 'digit-40'"),
        (["digits-40", "--repeats", "0"], "--repeats must be at least 1"),
        (["digits-40", "--seconds", "0"], "--seconds must be more than 0"),
        (["digits-40", "--steps-scale", "0"], "--steps-scale must be more than 0, got 0"),
        (["digits-40", "--axes", "kk"], "--axes: unknown axis or ablation 'kk'"),
        (["digits-40", "--axes", "k=2"], "the preset already has these settings; nothing to compare"),
        (["digits-40", "--seeds", "-1"], "--seeds must be from 0 to 4294967295, got -1"),
        (["digits-40", "--seeds", "1", "1"], "--seeds has a duplicate value: 1 1"),
    ],
)
def test_invalid_input_gives_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        ablate.main(words)
