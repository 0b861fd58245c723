"""torch's fused optimizer, which reads CPU memory in order, updates every network like the unfused one."""

import re

import pytest
import torch
from torch.nn import Parameter

from engine.training import optimizers
from tests.engine.training.noise_training import CPU, NoiseTraining
from tests.processes import train

BACKBONES = ("resnet10t", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224", "regnetx_002")
NETWORKS = {
    "narrow": {"width": 8},
    "wide": {"width": 32, "blocks": 3, "scales": 3},
    "shallow": {"blocks": 1, "scales": 1},
    "micro-batches": {"micro_batches": 4},
    "bn split": {"bn": "split", "bn_groups": 2},
    "bn split, micro-batches": {"batch": 16, "bn": "split", "bn_groups": 4, "micro_batches": 2},
    "bn sync": {"bn": "sync"},
    "statistics of the pool": {"bn_stats": "pool"},
    "joint guess": {"guess_pass": "joint"},
    "interpolated logits": {"interpolate_logits": True, "mixup_alpha": 0.0},
    "fp64": {"precision": "fp64"},
    "bf16": {"precision": "bf16"},
    **{name: {"network": f"timm:{name}", "k": 1} for name in BACKBONES},
    "timm, micro-batches": {"network": f"timm:{BACKBONES[0]}", "k": 1, "micro_batches": 2},
}


class Compared(optimizers._AdamW):
    """Compares each update with that of the unfused optimizer, which has its own moments."""

    def __init__(self, groups, lr, device):
        super().__init__(groups, lr=lr, betas=optimizers.BETAS, fused=True)
        self.own = [p for group in groups for p in group["params"]]
        self.copies = [Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in self.own]
        copies = iter(self.copies)
        unfused = [group | {"params": [next(copies) for _ in group["params"]]} for group in groups]
        self.unfused = torch.optim.AdamW(unfused, lr=lr, betas=optimizers.BETAS, fused=False, foreach=True)
        self.lr, self.updates = lr, 0

    def step(self, closure=None):
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.own, strict=True):
                copy.copy_(parameter)
                gradient = parameter.grad
                copy.grad = None if gradient is None else gradient.clone(memory_format=torch.contiguous_format)
        self.unfused.step()
        super().step()
        for copy, parameter in zip(self.copies, self.own, strict=True):
            # A wrong element would differ by about the learning rate.
            torch.testing.assert_close(parameter, copy, atol=1e-3 * self.lr, rtol=1e-6)
        self.updates += 1


@pytest.mark.parametrize(
    "changes",
    # Compiling takes a minute.
    [*NETWORKS.values(), pytest.param({"mode": "compile"}, marks=pytest.mark.long)],
    ids=[*NETWORKS, "compiled"],
)
def test_fused_updates_equal_unfused_ones(changes, tiny, monkeypatch):
    if "network" in changes:
        pytest.importorskip("timm", reason="needs timm")
    config = tiny(**changes)
    monkeypatch.setitem(optimizers.OPTIMIZERS, "torch", Compared)
    precision = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(config.precision, torch.float32)
    side = 32 if config.backbone else 8
    training = NoiseTraining(config, precision, side, compiled=config.mode == "compile")
    training.advance(3)
    assert training.state.optimizer.updates == 3


@pytest.mark.parametrize("flags", [(), ("--micro-batches", 4), ("--bn", "sync"), ("--network", "timm:resnet10t")])
def test_fused_updates_of_two_ranks_equal_unfused_ones(flags, tmp_path):
    """Gradients are views of DistributedDataParallel's buckets, which are made anew after the first step."""
    if "timm" in str(flags):
        pytest.importorskip("timm", reason="needs timm")
    sizes = ("--steps", 3, "--eval-every", 3, "--log-every", 3, "--batch", 8, "--width", 8, "--k", 1)
    patch = {"engine.training.state.OPTIMIZERS": {"torch": Compared}}
    train(tmp_path / "run", 2, "--device", "cpu", "--quiet", *sizes, *flags, patch=patch)


def optimizer_of(parameter):
    return optimizers.OPTIMIZERS["torch"]([{"params": [parameter], "weight_decay": 0.1}], 0.1, CPU)


def test_a_gradient_or_a_moment_in_another_order_is_an_error():
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    parameter, contiguous = Parameter(weight), torch.randn(8, 4, 3, 3)
    optimizer, before = optimizer_of(parameter), parameter.detach().clone()
    parameter.grad = contiguous
    with pytest.raises(AssertionError, match=re.escape("grad of a parameter (8, 4, 3, 3) has strides (36, 9, 3, 1)")):
        optimizer.step()
    assert torch.equal(parameter, before)
    parameter.grad = contiguous.to(memory_format=torch.channels_last)
    optimizer.step()
    optimizer.state[parameter]["exp_avg"] = torch.zeros(8, 4, 3, 3)
    with pytest.raises(AssertionError, match="internal error: exp_avg of a parameter"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(8, 4, 1, 1), (8, 1, 3, 3), (1, 4, 1, 1)])
def test_strides_of_dimensions_of_one_element_do_not_count(shape):
    parameter = Parameter(torch.randn(shape).to(memory_format=torch.channels_last))
    parameter.grad = torch.randn(shape)
    optimizer_of(parameter).step()


def test_torch_updates_wrong_elements_without_the_check():
    """Torch 2.15; once this fails, the check can go."""
    weight, gradient = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(8, 4, 3, 3)
    updated = []
    for options in ({"fused": True}, {"foreach": True}):
        parameter = Parameter(weight.clone())
        parameter.grad = gradient.clone()
        torch.optim.AdamW([parameter], lr=0.1, **options).step()
        updated.append(parameter.detach())
    assert (updated[0] - updated[1]).abs().max() > 0.1
