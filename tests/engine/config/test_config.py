"""Presets, and one clear error line for every invalid value."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from engine.commands.main import main
from engine.config.checks import validate
from engine.config.config import Config, changed_fields, config_json, load_config
from engine.config.presets import PRESETS, preset
from engine.errors import UserError
from engine.models.build import make_network
from engine.runs.setup import setup_run
from engine.studies.reproduce import check_seeds
from engine.training.feed import plan_spec
from pipelines.data.datasets import digits


def test_every_preset_is_valid_and_carries_its_name():
    for name, config in PRESETS.items():
        validate(config)
        assert config.preset == name


def test_defaults_match_the_paper():
    c = Config()
    assert (c.batch, c.k, c.temperature, c.mixup_alpha) == (64, 8, 0.5, 0.75)
    assert (c.w_u, c.w_u1, c.w_rot, c.ramp_kimg) == (1.5, 0.5, 0.5, 1024)
    assert (c.lr, c.weight_decay, c.ema_decay, c.marginal_decay, c.bn_momentum) == (0.002, 0.02, 0.999, 0.999, 0.001)
    assert (c.scales, c.blocks, c.width, c.bn) == (3, 4, 32, "joint")


def test_supervised_presets_change_only_the_method():
    changed = changed_fields(preset("digits-40"), preset("digits-40-supervised"))
    assert {line.split()[0] for line in changed} == {"preset", "method"}


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean digits-40"):
        preset("digit-40")
    with pytest.raises(UserError, match="choose from digits-40, digits-10"):
        preset("zzz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=0), "--k must be at least 1, got 0"),
        (dict(batch=0), "--batch must be at least 1"),
        (dict(steps=-1), "--steps must be at least 1"),
        (dict(width=7), "--width must be at least 8, got 7: .* wrong gradients or crashes on CPUs"),
        (dict(temperature=0.0), "--temperature must be more than 0"),
        (dict(lr=float("nan")), "--lr must be more than 0"),
        (dict(w_u=float("nan")), "--w-u must be at least 0"),
        (dict(seed=2**64), "--seed must be less than"),
        (dict(class_distribution=(0.5, 0.6)), "must be probabilities that sum to 1, got 0.5 0.6"),
        (dict(ema_decay=1.5), "--ema-decay must be between 0 and 1"),
        (dict(dataset="imagenet"), "unknown data set 'imagenet'; choose from digits, .* --data DIR"),
        (dict(dataset="cifar-10"), "unknown data set 'cifar-10'; did you mean cifar10"),
        (dict(lag=23, prefetch=2), "--lag must be at least \\(prefetch \\+ 1\\) \\* view_steps = 24"),
        (dict(bn="split", bn_groups=5), "--bn-groups must be a multiple"),
        (dict(bn="split", bn_groups=2, micro_batches=4), "--bn-groups must be a multiple of the 4 micro-batches"),
        (dict(bn="sync", micro_batches=2), "--bn sync needs all images of a step at once"),
        (dict(micro_batches=0), "--micro-batches must be at least 1"),
        (dict(micro_batches=3), "--batch 16 cannot be shared by 3 micro-batches"),
        (dict(bn="split", bn_groups=8), "at least 4 images per group"),
    ],
)
def test_invalid_values(changes, message):
    with pytest.raises(UserError, match=message):
        validate(dataclasses.replace(preset("digits-40"), **changes))


def test_batch_must_divide_evenly_among_ranks():
    with pytest.raises(UserError, match="cannot be shared by 3 ranks"):
        validate(preset("digits-40"), ranks=3)


def test_micro_batches_divide_evenly_with_at_least_one_per_rank():
    config = dataclasses.replace(preset("digits-40"), micro_batches=2)
    validate(config, ranks=4)
    assert [config.micro_batches_of(ranks) for ranks in (1, 2, 4)] == [2, 2, 4]
    with pytest.raises(UserError, match="--micro-batches must be a multiple of the 2 ranks, got 3"):
        validate(dataclasses.replace(config, batch=12, micro_batches=3), ranks=2)


def test_plans_use_the_configured_ctaugment(tiny):
    data, split = digits(), np.arange(40)
    for ctaugment in ("paper", "code"):
        spec = plan_spec(tiny(ctaugment=ctaugment), data, split)
        assert (spec.ctaugment, spec.side) == (ctaugment, 16)


WHOLE = '{"preset": "digits-40", "dataset": "digits", "seed": 0, "steps": 3}'


def test_configuration_round_trips_through_its_file(tmp_path):
    config = dataclasses.replace(preset("digits-10"), lr=0.0031, seed=7, class_distribution=(0.1,) * 10)
    path = tmp_path / "config.json"
    path.write_text(config_json(config))
    assert load_config(path) == config
    assert changed_fields(config, dataclasses.replace(config, k=4, align=False)) == ["k 2 -> 4", "align True -> False"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "not a JSON object"),
        ("{}", "it lacks dataset, preset, seed, steps"),
        ('{"preset": "digits-40", "seed": 0, "steps": 3}', "it lacks dataset"),
        (WHOLE.replace("}", ', "color": 1}'), "unknown configuration field 'color'"),
        (WHOLE.replace("}", ', "k": "x"}'), "k must be an integer, got 'x'"),
        (WHOLE.replace("}", ', "lr": null}'), "lr must be a number, got None"),
        (WHOLE.replace("}", ', "flip": "no"}'), "flip must be true or false, got 'no'"),
        (WHOLE.replace("3}", f"{'3' * 5000}}}"), "Exceeds the limit"),
        ("[" * 100_000, "maximum recursion depth"),
    ],
)
def test_invalid_configuration_files(tmp_path, text, reason):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"is not a configuration of this version \({reason}"):
        load_config(path)
    with pytest.raises(UserError, match=r"no folder '.*/elsewhere'"):
        load_config(tmp_path / "elsewhere" / "config.json")


def test_every_accepted_seed_has_its_own_weights_and_others_are_refused(tiny, tmp_path, elsewhere):
    def weights(seed):
        return make_network(tiny(seed=seed), 10, torch.device("cpu")).stem.weight

    seeds = (0, 1, 2**31, 2**32 - 1)
    assert not any(torch.equal(weights(one), weights(two)) for one, two in itertools.combinations(seeds, 2))
    assert torch.equal(weights(5), weights(2**32 + 5)), "torch uses 32 bits, hence the limit"
    for split in ("balanced", "paper"):
        setup_run(tiny(seed=2**32 - 1, split=split))
        for resume in (False, True):
            with pytest.raises(UserError, match=r"^--seed must be from 0 to 4294967295, got 4294967296$"):
                setup_run(tiny(seed=2**32, split=split), tmp_path / "new", resume)
    for seed in (2**32, -1):
        with pytest.raises(UserError, match=rf"^--seeds must be from 0 to 4294967295, got {seed}$"):
            check_seeds([0, seed])
        with pytest.raises(SystemExit):
            main(["data", "split", "digits", "--labels", "40", "--seed", str(seed)])


def test_runs_with_larger_seeds_of_earlier_versions_can_be_resumed(tiny, tmp_path):
    (tmp_path / "config.json").write_text(config_json(tiny(seed=2**40)))
    assert setup_run(tiny(seed=2**40), tmp_path, resume=True).resumed
