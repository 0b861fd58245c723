"""A training step captured once as a CUDA graph and replayed.

An eager step is about a thousand kernel launches of a few microseconds each, and the host cannot issue them as fast as
the device executes them. A captured step is one launch. Capture requires fixed shapes, fixed addresses and no
synchronization with the host. `Step` meets these conditions, and every tensor used here lives as long as the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from engine.config.config import Config
from engine.distributed import collectives
from engine.method.batch_layout import BatchLayout
from engine.training import ranges
from engine.training.convolutions import choose_convolutions
from engine.training.execution import Execution
from engine.training.state import TrainState
from engine.training.step import Step, StepOutput
from engine.training.step_input import StepInput

# Warm-up steps before the capture create what is initialized lazily: compiled code, cuDNN's choices, the optimizer's
# moments. DistributedDataParallel records timing events, which a capture does not allow, during its first ten passes.
_WARM_UP, _WARM_UP_RANKS = 3, 11


def make_step(
    config: Config, state: TrainState, layout: BatchLayout, execution: Execution, example: Callable[[], StepInput]
) -> Callable[[StepInput], StepOutput]:
    """Make the training step of a run, eager, compiled or captured.

    Args:
        config: The run's configuration.
        state: The training state, updated in place by every call.
        layout: This rank's batch layout.
        execution: The mode and precision of the step.
        example: Returns an input with the shapes of all steps; called if the step is captured.
    """
    if execution.convolutions != "cudnn":
        _, height, width, _ = example().views.shape
        choose_convolutions(config, state, layout, execution, (height, width))
    compiled = execution.mode != "eager"
    make = partial(Step, config, state, layout, execution.precision, compiled, execution.inductor, execution.concurrent)
    return CapturedStep(make, example()) if execution.mode == "graph" else make()


class CapturedStep:
    """A `Step` captured as a CUDA graph, with the same call and results.

    The graph refers to the state by address. Load a checkpoint before constructing this object.

    Args:
        make: Makes the step, on a GPU. The constructor runs it to warm up and then restores its state.
        example: An input with the shapes of all steps.
    """

    def __init__(self, make: Callable[[], Step], example: StepInput) -> None:
        self._static = example.clone()
        self._stream = stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Made here, since DistributedDataParallel's hooks run on the stream that they were registered on. Kept,
            # since the graph refers to the step's own tensors by address only.
            self._step = make()
            before = Snapshot(self._step.state)
            for _ in range(_WARM_UP_RANKS if collectives.grouped() else _WARM_UP):
                self._step(self._static)
            before.restore()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may keep using the GPU, for example to make views.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._output = self._step(self._static)

    def __call__(self, data: StepInput) -> StepOutput:
        """Train one step; see `Step.__call__`.

        Returns:
            Tensors that the next call overwrites, ordered by the current stream.
        """
        self._static.copy_(data)
        ranges.enter("replay")
        self._graph.replay()
        return self._output

    def launch_by_launch(self) -> None:
        """Train on the last input once more without the graph, so that a profiler sees every kernel launch."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(self._static)
        torch.cuda.current_stream().wait_stream(self._stream)


class Snapshot:
    """A copy of the state's tensors, to be restored in place.

    Tensors keep their addresses. Tensors created after the snapshot are zeroed: these are the optimizer's moments and
    step counts, which start at zero.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._scale = state.scaler.state_dict()
        self._values = [(tensor, tensor.clone()) for tensor in state.tensors()]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state."""
        known = {id(tensor) for tensor, _ in self._values}
        for tensor, value in self._values:
            tensor.copy_(value)
        for tensor in self._state.tensors():
            if id(tensor) not in known:
                tensor.zero_()
        self._state.scaler.load_state_dict(self._scale)
