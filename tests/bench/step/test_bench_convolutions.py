"""Our convolution kernels beside cuDNN's: bytes by hand, on the kernels' references."""

import torch

from bench.step import convolutions
from bench.step.convolutions import PASSES, Shape, time_fused
from kernels import convolution

CPU = torch.device("cpu")


def test_kernels_are_timed_with_their_own_bytes():
    shape = Shape(inputs=16, outputs=32, side=8, taps=3, stride=2)
    found = {one["pass"]: one for one in time_fused(shape, 16, CPU, 1)}
    assert list(found) == [f"triton {name}" for name in PASSES]
    x, y, weights = 2 * 16 * 16 * 64, 2 * 16 * 32 * 16, 2 * 32 * 16 * 9
    tilings = {name: found[f"triton {name}"]["tiling"].split() for name in PASSES}
    pixels, splits = int(tilings["forward"][0]) * int(tilings["forward"][1]), int(tilings["weight gradient"][0])
    forward, input_grad, weight_grad = (one["bytes"] for one in found.values())
    assert forward == x + weights + y + 8 * 32 * (16 * 16 // pixels)
    assert 0 < input_grad - (2 * x + y + weights) < 8 * 16 * 16 * 64
    assert weight_grad == x + y + splits * 2 * weights
    for one in found.values():
        assert one["flops"] == y * 16 * 9 and one["microseconds"] > 0 and one["floor_ratio"] > 0
        assert one["tilings"] >= 1


def test_a_failing_tiling_is_skipped_and_an_unsupported_shape_has_none(monkeypatch, capsys):
    def functions(layer, dtype, device):
        def broken():
            raise RuntimeError("out of shared memory")

        yield "forward cudnn", broken
        yield "forward 64 1", broken
        yield "weight_grad 2 64", lambda: torch.zeros(3)

    monkeypatch.setattr(convolutions.convolutions, "functions", functions)
    found = list(time_fused(Shape(16, 32, 8, 3, 1), 16, CPU, 1))
    assert [(one["pass"], one["tiling"]) for one in found] == [("triton weight gradient", "2 64")]
    assert found[0]["bytes"] == 2 * 16 * 64 * (16 + 32) + 12
    assert "forward 64 1 does not work: out of shared memory" in capsys.readouterr().out
    assert not convolution.tilings(convolution.Shape(16, 3, 8, 8, 16, 3, 1), "forward")
    assert not list(time_fused(Shape(3, 16, 8, 3, 1), 16, CPU, 1))
