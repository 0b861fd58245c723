"""Terms of the loss: presence and weights. tests/engine/training/test_step.py tests their values."""

import dataclasses

import pytest
import torch

from engine.config.presets import preset
from engine.method import losses
from engine.method.losses import TERMS, Samples, Term, ramp_up, total_loss

CLASSES, N = 3, 8


def samples(**changes):
    """Make two samples each of X', U', u_1 and rotated u_1."""
    rng = torch.Generator().manual_seed(0)
    shares = torch.zeros(3, N)
    for group in range(3):
        shares[group, 2 * group : 2 * group + 2] = 0.5
    rotation_shares = torch.tensor([0.0] * 6 + [0.5] * 2)
    targets = torch.rand(N, CLASSES, generator=rng).softmax(-1)
    logits, rotation_logits = torch.randn(N, CLASSES, generator=rng), torch.randn(N, 4, generator=rng)
    config = dataclasses.replace(preset("digits-40"), **changes)
    return Samples(config, logits, rotation_logits, targets, torch.arange(N) % 4, shares, rotation_shares)


def values(batch, ramp):
    loss, terms = total_loss(batch, ramp)
    assert torch.equal(loss, terms[0])
    return dict(zip(losses.LOSSES, terms.tolist(), strict=True))


def test_the_ramp_applies_to_loss_u_and_loss_u1():
    terms = values(samples(), torch.tensor(0.25))
    ramped = 0.25 * (1.5 * terms["loss_u"] + 0.5 * terms["loss_u1"])
    assert terms["loss"] == pytest.approx(terms["loss_x"] + ramped + 0.5 * terms["loss_rot"])
    config = preset("cifar10-250")  # 1024 kimg, 64 labeled images per step.
    assert [ramp_up(config, torch.tensor(step)).item() for step in (0, 4096, 16384, 20000)] == [0, 0.25, 1, 1]


@pytest.mark.parametrize("name", ["w_u", "w_u1", "w_rot"])
def test_a_term_with_weight_0_is_0(name):
    term = {"w_u": "loss_u", "w_u1": "loss_u1", "w_rot": "loss_rot"}[name]
    whole, without = values(samples(), torch.tensor(1.0)), values(samples(**{name: 0.0}), torch.tensor(1.0))
    assert whole[term] > 0 == without[term]
    weight = getattr(preset("digits-40"), name)
    assert without["loss"] == pytest.approx(whole["loss"] - weight * whole[term])


@pytest.mark.parametrize(("unlabeled", "present"), [(True, False), (False, True)])
def test_supervised_training_uses_only_terms_of_labeled_samples(unlabeled, present, monkeypatch):
    extra = Term(lambda batch: (batch.shares[0] * batch.log_p.exp().amax(-1)).sum(), lambda c: 2.0, unlabeled=unlabeled)
    monkeypatch.setitem(TERMS, "loss_extra", extra)
    monkeypatch.setattr(losses, "LOSSES", ("loss", *TERMS))
    terms = values(samples(method="supervised"), torch.tensor(1.0))
    assert terms["loss_u"] == terms["loss_u1"] == terms["loss_rot"] == 0
    assert (terms["loss_extra"] > 0) == present
    assert terms["loss"] == pytest.approx(terms["loss_x"] + 2 * terms["loss_extra"])
