"""Cost and benefit of components: variants by axis, prices, reuse of measurements, and the written files."""

import csv

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


@pytest.mark.parametrize(("errors", "price"), [({1: 23, 2: 21, 3: 22}, "(10.00)"), ({1: 21, 2: 23, 3: 22}, "10.00")])
def test_the_price_of_an_insignificant_difference_is_in_parentheses(errors, price):
    compared = line("k=1", errors, {1: 20, 2: 22, 3: 21})  # 1 pp on average: of 3, -1 and 1, or of 1, 1 and 1.
    table = ablate.markdown("a title", [AblationRow("k=1", {**COST, "step_ms": 10.0, "ratio": 0.5}, {}, compared)])
    assert f", n = 3 | {price} |" in table


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
    run(tmp_path, "--time-only")
    assert costs == [(2, 0.5), (1, 0.5), (8, 0.5), (2, 0.5)]  # The full method first, l2 last.
    printed = capsys.readouterr().out
    assert caplog.messages == ["l2: cannot measure its cost (it ended with exit code 1)"]
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


def test_changed_settings_are_timed_again(costs, tmp_path):
    run(tmp_path, "--time-only")
    del costs[:]
    ablate.main(
        ["digits-40", "--axes", "k=1", "--no-count", "--time-only", "--out", str(tmp_path), *SMALL, "--w-rot", "2"]
    )
    assert costs == [(2, 2.0), (1, 2.0)]


def test_errors_are_paired_by_seed(costs, tmp_path, monkeypatch):
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
        "| k=8 | 40.00 | 4.00 (3.60 to 4.40) | 100 | 500 | 8.00 ± 1.00 | -1.00 [-1.00, -1.00], n = 3 | 30.00 |" in text
    )
    assert "over 3 seeds" in text
    # `finish` makes the median 1 pp worse. With 40 steps there is one evaluation, so the last comes first.
    assert "those of the last evaluation" in text
    with (tmp_path / "ablate.csv").open() as file:
        rows = {(row["variant"], row["seed"]): row for row in csv.DictReader(file)}
    assert rows["k=1", "2"]["error_last"] == "12.0" and rows["k=1", "2"]["step_ms"] == "5.0"


def test_collected_records_rebuild_table_and_chart(costs, tmp_path, monkeypatch, capsys):
    words = ["--axes", "k=1", "k=8", "--seeds", "1", "2"]
    entries = ablations(SMALL[1:], (1, 2), ("remixmatch", "k=1", "k=8"))
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
