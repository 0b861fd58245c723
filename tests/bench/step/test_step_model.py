"""The model of a step's time: bounds by hand, passes that share the device, and the measured step of an H100."""

import pytest

from bench.step import step_model
from bench.step.count import TARGETS
from bench.step.step_model import FUSED, FUSED_SHARE, GAP_SECONDS, KERNEL_SECONDS, Device, Launch, kernels, predict

# 1 GB/s, 10 TFLOP/s, and an L2 cache of 1 kB with 4 GB/s.
DEVICE = Device("made up", 1e9, 1e13, "", 1000, 4e9)


def seconds(name, size, flops=0, shape=(), device=DEVICE):
    """Return the times of a launch's kernels by kind, without the constant per kernel."""
    made = kernels(Launch("backward", name, size, flops, shape))
    return {kernel.kind: kernel.seconds(device) - kernel.count * KERNEL_SECONDS for kernel in made}


def test_kernels_of_inductor_take_their_bytes():
    assert seconds("triton triton_poi_fused_0", 5000) == {"pointwise kernels": pytest.approx(5e-6)}
    assert seconds("triton triton_red_fused_0", 1000) == {"reductions": pytest.approx(0.25e-6)}, "bytes in the cache"
    assert seconds("triton triton_per_fused_0", 1001) == {"reductions": pytest.approx(1.001e-6)}
    assert seconds("aten::_fused_adamw_", 500) == {"others": pytest.approx(0.5e-6)}, "parameters are not in the cache"


def test_a_convolution_loads_its_input_once_per_tap_and_tile_of_channels():
    # 2 images of 4 x 4 with 8 channels, 3x3 with stride 2 and 80 outputs: 8 pixels, two tiles of 64 channels.
    x, y, w = 2 * 256, 2 * 640, 2 * 5760
    shape, flops = (2, 8, 4, 4, 80, 3, 2), 2 * 640 * 72
    loaded = 2 * 8 * 72 * 2 + y
    assert seconds("aten::convolution", x + y + w, flops, (*shape, 1)) == {
        "forward convolutions": pytest.approx(max((x + y + w) / 1e9, loaded / 4e9))
    }
    fast = Device("made up", 1e15, 1e13, "", 0, 4e9)
    assert seconds("aten::convolution", x + y + w, flops, (*shape, 1), fast) == {
        "forward convolutions": pytest.approx(loaded / 4e9)
    }
    # Columns of the weight gradient are 72, in two tiles. The input gradient has one tile of 8 channels.
    assert seconds("aten::convolution_backward", 2 * x + y + 2 * w, 2 * flops, (*shape, 2), fast) == {
        "weight gradients": pytest.approx((2 * 8 * 72 * 2 + 2 * y) / 4e9),
        "input gradients": pytest.approx((2 * 640 * 9 + x) / 4e9),
    }
    both = kernels(Launch("backward", "aten::convolution_backward", 2 * x + y + 2 * w, 2 * flops, (*shape, 2)))
    assert [kernel.count for kernel in both] == [2, 1], "cuDNN adds parts of a weight gradient in a second kernel"
    assert list(seconds("aten::convolution_backward", x + y + 2 * w, flops, (*shape, 1), fast)) == ["weight gradients"]
    slow = Device("made up", 1e15, 1e9, "", 0, 1e15)
    assert seconds("aten::convolution", x + y + w, flops, (*shape, 1), slow) == {
        "forward convolutions": pytest.approx(flops / 1e9)
    }


def test_a_fused_convolution_takes_its_bytes_operations_or_issue_slots():
    shape = (2, 8, 4, 4, 80, 3, 1, 1)
    for name, kind in (
        ("", "forward convolutions"),
        ("_eval", "forward convolutions"),
        ("_weight_grad", "weight gradients"),
        ("_input_grad", "input gradients"),
    ):
        assert seconds(FUSED + name, 5000, 1000, shape) == {kind: pytest.approx(5e-6)}
        assert seconds(FUSED + name, 5000, 10**8, shape) == {kind: pytest.approx(1e-5 / FUSED_SHARE)}
    launch = Launch("backward", FUSED, 5000, 1000, shape)
    assert predict([launch], DEVICE).step == pytest.approx(5e-6 + KERNEL_SECONDS + GAP_SECONDS)
    assert kernels(launch, 0.25)[0].share == 0.25
    slow, fast = (predict([Launch("backward", FUSED, 5000, 10**9, shape)], DEVICE, fused_share=s) for s in (0.2, 0.4))
    assert slow.step - fast.step == pytest.approx(1e-4 * (1 / 0.2 - 1 / 0.4))
    bound = predict([launch], DEVICE, {(FUSED, shape): 7e-6})
    assert bound.step == pytest.approx(7e-6 + KERNEL_SECONDS + GAP_SECONDS)
    assert launch.kind == "operator" and launch.least == 5000


def test_passes_that_run_at_the_same_time_share_the_device(monkeypatch):
    monkeypatch.setattr(step_model, "KERNEL_SECONDS", 0)
    work = {"probes": 2000, "guess": 3000, "forward": 7000, "backward": 9000}
    launches = [Launch(part, "triton triton_poi_fused_0", size, 0) for part, size in work.items()]
    found = predict(launches, DEVICE)
    assert found.step == pytest.approx(21e-6 + 4 * GAP_SECONDS)
    # Probes end after 3 * 2 us, the labels 2 * 1 us later, the forward pass when all is done.
    ends = {"probes": 6e-6, "guess": 8e-6, "forward": 12e-6, "backward": 9e-6}
    assert found.parts == pytest.approx(ends)
    assert found.kernels == pytest.approx({"pointwise kernels": sum(ends.values())})
    alone = predict([launches[1], launches[3]], DEVICE)
    assert alone.parts == pytest.approx({"guess": 3e-6, "backward": 9e-6})


def test_every_device_has_a_cache():
    for target in TARGETS.values():
        for device in target.devices:
            assert device.l2_bytes >= 40e6 and device.l2_bytes_per_second > device.copy_bytes_per_second
