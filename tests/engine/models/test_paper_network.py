"""Wide ResNet against a second implementation, written from the paper in plain functions and double precision.

It uses nothing of the engine. Weights are passed by their names in the `state_dict` of the module under test.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from engine.models.wide_resnet import WideResNet

SLOPE = 0.1  # Of leaky ReLU.
EPSILON, MOMENTUM = 1e-3, 0.001  # Of batch norm and of its running statistics.
STEM = 16  # Channels of the first convolution.
CLASSES, ROTATIONS = 10, 4


def layout(scales, blocks, width):
    """Return (input channels, output channels, stride) of the residual blocks in order."""
    listed, inputs = [], STEM
    for group in range(scales):
        for block in range(blocks):
            outputs = width * 2**group
            listed.append((inputs, outputs, 2 if group and not block else 1))
            inputs = outputs
    return listed


class PlainNetwork:
    """Forward pass of a Wide ResNet with 3x3 residual blocks.

    Args:
        weights: Tensors by their names in WideResNet's state_dict. Running statistics change in place.
        blocks: The result of `layout`.
        training: Whether batch norm uses the statistics of the batch and updates the running statistics.
    """

    def __init__(self, weights, blocks, training):
        self.weights, self.blocks, self.training = weights, blocks, training

    def __call__(self, images):
        """Map (N, 3, H, W) to (N, L) class logits and (N, 4) rotation logits."""
        x = self.convolve(images, "stem", 1)
        for number, (inputs, outputs, stride) in enumerate(self.blocks):
            name = f"body.{number}."
            activated = self.activate(x, name + "norm1")
            residual = self.convolve(activated, name + "conv1", stride)
            residual = self.convolve(self.activate(residual, name + "norm2"), name + "conv2", 1)
            # The very first block activates before it branches, so its shortcut is activated, too.
            shortcut = activated if number == 0 else x
            if inputs != outputs:
                shortcut = self.convolve(shortcut, name + "shortcut", stride)
            x = shortcut + residual
        features = self.activate(x, "norm").mean(3).mean(2)
        return tuple(
            features @ self.weights[head + ".weight"].T + self.weights[head + ".bias"]
            for head in ("head", "rotation_head")
        )

    def convolve(self, x, name, stride):
        """Convolve without bias, padded such that stride 1 keeps the size."""
        kernel = self.weights[name + ".weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def activate(self, x, name):
        """Apply batch norm, written out, and leaky ReLU."""
        running_mean, running_var = (self.weights[f"{name}.running_{which}"] for which in ("mean", "var"))
        mean, var = running_mean, running_var
        if self.training:
            mean = x.mean((0, 2, 3))
            var = (x - mean[:, None, None]).square().mean((0, 2, 3))
            count = x.numel() // x.shape[1]
            with torch.no_grad():
                running_mean += MOMENTUM * (mean - running_mean)
                running_var += MOMENTUM * (var * count / (count - 1) - running_var)
        normalized = (x - mean[:, None, None]) / (var[:, None, None] + EPSILON).sqrt()
        scaled = (
            normalized * self.weights[name + ".weight"][:, None, None] + self.weights[name + ".bias"][:, None, None]
        )
        return torch.where(scaled > 0, scaled, SLOPE * scaled)


@pytest.fixture(params=[(3, 4, 8), (4, 2, 8), (1, 1, 16), (2, 1, 20)], ids=str)
def shape(request):
    """Number of groups, blocks per group, and width. In (1, 1, 16) the first block has no shortcut convolution."""
    return request.param


def networks(shape, training):
    """Return the module under test and the plain network with equal weights, all different from initial ones."""
    ours = WideResNet(CLASSES, *shape).double().to(memory_format=torch.channels_last).train(training)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            noise = torch.randn(tensor.shape, generator=chance, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(1 + noise.abs())
            else:
                tensor.add_(0.3 * noise if tensor.ndim < 2 else 0.3 * tensor.std() * noise)
    weights = {name: tensor.clone().contiguous() for name, tensor in ours.state_dict().items()}
    for name, _ in ours.named_parameters():
        weights[name].requires_grad_()
    images = torch.randn(6, 3, 16, 16, generator=chance, dtype=torch.float64)
    return ours, PlainNetwork(weights, layout(*shape), training), images, chance


def assert_equal(ours, plain, name):
    """Assert equality up to the rounding of double precision."""
    torch.testing.assert_close(
        ours, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().item(), msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_values_gradients_and_running_statistics(shape, training):
    ours, plain, images, chance = networks(shape, training)
    actual, expected = ours(images.to(memory_format=torch.channels_last)), plain(images)
    for name, one, other in zip(("classes", "rotations"), actual, expected, strict=True):
        assert_equal(one, other, name)
    weights = [torch.randn(logits.shape, generator=chance, dtype=torch.float64) for logits in expected]
    for outputs in (actual, expected):
        sum((logits * weight).sum() for logits, weight in zip(outputs, weights, strict=True)).backward()
    for name, parameter in ours.named_parameters():
        assert plain.weights[name].grad.any(), name
        assert_equal(parameter.grad, plain.weights[name].grad, name)
    for name, buffer in ours.named_buffers():
        assert_equal(buffer, plain.weights[name], name)


def count(classes, scales, blocks, width, side):
    """Count parameters, and multiply-adds of the forward pass of one image: convolutions, batch norms, two heads."""
    parameters, multiply_adds = 0, 0

    def convolution(inputs, outputs, kernel, side):
        nonlocal parameters, multiply_adds
        parameters += inputs * outputs * kernel**2
        multiply_adds += inputs * outputs * kernel**2 * side**2

    convolution(3, STEM, 3, side)
    channels = STEM
    for inputs, outputs, stride in layout(scales, blocks, width):
        side //= stride
        parameters += 2 * inputs + 2 * outputs
        convolution(inputs, outputs, 3, side)
        convolution(outputs, outputs, 3, side)
        if inputs != outputs:
            convolution(inputs, outputs, 1, side)
        channels = outputs
    parameters += 2 * channels
    for outputs in (classes, ROTATIONS):
        parameters += (channels + 1) * outputs
        multiply_adds += channels * outputs
    return parameters, multiply_adds


@pytest.mark.parametrize(
    ("scales", "width", "side", "parameters", "multiply_adds"),
    [
        (3, 32, 32, 1_468_126, 214_353_664),
        (4, 32, 96, 5_930_462, 2_570_898_944),
        (4, 64, 96, 23_687_646, 10_177_272_832),
    ],
    ids=["WRN-28-2", "WRN-37-2, w=32", "WRN-37-2, w=64"],
)
def test_parameters_and_multiply_adds(scales, width, side, parameters, multiply_adds):
    """Compare the counts of `count` with torch's for the networks of the paper."""
    assert count(CLASSES, scales, 4, width, side) == (parameters, multiply_adds)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = WideResNet(CLASSES, scales, 4, width).eval()
        network(torch.empty(1, 3, side, side))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert counter.get_total_flops() == 2 * multiply_adds
