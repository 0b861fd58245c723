"""Model of the time of a captured step on a GPU, by part, from its counted launches.

A launch takes as long as its slowest resource, plus a constant. The resources are:

- Device memory: the bytes of inputs and outputs at copy bandwidth. Those of a network's kernel that fit into the L2
  cache were written by the kernels before and are read from it, at its rate.
- L2: a convolution as an implicit matrix product loads the activation once per tap, and once per tile of output
  channels; a weight gradient also loads the output's gradient once per tile of its columns, which are taps times input
  channels. The weight is not counted.
- Arithmetic: operations at the rate of a large matrix product.
- Issue slots, of kernels whose machine code was analyzed (`bench.step.issue`).

The passes of pseudo-labels and probes run at the same time as the forward pass. Their kernels share the device equally,
so that each takes longer while the whole does not. A profile shows the longer times, and `Prediction` as well.

Two constants are fitted, KERNEL_SECONDS and the L2 rate of the H100, to twelve measurements on an H100 with torch 2.11
and cuDNN 9: seven parts of the step with K = 8, and the steps with K = 1, 2, 4, 8 and 16 (docs/measurements/h100.md).
TILE was chosen from 64, 128 and 256, and the two rules about the cache and the weight by the same fit. Groups and
dilation are not modeled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KERNEL_SECONDS = 3.2e-6  # A kernel starts and ends with the device half empty. Fitted.
GAP_SECONDS = 1.05e-6  # Between kernels; on an H100 the device idles for 0.54 ms of a step with 512 of them.
TILE = 64  # Sides in elements of the tiles in which a convolution computes a matrix. Chosen by the fit.
FUSED_SHARE = 0.5  # Share of the matrix-product rate that fused convolutions reach. Assumed; none has run on a GPU.
FUSED = "remixmatch::norm_act_conv"  # How names of fused convolutions begin. They read each tensor once.
CONCURRENT = ("probes", "guess", "forward")  # Parts that run at the same time.
NETWORKS = (*CONCURRENT, "backward")  # Parts that run a network.
LIBRARIES = ("aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm")

FORWARD, WEIGHT, INPUT = "forward convolutions", "weight gradients", "input gradients"
REDUCTIONS, POINTWISE, OTHERS = "reductions", "pointwise kernels", "others"
KERNELS = (FORWARD, WEIGHT, INPUT, REDUCTIONS, POINTWISE, OTHERS)

_FUSED_GRADIENTS = {f"{FUSED}_weight_grad": WEIGHT, f"{FUSED}_input_grad": INPUT}


@dataclass(frozen=True)
class Device:
    """Rates of a device that a prediction is based on.

    Attributes:
        name: Name of the device.
        copy_bytes_per_second: Rate of a large copy, counting bytes read and bytes written.
        matmul_flops_per_second: Rate of a large bf16 matrix product.
        source: Origin of both rates.
        l2_bytes: Size of the L2 cache, from the data sheet.
        l2_bytes_per_second: Rate of the L2 cache: fitted for the H100, for others scaled by multiprocessors and clock.
    """

    name: str
    copy_bytes_per_second: float
    matmul_flops_per_second: float
    source: str
    l2_bytes: int
    l2_bytes_per_second: float


@dataclass(frozen=True)
class Launch:
    """One launch of a step; see `bench.step.count_worker`.

    Attributes:
        part: One of PARTS.
        name: Name of the operator, or "triton " and the name of a kernel.
        bytes: Bytes of inputs and outputs, once each.
        flops: Floating-point operations of convolutions and matrix products.
        shape: Of a convolution: N, C, H, W of its input, O, side of its kernel, stride, and number of passes, which is
            2 for a backward pass with both gradients.
    """

    part: str
    name: str
    bytes: int
    flops: int
    shape: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """One of `engine.measuring.counts.KINDS`."""
        return "triton" if self.name.startswith("triton ") else "library" if self.name in LIBRARIES else "operator"

    @property
    def least(self) -> int:
        """Bytes that remain if everything in a network is fused into its convolutions and matrix products."""
        remains = self.kind == "library" or self.name.startswith(FUSED) or self.part not in NETWORKS
        return self.bytes if remains else 0


@dataclass(frozen=True)
class Kernel:
    """What one kernel of a launch needs.

    Attributes:
        kind: One of KERNELS.
        bytes: Bytes of inputs and outputs, once each.
        l2_bytes: Bytes loaded and stored through L2.
        flops: Floating-point operations.
        share: Share of the matrix-product rate.
        count: Number of kernels. What the others need is included in the first, except their constant time.
    """

    kind: str
    bytes: float
    l2_bytes: float = 0
    flops: float = 0
    share: float = 1
    count: int = 1

    def seconds(self, device: Device) -> float:
        """Return its time on a device of its own."""
        cached = self.kind != OTHERS and self.bytes <= device.l2_bytes
        bandwidth = device.l2_bytes_per_second if cached else device.copy_bytes_per_second
        arithmetic = self.flops / (self.share * device.matmul_flops_per_second)
        bound = max(self.bytes / bandwidth, self.l2_bytes / device.l2_bytes_per_second, arithmetic)
        return bound + self.count * KERNEL_SECONDS


@dataclass(frozen=True)
class Prediction:
    """Predicted times in seconds.

    Attributes:
        step: Time of the step.
        kernels: Time of all kernels of a kind, as in a profile, by the names in KERNELS.
        parts: Time of all kernels of a part, as in a profile.
    """

    step: float
    kernels: Mapping[str, float]
    parts: Mapping[str, float]


def kernels(launch: Launch, fused_share: float = FUSED_SHARE) -> list[Kernel]:
    """Return the kernels of a launch; see `predict`."""
    if launch.name in ("aten::convolution", "aten::convolution_backward"):
        return _convolution(launch)
    if launch.name.startswith(FUSED):
        kind = _FUSED_GRADIENTS.get(launch.name, FORWARD)
        return [Kernel(kind, launch.bytes, launch.bytes, launch.flops, fused_share)]
    kind = OTHERS
    if launch.name.startswith("triton "):
        reduces = launch.name.startswith(("triton triton_red", "triton triton_per"))
        kind = REDUCTIONS if reduces else POINTWISE
    return [Kernel(kind, launch.bytes, flops=launch.flops)]


def _convolution(launch: Launch) -> list[Kernel]:
    """Return the forward pass of a convolution, or its weight gradient and its input gradient if it has one."""
    n, c, h, w, o, side, stride, passes = launch.shape
    backward = launch.name.endswith("backward")
    flops = launch.flops / passes
    taps = side * side
    pixels = n * math.ceil(h / stride) * math.ceil(w / stride)  # Of the output.
    inputs, outputs, weights = n * c * h * w, pixels * o, flops / (2 * pixels)
    # A backward pass reads all three, and writes a weight and with two passes an input.
    size = launch.bytes / (inputs * passes + outputs + 2 * weights if backward else inputs + outputs + weights)
    once = size * (inputs + outputs + weights)
    unrolled = size * pixels * c * taps * math.ceil(o / TILE)
    if not backward:
        return [Kernel(FORWARD, once, unrolled + size * outputs, flops)]
    # cuDNN splits the sum over pixels and adds the parts in a second kernel.
    loaded = unrolled + size * outputs * math.ceil(taps * c / TILE)
    gradients = [Kernel(WEIGHT, once, loaded, flops, count=2)]
    if passes == 2:
        unrolled = size * pixels * o * taps * math.ceil(c / TILE)
        gradients.append(Kernel(INPUT, once, unrolled + size * inputs, flops))
    return gradients


def predict(
    launches: Iterable[Launch],
    device: Device,
    issue: Mapping[tuple[str, tuple[int, ...]], float] | None = None,
    fused_share: float = FUSED_SHARE,
) -> Prediction:
    """Predict the time of a step on a device.

    Args:
        launches: The launches of the step.
        device: The device.
        issue: Issue-slot time in seconds of fused convolutions, by name and shape; see `bench.step.issue`.
        fused_share: Share of the matrix-product rate that fused convolutions reach.
    """
    alone: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    count = 0
    for launch in launches:
        least = KERNEL_SECONDS + (issue or {}).get((launch.name, launch.shape), 0)
        for kernel in kernels(launch, fused_share):
            alone[launch.part][kernel.kind] += max(kernel.seconds(device), least)
            count += kernel.count
    parts = {part: sum(times.values()) for part, times in alone.items()}
    together = [seconds for part, seconds in parts.items() if part in CONCURRENT]
    by_kind: dict[str, float] = defaultdict(float)
    by_part = {}
    for part, own in parts.items():
        # With equal shares, while a pass does its work every other one does as much, or all it has.
        by_part[part] = sum(min(own, other) for other in together) if part in CONCURRENT else own
        for kind, seconds in alone[part].items():
            by_kind[kind] += seconds * by_part[part] / own
    return Prediction(sum(parts.values()) + count * GAP_SECONDS, by_kind, by_part)
