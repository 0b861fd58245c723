"""The training state: the loss scale in checkpoints, trained parameters, and names of buffers."""

import dataclasses

import pytest
import torch

from engine.config.presets import preset
from engine.method import registry
from engine.method.targets import Targets
from engine.training.state import make_state

CPU = torch.device("cpu")


def state(**changes):
    small = dict(width=8, blocks=1)
    return make_state(dataclasses.replace(preset("digits-40"), **small | changes), 5, CPU, (16, 16))


def test_the_loss_scale_is_restored():
    trained, fresh = state(precision="fp16"), state(precision="fp16")
    trained.scaler.load_state_dict(trained.scaler.state_dict() | {"scale": 1024.0, "_growth_tracker": 7})
    fresh.load_state_dict(trained.state_dict())
    assert fresh.scaler.state_dict() == trained.scaler.state_dict() and fresh.scaler.state_dict()["scale"] == 1024.0


@pytest.mark.parametrize(
    ("changes", "trained"), [({}, True), (dict(w_rot=0.0), False), (dict(method="supervised"), False)]
)
def test_the_rotation_head_is_trained_only_with_the_rotation_task(changes, trained):
    head = state(**changes).network.rotation_head
    assert all(parameter.requires_grad == trained for parameter in head.parameters())


@pytest.mark.parametrize("name", ["step", "network", "optimizer", "scaler"])
def test_buffers_cannot_have_reserved_names(name, monkeypatch):
    class Named(Targets):
        def __init__(self, config, classes, unlabeled_images=0):
            super().__init__(config, classes, unlabeled_images)
            self.register_buffer(name, torch.zeros(()))

    monkeypatch.setitem(registry.TARGETS, "remixmatch", Named)
    with pytest.raises(ValueError, match=f"Named: buffer names {name} are reserved"):
        state()
