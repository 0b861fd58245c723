"""The choice of convolution kernels by measurement, with made-up times."""

import json
import logging
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from engine.config.config import Config
from engine.errors import UserError
from engine.models.fused import Pass
from engine.models.wide_resnet import WideResNet
from engine.training import convolutions, execution
from engine.training.convolutions import Layer, Times, cheapest, choose_tilings, library_bytes
from kernels import convolution
from kernels.convolution import Shape
from kernels.norm_act_conv import Tilings

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPE = Shape(2, 16, 8, 8, 32, 3, 2)
CONV1, CONV2 = Layer(SHAPE, "train"), Layer(SHAPE, "train", residual=True)
X, Y = 2 * 2 * 16 * 64, 2 * 2 * 32 * 16  # Bytes of input and result in bfloat16.


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remixmatch"


def offer(monkeypatch, forward=((32, 2), (16, 2)), input_grad=((16, 4),), weight_grad=((4,), (8,))):
    lists = {"forward": list(forward), "input_grad": list(input_grad), "weight_grad": list(weight_grad)}
    monkeypatch.setattr(convolution, "tilings", lambda shape, which: lists[which])


def timer(seconds, seen=None):
    """Return a timer that makes times up: 1 s, or what `seconds` has for a name."""

    def time(functions):
        if seen is not None:
            seen.extend(functions)
        return {name: seconds.get(name, 1.0) for name in functions}

    return time


def test_bytes_of_the_passes_that_the_operator_saves():
    """By hand: normalization reads and writes x; an addition reads two tensors and writes one; sums read two."""
    assert library_bytes(CONV1, 2) == (2 * X + Y, 2 * X, 2 * X)
    assert library_bytes(CONV2, 2) == (2 * X + 3 * Y, 2 * X, 2 * X)
    assert library_bytes(CONV1._replace(second=True), 2) == (0, X, 0)
    # The gradient of y is read with y, and written with that of the statistics; that of a skip connection is read.
    assert library_bytes(CONV2._replace(folds=True), 2) == (2 * X + 3 * Y, 2 * X + 3 * Y, 2 * X)
    assert library_bytes(CONV1._replace(folds=True, skips=True), 2).input_grad == 3 * X + 3 * Y
    assert library_bytes(CONV1._replace(mode="guess"), 2).forward == 2 * X + Y
    assert library_bytes(CONV1._replace(mode="eval"), 2).forward == X
    assert library_bytes(CONV2._replace(mode="eval"), 2).forward == 2 * X + 3 * Y


FOUND = {"forward": [(32, 2), (16, 2)], "input_grad": [(32, 4)], "weight_grad": [(4,), (8,)]}
LIBRARY = {"forward cudnn": 5.0, "input_grad cudnn": 6.0, "weight_grad cudnn": 7.0}
SAVED = [each / 1e3 for each in library_bytes(CONV1, 2)]
PARTIAL = 4 * 9 * 16 * 32 / 1e3  # Seconds for the bytes of one split's weight gradient.


@pytest.mark.parametrize(
    ("seconds", "tilings", "total"),
    [
        # The fastest of two, and cuDNN for both gradients: it then needs the sums and the activations, too.
        (
            {"forward 32 2": 3.0, "forward 16 2": 2.0, "input_grad 32 4": 6.1 + SAVED[1], "weight_grad 4": 9e9},
            Tilings((16, 2)),
            2 + 6 + SAVED[1] + 7 + SAVED[2],
        ),
        # The gradients' bytes count for the operator.
        (
            {"forward 32 2": 3.0, "input_grad 32 4": 5.9 + SAVED[1], "weight_grad 4": 9.0, "weight_grad 8": 8.0},
            Tilings((32, 2), (32, 4), ()),
            3 + 5.9 + SAVED[1] + 7 + SAVED[2],
        ),
        ({"forward 32 2": 3.0, "weight_grad 4": -60.0}, Tilings((32, 2), (), (4,)), 0),
        ({"input_grad 32 4": 1.0}, None, 0),  # No forward tiling works.
    ],
)
def test_the_fastest_kernel_of_each_pass(seconds, tilings, total):
    choice = cheapest(CONV1, FOUND, LIBRARY | seconds, 1e3, 2)
    assert choice.tilings == tilings
    assert choice.library_seconds == pytest.approx(5 + SAVED[0] + 6 + SAVED[1] + 7)
    if total:
        assert choice.seconds == pytest.approx(total)


def network():
    return WideResNet(3, scales=2, blocks=1, width=32)


PASSES = [Pass("train", 4, 8, 8), Pass("guess", 2, 8, 8), Pass("eval", 2, 8, 8)]


def choose(seconds, stats_samples=None, passes=PASSES, seen=None):
    times = Times(CPU, BF16, timer({"copied byte": 1e-9, **seconds}, seen))
    return choose_tilings(network(), passes, stats_samples, times)


def test_a_network_uses_the_faster_kernels(monkeypatch, caplog):
    offer(monkeypatch)
    caplog.set_level(logging.INFO)
    passes = [one._replace(samples=4) for one in PASSES]
    chosen = choose({"forward 16 2": 0.5, "input_grad 16 4": 0.5, "weight_grad 8": 2.0}, passes=passes)
    best = Tilings((16, 2), (16, 4))
    assert chosen[passes[0]] == ((best, best, best), (best, best, None))
    only_forward = Tilings((16, 2))
    assert chosen[passes[1]] == chosen[passes[2]] == ((only_forward,) * 3, (only_forward, only_forward, None))
    (line,) = caplog.messages
    # 1 s less for each forward pass and input gradient; the bytes take microseconds.
    assert line.startswith("convolutions: 15 of 15 use Triton kernels, which saves about 10000.")
    assert " ms of a step (measured in " in line


def test_cudnn_is_used_where_it_is_as_fast(monkeypatch):
    offer(monkeypatch)
    assert choose({"forward 16 2": 0.97, "forward cudnn": 0.98}) == {}


def test_gradients_that_each_layer_adds():
    """The last block of a scale has no successor with a skip connection; the first has a shortcut."""
    seen = []

    def see(layer, tilings):
        seen.append(layer)
        return tilings

    choose_tilings(WideResNet(3, scales=2, blocks=2, width=32), [Pass("train", 64, 8, 8)], None, None, first=see)
    found = [(layer.shape.outputs, layer.residual, layer.second, layer.folds, layer.skips) for layer in seen]
    assert found == [
        (32, False, False, True, False), (32, False, True, False, False), (32, True, False, True, False),
        (32, False, False, True, True), (32, True, False, False, False),
        (64, False, False, True, False), (64, True, False, True, False),
        (64, False, False, True, True), (64, True, False, False, False),
    ]  # fmt: skip
    seen.clear()
    choose_tilings(WideResNet(3, scales=2, blocks=2, width=32), [Pass("guess", 64, 8, 8)], None, None, first=see)
    assert seen and not any(layer.folds or layer.skips for layer in seen)


@pytest.mark.parametrize("adds", [True, False])
def test_gradients_are_timed_as_they_are_computed(monkeypatch, adds):
    offer(monkeypatch)
    seen = []
    monkeypatch.setattr(torch.ops.remixmatch, "norm_act_conv_input_grad", lambda *arguments: seen.append(arguments))
    dict(convolutions.functions(CONV1._replace(folds=adds, skips=adds), BF16, CPU))["input_grad 16 4"]()
    ((grad, x, *_, skip_grad), *correction) = (seen[0][:10], *seen[0][10:])
    assert x.shape == (2, 16, 8, 8) and grad.shape == (2, 32, 4, 4)
    if adds:
        y, factor, offset = correction
        assert skip_grad.shape == x.shape and y.shape == grad.shape and factor.shape == offset.shape == (32,)
    else:
        assert skip_grad is None and not correction


def test_convolutions_of_the_same_activations_use_the_operator_together():
    """The first block's shortcut and first convolution; here the shortcut is too slow."""
    first = [Layer(Shape(4, 16, 8, 8, 32, 3, 1), "guess"), Layer(Shape(4, 16, 8, 8, 32, 1, 1), "guess", second=True)]

    def chosen(shortcut_seconds):
        seconds = {first[0]: {"forward cudnn": 4.0, "forward 64 2": 3.0}}
        seconds[first[1]] = {"forward cudnn": 1.0, "forward 64 2": shortcut_seconds}
        times = SimpleNamespace(of=seconds.__getitem__, copy_bytes_per_second=1e30, dtype=BF16)
        return [choice.tilings for choice in convolutions._choose(first, times, None)]

    with pytest.MonkeyPatch.context() as patch:
        offer(patch, forward=[(64, 2)])
        assert chosen(1.8) == [Tilings((64, 2))] * 2
        assert chosen(2.1) == [None, None]


def test_the_first_samples_with_statistics_must_be_whole_tiles(monkeypatch):
    offer(monkeypatch, forward=[(32, 2), (16, 2), (8, 2)])
    layer = Layer(Shape(4, 16, 8, 8, 32, 3, 2), "train")
    assert convolutions.candidates(layer, None)["forward"] == [(32, 2), (16, 2), (8, 2)]
    assert convolutions.candidates(layer, 2)["forward"] == [(8, 2)]
    assert convolutions.candidates(layer._replace(second=True), 2)["forward"] == [(32, 2), (16, 2), (8, 2)]
    chosen = choose_tilings(network(), PASSES[:1], 2, None)
    assert [block.conv1 and block.conv1.forward for block in chosen[PASSES[0]]] == [(16, 2), (8, 2)]


def test_a_kernel_that_fails_is_skipped(monkeypatch, caplog):
    offer(monkeypatch)
    caplog.set_level(logging.DEBUG, convolutions.__name__)

    def forward(x, mean, rstd, gamma, beta, weight, residual, stride, statistics, tiling, *others):
        if tuple(tiling) == (16, 2):
            raise RuntimeError("out of resource: shared memory\nmore")
        return (x, x)

    monkeypatch.setattr(torch.ops.remixmatch, "norm_act_conv", forward)
    chosen = choose({"forward 16 2": 0.1, "forward 32 2": 0.5}, passes=PASSES[1:2])
    assert chosen[PASSES[1]][0] == (Tilings((32, 2)),) * 3
    assert "forward 16 2 does not work (out of resource: shared memory)" in caplog.text


def test_kernels_are_compiled_at_once(monkeypatch):
    offer(monkeypatch)
    both = threading.Barrier(2)

    def forward(x, *others):
        both.wait(timeout=20)
        return (x, x)

    monkeypatch.setattr(torch.ops.remixmatch, "norm_act_conv", forward)
    times = Times(CPU, BF16, lambda functions: dict.fromkeys(functions, 1.0))
    assert times.of(CONV1._replace(mode="eval")).keys() == {"forward cudnn", "forward 32 2", "forward 16 2"}


@pytest.mark.parametrize("failing", ["norm_act_conv", "cudnn"])
def test_being_out_of_memory_is_not_cached(monkeypatch, cache, failing):
    offer(monkeypatch)

    def fail(*arguments):
        raise torch.OutOfMemoryError

    if failing == "cudnn":
        monkeypatch.setattr(convolutions.F, "conv2d", fail)
    else:
        monkeypatch.setattr(torch.ops.remixmatch, failing, fail)
    times = Times(CPU, BF16, lambda functions: {name: function() and 1.0 for name, function in functions.items()})
    with pytest.raises(torch.OutOfMemoryError):
        times.of(CONV1._replace(mode="eval"))
    times.save()
    assert not list(cache.glob("*.json"))


def test_dtypes_have_times_of_their_own(monkeypatch):
    offer(monkeypatch)
    for dtype in (BF16, torch.float16):
        times = Times(CPU, dtype, timer({}))
        assert times.of(CONV1) and times.measured == 1
        times.save()


def test_triton_takes_the_first_tilings_that_work(monkeypatch):
    offer(monkeypatch)
    called = []

    def forward(x, mean, rstd, gamma, beta, weight, residual, stride, statistics, tiling, *others):
        called.append(x.shape)
        if tuple(tiling) == (32, 2):
            raise RuntimeError("out of resource: shared memory")
        return (x, x)

    def fail(*arguments):
        raise RuntimeError("out of resource: registers")

    monkeypatch.setattr(torch.ops.remixmatch, "norm_act_conv", forward)
    monkeypatch.setattr(torch.ops.remixmatch, "norm_act_conv_weight_grad", fail)
    first = partial(convolutions.first_working, BF16, CPU)
    passes = [one._replace(samples=4) for one in PASSES[:1]]
    deep = WideResNet(3, scales=1, blocks=3, width=16)
    found = choose_tilings(deep, passes, None, None, first=first)[passes[0]]
    only = Tilings((16, 2), (16, 4), ())
    assert found[1] == found[2] == (only, only, None)
    assert len(called) == 6, "each of three layers is tried once"


def test_times_are_cached(monkeypatch, cache, caplog):
    offer(monkeypatch)
    seconds, seen = {"forward 16 2": 0.5}, []
    first = choose(seconds, seen=seen)
    (path,) = cache.glob("*.json")
    # Five layers in each of three passes.
    assert seen.count("forward cudnn") == 15 and seen.count("copied byte") == 1
    stored = json.loads(path.read_text())
    assert stored["environment"]["torch"] == torch.__version__ and len(stored["environment"]["kernels"]) == 64
    caplog.set_level(logging.INFO)
    count = len(seen)
    assert choose({}, seen=seen) == first and len(seen) == count
    assert "(measured earlier)" in caplog.text
    path.write_text(path.read_text()[:-100])  # Damaged.
    again = []
    choose(seconds, seen=again)
    assert again.count("forward cudnn") == 15
    assert json.loads(path.read_text())["seconds"] == stored["seconds"]


def test_other_kernels_have_other_times(monkeypatch, cache, tmp_path):
    offer(monkeypatch)
    choose({})
    changed = tmp_path / "changed.py"
    changed.write_text("changed")
    monkeypatch.setattr(convolution, "__file__", str(changed))
    choose({})
    assert len(list(cache.glob("*.json"))) == 2


def test_processes_measure_one_after_another_and_share_their_times(monkeypatch, cache):
    offer(monkeypatch)
    one, other = (Times(CPU, BF16, timer({})) for _ in range(2))
    one.of(CONV1)
    found = []
    thread = threading.Thread(target=lambda: found.append(other.of(CONV1)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not found, "it waits"
    one.save()
    thread.join()
    assert found == [one.of(CONV1)] and other.measured == 0
    other.of(CONV2)
    other.save()
    third = Times(CPU, BF16, timer({}))
    assert third.of(CONV1) == found[0] and third.of(CONV2) and third.measured == 0


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    offer(monkeypatch)
    (tmp_path / "cache").write_text("a file")
    assert PASSES[1] in choose({"forward 16 2": 0.5})


@pytest.fixture
def run(monkeypatch):
    """Chooses for the networks of a run, whose passes are PASSES; returns the state."""
    state = SimpleNamespace(network=network(), ema_model=network())
    layout = SimpleNamespace(
        accumulation_steps=2, ranks=1, target_index=range(8), guess_inputs=4, probe_order=range(4),
        pool=range(4), labeled_index=range(6),
    )  # fmt: skip
    how = SimpleNamespace(convolutions="measured", device=CPU, precision=BF16)

    def choose_for(timer, bn_stats="all", **changes):
        settings = {name: changes.pop(name) for name in ("guess_pass", "interpolate_logits") if name in changes}
        config = Config(bn_stats=bn_stats, **settings)
        one = SimpleNamespace(**vars(layout) | changes)
        convolutions.choose_convolutions(config, state, one, how, (8, 8), timer)
        return state

    return choose_for


def test_both_networks_of_a_run_get_the_tilings_of_a_micro_batch(monkeypatch, run):
    offer(monkeypatch)
    state = run(timer({"forward 16 2": 0.1}))
    assert state.network.tilings is state.ema_model.tilings and list(state.network.tilings) == PASSES
    # The second block has 4 columns, so that its tiles of 16 pixels are 4 samples; the pool has 2 of each micro-batch.
    second = run(timer({"forward 16 2": 0.1}), "pool").network.tilings[PASSES[0]][1]
    assert second == (None, None, None)


def test_passes_of_several_ranks_and_of_a_joint_guess(monkeypatch, run):
    """The order of the probes is that of all ranks."""
    offer(monkeypatch)
    faster = timer({"forward 16 2": 0.1})
    ranks = run(faster, ranks=2, probe_order=range(8))
    assert list(ranks.network.tilings) == PASSES
    joint = run(faster, guess_pass="joint")
    assert list(joint.network.tilings) == [Pass("train", 6, 8, 8), PASSES[2]]
    interpolated = run(faster, interpolate_logits=True)
    assert list(interpolated.network.tilings) == [*PASSES, Pass("train", 6, 8, 8)]


def test_an_unexpected_failure_leaves_cudnn(monkeypatch, run, caplog):
    def fail(functions):
        raise RuntimeError("device lost")

    offer(monkeypatch)
    assert run(fail).network.tilings == {}
    assert "using cuDNN's convolutions: choosing others failed (device lost)" in caplog.text


def test_what_auto_and_triton_mean(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(execution, "has_triton", lambda: True)
    pick = execution.pick_convolutions
    assert pick(Config(), gpu) == "measured" and pick(Config(), CPU) == "cudnn"
    assert pick(Config(convolutions="triton", deterministic=True), gpu) == "triton"
    for setting in (
        dict(deterministic=True), dict(bn="sync"), dict(bn="split"), dict(precision="fp32"), dict(precision="fp64"),
        dict(network="timm:resnet18"), dict(convolutions="cudnn"),
    ):  # fmt: skip
        assert pick(Config(**setting), gpu) == "cudnn", setting
    monkeypatch.setattr(execution, "has_triton", lambda: False)
    assert pick(Config(), gpu) == "cudnn"
    with pytest.raises(UserError, match=r"--convolutions triton requires a GPU, --precision bf16 or fp16$"):
        pick(Config(convolutions="triton"), CPU)
    with pytest.raises(UserError, match=r"requires --bn joint$"):
        pick(Config(convolutions="triton", bn="sync"), gpu)
    with pytest.raises(UserError, match=r"requires a Wide ResNet$"):
        pick(Config(convolutions="triton", network="timm:resnet18"), gpu)
