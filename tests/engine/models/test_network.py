"""Wide ResNet and batch norm over groups."""

import copy
import math

import pytest
import torch
from torch import nn

from engine.models.batch_norm import BatchNorm
from engine.models.wide_resnet import ResidualBlock, WideResNet
from tests.running_statistics import statistics_of_first_samples


@pytest.mark.parametrize(
    ("scales", "width", "millions"), [(3, 32, 1.47), (4, 32, 5.93), (4, 64, 23.69)], ids=["28-2", "37-2", "37-2w64"]
)
def test_parameter_counts(scales, width, millions):
    count = sum(p.numel() for p in WideResNet(10, scales, 4, width).parameters())
    assert round(count / 1e6, 2) == millions


def test_shapes_strides_and_heads():
    network = WideResNet(7, scales=3, blocks=2, width=8)
    sizes = []
    network.norm.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    logits, rotation_logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and rotation_logits.shape == (2, 4)
    assert sizes == [(2, 32, 8, 8)]
    assert network.stem.out_channels == 16
    assert [block.conv1.stride[0] for block in network.body] == [1, 1, 2, 1, 2, 1]
    assert [block.activate_first for block in network.body] == [True] + [False] * 5


def test_initial_weights():
    network = WideResNet(10, scales=3, blocks=4, width=32, seed=5)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 9000:
            k, _ = module.kernel_size
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (k * k * module.out_channels)), rel=0.05)
        if isinstance(module, nn.Linear):
            expected = math.sqrt(2 / (module.in_features + module.out_features))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.15)
            assert not module.bias.any()
    same, other = WideResNet(10, seed=5).state_dict(), WideResNet(10, seed=6).state_dict()
    assert all(torch.equal(same[name], value) for name, value in network.state_dict().items())
    assert not torch.equal(other["stem.weight"], same["stem.weight"])


def test_running_statistics_of_a_converted_copy():
    network = WideResNet(4, scales=1, blocks=1, width=16)
    before = network.running_statistics()
    other = copy.deepcopy(network).double()
    other.norm.running_mean.fill_(3.0)
    assert torch.equal(network.running_statistics(), before)
    assert other.running_statistics().dtype == torch.float64
    assert (other.running_statistics() == 3).sum() == 16


@pytest.mark.parametrize("bn", [(None, False), (2, False)], ids=["joint", "split"])
def test_a_block_keeps_its_input(bn):
    """The activation overwrites the result of batch norm, which must not be the block's input."""
    block = ResidualBlock(16, 16, 1, False, 0.1, *bn)
    x = torch.randn(4, 16, 6, 6)
    for training in (True, False):
        kept = x.clone()
        block.train(training)(x, track=False).sum().backward()
        assert torch.equal(x, kept)


@pytest.mark.parametrize("inputs", [3, 8, 16])
@pytest.mark.parametrize("side", [7, 8])
def test_the_shortcut_is_a_strided_convolution(inputs, side):
    block = ResidualBlock(inputs, 20, 2, False, 0.1, None, False).double()
    nn.init.zeros_(block.conv2.weight)  # The output is that of the shortcut.
    x = torch.randn(2, inputs, side, side, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("oi,nihw->nohw", block.shortcut.weight[..., 0, 0], x[:, :, 0::2, 0::2])
    assert expected.shape == (2, 20, 4, 4)
    torch.testing.assert_close(block(x, track=False), expected)


def test_hooks_of_a_trained_network_see_what_layers_return():
    network, seen, gradients = WideResNet(3, 1, 2, 16).eval(), [], []
    for layer in (network.body[0].conv2, network.body[1].norm2, network.norm):
        layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
        layer.register_full_backward_hook(lambda *arguments: gradients.append(arguments))
    images = torch.randn(2, 3, 8, 8)
    network(images)[0].sum().backward()
    with torch.no_grad():
        network(images)
    assert len(seen) == 6 and len(gradients) == 3
    assert all(torch.equal(output, before) for output, before in seen)


def test_one_pass_over_groups_equals_a_pass_per_group():
    """Compares outputs, gradients and running statistics."""
    torch.manual_seed(0)
    grouped, single = BatchNorm(5, 0.1, group_size=4), BatchNorm(5, 0.1, None)
    with torch.no_grad():
        for p in grouped.parameters():
            p.normal_()
        single.load_state_dict(grouped.state_dict())
    x = torch.randn(12, 5, 3, 3) * 3 + 1
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn_like(x)
    out = grouped(a, True)
    parts = [single(part, False) for part in b.split(4)]
    torch.testing.assert_close(out, torch.cat(parts), atol=1e-5, rtol=1e-5)
    (out * weights).sum().backward()
    (torch.cat(parts) * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grouped.weight.grad, single.weight.grad, atol=1e-4, rtol=1e-5)

    groups = x.view(3, 4, 5, 3, 3)
    mean = groups.mean((1, 3, 4)).mean(0)
    var = groups.var((1, 3, 4)).mean(0)
    torch.testing.assert_close(grouped.running_mean, 0.1 * mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grouped.running_var, 0.9 + 0.1 * var, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group_size", [None, 4])
def test_passes_without_tracking_keep_the_running_statistics(group_size):
    network = WideResNet(3, 2, 1, 8, group_size=group_size)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(torch.randn(8, 3, 8, 8), track=False)
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    network(torch.randn(8, 3, 8, 8))
    assert not any(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


@pytest.mark.parametrize("group_size", [None, 2, 4])
def test_running_statistics_of_the_first_samples(group_size):
    """Outputs and gradients stay bit-identical to a pass in which all samples update the running statistics."""
    network = WideResNet(3, 2, 1, 8, bn_momentum=0.1, group_size=group_size).double()
    images = torch.randn(12, 3, 8, 8, dtype=torch.float64) * torch.linspace(0.2, 3, 12)[:, None, None, None]
    images = images.contiguous(memory_format=torch.channels_last)
    expected, of_all = (statistics_of_first_samples(network, images, first, 0.1) for first in (8, 12))
    results = []
    for first, statistics in ((None, of_all), (12, of_all), (8, expected)):
        one = copy.deepcopy(network)
        logits, rotation_logits = one(images, stats_samples=first)
        (logits.square().sum() + rotation_logits.sum()).backward()
        torch.testing.assert_close(one.running_statistics(), statistics, atol=1e-12, rtol=1e-12)
        results.append([logits, rotation_logits, *(p.grad for p in one.parameters())])
    assert (expected - of_all).abs().max() > 1e-3
    for with_all, with_first in zip(results[0], results[2], strict=True):
        assert torch.equal(with_all, with_first)
    before = network.running_statistics()
    network(images, track=False, stats_samples=8)
    network.eval()(images, stats_samples=8)
    assert torch.equal(network.running_statistics(), before)


@pytest.mark.parametrize("group_size", [None, 4])
def test_running_statistics_in_half_precision(group_size):
    norm = BatchNorm(5, 1.0, group_size)
    x = (3 * torch.randn(12, 5, 4, 4) + 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x, True, 8).dtype == torch.bfloat16
    groups = x[:8].float().unflatten(0, (-1, group_size or 8))
    torch.testing.assert_close(norm.running_mean, groups.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(norm.running_var, groups.var((1, 3, 4)).mean(0))


@pytest.mark.compiler
@pytest.mark.parametrize("group_size", [None, 4])
def test_compiled_running_statistics_of_the_first_samples(group_size):
    torch._dynamo.reset()
    eager = BatchNorm(8, 0.1, group_size)
    compiled = torch.compile(copy.deepcopy(eager), dynamic=False, fullgraph=True)
    outputs = []
    for norm in (eager, compiled):
        x = torch.randn(12, 8, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = norm(x, True, stats_samples=8)
        out.sin().sum().backward()
        outputs.append([out, x.grad, *norm.buffers()])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_evaluation_uses_the_running_statistics():
    network = WideResNet(3, 2, 1, 8, group_size=4).eval()
    images = torch.randn(6, 3, 8, 8)
    together = network(images)[0]
    alone = torch.cat([network(image[None])[0] for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_zero_channels_change_neither_logits_nor_gradients():
    network = WideResNet(10, scales=2, blocks=1, width=16)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for inputs in (images, torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 5))):
        network.zero_grad()
        logits, rotation_logits = network(inputs, False)
        (logits.square().sum() + rotation_logits.sum()).backward()
        results.append([logits, rotation_logits, network.stem.weight.grad.clone()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
