"""Looking up the record of `bench count` for a step."""

import dataclasses

import pytest

from engine.config.config import COUNTED
from engine.config.presets import preset
from engine.measuring.counts import counted


def found(precision="bf16", images=(32, 10), **changes):
    return counted(dataclasses.replace(preset("cifar10-250"), **changes), precision, images)


def test_lookup_ignores_settings_that_do_not_change_launches():
    count = found()
    assert count["launches"] == 484 and count["k"] == 8 and count["batch"] == 64
    assert found(seed=3, steps=7, lr=0.1, device="cpu", eval_every=9) == count


@pytest.mark.parametrize("changes", [dict(micro_batches=2), dict(width=64), dict(k=5), dict(mixup_alpha=0.5)])
def test_no_record_for_a_different_step(changes):
    assert found(**changes) is None
    assert "micro_batches" in changes or changes.keys() <= COUNTED


def test_no_record_for_another_precision_or_image_size():
    assert found("fp16") is None and found(images=(96, 10)) is None
