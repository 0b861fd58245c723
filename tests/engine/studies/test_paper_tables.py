"""Tables of `remixmatch reproduce`: order of the jobs, flags, and scaled steps."""

import dataclasses
import math

import pytest

from engine.config.methods import ABLATIONS, METHODS
from engine.config.scaling import scaled
from engine.studies.paper_tables import TABLES, compared_with
from tests.engine.studies.made_jobs import entries

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("name", TABLES)
def test_the_first_seed_of_everything_precedes_the_second_of_anything(name):
    found = entries(name, seeds=(4, 7))
    assert [entry.seed for entry in found] == [4] * (len(found) // 2) + [7] * (len(found) // 2)
    first = found[: len(TABLES[name].presets)]
    assert {entry.row for entry in first} <= {"remixmatch", "remixmatch-k1"}, "the full method comes first"
    assert [entry.preset for entry in first] == list(TABLES[name].presets)
    assert len({entry.job.name for entry in found}) == len(found)
    for entry in found:
        assert entry.job.config == entry.base and entry.base.seed == entry.seed
        assert entry.job.name.startswith(f"{entry.preset}-{entry.row}-seed{entry.seed}-")


def test_tables_have_the_methods_and_seeds_of_the_paper():
    assert len(entries("cifar10")) == len(entries("svhn")) == 3 * 6 * 5
    assert {entry.row for entry in entries("digits")} == set(METHODS)
    assert [entry.seed for entry in entries("digits", rows=("uda",))] == [0, 1, 2, 3, 4]
    ablations = {entry.row for entry in entries("ablation")}
    assert ablations == {"remixmatch", *ABLATIONS} - {"k=8"} and {entry.seed for entry in entries("ablation")} == {3}
    small = entries("ablation", presets=("fashion-100-small",), seeds=(1, 2))
    assert {entry.row for entry in small} == {"remixmatch", *ABLATIONS} - {"k=2"}, "K is 2 there"
    mixmatch = entries("svhn", rows=("mixmatch",), seeds=(1,))
    assert {entry.job.config.w_u for entry in mixmatch} == {250.0}


def test_the_table_of_unequal_classes():
    found = entries("imbalance")
    assert len(found) == 2 * 5 * 5 and {entry.seed for entry in found} == {1, 2, 3, 4, 5}
    kinds = {each.row: (each.base.method, each.base.marginal, each.base.align) for each in found}
    assert kinds == {
        "remixmatch": ("remixmatch", "running", True), "marginal=labels": ("remixmatch", "labels", True),
        "marginal=uniform": ("remixmatch", "uniform", True), "no-alignment": ("remixmatch", "running", False),
        "fixmatch": ("fixmatch", "running", False),
    }  # fmt: skip
    alike = [entry.job.config for entry in entries("imbalance", presets=("fashion-100-small",), seeds=(0,))]
    # N_1 = 200 labels of the first class.
    for entry in found:
        config = entry.job.config
        counts = [int(200 * config.imbalance ** (-k / 9) + 1e-9) for k in range(10)]
        assert config.labels == sum(counts) and counts[-1] == 200 / config.imbalance
        assert config.class_ratios.unlabeled == config.class_ratios.labeled == config.imbalance
        other = dataclasses.replace(config, labels=100, imbalance=1.0, preset="fashion-100-small", seed=0)
        assert other in alike, "all else is as with equal classes"


def test_the_tables_over_k():
    """At equal numbers of trained samples a run with a larger K has fewer steps and shorter averages."""
    steps, samples = entries("k", seeds=(0,)), entries("k-samples", seeds=(0,))
    assert [each.row for each in steps] == [each.row for each in samples]
    assert {(each.base.method, each.base.k) for each in steps} == {
        (method, k) for method in ("remixmatch", "fixmatch", "freematch", "softmatch") for k in (1, 2, 4, 8)
    }
    assert {each.base.steps for each in steps} == {2500}
    found = {each.row: each.base for each in samples}
    # Labeled images and mu K views of the unlabeled ones; ReMixMatch also trains on u_weak, u_1 and the rotated u_1.
    for name, k, trained, of_one in (("fixmatch", 8, 57, 8), ("softmatch", 4, 29, 8), ("remixmatch", 8, 12, 5)):
        config = found[f"{name}-k{k}"]
        assert config.steps == round(2500 * of_one / trained) and found[f"{name}-k1"].steps == 2500
        spans = [1 / (1 - one.ema_decay) / one.steps for one in (config, found[f"{name}-k1"])]
        assert spans[0] == pytest.approx(spans[1], rel=0.1)
    assert compared_with("freematch-k8") == "freematch-k1" and compared_with("no-alignment") == "remixmatch"


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("scale", [0.01, 0.002])
def test_a_rehearsal_has_the_same_number_of_evaluations(name, scale):
    for entry in entries(name, steps_scale=scale, seeds=(1,)):
        config, base = entry.job.config, entry.base
        assert config.steps == max(1, round(base.steps * scale)) and config.ramp_kimg == base.ramp_kimg * scale
        evaluations = math.ceil(config.steps / config.eval_every)
        assert evaluations >= min(20, config.steps)
        changed = {
            "steps", "ramp_kimg", "dash_epoch_kimg", "eval_every", "log_every", "checkpoint_every", "ema_decay",
            "threshold_decay", "bn_momentum",
        }  # fmt: skip
        assert dataclasses.replace(config, **{name: getattr(base, name) for name in changed}) == base
        assert min(config.eval_every, config.log_every, config.checkpoint_every) >= 1
    assert scaled(base, 1e-9).steps == 1 and scaled(base, 1) is base


def test_averages_of_a_rehearsal_cover_the_same_share_of_it():
    """After a tenth of the steps, the initial value has the same weight in an average."""

    def config_of(scale, *flags):
        (entry,) = entries("digits", *flags, rows=("remixmatch",), seeds=(1,), steps_scale=scale)
        return entry.job.config

    left, flags = {}, ("--steps", "8000", "--ema-decay", "0.999", "--bn-momentum", "0.01")
    for config in (config_of(1, *flags), config_of(0.25, *flags)):
        average = running = 1.0
        for _ in range(config.steps // 10):
            average *= config.ema_decay
            running -= config.bn_momentum * running
        left[config.steps] = average, running
    assert left[2000] == pytest.approx(left[8000], rel=1e-9) and left[8000][0] == pytest.approx(0.4491, abs=1e-4)
    assert config_of(0.25, "--ema-decay", "0").ema_decay == 0


def test_flags_apply_to_every_job_before_steps_are_scaled():
    (plain,) = entries("digits", seeds=(1,), rows=("fixmatch",))
    (entry,) = entries("digits", "--batch", "4", "--steps", "1000", seeds=(1,), rows=("fixmatch",), steps_scale=0.1)
    assert entry.job.config.batch == 4 and entry.job.config.steps == 100 and entry.base == plain.base
    assert entry.job.config.mu == 7 and entry.job.digest != plain.job.digest
