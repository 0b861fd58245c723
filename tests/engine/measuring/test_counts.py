"""Which step a record of `bench count` is of."""

import dataclasses

import pytest

from engine.config.config import COUNTED
from engine.config.presets import preset
from engine.measuring.counts import counted


def found(precision="bf16", images=(32, 10), **changes):
    return counted(dataclasses.replace(preset("cifar10-250"), **changes), precision, images)


def test_a_step_is_looked_up_by_what_it_launches():
    row = found()
    assert row["launches"] == 484 and row["k"] == 8 and row["batch"] == 64
    assert found(seed=3, steps=7, lr=0.1, device="cpu", eval_every=9) == row


@pytest.mark.parametrize("changes", [dict(micro_batches=2), dict(width=64), dict(k=5), dict(mixup_alpha=0.5)])
def test_another_step_is_not_taken_for_it(changes):
    assert found(**changes) is None
    assert "micro_batches" in changes or changes.keys() <= COUNTED


def test_precision_and_images_belong_to_it():
    assert found("fp16") is None and found(images=(96, 10)) is None
