"""Choice of the kernels of a network's convolutions: cuDNN's or ours, by measurement on the run's device.

`kernels.norm_act_conv` computes a convolution together with what surrounds it: batch norm and leaky ReLU before it, the
residual addition and the statistics for the next batch norm after it. To compare both, every distinct layer is timed
with the shapes of the run, and cuDNN is charged for the passes over activations that it needs and the operator does
not: their bytes at the bandwidth of a large copy, which is less than they take. A layer uses the operator if that is
faster over forward pass and gradients together. Each of the operator's gradients may still be computed by cuDNN.

Measured times are cached per user, device, library versions and source of the kernels. Choices follow from them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.config import Config
from engine.distributed import collectives
from engine.measuring import timing
from engine.method.batch_layout import BatchLayout
from engine.models import fused
from engine.models.fused import BlockTilings, Pass
from engine.models.wide_resnet import WideResNet
from engine.training.execution import Execution
from engine.training.state import TrainState
from kernels import convolution, norm_act_conv
from kernels.convolution import Shape
from kernels.norm_act_conv import Tilings
from pipelines.files import checked_json, first_line, read_json, write_text

log = logging.getLogger(__name__)

Found = dict[str, list[tuple[int, ...]]]
Timer = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, float]]
NetworkTilings = dict[Pass | None, tuple[BlockTilings, ...]]
PASSES = ("forward", "input_grad", "weight_grad")
LIBRARY = "cudnn"
_MARGIN = 0.02  # Share of its time that a layer must save, so that noise does not decide.
_REPEATS = 10


class Layer(NamedTuple):
    """A convolution of one kind of pass.

    Attributes:
        shape: Shape of the convolution.
        mode: See `Pass`.
        residual: Whether a residual is added to the result.
        second: Whether another convolution normalizes the same input: a shortcut of activations. Its result has no
            statistics.
        folds: Whether the input gradient's kernel adds the gradient of the statistics; see `norm_act_conv`.
        skips: Whether it also adds the gradient of a skip connection, likewise.
    """

    shape: Shape
    mode: str
    residual: bool = False
    second: bool = False
    folds: bool = False
    skips: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that a step computes, of PASSES."""
        return PASSES if self.mode == "train" else PASSES[:1]


class Choice(NamedTuple):
    """Tilings for a layer, and the seconds that it takes with cuDNN and with them."""

    tilings: Tilings | None
    library_seconds: float = 0.0
    seconds: float = 0.0


class Library(NamedTuple):
    """Bytes of the passes over activations that cuDNN's convolutions need and the operator does not.

    Attributes:
        forward: Of a forward pass.
        input_grad: Of the input gradient.
        activations: Of recomputing the activations for cuDNN's weight gradient after the operator's forward pass.
    """

    forward: int
    input_grad: int
    activations: int


def library_bytes(layer: Layer, itemsize: int) -> Library:
    """Count the bytes of the passes that the operator saves, as torch.compile fuses them today.

    Args:
        layer: The layer.
        itemsize: Bytes of an element of the activations.
    """
    s = layer.shape
    x = s.samples * s.height * s.width * s.inputs * itemsize
    y = s.samples * (s.height // s.stride) * (s.width // s.stride) * s.outputs * itemsize
    # Reads two addends and writes their sum; this pass also computes the statistics. Without a residual, they are read.
    addition = 3 * y if layer.residual else 0 if layer.mode == "eval" else y
    # Reads x and writes the activations. In evaluation mode, the addition before a first convolution already has x.
    normalization = x if layer.mode == "eval" and not layer.residual else 2 * x
    if layer.second:  # The other convolution pays for the normalization, and two gradients are added in either case.
        return Library(0, x, 0)
    # The sums of batch norm's backward read the gradient and x. Without the kernel, another pass reads the gradient of
    # y and y, and writes the former, and such a pass before this layer reads the gradient of the skip connection.
    input_grad = (3 if layer.skips else 2) * x + (3 * y if layer.folds else 0)
    return Library(normalization + addition, input_grad, 2 * x)


def choose_convolutions(
    config: Config,
    state: TrainState,
    layout: BatchLayout,
    execution: Execution,
    sides: tuple[int, int],
    timer: Timer | None = None,
) -> None:
    """Set the tilings of a run's networks, the same on all ranks; call this before they are compiled.

    Args:
        config: The run's configuration.
        state: The training state.
        layout: This rank's batch layout.
        execution: `convolutions` is "triton", which takes the first tiling of each kernel that works on the device, or
            "measured".
        sides: (H, W) of the images.
        timer: Returns the seconds that each function takes; by default `engine.measuring.timing.measure`.
    """
    assert isinstance(state.network, WideResNet) and isinstance(state.ema_model, WideResNet)
    parts = layout.accumulation_steps
    guesses = layout.guess_inputs // parts
    joint = config.guess_pass == "joint"
    sizes = {
        "train": len(layout.target_index) // parts + (guesses if joint else 0),
        "guess": 0 if joint else guesses,
        "eval": len(layout.probe_order) // layout.ranks // parts,
    }
    passes = [Pass(mode, samples, *sides) for mode, samples in sizes.items() if samples]
    if config.interpolate_logits:  # A training pass over the labeled samples alone.
        passes.append(Pass("train", len(layout.labeled_index), *sides))
    stats_samples = len(layout.pool) // parts if config.bn_stats == "pool" else None
    network = state.network

    def choose() -> NetworkTilings:
        device, dtype = execution.device, execution.precision
        try:
            if execution.convolutions == "triton":
                first = partial(first_working, dtype, device)
                return choose_tilings(network, passes, stats_samples, None, parts, first)
            return choose_tilings(network, passes, stats_samples, Times(device, dtype, timer), parts)
        except Exception as error:  # Training is possible without.
            log.warning(f"using cuDNN's convolutions: choosing others failed ({first_line(error)})")
            log.debug("traceback", exc_info=True)
            return {}
        finally:
            if device.type == "cuda":  # What was measured is no part of the run's memory.
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)

    tilings = collectives.run_on_rank_0(choose)
    state.network.tilings = state.ema_model.tilings = tilings


def choose_tilings(
    network: WideResNet,
    passes: list[Pass],
    stats_samples: int | None,
    times: Times | None,
    parts: int = 1,
    first: Callable[[Layer, Found], Found] | None = None,
) -> NetworkTilings:
    """Choose the tilings of every layer in some passes of a network. Passes without any are omitted.

    Args:
        network: The network.
        passes: The passes.
        stats_samples: See `WideResNet.forward`, in training.
        times: Measured times; None takes the first tiling of each kernel.
        parts: Number of times that a step runs each pass, for the log.
        first: Narrows down a layer's tilings, before the first one is taken, without measured times.
    """
    begin = time.perf_counter()
    result: NetworkTilings = {}
    used = layers = 0
    saved = 0.0
    for one in passes:
        counted = stats_samples if one.mode == "train" else None
        choose = cache(partial(_choose, times=times, stats_samples=counted, first=first))
        blocks, train = [], one.mode == "train"
        for folds, skips, shapes in zip(*fused.gradients(network), fused.shapes(network, *one[1:]), strict=True):
            first_layer = partial(Layer, mode=one.mode, folds=train, skips=train and skips)
            both: tuple[Layer, ...] = (first_layer(shapes.conv1),) if shapes.conv1 else ()
            both += (Layer(shapes.shortcut, one.mode, second=True),) if shapes.shortcut else ()
            # Convolutions of the same activations use the operator together, or none does.
            second = (Layer(shapes.conv2, one.mode, residual=True, folds=train and folds),) if shapes.conv2 else ()
            chosen, chosen_second = choose(both), choose(second)
            each = [*chosen, *chosen_second]
            conv1, shortcut = [*(choice.tilings for choice in chosen), None, None][:2]
            blocks.append(BlockTilings(conv1, chosen_second[0].tilings if second else None, shortcut))
            layers += len(each)
            used += sum(choice.tilings is not None for choice in each)
            saved += sum(choice.library_seconds - choice.seconds for choice in each if choice.tilings)
        if any(tilings for block in blocks for tilings in block):
            result[one] = tuple(blocks)
    text = f"convolutions: {used} of {layers} use Triton kernels"
    if times is not None:
        times.save()
        source = f"measured in {time.perf_counter() - begin:.0f} s" if times.measured else "measured earlier"
        text += f", which saves about {1e3 * parts * saved:.2f} ms of a step ({source})"
    log.info(text)
    return result


def candidates(layer: Layer, stats_samples: int | None) -> Found:
    """Return the tilings to choose from for each pass of a layer.

    Args:
        layer: The layer.
        stats_samples: Number of first samples with statistics of their own, which must be whole tiles.
    """
    found = {which: convolution.tilings(layer.shape, which) for which in layer.passes}
    if stats_samples is not None and not layer.second:
        pixels = stats_samples * (layer.shape.width // layer.shape.stride)
        found["forward"] = [tiling for tiling in found["forward"] if pixels % tiling[0] == 0]
    return found


def first_working(dtype: torch.dtype, device: torch.device, layer: Layer, tilings: Found) -> Found:
    """Return the first tiling of each pass that works on a device.

    Args:
        dtype: Dtype of the activations.
        device: The device.
        layer: The layer.
        tilings: Tilings to choose from, see `candidates`.
    """
    every = dict(functions(layer, dtype, device))
    found = {}
    for which, choices in tilings.items():
        working = (tiling for tiling in choices if _works(layer, name(which, tiling), every, device))
        found[which] = list(itertools.islice(working, 1))
    return found


def _works(layer: Layer, each: str, every: Mapping[str, Callable[[], Any]], device: torch.device) -> bool:
    """Call a kernel, which compiles it, and return whether it works. Being out of memory is no fault of the kernel."""
    cuda = device.type == "cuda"
    try:
        with torch.cuda.device(device) if cuda else contextlib.nullcontext():  # Each thread has its own.
            every[each]()
            if cuda:
                torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # For example too little shared memory; Triton has many kinds.
        log.debug(f"{layer}: {each} does not work ({first_line(error)})")
        return False
    return True


def _choose(
    layers: Sequence[Layer],
    times: Times | None,
    stats_samples: int | None,
    first: Callable[[Layer, Found], Found] | None = None,
) -> list[Choice]:
    """Choose tilings for layers of the same input: for all of them or for none."""
    choices = []
    for layer in layers:
        found = candidates(layer, stats_samples)
        if times is None:
            found = first(layer, found) if first else found
            taken = [found.get(which, [])[:1] for which in PASSES]
            choices.append(Choice(Tilings(*(each[0] if each else () for each in taken)) if taken[0] else None))
        else:
            choices.append(cheapest(layer, found, times.of(layer), times.copy_bytes_per_second, times.dtype.itemsize))
    if any(choice.tilings is None for choice in choices):
        return [Choice(None) for _ in choices]
    before, after = (sum(each) for each in ([c.library_seconds for c in choices], [c.seconds for c in choices]))
    if times is not None and after > (1 - _MARGIN) * before:
        return [Choice(None) for _ in choices]
    return choices


def cheapest(
    layer: Layer,
    tilings: Mapping[str, list[tuple[int, ...]]],
    seconds: Mapping[str, float],
    copy_bytes_per_second: float,
    itemsize: int,
) -> Choice:
    """Return the fastest tilings of a layer, and its time with cuDNN and with them; see the module's docstring.

    Args:
        layer: The layer.
        tilings: Tilings to choose from, see `candidates`.
        seconds: Time of each tiling that works, and of cuDNN, by `name`.
        copy_bytes_per_second: Bandwidth of a large copy, bytes read plus bytes written.
        itemsize: Bytes of an element of the activations.
    """
    passes = {field: count / copy_bytes_per_second for field, count in library_bytes(layer, itemsize)._asdict().items()}
    library = sum(seconds[name(which)] + passes.get(which, 0.0) for which in layer.passes)
    chosen: dict[str, tuple[int, ...]] = {}
    total = 0.0
    for which in layer.passes:
        working = {tiling: seconds[name(which, tiling)] for tiling in tilings[which] if name(which, tiling) in seconds}
        if which == "input_grad":
            working[()] = seconds[name(which)] + passes[which]
        elif which == "weight_grad":
            partials = 4 * layer.shape.outputs * layer.shape.inputs * layer.shape.taps**2 / copy_bytes_per_second
            working = {tiling: taken + tiling[0] * partials for tiling, taken in working.items()}
            working[()] = seconds[name(which)] + passes["activations"]
        if not working:
            return Choice(None, library, library)
        chosen[which] = min(working, key=working.__getitem__)
        total += working[chosen[which]]
    return Choice(Tilings(**chosen), library, total)


def name(which: str, tiling: tuple[int, ...] = ()) -> str:
    """Return the name of a kernel's time; () is cuDNN's."""
    return " ".join([which, *(map(str, tiling) if tiling else [LIBRARY])])


class Times:
    """Measured times of layers on a device, cached in a file.

    Args:
        device: The device.
        dtype: Dtype of the activations.
        timer: See `choose_convolutions`.

    Attributes:
        measured: Number of layers measured by this object.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, timer: Timer | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.timer = timer or self._time
        self.measured = 0
        self._environment = _environment(device)
        digest = hashlib.sha256(json.dumps(self._environment, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_folder() / f"convolutions-{digest}.json"
        self._seconds: dict[str, dict[str, float]] = self._read()
        self._lock: BinaryIO | None = None

    def _read(self) -> dict[str, dict[str, float]]:
        return read_json(self.path, {"seconds": {str: {str: float}}}).get("seconds", {})

    @property
    def copy_bytes_per_second(self) -> float:
        """Bandwidth of a large copy, measured once."""
        if "copy" not in self._seconds:
            if self.timer == self._time:
                bandwidth = timing.ceilings(self.device).copy_bytes_per_second
            else:
                bandwidth = 1 / self.timer({"copied byte": lambda: None})["copied byte"]
            self._seconds["copy"] = {"bytes_per_second": bandwidth}
        return self._seconds["copy"]["bytes_per_second"]

    def of(self, layer: Layer) -> Mapping[str, float]:
        """Return the seconds of each kernel of a layer, by `name`; those that do not work are missing."""
        key = f"{self.dtype} {layer}"
        if key not in self._seconds:
            self._wait_for_others()
        if key not in self._seconds:
            self._seconds[key] = self._measure(layer)
            self.measured += 1
        log.debug(f"{layer}: " + ", ".join(f"{each} {1e6 * s:.1f} us" for each, s in self._seconds[key].items()))
        return self._seconds[key]

    def _wait_for_others(self) -> None:
        """Let no other process measure until `save`: it would disturb these measurements. Take over its times."""
        if self._lock is None:
            with contextlib.suppress(OSError):  # Without a lock, times may be less exact.
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = self.path.with_suffix(".lock").open("wb")
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.info("convolutions: waiting for another process, which measures them")
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._seconds |= self._read()

    def save(self) -> None:
        """Write new times to the cache, with what other processes have written meanwhile."""
        if self.measured:
            content = {"environment": self._environment, "seconds": self._read() | self._seconds}
            try:
                write_text(self.path, checked_json(content), shared=True)
            except OSError as error:
                log.debug(f"{self.path} cannot be written ({error.strerror or error})")
        if self._lock is not None:
            self._lock.close()

    def _measure(self, layer: Layer) -> dict[str, float]:
        every = dict(functions(layer, self.dtype, self.device))
        library = [name(which) for which in layer.passes]
        ours = [each for each in every if each not in library]
        # Compiling a kernel takes a second, most of it without Python's lock. cuDNN's own timing must not be disturbed.
        with ThreadPoolExecutor() as threads:
            work = list(threads.map(lambda each: _works(layer, each, every, self.device), ours))
        working = {each: every[each] for each in library}
        working |= {each: every[each] for each, works in zip(ours, work, strict=True) if works}
        return dict(self.timer(working))

    def _time(self, functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        timings = timing.measure(functions, self.device, _REPEATS, queued=True)
        return {each: one.seconds for each, one in timings.items()}


def functions(layer: Layer, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield name and function of every kernel of a layer, on tensors of its shapes."""
    s = layer.shape
    noise = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        count = math.prod(sizes)
        values = noise.repeat(math.ceil(count / len(noise)))[:count].view(sizes).mul_(scale)
        return values.contiguous(memory_format=torch.channels_last)

    x = random(s.samples, s.inputs, s.height, s.width)
    weight = random(s.outputs, s.inputs, s.taps, s.taps, scale=(s.inputs * s.taps**2) ** -0.5)
    grad = random(s.samples, s.outputs, s.height // s.stride, s.width // s.stride)
    residual = torch.zeros_like(grad) if layer.residual else None
    correction = (random(*grad.shape), *torch.ones(2, s.outputs, device=device)) if layer.folds else ()
    skip_grad = random(*x.shape) if layer.skips else None
    mean, ones = torch.zeros(s.inputs, device=device), torch.ones(s.inputs, device=device)
    norm = mean, ones, ones, mean
    statistics = layer.mode != "eval" and not layer.second
    fixed = (None, [s.stride] * 2, [s.taps // 2] * 2, [1, 1], False, [0, 0], 1)
    ours = torch.ops.remixmatch

    def forward(tiling: tuple[int, ...]) -> Callable[[], Any]:
        return lambda: ours.norm_act_conv(x, *norm, weight, residual, s.stride, statistics, tiling)

    def input_grad(tiling: tuple[int, ...]) -> Callable[[], Any]:
        arguments = (grad, x, *norm, weight, s.stride, tiling, skip_grad, *correction)
        return lambda: ours.norm_act_conv_input_grad(*arguments)

    def weight_grad(tiling: tuple[int, ...]) -> Callable[[], Any]:
        return lambda: ours.norm_act_conv_weight_grad(grad, x, *norm, s.taps, s.stride, tiling)

    def library_grad(*wanted: bool) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(grad, x, weight, *fixed, [*wanted, False])

    yield name("forward"), lambda: F.conv2d(x, weight, None, s.stride, s.taps // 2)
    for tiling in convolution.tilings(s, "forward"):
        yield name("forward", tiling), forward(tiling)
    if layer.mode != "train":
        return
    yield name("input_grad"), library_grad(True, False)
    for tiling in convolution.tilings(s, "input_grad"):
        yield name("input_grad", tiling), input_grad(tiling)
    yield name("weight_grad"), library_grad(False, True)
    for tiling in convolution.tilings(s, "weight_grad"):
        yield name("weight_grad", tiling), weight_grad(tiling)


def cache_folder() -> Path:
    """Return the user's folder for what can be measured again."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "remixmatch"


def _environment(device: torch.device) -> dict[str, Any]:
    """Return what measured times depend on, besides the layer."""
    import triton

    cuda = device.type == "cuda"
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in (convolution, norm_act_conv))
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else [],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": hashlib.sha256(source).hexdigest(),
    }
