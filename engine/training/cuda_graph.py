"""A step captured once as a CUDA graph and replayed.

Eagerly, a step is a thousand launches of a few microseconds each, which a host cannot issue as fast as the device
executes them. Captured, it is one. That needs fixed shapes, fixed addresses and no look at the device by the host in
between: `Step` is written so, and every address here is of a tensor that lives as long as the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from engine.config.config import Config
from engine.distributed import collectives
from engine.method.batch_layout import BatchLayout
from engine.training import ranges
from engine.training.execution import Execution
from engine.training.state import TrainState
from engine.training.step import Step, StepOutput
from engine.training.step_input import StepInput

# lazily made things have to be there before the capture: compiled code, cuDNN's choices, the optimiser's moments.
# DistributedDataParallel logs its times up to its tenth pass, by events that a capture may not have
_WARM_UP, _WARM_UP_RANKS = 3, 11


def make_step(
    config: Config, state: TrainState, layout: BatchLayout, execution: Execution, example: Callable[[], StepInput]
) -> Callable[[StepInput], StepOutput]:
    """The step of a run, in the mode of its execution.

    Args:
        config: the run's configuration.
        state: changed in place by every call.
        layout: this rank's rows.
        execution: eager, compiled or captured, and in which precision.
        example: gives an input of the shapes of all steps, if the step is captured.
    """
    compiled = execution.mode != "eager"
    make = partial(Step, config, state, layout, execution.precision, compiled, execution.inductor, execution.concurrent)
    return CapturedStep(make, example()) if execution.mode == "graph" else make()


class CapturedStep:
    """`Step`, as one graph: same call, same result.

    The state keeps its addresses from here on: whoever loads a checkpoint does so before.

    Args:
        make: makes the step, on a GPU; its state is as before when this returns.
        example: of the shapes of all steps to come.
    """

    def __init__(self, make: Callable[[], Step], example: StepInput) -> None:
        self._static = example.clone()
        self._stream = stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # made here, since DistributedDataParallel's hooks run on the stream on which they were made; and kept,
            # since the graph knows the step's own tensors by their addresses alone
            self._step = make()
            before = Snapshot(self._step.state)
            for _ in range(_WARM_UP_RANKS if collectives.grouped() else _WARM_UP):
                self._step(self._static)
            before.restore()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # other threads may go on with what they do, such as making views
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._output = self._step(self._static)

    def __call__(self, data: StepInput) -> StepOutput:
        """Trains one step: see `Step.__call__`.

        Returns:
            Tensors that the next call overwrites, in the order of the current stream.
        """
        self._static.copy_(data)
        ranges.enter("replay")
        self._graph.replay()
        return self._output

    def launch_by_launch(self) -> None:
        """Trains a step on the last input once more, as it was captured, so that its parts can be told apart."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(self._static)
        torch.cuda.current_stream().wait_stream(self._stream)


class Snapshot:
    """The state's tensors as they were, put back in place: addresses stay, and what has come since is zeroed.

    What comes with the first step are the optimiser's moments and counts, which begin at zero.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._scale = state.scaler.state_dict()
        self._values = [(tensor, tensor.clone()) for tensor in state.tensors()]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        known = {id(tensor) for tensor, _ in self._values}
        for tensor, value in self._values:
            tensor.copy_(value)
        for tensor in self._state.tensors():
            if id(tensor) not in known:
                tensor.zero_()
        self._state.scaler.load_state_dict(self._scale)
