"""Every convolution of every preset on a CPU, against double precision.

oneDNN chooses its code by CPU and shape, and some of this code was wrong; see `MIN_WIDTH`. Shapes are tested for this
CPU, without AVX-512, and without AVX2, each in a separate process, since code that writes past its buffers crashes it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config.checks import MIN_WIDTH, MIN_WIDTH_LARGE
from engine.config.config import Config
from engine.config.presets import PRESETS
from engine.models.build import make_network
from tests.processes import call

SIDES = {"digits": 16, "stl10": 96}  # Image sides in pixels; 32 for the other data sets.
BATCH_SIZES = {16: 32, 32: 8, 96: 1}  # By image side.
TOLERANCE = 1e-4  # Relative to the largest value. Wrong code was off by 5e-2.
CONFIGS = [
    *PRESETS.values(),
    Config(),  # WRN-28-2
    Config(dataset="stl10", scales=4, width=64),  # WRN-37-2
    *(Config(dataset="digits", width=width, blocks=1) for width in (MIN_WIDTH, MIN_WIDTH + 1, 12)),
    *(Config(dataset=name, width=MIN_WIDTH, blocks=1) for name in ("cifar10", "stl10")),
    Config(dataset="stl10", width=MIN_WIDTH_LARGE, blocks=1),
]


def shapes(configs):
    """Return the distinct shapes: batch size, input channels, output channels, kernel side, stride, input side."""
    distinct = set()
    for config in configs:
        side = SIDES.get(config.dataset, 32)
        trained = config.batch * (config.k + 4)

        def add_shape(module, arguments, output, side=side, trained=trained):
            kernel, stride = module.kernel_size[0], module.stride[0]
            inputs = arguments[0]
            # The batch size of a training step if that is cheap.
            size = trained if trained * side**2 <= 2**15 else BATCH_SIZES[side]
            distinct.add((size, module.in_channels, module.out_channels, kernel, stride, inputs.shape[-1]))

        network = make_network(config, 10, torch.device("meta"))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(add_shape)
        network(torch.empty(2, 3, side, side, device="meta"))
    return sorted(distinct)


def errors(batch_size, inputs, outputs, kernel, stride, side):
    """Return the errors of values, input gradient and weight gradient, relative to the largest value of each."""
    rng = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
        for shape in ((batch_size, inputs, side, side), (outputs, inputs, kernel, kernel))
    ]
    single = [t.detach().float().to(memory_format=torch.channels_last).requires_grad_() for t in exact]
    gradient, results = None, []
    for images, weight in (exact, single):
        values = F.conv2d(images, weight, stride=stride, padding=kernel // 2)
        if gradient is None:
            gradient = torch.randn(values.shape, generator=rng, dtype=torch.float64)
        values.backward(gradient.to(values.dtype).to(memory_format=torch.channels_last))
        results.append((values.detach(), images.grad, weight.grad))
    return [((b.double() - a).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True)]


def check(configs):
    """Assert that every shape is computed correctly. Prints each before it runs, since wrong code may crash."""
    for shape in shapes(configs):
        print("batch size, inputs, outputs, kernel, stride, side:", *shape, flush=True)
        measured = errors(*shape)
        # This form of the comparison also fails on NaN.
        assert all(error < TOLERANCE for error in measured), f"errors of values, input and weight gradient: {measured}"


def test_shapes_match_the_networks():
    (digits,) = {tuple(shapes([PRESETS[name]])) for name in ("digits-40", "digits-10")}
    assert digits == (
        (96, 3, 16, 3, 1, 16), (96, 16, 16, 3, 1, 16), (96, 16, 32, 1, 2, 16), (96, 16, 32, 3, 2, 16),
        (96, 32, 32, 3, 1, 8), (96, 32, 64, 1, 2, 8), (96, 32, 64, 3, 2, 8), (96, 64, 64, 3, 1, 4),
    )  # fmt: skip
    assert len(shapes(CONFIGS)) > 40
    assert not {shape for shape in shapes(CONFIGS) if shape[1] < MIN_WIDTH and shape[1:4] != (3, 16, 3)}


@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX2", "SSE41"])
def test_convolutions_agree_with_double_precision(tmp_path, instructions):
    log = tmp_path / "log"
    assert call(log, check, CONFIGS, ONEDNN_MAX_CPU_ISA=instructions) == 0, log.read_text()[-2000:]
