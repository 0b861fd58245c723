"""Every convolution of every preset's network against double precision, as a CPU's library computes it.

oneDNN chooses other code for other CPUs and shapes, and some of it was wrong: see `LEAST_WIDTH`. The
shapes are computed in processes of their own, since what writes past its buffers ends them, for this CPU and as a
CPU without AVX-512 and one without AVX2 compute them.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config.checks import LEAST_WIDTH, LEAST_WIDTH_LARGE
from engine.config.config import Config
from engine.config.presets import PRESETS
from engine.models.build import make_network
from tests.processes import call

SIDES = {"digits": 16, "stl10": 96}  # pixels of an image's side, 32 for the other data sets
ROWS = {16: 32, 32: 8, 96: 1}  # of a batch, fewer of larger images
ROUNDING = 1e-4  # of the largest value; wrong code was off by 5e-2
CONFIGS = [
    *PRESETS.values(),
    Config(),  # WRN-28-2
    Config(dataset="stl10", scales=4, width=64),  # WRN-37-2
    *(Config(dataset="digits", width=width, blocks=1) for width in (LEAST_WIDTH, LEAST_WIDTH + 1, 12)),
    Config(dataset="stl10", width=LEAST_WIDTH_LARGE, blocks=1),
]


def shapes(configs):
    """Distinct shapes: rows, input channels, output channels, kernel side, stride, side of the input."""
    found = set()
    for config in configs:
        side = SIDES.get(config.dataset, 32)
        trained = config.batch * (config.k + 4)

        def note(module, arguments, output, side=side, trained=trained):
            kernel, stride = module.kernel_size[0], module.stride[0]
            inputs = arguments[0]
            # a step's own rows where they are cheap
            rows = trained if trained * side**2 <= 2**15 else ROWS[side]
            found.add((rows, module.in_channels, module.out_channels, kernel, stride, inputs.shape[-1]))

        network = make_network(config, 10, torch.device("meta"))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        network(torch.empty(2, 3, side, side, device="meta"))
    return sorted(found)


def errors(rows, inputs, outputs, kernel, stride, side):
    """How far values, input gradient and weight gradient are from double precision, in parts of the largest value."""
    chance = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(shape, generator=chance, dtype=torch.float64).requires_grad_()
        for shape in ((rows, inputs, side, side), (outputs, inputs, kernel, kernel))
    ]
    single = [t.detach().float().to(memory_format=torch.channels_last).requires_grad_() for t in exact]
    gradient, results = None, []
    for images, weight in (exact, single):
        values = F.conv2d(images, weight, stride=stride, padding=kernel // 2)
        if gradient is None:
            gradient = torch.randn(values.shape, generator=chance, dtype=torch.float64)
        values.backward(gradient.to(values.dtype).to(memory_format=torch.channels_last))
        results.append((values.detach(), images.grad, weight.grad))
    return [((b.double() - a).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True)]


def check(configs):
    """Names the first shape that is computed wrongly; says each before it is tried."""
    for shape in shapes(configs):
        print("rows, inputs, outputs, kernel, stride, side:", *shape, flush=True)
        found = errors(*shape)
        # not a number is no rounding, either
        assert all(error < ROUNDING for error in found), f"values, input gradient, weight gradient: off by {found}"


def test_shapes_are_those_of_the_networks():
    (digits,) = {tuple(shapes([PRESETS[name]])) for name in ("digits-40", "digits-10")}
    assert digits == (
        (96, 3, 16, 3, 1, 16), (96, 16, 16, 3, 1, 16), (96, 16, 32, 1, 2, 16), (96, 16, 32, 3, 2, 16),
        (96, 32, 32, 3, 1, 8), (96, 32, 64, 1, 2, 8), (96, 32, 64, 3, 2, 8), (96, 64, 64, 3, 1, 4),
    )  # fmt: skip
    assert len(shapes(CONFIGS)) > 40
    assert not {shape for shape in shapes(CONFIGS) if shape[1] < LEAST_WIDTH and shape[1:4] != (3, 16, 3)}


@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX2", "SSE41"])
def test_convolutions_are_those_of_double_precision(tmp_path, instructions):
    log = tmp_path / "log"
    assert call(log, check, CONFIGS, ONEDNN_MAX_CPU_ISA=instructions) == 0, log.read_text()[-2000:]
