"""Configurations of small runs."""

import dataclasses

import pytest

from engine.config.presets import preset


@pytest.fixture
def tiny():
    """Make small configurations, such as `tiny(k=3)`: a network of a few hundred kilobytes, batches of 8."""

    def make(**changes):
        small = dict(batch=8, k=2, width=8, steps=4, eval_every=2, log_every=1, checkpoint_every=2, device="cpu")
        return dataclasses.replace(preset("digits-40"), **(small | changes))

    return make
