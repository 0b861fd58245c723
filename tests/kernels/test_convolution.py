"""Test the kernels of `norm_act_conv` in Triton's interpreter, against the definition of the layer in float64.

The interpreter rounds to bfloat16 toward zero, unlike a GPU, so that most tests use float16. Heights are smaller than
those of the networks, to save time; kernels treat all rows but the first and the last alike.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.step.issue import recorded
from kernels.convolution import Shape, launch_forward, launch_input_grad, launch_weight_grad, tilings
from kernels.norm_act_conv import Moments, Tilings, merge_moments, moments_of, norm_act_conv

EPSILON = 1e-3
# (inputs, outputs, width, taps, stride) of every convolution of WRN-28-2 on 32x32 and WRN-37-2 on 96x96.
LAYERS = [
    *[(16, 32, width, taps, 1) for width in (32, 96) for taps in (1, 3)],
    *[
        (32 << scale, 32 << scale, side >> scale, 3, 1)
        for side, scales in ((32, 3), (96, 4))
        for scale in range(scales)
    ],
    *[
        (32 << scale, 64 << scale, side >> scale, 3, 2)
        for side, scales in ((32, 3), (96, 4))
        for scale in range(scales - 1)
    ],
]


class Layer:
    """Inputs of a layer, and its results and gradients in float64 by autograd.

    `grad` is the gradient of y with its mean and variance held fixed. `total` also has their part, from gradients
    `mean_grad` and `var_grad`, and is what the other gradients follow from.
    """

    def __init__(self, shape, dtype, residual=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes):
            return torch.randn(*sizes, generator=generator)

        def activations(values):
            return values.to(dtype).contiguous(memory_format=torch.channels_last)

        samples, inputs, height, width, outputs, taps, stride = shape
        result = (samples, outputs, height // stride, width // stride)
        self.shape = shape
        self.x = activations(1.5 * normal(samples, inputs, height, width) + normal(inputs, 1, 1))
        self.weight = activations(normal(outputs, inputs, taps, taps) / (taps * inputs**0.5))
        self.gamma, self.beta = 0.5 + torch.rand(inputs, generator=generator), normal(inputs)
        self.residual = activations(normal(*result)) if residual else None
        self.grad, self.skip_grad = activations(normal(*result)), activations(normal(*self.x.shape))
        pixels = samples * (height // stride) * (width // stride)
        self.mean_grad, self.var_grad = pixels * normal(outputs), pixels * normal(outputs) / 4

        x, weight = self.x.double(), self.weight.double().requires_grad_()
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        self.moments = Moments(mean.float(), var.float())
        self.rstd = (1 / (var + EPSILON).sqrt()).float()
        normalized = (x - mean[:, None, None]) / (var + EPSILON).sqrt()[:, None, None]
        normalized = normalized * self.gamma.double()[:, None, None] + self.beta.double()[:, None, None]
        normalized.requires_grad_()
        activated = torch.maximum(normalized, 0.1 * normalized)
        self.y = F.conv2d(activated, weight, stride=stride, padding=taps // 2)
        if residual:
            self.y = self.y + self.residual.double()
        self.y.retain_grad()
        y_mean = self.y.mean((0, 2, 3))
        y_var = (self.y - y_mean[:, None, None]).square().mean((0, 2, 3))
        through_moments = (y_mean * self.mean_grad.double()).sum() + (y_var * self.var_grad.double()).sum()
        ((self.y * self.grad.double()).sum() + through_moments).backward()
        self.total, self.y = self.y.grad, self.y.detach()
        self.y_mean = y_mean.detach().float()
        self.rounded_y, self.rounded_total = activations(self.y), activations(self.total)
        self.normalized_grad, self.weight_grad = normalized.grad, weight.grad
        scale = (self.gamma.double() / (var + EPSILON).sqrt())[:, None, None]
        self.x_grad = normalized.grad * scale + self.skip_grad.double()
        self.sums = torch.stack(
            [self.normalized_grad.sum((0, 2, 3)), (self.normalized_grad * (x - mean[:, None, None])).sum((0, 2, 3))]
        )

    @property
    def norm(self):
        return self.moments.mean, self.rstd, self.gamma, self.beta


def error(values, exact):
    """Return the relative error in the Euclidean norm."""
    return ((values.double() - exact).norm() / exact.norm()).item()


def todays_path(layer):
    """Compute y, the gradients of y, x and the weight by separate operators of torch; see `Layer`."""
    stride, padding = layer.shape.stride, layer.shape.taps // 2
    weight = layer.weight.clone().requires_grad_()
    normalized = F.batch_norm(layer.x, None, None, layer.gamma, layer.beta, True, 0.0, EPSILON).requires_grad_()
    y = F.conv2d(F.leaky_relu(normalized, 0.1), weight, stride=stride, padding=padding)
    if layer.residual is not None:
        y = y + layer.residual
    centered = layer.rounded_y.float() - layer.y_mean[:, None, None]
    pixels = y.numel() // y.shape[1]
    correction = (layer.mean_grad[:, None, None] + 2 * layer.var_grad[:, None, None] * centered) / pixels
    total = (layer.grad.float() + correction).to(y.dtype)
    y.backward(total)
    x_grad = (normalized.grad.float() * (layer.gamma * layer.rstd)[:, None, None]).to(y.dtype) + layer.skip_grad
    return y.detach(), total, x_grad, weight.grad


def few_programs(tiling, rows):
    """Return a tiling with more rows per tile, or fewer splits: the interpreter runs programs one after another."""
    if len(tiling) == 6:
        return (tiling[0], rows, *tiling[2:])
    return (min(tiling[0], 2), tiling[1], rows, *tiling[3:])


def run(interpreter, layer, which, tiling, folds=True):
    """Run one kernel in the interpreter. That of the input gradient computes the gradient of y if `folds`."""
    stride, taps = layer.shape.stride, layer.shape.taps
    if which == "forward":
        arguments = (layer.x, *layer.norm, layer.weight, layer.residual, stride, True, tiling)
        return interpreter(launch_forward, *arguments)
    rounded = layer.rounded_total
    if which == "input_grad":
        arguments = (layer.x, *layer.norm, layer.weight, stride, tiling, layer.skip_grad)
        if not folds:
            return interpreter(launch_input_grad, rounded, *arguments)
        pixels = layer.y.numel() // len(layer.y_mean)
        factor = 2 * layer.var_grad / pixels
        offset = layer.mean_grad / pixels - factor * layer.y_mean
        return interpreter(launch_input_grad, layer.grad, *arguments, layer.rounded_y, factor, offset)
    return interpreter(launch_weight_grad, rounded, layer.x, *layer.norm, taps, stride, tiling)


@pytest.mark.parametrize(
    "layer",
    [pytest.param(layer, marks=pytest.mark.long if layer[1] > 128 else (), id=str(layer)) for layer in LAYERS],
)
def test_error_is_at_most_that_of_separate_operators(interpreter, layer):
    inputs, outputs, width, taps, stride = layer
    samples = next(n for n in range(1, 65) if n * width // stride % (128 if outputs > 64 else 64) == 0)
    layer = Layer(
        Shape(samples, inputs, (4 if inputs < 64 else 2) * stride, width, outputs, taps, stride), torch.float16
    )
    y, total, x_grad, weight_grad = todays_path(layer)
    results = {
        which: run(interpreter, layer, which, few_programs(tilings(layer.shape, which)[0], 2))
        for which in ("forward", "input_grad", "weight_grad")
    }
    found, partial = results["forward"]
    assert error(found, layer.y) <= 1.01 * error(y, layer.y)
    mean, var = merge_moments(partial, layer.y.numel() // outputs)
    assert error(mean, layer.y.mean((0, 2, 3))) < 1e-3
    assert error(var, layer.y.var((0, 2, 3), correction=0)) < 1e-3
    found, sums, found_total = results["input_grad"]
    assert error(found_total, layer.total) <= 1.01 * error(total, layer.total)
    assert error(found, layer.x_grad) <= 1.01 * error(x_grad, layer.x_grad)
    assert error(sums.sum(0), layer.sums) < 1e-3
    assert error(results["weight_grad"].sum(0), layer.weight_grad) <= 1.01 * error(weight_grad, layer.weight_grad)


@pytest.mark.parametrize("which", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(8, 32, 4, 16, 32, 3, 1),
        Shape(16, 64, 2, 8, 64, 3, 1),
        pytest.param(Shape(16, 128, 2, 8, 128, 3, 1), marks=pytest.mark.long),
        Shape(16, 16, 4, 16, 64, 3, 2),
        Shape(8, 16, 4, 16, 32, 1, 1),
    ],
    ids=str,
)
def test_every_tiling_computes_the_same(interpreter, shape, which):
    layer = Layer(shape, torch.float16, residual=False)
    exact = {"forward": layer.y, "input_grad": layer.x_grad, "weight_grad": layer.weight_grad}[which]
    every = {
        few_programs(tiling, rows)
        for capability in (80, 90)
        for tiling in tilings(shape, which, capability)
        for rows in ((1, 2) if shape.inputs < 64 else (1,))
        if tiling[-1] == 1  # The number of stages changes nothing in the interpreter.
    }
    for tiling in every:
        found = run(interpreter, layer, which, tiling)
        assert error(found.sum(0) if which == "weight_grad" else found[0], exact) < 1e-3
        if which == "input_grad":
            assert error(found[1].sum(0), layer.sums) < 1e-3
            assert error(found[2], layer.total) < 1e-3


def test_statistics_are_those_of_tiles_in_the_order_of_samples(interpreter):
    layer = Layer(Shape(16, 16, 4, 16, 32, 3, 1), torch.float16)
    _, partial = run(interpreter, layer, "forward", (64, 2, 32, 16, 4, 1))
    assert partial.shape == (8, 2, 32)
    tile = layer.y[4:8, :, 2:]  # 4 samples of 16 columns are 64 positions; the second half of the rows.
    torch.testing.assert_close(partial[3, 0].double(), tile.mean((0, 2, 3)), atol=1e-3, rtol=0)
    deviations = tile.var((0, 2, 3), correction=0) * 128
    torch.testing.assert_close(partial[3, 1].double(), deviations, atol=0, rtol=1e-3)
    half = merge_moments(partial[:4], 8 * 4 * 16)
    torch.testing.assert_close(half.var.double(), layer.y[:8].var((0, 2, 3), correction=0), atol=0, rtol=1e-3)


def test_variance_of_channels_with_a_large_mean(interpreter):
    layer = Layer(Shape(8, 16, 2, 16, 16, 1, 1), torch.float16, residual=False)
    layer.residual = torch.full_like(layer.grad, 50)  # Standard deviations are near 1.
    _, partial = run(interpreter, layer, "forward", (64, 2, 16, 16, 4, 1))
    _, var = merge_moments(partial, 8 * 2 * 16)
    torch.testing.assert_close(var.double(), layer.y.var((0, 2, 3), correction=0), atol=0, rtol=3e-3)


def test_bfloat16(interpreter):
    layer = Layer(Shape(4, 32, 4, 32, 32, 3, 1), torch.bfloat16)
    y, partial = run(interpreter, layer, "forward", (64, 2, 32, 32, 4, 1))
    assert y.dtype is torch.bfloat16 and partial.dtype is torch.float32
    assert error(y, layer.y) < 0.01
    for folds in (True, False):
        x_grad, _, total = run(interpreter, layer, "input_grad", (64, 2, 32, 32, 4, 1), folds)
        assert x_grad.dtype == total.dtype == torch.bfloat16 and error(x_grad, layer.x_grad) < 0.01
        assert error(total, layer.total) < 0.01 if folds else not len(total)
    weight_grad = run(interpreter, layer, "weight_grad", (3, 128, 2, 32, 32, 4, 8, 1)).sum(0)
    assert error(weight_grad, layer.weight_grad) < 0.01


def test_no_statistics_no_residual(interpreter):
    layer = Layer(Shape(4, 16, 2, 16, 32, 3, 1), torch.float16, residual=False)
    arguments = (layer.x, *layer.norm, layer.weight, None, 1, False, (64, 2, 32, 16, 4, 1))
    y, partial = interpreter(launch_forward, *arguments)
    assert error(y, layer.y) < 1e-3 and partial.shape == (0, 2, 32)


@pytest.mark.parametrize("shape", [Shape(4, 16, 2, 16, 32, 3, 1), Shape(16, 16, 4, 8, 32, 3, 2)], ids=str)
def test_an_input_gradient_alone(interpreter, shape):
    """Without gradients of statistics or of a skip connection to add."""
    layer = Layer(shape, torch.float16)
    rounded, tiling = layer.rounded_total, (64, 2, 16, 32, 4, 1)
    x_grad, _, total = interpreter(launch_input_grad, rounded, layer.x, *layer.norm, layer.weight, shape.stride, tiling)
    assert error(x_grad, layer.x_grad - layer.skip_grad.double()) < 1e-3 and total.shape == (0,)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 32, 32, 32, 32, 3, 1),
        Shape(48, 64, 28, 16, 128, 3, 2),
        Shape(64, 16, 8, 8, 32, 1, 1),
        Shape(64, 16, 1, 1, 16, 3, 1),
    ],
    ids=str,
)
def test_results_have_the_layout_that_torch_compile_expects(shape, statistics):
    samples, inputs, height, width, outputs, taps, stride = shape

    def activations(*sizes):
        return torch.empty(sizes, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)

    x, grad = (
        activations(samples, inputs, height, width),
        activations(samples, outputs, height // stride, width // stride),
    )
    weight, norm = activations(outputs, inputs, taps, taps), [torch.empty(inputs, device="meta") for _ in range(4)]
    forward, input_grad, weight_grad = (tilings(shape, which)[0] for which in ("forward", "input_grad", "weight_grad"))
    correction = (x, grad, *torch.empty(2, outputs, device="meta")) if statistics else ()
    ours = torch.ops.remixmatch
    for launcher, operator, arguments in (
        (launch_forward, ours.norm_act_conv, (x, *norm, weight, None, stride, statistics, forward)),
        (launch_input_grad, ours.norm_act_conv_input_grad, (grad, x, *norm, weight, stride, input_grad, *correction)),
        (launch_weight_grad, ours.norm_act_conv_weight_grad, (grad, x, *norm, taps, stride, weight_grad)),
    ):
        with recorded():
            launched = launcher(*arguments)
        both = zip(
            *((each,) if isinstance(each, torch.Tensor) else each for each in (launched, operator(*arguments))),
            strict=True,
        )
        for one, other in both:
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_other_layouts_are_refused():
    layer = Layer(Shape(4, 16, 2, 16, 32, 3, 1), torch.float16)
    with pytest.raises(ValueError, match="channels_last"):
        launch_input_grad(
            layer.grad.contiguous(), layer.x, *layer.norm, layer.weight, 1, tilings(layer.shape, "input_grad")[0]
        )


@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 24, 32, 32, 32, 3, 1),  # Channels are no power of two.
        Shape(64, 8, 32, 32, 32, 3, 1),  # Fewer than 16.
        Shape(3, 32, 32, 32, 32, 3, 1),  # 96 positions.
        Shape(64, 32, 32, 32, 32, 5, 1),
        Shape(64, 32, 33, 32, 32, 3, 2),
        Shape(2**16, 32, 32, 32, 32, 3, 1),  # Offsets exceed 32 bits.
        Shape(2**15, 32, 32, 32, 64, 3, 1),  # Those of the result.
        Shape(4, 16, 32, 16, 32, 3, 2),  # 32 positions in the smaller image.
    ],
    ids=str,
)
def test_unsupported_shapes(shape):
    assert all(tilings(shape, which) == [] for which in ("forward", "input_grad", "weight_grad"))
    assert tilings(Shape(2**16 - 2, 32, 32, 32, 32, 3, 1), "forward")
    pointwise = Shape(64, 32, 32, 32, 64, 1, 2)
    assert tilings(pointwise, "forward") and tilings(pointwise, "input_grad") == []


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("shape", [Shape(8, 16, 4, 8, 32, 3, 2), Shape(8, 16, 4, 8, 32, 1, 1)], ids=str)
def test_gradients_of_the_layer(shape, folds, by_library):
    """The operator on a CPU, with all gradients, also through the statistics of x and y and a skip connection."""
    layer = Layer(shape, torch.bfloat16)
    leaves = [layer.x, layer.gamma, layer.beta, layer.weight, layer.residual]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    x, gamma, beta, weight, residual = exact
    normalized = F.batch_norm(x, None, None, gamma, beta, True, 0.0, EPSILON)
    activated = torch.where(normalized > 0, normalized, 0.1 * normalized)
    y = F.conv2d(activated, weight, stride=shape.stride, padding=shape.taps // 2) + residual
    y_mean = y.mean((0, 2, 3))
    statistics = y_mean, (y - y_mean[:, None, None]).square().mean((0, 2, 3))
    loss = (y * layer.grad.double()).sum() + (x * layer.skip_grad.double()).sum()
    weights = layer.mean_grad, layer.var_grad
    (loss + sum((each * w.double()).sum() for each, w in zip(statistics, weights, strict=True))).backward()

    x, gamma, beta, weight, residual = (leaf.detach().requires_grad_() for leaf in leaves)
    chosen = Tilings((16, 2), *((), ()) if by_library else ((16, 2), (3,)))
    arguments = (gamma, beta, EPSILON, weight, residual, shape.stride, chosen, True, folds, True)
    found, moments, partial, skip = norm_act_conv(x, moments_of(x), *arguments)
    loss = (found.float() * layer.grad).sum() + (skip.float() * layer.skip_grad).sum()
    (loss + sum((each * w).sum() for each, w in zip(moments, weights, strict=True))).backward()
    assert error(found, y.detach()) < 4e-3
    for each, reference in zip(moments, statistics, strict=True):
        assert error(each.detach(), reference.detach()) < 4e-3
    for leaf, reference in zip((x, gamma, beta, weight, residual), exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert error(leaf.grad, reference.grad) < 5e-3
    assert not partial.requires_grad


def test_gradients_are_given_to_the_kernels_in_channels_last():
    layer, seen = Layer(Shape(8, 16, 4, 8, 32, 3, 2), torch.bfloat16), []

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "norm_act_conv_" in function.name():
                seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
            return function(*args, **(kwargs or {}))

    x, chosen = layer.x.requires_grad_(), Tilings((16, 2), (16, 2), (3,))
    norm = layer.moments, layer.gamma, layer.beta, EPSILON
    found = norm_act_conv(x, *norm, layer.weight.requires_grad_(), None, 2, chosen).y
    with See():
        found.backward(layer.grad.contiguous())
    assert seen == [True, True]
