"""The fused forward pass of a Wide ResNet and today's, in bfloat16, against a network written in double precision.

The reference is a loop over layers: batch norm by its definition, leaky ReLU, and convolutions of torch, in float64.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.models import fused
from engine.models.batch_norm import BatchNorm
from engine.models.fused import BlockTilings, Pass
from engine.models.wide_resnet import WideResNet
from kernels.norm_act_conv import Tilings

SAMPLES, FIRST, SIDE, MOMENTUM = 32, 16, 16, 0.1
OURS = Tilings((64, 4), (64, 2), (4,))
FORMS = {
    "all": lambda number: OURS,
    "gradients by the library": lambda number: Tilings((64, 4)),
    "input gradient": lambda number: Tilings((64, 4), (64, 2)),
    "weight gradient": lambda number: Tilings((64, 4), (), (4,)),
    "every second": lambda number: OURS if number % 2 else None,
    "every other second": lambda number: None if number % 2 else OURS,
    "none": lambda number: None,
}


def tilings(network, choose, mode="train", samples=SAMPLES):
    """Return tilings for every layer that the operator supports; `choose` maps a layer's number to them."""
    blocks = []
    for number, shapes in enumerate(fused.shapes(network, samples, SIDE, SIDE)):
        conv1, conv2 = choose(2 * number), choose(2 * number + 1)
        blocks.append(BlockTilings(shapes.conv1 and conv1, shapes.conv2 and conv2, shapes.shortcut and conv1))
    return {Pass(mode, samples, SIDE, SIDE): tuple(blocks)}


def make(width=16, scales=2, blocks=2):
    """Return a network with random batch norms, images, and weights for a loss of its logits."""
    rng = torch.Generator().manual_seed(3)
    network = WideResNet(5, scales, blocks, width, bn_momentum=MOMENTUM).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, BatchNorm):
                module.weight.uniform_(0.5, 1.5, generator=rng)
                module.bias.normal_(0, 0.3, generator=rng)
                module.running_mean.normal_(0, 0.3, generator=rng)
                module.running_var.uniform_(0.5, 2, generator=rng)
    scales_of_images = torch.linspace(0.5, 2, SAMPLES)[:, None, None, None]  # So that the first samples differ.
    images = torch.randn(SAMPLES, 3, SIDE, SIDE, generator=rng) * scales_of_images
    images = images.to(torch.bfloat16, memory_format=torch.channels_last)
    return network, images, [torch.randn(SAMPLES, n, generator=rng) for n in (5, 4)]


class Exact:
    """The network in float64, from the description in Oliver et al. (2018)."""

    def __init__(self, network, training, first, momentum=MOMENTUM):
        self.p = {name: value.detach().double().requires_grad_() for name, value in network.named_parameters()}
        self.buffers = {name: value.double() for name, value in network.named_buffers()}
        self.body = [
            (block.conv1.stride[0], block.activate_first, block.shortcut is not None) for block in network.body
        ]
        self.training, self.first, self.momentum = training, first, momentum

    def act(self, x, name):
        mean, var = (self.buffers[f"{name}.running_{each}"] for each in ("mean", "var"))
        if self.training:
            some = x[: self.first].detach().transpose(0, 1).flatten(1)
            self.buffers[f"{name}.running_mean"] = mean.lerp(some.mean(1), self.momentum)
            self.buffers[f"{name}.running_var"] = var.lerp(some.var(1), self.momentum)
            mean = x.mean((0, 2, 3))
            var = (x - mean[:, None, None]).square().mean((0, 2, 3))
        normal = (x - mean[:, None, None]) / (var[:, None, None] + 1e-3).sqrt()
        z = normal * self.p[f"{name}.weight"][:, None, None] + self.p[f"{name}.bias"][:, None, None]
        return torch.where(z > 0, z, 0.1 * z)

    def __call__(self, images):
        x = F.conv2d(images.double(), self.p["stem.weight"], padding=1)
        for number, (stride, activate_first, has_shortcut) in enumerate(self.body):
            name = f"body.{number}"
            a = self.act(x, f"{name}.norm1")
            y = F.conv2d(a, self.p[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(self.act(y, f"{name}.norm2"), self.p[f"{name}.conv2.weight"], padding=1)
            skip = a if activate_first else x
            if has_shortcut:
                skip = F.conv2d(skip, self.p[f"{name}.shortcut.weight"], stride=stride)
            x = skip + y
        features = self.act(x, "norm").mean((2, 3))
        heads = ("head", "rotation_head")
        return [F.linear(features, self.p[f"{head}.weight"], self.p[f"{head}.bias"]) for head in heads]


def train(network, images, weights, first, dtype=torch.bfloat16, compiler=lambda network: network):
    """Return logits, gradients and running statistics of a training pass of a copy of the network."""
    one = copy.deepcopy(network)
    with torch.autocast("cpu", dtype):
        logits = compiler(one)(images.to(dtype), stats_samples=first)
    sum((each.float() * w).sum() for each, w in zip(logits, weights, strict=True)).backward()
    results = {f"logits {n}": each.detach() for n, each in enumerate(logits)}
    results |= {f"gradient of {name}": p.grad for name, p in one.named_parameters()}
    return results | {name: value for name, value in one.named_buffers() if "running" in name}


def train_exactly(network, images, weights, first):
    """Like `train`, in float64."""
    exact = Exact(network, True, first or SAMPLES)
    logits = exact(images)
    sum((each * w).sum() for each, w in zip(logits, weights, strict=True)).backward()
    results = {f"logits {n}": each.detach() for n, each in enumerate(logits)}
    return results | {f"gradient of {name}": p.grad for name, p in exact.p.items()} | exact.buffers


def error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("form", "width", "first"),
    [
        *((form, 32, FIRST) for form in FORMS),
        ("all", 16, None),  # Without a shortcut in the first block.
        ("every second", 16, None),
        ("every other second", 32, None),
    ],
)
def test_a_fused_training_pass_is_as_exact_as_todays(form, first, width):
    network, images, weights = make(width)
    exact = train_exactly(network, images, weights, first)
    today = train(network, images, weights, first)
    network.tilings = tilings(network, FORMS[form])
    results = train(network, images, weights, first)
    assert results.keys() == today.keys() == exact.keys()
    for name, value in results.items():
        allowed = 1.3 * error(today[name], exact[name]) + (1e-3 if "running" in name else 2e-2)
        assert error(value, exact[name]) < allowed, name
        assert value.dtype == today[name].dtype and value.stride() == today[name].stride(), name
    assert any(not torch.equal(value, today[name]) for name, value in results.items())


def test_kernels_add_gradients_where_no_shortcut_does():
    """Of the input gradients of four blocks, two with a shortcut: with that of the statistics, of a skip connection."""
    network, images, weights = make(32)
    network.tilings = tilings(network, FORMS["all"])
    seen = []

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.remixmatch.norm_act_conv_input_grad.default:
                skip_grad, y = (*args[9:11], None, None)[:2]
                seen.append((y is not None, skip_grad is not None))
            return function(*args, **(kwargs or {}))

    with See():
        train(network, images, weights, FIRST)
    # In the order of the backward pass. The first block's shortcut is last or last but one.
    assert seen[:6] == [(False, False), (True, True), (True, False), (True, False), (False, False), (True, True)]
    assert seen[6] == (True, False) and sorted(seen[7:]) == [(False, False), (True, False)]


def test_running_variances_are_unbiased_and_of_the_first_samples():
    """With so few pixels that the bias, 1/127, exceeds the rounding."""
    network = WideResNet(5, 1, 1, 32, bn_momentum=1.0).to(memory_format=torch.channels_last)
    ours = Tilings((16, 4))
    network.tilings = {Pass("train", 4, 8, 8): (BlockTilings(ours, ours, ours),)}
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images *= torch.tensor([1, 2, 3, 4])[:, None, None, None]
    exact = Exact(network, True, 2, momentum=1.0)
    exact(images.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        network(images.to(torch.bfloat16, memory_format=torch.channels_last), stats_samples=2)
    for name, value in network.named_buffers():
        if name.endswith("var"):
            torch.testing.assert_close(value.double(), exact.buffers[name], rtol=5e-3, atol=0)


@pytest.mark.parametrize("form", ["all", "every second", "none"])
def test_evaluation_uses_running_statistics(form):
    network, images, _ = make(32)
    network.eval()
    exact = Exact(network, False, None)(images)
    results = []
    for chosen in ({}, tilings(network, FORMS[form], "eval")):
        network.tilings = chosen
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results.append(network(images))
    for todays, ours, reference in zip(*results, exact, strict=True):
        assert error(ours, reference.detach()) < 1.3 * error(todays, reference.detach()) + 5e-3
        assert not torch.equal(todays, ours)


def test_a_pass_for_label_guessing_keeps_the_running_statistics():
    network, images, _ = make(32)
    before = network.running_statistics()
    network.tilings = tilings(network, FORMS["all"], "guess")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = network(images, track=False)[0]
        assert torch.equal(network.running_statistics(), before)
        network.tilings = {}
        todays = network(images, track=False)[0]
    assert error(ours, todays.double()) < 0.05 and not torch.equal(ours, todays)


def test_other_passes_are_todays_bit_for_bit():
    """Other batch sizes, full precision, and gradients in evaluation mode."""
    network, images, _ = make(32)
    plain = copy.deepcopy(network)
    network.tilings = tilings(network, FORMS["all"]) | tilings(network, FORMS["all"], "eval")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images[:8])[0], plain(images[:8])[0])
    assert torch.equal(network(images.float())[0], plain(images.float())[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.eval()(images)[0], plain.eval()(images)[0])
    assert network.state_dict().keys() == plain.state_dict().keys()


def test_samples_with_running_statistics_of_their_own_must_be_whole_tiles():
    network, images, weights = make(32)
    network.tilings = tilings(network, FORMS["all"])
    with pytest.raises(AssertionError, match="for other running statistics"):
        train(network, images, weights, 6)


def test_float16_with_a_loss_scaler():
    network, images, weights = make(32, blocks=1)
    exact, scaled = train_exactly(network, images, weights, None), [128 * w for w in weights]
    errors = []
    for chosen in ({}, tilings(network, FORMS["all"])):
        network.tilings = chosen
        gradients = train(network, images, scaled, None, torch.float16)
        errors.append([error(gradients[name] / 128, exact[name]) for name in exact if "gradient" in name])
    assert all(ours < 1.5 * todays + 0.01 for todays, ours in zip(*errors, strict=True)), errors
    assert max(errors[1]) < 0.1


def test_shapes_are_those_of_the_convolutions():
    network, images, _ = make(32, scales=3)
    seen = {}

    def see(module, arguments, output):
        seen[module] = (*arguments[0].shape, module.out_channels, module.kernel_size[0], module.stride[0])

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(see)
    with torch.no_grad():
        network(images.float())
    for block, shapes in zip(network.body, fused.shapes(network, SAMPLES, SIDE, SIDE), strict=True):
        assert shapes.conv1 == seen[block.conv1] and shapes.conv2 == seen[block.conv2]
        assert (shapes.shortcut is not None) == block.activate_first
        assert not shapes.shortcut or shapes.shortcut == seen[block.shortcut]
    odd = fused.shapes(network, SAMPLES, 15, 16)
    assert odd[0].conv1 and odd[2].conv1 is None and odd[2].conv2.height == 8, (
        "the operator has no odd sides and strides"
    )


@pytest.mark.parametrize("form", ["all", "every second"])
def test_compiled_passes_are_as_exact_as_eager_ones(form):
    network, images, weights = make(32, scales=1, blocks=1)
    network.tilings = tilings(network, FORMS[form])
    exact = train_exactly(network, images, weights, FIRST)
    eager = train(network, images, weights, FIRST)
    compiled = train(
        network, images, weights, FIRST, compiler=partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    for name, value in compiled.items():
        assert error(value, exact[name]) < 1.3 * error(eager[name], exact[name]) + 2e-2, name
