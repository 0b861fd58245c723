"""Warnings of runs that do not learn: thresholds on given numbers, and on runs made to fail."""

import dataclasses
import re

import numpy as np
import pytest

from engine import run
from engine.config.presets import PRESETS, preset
from engine.inference.evaluation import normalized
from engine.models.wide_resnet import WideResNet
from engine.runs import health
from engine.runs.health import Health, Observation, compared_images
from engine.runs.setup import setup_run
from engine.training.diagnostics import agreement

CLASSES = tuple("0123456789")
UNIFORM = (0.1,) * 10
GOOD = dict(loss_x=0.6, confidence=0.9, guesses_used=1.0)


def watched(counts=(4,) * 10, **changes):
    """Return the Health of a digits-40 run of 2 500 steps with some settings changed."""
    config = dataclasses.replace(preset("digits-40"), **changes)
    return Health(config, CLASSES[: len(counts)], np.array(counts), images_per_step=96)


def warnings(watch, checks, every=50, start=0, **metrics):
    """Return all warnings of several checks, each after `every` steps with the given metrics.

    `p_model`, `label_marginal` and `agreement` are attributes of the observations; all other metrics are those of a
    healthy run.
    """
    attributes = dict(p_model=watch.p_data, label_marginal=watch.p_data) | {
        name: metrics.pop(name) for name in ("p_model", "label_marginal", "agreement") if name in metrics
    }
    said = []
    for step in range(start + every, start + checks * every + 1, every):
        for _ in range(every):
            watch.add(GOOD | metrics)
        assert watch.due(step)
        said += watch.check(Observation(step, **attributes))
    return said


def shares(*first):
    """Return p~(y) that starts with the given probabilities and is uniform over the other classes."""
    return (*first, *[(1 - sum(first)) / (10 - len(first))] * (10 - len(first)))


@pytest.mark.parametrize(
    "seen",
    [
        dict(),
        dict(p_model=shares(0.4)),
        dict(p_model=shares(0.02)),
        dict(p_model=shares(0.005)),  # reported for a single class only with alignment
        dict(confidence=0.15),
        dict(loss_x=0.94 * np.log(10)),
        dict(agreement=(0.5, 0.2)),
        dict(guesses_used=0.0),  # without a threshold
        dict(agreement=(1.0, 1.0)),
    ],
)
def test_a_healthy_run_causes_no_warnings(seen):
    assert warnings(watched(align=False), 50, **seen) == []


@pytest.mark.parametrize(
    ("seen", "what"),
    [
        (dict(p_model=shares(0.6)), r"collapsed: .* is 60 % class 0, whose .* is 10 %; .*--align \(on\), --w-u 1.5"),
        (dict(p_model=shares(0.005, 0.005)), r"collapsed: .* 2 of 10 classes \(0, 1\) have less than a tenth"),
        (dict(confidence=0.11), r"class prior: .* confidence is 0.110, and .* have 0.100; .*--temperature 0.5"),
        (dict(p_model=shares(0.005)), r"does not bring .* class 0 has p\(y\) 0.100 and p~\(y\) 0.005, a ratio of 20"),
        (dict(loss_x=2.25), r"labels are not learned: loss_x is 2.25, and .* has 2.30; .*--lr 0.002"),
        (dict(loss_x=90.0), r"labels are not learned: loss_x is 90.00"),
        (dict(agreement=(0.3, 0.1)), r"agree on 30 % of 64 .* \(10 % .*--ema-decay 0.99 and --bn-momentum 0.02"),
    ],
)  # fmt: skip
def test_each_failure_is_reported_once_and_not_too_early(seen, what):
    watch = watched()
    (line,) = warnings(watch, 50, **seen)
    assert re.search(what, line) and "\n" not in line
    step = int(line.removeprefix("step ").split(":")[0])
    held = 0 if "agreement" in seen else health.HOLD
    assert watch.late == watch.ema_late == 625 and 625 + held <= step < 625 + held + 50


def test_causes_are_reported_before_their_effects():
    watch = watched()
    everything = dict(loss_x=2.5, confidence=0.1, agreement=(0.0, 0.0))
    (line,) = warnings(watch, 50, p_model=shares(0.95), **everything)
    assert "collapsed" in line
    (line,) = warnings(watch, 10, start=2500, **everything)
    assert "labels are not learned" in line
    (line,) = warnings(watch, 10, start=3000, **everything | dict(loss_x=0.6))
    assert "prior" in line


def test_temporary_failures_are_not_reported():
    watch = watched()
    for start in range(0, 2500, 250):
        assert warnings(watch, 2, start=start, loss_x=2.4, p_model=shares(0.9)) == []
        assert warnings(watch, 3, start=start + 100) == []


def test_without_unlabeled_data_only_labels_and_the_ema_are_checked():
    seen = dict(p_model=shares(0.9), confidence=0.1)
    assert warnings(watched(method="supervised"), 50, **seen) == []
    assert len(warnings(watched(method="supervised"), 50, **seen, loss_x=2.3)) == 1


def test_chance_is_the_loss_of_predicting_the_label_frequencies():
    assert watched([4] * 10).chance == pytest.approx(np.log(10))
    watch = watched([90, 10])
    assert watch.chance == pytest.approx(-(0.9 * np.log(0.9) + 0.1 * np.log(0.1)))
    assert len(warnings(watch, 50, loss_x=0.32)) == 1
    assert warnings(watched([90, 10]), 50, loss_x=0.29) == []
    assert warnings(watched([40, 0]), 50, loss_x=0.0) == []  # a single class has no loss


def test_unbalanced_classes_are_not_a_failure():
    counts = [60, 20, 5, 5, 4, 2, 1, 1, 1, 1]
    expected = tuple(np.array(counts) / 100)
    assert warnings(watched(counts), 50) == []
    # The running p(y) starts uniform, which takes thousands of steps to fade.
    assert warnings(watched(counts), 50, label_marginal=UNIFORM) == []
    assert len(warnings(watched(counts), 50, p_model=(1.0, *[0.0] * 9))) == 1, "one class has absorbed all others"
    assert len(warnings(watched(class_distribution=expected), 50, p_model=UNIFORM)) == 0, "ratios of 0.1 to 6"


def test_a_wrong_class_distribution_is_reported():
    prior = (0.0, 0.0, *[0.125] * 8)
    (line,) = warnings(watched(class_distribution=prior), 50, p_model=UNIFORM)
    assert "class 0 has p(y) 0.000 and p~(y) 0.100, a ratio of 1e-05" in line and "--class-distribution" in line
    assert warnings(watched(class_distribution=prior, align=False), 50, p_model=UNIFORM) == []


def test_confidence_is_compared_with_that_of_identical_pseudo_labels():
    marginal = np.array(shares(0.5))
    sharp = (marginal**2 / (marginal**2).sum()).max()
    counts, seen = marginal * 1000, dict(label_marginal=marginal, p_model=marginal)
    assert 0.85 < sharp < 0.9
    assert len(warnings(watched(counts), 50, **seen, confidence=sharp)) == 1
    assert warnings(watched(counts), 50, **seen, confidence=sharp + 0.05 * (1 - sharp)) == []
    # Without alignment, pseudo-labels keep the marginal p~(y).
    assert (
        len(warnings(watched(counts, align=False), 50, label_marginal=UNIFORM, p_model=marginal, confidence=sharp)) == 1
    )
    # Hard labels always have confidence 1 or 0.
    assert warnings(watched(counts, hard_labels=True), 50, **seen, confidence=sharp) == []


def test_with_a_threshold_the_fraction_of_used_pseudo_labels_counts():
    fixmatch = dict(hard_labels=True, threshold=0.95, align=False)
    (line,) = warnings(watched(**fixmatch), 50, guesses_used=0.004, confidence=0.0)
    assert "almost no pseudo-labels are used: 0.4 % reach --threshold 0.95" in line
    assert warnings(watched(**fixmatch), 50, guesses_used=0.02, confidence=0.0) == []


@pytest.mark.parametrize(
    ("changes", "late", "ema_late"),
    [
        (dict(steps=2500), 625, 625),
        (dict(steps=200), 128, 150),  # p~(y) no longer contains its uniform start
        (dict(steps=2**20, batch=64, ramp_kimg=1024.0, ema_decay=0.999, bn_momentum=0.001), 16384, 16384),
        (dict(steps=2**20, batch=64, ramp_kimg=8192.0), 16384, 16384),
        (dict(steps=2**20, ramp_kimg=0.0, ema_decay=0.999), 1024, 5000),
        (dict(steps=2**20, ramp_kimg=0.0, bn_momentum=0.0001), 1024, 50000),
        (dict(steps=2500, ema_decay=0.9999), 625, 1875),  # the EMA would not settle before the end
        (dict(steps=2500, ema_decay=1.0, bn_momentum=0.0), 625, 1875),
    ],
)
def test_first_step_at_which_failures_count(changes, late, ema_late):
    watch = watched(**changes)
    assert watch.late == pytest.approx(late) and watch.ema_late == pytest.approx(ema_late)


@pytest.mark.parametrize("name", PRESETS)
def test_comparing_takes_at_most_half_a_percent_of_training(name):
    config = PRESETS[name]
    rows = config.batch * (config.k + 4 if config.unlabeled else 1)
    watch = Health(config, CLASSES, np.full(10, 4), rows)
    compared = []
    for step in range(config.eval_every, min(config.steps, 2**17) + 1, config.eval_every):
        watch.add(GOOD)
        far = watch.comparing(step)
        compared += [step] * far
        watch.check(Observation(step, UNIFORM, UNIFORM, (1.0, 0.1) if far else None))
    assert compared and 64 <= watch.images <= 256
    # Each compared image takes two passes without gradient, each trained one the equivalent of three.
    assert len(compared) * 2 * watch.images <= 0.005 * 3 * rows * compared[-1]


def test_the_number_of_images_fills_batch_norm_groups():
    assert watched(bn="split", batch=24, bn_groups=1).images == 48
    assert watched(bn="split", batch=512, bn_groups=2).images == 256
    assert watched(bn="split", batch=512, bn_groups=1).images == 512
    images = np.arange(10)[:, None, None, None]
    assert len(compared_images(images, 64)) == 64 and set(compared_images(images, 64).ravel()) == set(range(10))


def test_agreement_with_batch_norm_over_groups():
    network, ema_model = (WideResNet(10, 3, 1, 8, group_size=24) for _ in range(2))
    images = np.zeros((watched(bn="split", batch=24, bn_groups=1).images, 16, 16, 3), np.uint8)
    share, by_chance = agreement(network, ema_model.eval(), images, "cpu")
    assert share == by_chance, "each network assigns all black images to one class"


def test_checks_are_at_least_some_steps_apart():
    watch = watched()
    for step in range(1, 201):
        watch.add(GOOD)
        if watch.due(step):
            watch.check(Observation(step, UNIFORM, UNIFORM))
            assert step % health.EVERY == 0


def test_a_resumed_run_warns_like_an_undisturbed_one():
    straight, before = watched(), watched()
    expected = warnings(straight, 14, loss_x=2.3)
    assert warnings(before, 14, loss_x=2.3) == expected == []
    for each in (straight, before):
        each.add(GOOD | dict(loss_x=2.5))
    after = watched()
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == straight.state_dict()
    assert len(warnings(after, 36, start=700, loss_x=2.3)) == 1
    again = watched()
    again.load_state_dict(after.state_dict())
    assert warnings(again, 10, start=2500, loss_x=2.3) == []


def test_checkpoints_contain_which_failures_were_reported(tmp_path, caplog, tiny, monkeypatch):
    monkeypatch.setattr(health, "HOLD", 8)
    monkeypatch.setattr(health, "EVERY", 4)
    config = tiny(lr=1e-9, eval_every=4, steps=32)
    run.train(setup_run(config, tmp_path / "run"), quiet=True)
    assert "step 16: labels are not learned" in caplog.text
    caplog.clear()
    run.train(setup_run(dataclasses.replace(config, steps=48), tmp_path / "run", resume=True), quiet=True)
    assert caplog.messages == []


def test_agreement_uses_training_mode_and_changes_no_statistics():
    network, ema_model = (WideResNet(10, 3, 1, 8, seed=seed) for seed in (0, 0))
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    ema_model.eval()
    before = network.running_statistics().clone()
    share, by_chance = agreement(network, ema_model, images, "cpu")
    assert 0 <= by_chance <= 1 and share < 1, "running statistics have their initial values"
    assert network.training and before.equal(network.running_statistics())
    # With the batch's own statistics both networks are the same.
    for norm in (module for module in network.modules() if hasattr(module, "running_mean")):
        norm.momentum = 1.0
    network(normalized(network, images, "cpu"))
    ema_model.copy_running_statistics(network)
    assert agreement(network, ema_model, images, "cpu")[0] > 0.9


# Runs of 350 steps of a tiny network; failures count only after the first 128 or so. `ramp_kimg` 0.01 means no ramp.
SMALL = dict(batch=8, width=8, k=1, steps=350, device="cpu")
COLLAPSE = dict(align=False, w_u=100.0, ramp_kimg=0.01)


WRONG_PRIOR = (*[0.0] * 5, *[0.2] * 5)


def failing(name, expected, long=False, **changes):
    return pytest.param(changes, expected, id=name, marks=[pytest.mark.long] if long else [])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        failing("healthy", None),
        failing("collapse", r"collapsed: .* is \d\d % class \d, .*--align \(off\), --w-u 100", **COLLAPSE),
        failing("prior", r"prior: .* 0.10\d, and .* 0.10\d; .*--temperature 100", temperature=100.0),
        failing("ratio", r"does not bring .* p\(y\) 0.000 .*--class-distribution", class_distribution=WRONG_PRIOR),
        failing("threshold", r"almost no pseudo-labels are used: 0.0 % .*--threshold 1", threshold=1.0, long=True),
        failing("no-steps", r"not learned: loss_x is 2.[3-5]\d, and .* 2.30; .*--lr 1e-09", lr=1e-9),
        failing("large-steps", r"not learned: loss_x is .*--lr 1,", lr=1.0, long=True),
        failing("decay", r"not learned: loss_x is 2.3.*--weight-decay 100", weight_decay=100.0, long=True),
        failing("ema", r"EMA model.*--ema-decay 0.99999", ema_decay=0.99999),
        failing("running-statistics", r"EMA model.*--bn-momentum 1e-06", bn_momentum=1e-6, long=True),
    ],
)
def test_runs_made_to_fail_report_the_cause(tmp_path, caplog, changes, expected):
    config = dataclasses.replace(preset("digits-40"), **(SMALL | changes))
    run.train(setup_run(config, tmp_path / "run"), quiet=True)
    lines = caplog.messages
    assert len(lines) == (expected is not None), lines
    if expected:
        assert re.match(rf"step \d+: .*{expected}", lines[0]) and "\n" not in lines[0]
