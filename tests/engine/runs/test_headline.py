"""The result that comes first: the median of 20 evaluations after the ramp, or the last step. Values by hand."""

import dataclasses
from pathlib import Path

import pytest

from engine.commands import train
from engine.config.config import Config
from engine.config.methods import with_method
from engine.config.presets import preset
from engine.runs.headline import (
    Evaluations,
    evaluations_of,
    median_of_last,
    planned_evaluations,
    shown_results,
)
from engine.studies import statistics
from tests.pages import TEXTS


def test_the_median_is_over_the_last_20_evaluations():
    # The last 20 are 3, 6, 9, ..., 60, whose middle two are 30 and 33. The last 10 of them have the same middle.
    earlier = [99.0, 98.0, 1.0, 2.0, 97.0, 96.0, 95.0]
    last = [60.0, 3.0, 57.0, 6.0, 54.0, 9.0, 51.0, 12.0, 48.0, 15.0]
    last += [45.0, 18.0, 42.0, 21.0, 39.0, 24.0, 36.0, 27.0, 33.0, 30.0]
    assert median_of_last(earlier + last) == 31.5
    # The last 20 are ten of 3, 6, 9, 12, 15, 48, ..., 60, and ten zeros: the middle two are 0 and 3. Over 19 it would
    # be 0, over 10 it would be 0, and over 21, with 95, it would be 3.
    assert median_of_last([*earlier, *last[:10], *[0.0] * 10]) == 1.5
    assert median_of_last([5.0]) == 5.0 and median_of_last([1.0, 4.0]) == 2.5


# 8 labeled images per step: a ramp of 1 kimg takes 128 steps.
BASE = Config(steps=1000, batch=8, ramp_kimg=1.0, eval_every=50)


@pytest.mark.parametrize(
    ("changes", "count", "after"),
    [
        ({}, 20, 18),  # At 50, 100, ..., 1000; two of them during the ramp.
        ({"steps": 1100}, 22, 20),
        ({"steps": 1010}, 21, 19),  # Also after the last step, which no interval ends.
        ({"steps": 120}, 3, 0),  # 50, 100, 120.
        ({"steps": 130}, 3, 1),  # 50, 100, 130.
        ({"eval_every": 64, "steps": 256}, 4, 2),  # At 128 the ramp has just ended: no step had the full weight.
        ({"ramp_kimg": 0.0}, 20, 20),
        ({"eval_every": 5000}, 1, 1),
        ({"batch": 64}, 20, 20),  # 16 steps.
    ],
)
def test_evaluations_are_counted(changes, count, after):
    config = dataclasses.replace(BASE, **changes)
    assert planned_evaluations(config, config.steps) == Evaluations(count, after)
    at = [step for step in range(1, config.steps + 1) if step % config.eval_every == 0 or step == config.steps]
    ramp = config.ramp_kimg * 1024 / config.batch
    assert (len(at), sum(step > ramp for step in at)) == (count, after)


def test_the_counts_of_a_preset_are_those_of_the_protocol():
    config = preset("fashion-100-small")
    assert planned_evaluations(config, config.steps) == Evaluations(20, 15)
    assert "`fashion-100-small` has 20 evaluations, 15 of them after the ramp" in TEXTS["docs/protocol.md"]


def test_a_supervised_run_has_no_ramp():
    config = with_method(BASE, "supervised")
    assert planned_evaluations(dataclasses.replace(config, ramp_kimg=1024.0), 1000) == Evaluations(20, 20)


def test_an_unfinished_run_has_no_evaluation_of_its_last_step():
    assert planned_evaluations(BASE, 120) == Evaluations(2, 0)


def test_a_summary_without_counts_is_that_of_an_earlier_version():
    assert evaluations_of({"evaluations": 7, "evaluations_after_ramp": 3}, BASE) == Evaluations(7, 3)
    assert evaluations_of({"test_accuracy": 1.0}, BASE) == Evaluations(20, 18)


@pytest.mark.parametrize(
    ("evaluations", "words"),
    [
        (Evaluations(50, 45), "66 % (median of the last 20 evaluations), 75 % after the last step"),
        (Evaluations(20, 20), "66 % (median of all 20 evaluations), 75 % after the last step"),
        (Evaluations(24, 9), "75 % after the last step, 66 % as median of the last 20 evaluations, 9 after the ramp"),
        (Evaluations(6, 3), "75 % after the last step, 66 % as median of all 6 evaluations, 3 after the ramp"),
        (Evaluations(1, 0), "75 % after the last step (the only evaluation)"),
    ],
)
def test_the_last_step_comes_first_until_20_evaluations_follow_the_ramp(evaluations, words):
    assert shown_results(evaluations, 75.6, 66.2) == words.replace("66 %", "66.20 %").replace("75 %", "75.60 %")


@pytest.mark.parametrize(
    ("steps", "said", "ours"),
    [
        (2**20, "81.25 % (median of the last 20", "18.75 % (median of the last 20 evaluations)"),
        (6144, "87.50 % after the last step, 81.25 % as median of all 6", "12.50 % (after the last step)"),
    ],
)
def test_the_printed_summary_compares_the_first_result_with_the_paper(capsys, steps, said, ours):
    config = dataclasses.replace(preset("cifar10-250"), steps=steps)
    summary = {
        "preset": "cifar10-250", "seed": 3, "test_accuracy": 87.5, "median_last_20": 81.25, "train_seconds": 61.0,
        "paper_error": 5.44, "paper_deviation": 0.05, "paper_source": "table 1", "same_settings_as_paper": True,
    }  # fmt: skip
    train._print_summary(summary, config, Path("runs/one"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"cifar10-250 seed 3: test accuracy {said}") and "; 61 s; see runs/one/summary" in first
    apart = 18.75 - 5.44 if steps == 2**20 else 12.5 - 5.44
    assert second == f"test error: paper 5.44 ± 0.05 % (table 1), ours {ours}, difference {apart:+.2f} pp"


def line(row, results, full=None):
    return statistics.line(row, "p", tuple(results), results, full, None, papers_difference=2.0 if full else None)


@pytest.mark.parametrize(
    ("counts", "heading", "differences"),
    [
        ((Evaluations(30, 20), Evaluations(30, 20)), "median of last 20) | error, % (last)", (7.0, 9.0)),
        ((Evaluations(30, 20), Evaluations(6, 3)), "error, % (last) | error, % (median of last 6 to 20)", (1.0, 2.0)),
        ((Evaluations(6, 3), Evaluations(6, 6)), "error, % (last) | error, % (median of all 6)", (1.0, 2.0)),
    ],
)
def test_a_table_shows_one_kind_of_error_first(counts, heading, differences):
    """Differences are 7 and 9 pp between the medians, and 1 and 2 pp between the last evaluations."""
    first, second = counts
    full = {seed: statistics.Result(20.0, 10.0, 100, "paper", evaluations=first) for seed in (1, 2)}
    other = {
        seed: statistics.Result(20.0 + medians, 10.0 + lasts, 100, "paper", evaluations=second)
        for seed, medians, lasts in ((1, 7.0, 1.0), (2, 9.0, 2.0))
    }
    lines = statistics.choose_first([line("remixmatch", full), line("l2", other, full)])
    text = statistics.markdown("title", lines, "remixmatch")
    assert heading in text.splitlines()[2]
    assert f"| +{sum(differences) / 2:.2f} [" in text
    assert ("errors of the last evaluation come first" in text) == (differences == (1.0, 2.0))
    kept = statistics.to_json(lines)[1]
    assert kept["to_full"]["mean"] == 8.0 and kept["last_to_full"]["mean"] == 1.5
    assert kept["evaluations"] == {"count": second.count, "after_ramp": second.after_ramp}
