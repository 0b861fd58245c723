"""Time a training step in a subprocess: the worker process and its client.

`python -m engine.measuring.step_worker REQUEST` compiles and warms up the step of a configuration and prints `ready`.
It then answers each line of its input with a line of JSON:

- `sample N`: seconds per step, averaged over N steps.
- `profile N`: the device's work in N steps.
- `memory`: peak memory in MiB.

`bench variants` and `ablate` interleave the measurements of several workers. With another checkout on PYTHONPATH, the
worker times the step of that checkout, which must contain this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.config.config import Config
from engine.distributed.launch import PARENT, die_with_parent
from engine.measuring.steps import TimedSteps
from engine.measuring.timing import interleave, sample
from engine.measuring.trace import DEVICE, outermost, read, record
from pipelines.processes import ROOT, python_environment


class StepWorker:
    """A training step in a subprocess, which ends with this one and does not receive its SIGINT.

    Args:
        config: Fields of the configuration. Fields unknown to the checkout are ignored.
        views: Source of the views, one of `engine.measuring.steps.VIEWS`.
        execution: Fields of `Execution` to override.
        checkout: Folder of the checkout to time.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        views: str = "synthetic",
        execution: Mapping[str, Any] | None = None,
        checkout: Path = ROOT,
    ) -> None:
        request = json.dumps({"config": dict(config), "views": views, "execution": dict(execution or {})})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.measuring.step_worker", request],
            env=python_environment(checkout) | {PARENT: str(os.getpid())},
            cwd=checkout,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )

    def ready(self) -> None:
        """Wait until the step can be timed.

        Raises:
            RuntimeError: The step cannot be compiled or run.
        """
        for line in self._process.stdout or ():
            if line.strip() == "ready":
                return
        raise RuntimeError(f"the step ended with exit code {self._process.wait()}")

    def ask(self, request: str) -> Any:
        """Send a request and return its answer. See the module's docstring for the requests."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the step ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> StepWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """End the process, at once after an error or interrupt."""
        if kind is None and self._process.stdin:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._process.kill()
        self._process.wait()


def sample_interleaved(workers: Mapping[str, Any], repeats: int, steps: int) -> dict[str, list[float]]:
    """Return seconds per step of each worker, one sample per round. The order is reversed every second round."""
    rounds = interleave({name: partial(one.ask, f"sample {steps}") for name, one in workers.items()}, repeats)
    return {name: [taken[name] for taken in rounds] for name in workers}


def main(request: Mapping[str, Any]) -> None:
    """Serve one step.

    Args:
        request: "config", "views" and "execution" as in `StepWorker`.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in request["config"].items()
        if name in known
    }
    config = Config(**fields)
    case = TimedSteps.begin(config, request["views"], request["execution"])
    device = case.feed.execution.device
    cuda = device.type == "cuda"
    case.advance(3 * config.view_steps)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *number = line.split()
        if what == "sample":
            steps = int(number[0]) * config.view_steps
            answer: Any = sample(partial(case.advance, steps), device, 1) / steps
        elif what == "profile":
            answer = _profile(case, int(number[0]) * config.view_steps)
        else:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            answer = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident
        print(json.dumps(answer), flush=True)
    case.end()


def _profile(case: TimedSteps, steps: int) -> list[dict[str, Any]]:
    """Return name, begin and end (microseconds) of the kernels in `steps` steps, or of the operators on a CPU."""
    events = read(record(lambda: case.advance(steps), case.feed.execution.device)[0])
    kernels = [event for event in events if event.kind == DEVICE]
    return [{"name": event.name, "begin": event.begin, "end": event.end} for event in kernels or outermost(events)]


if __name__ == "__main__":
    die_with_parent()
    main(json.loads(sys.argv[1]))
