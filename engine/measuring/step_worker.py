"""A training step that is timed in a process of its own: the process, and how another one talks to it.

`python -m engine.measuring.step_worker REQUEST` compiles and warms up the step of a configuration, prints `ready`, and
then answers each line of its input by a line: `sample N` by the seconds that a step takes over N of them, `profile N`
by what the device did in N steps, `memory` by the MiB that it has had at most. `bench variants` and `ablate` have
several such processes take turns; with the packages of another checkout on PYTHONPATH, the step is that
checkout's, which has to have this file.
"""

from __future__ import annotations

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
from engine.measuring.process import search_path
from engine.measuring.steps import TimedSteps
from engine.measuring.timing import in_turns, sample
from engine.measuring.trace import DEVICE, outermost, read, record

ROOT = Path(__file__).parents[2]


class StepWorker:
    """A step in a process of its own, which waits for its turn.

    Args:
        config: fields of the configuration; those that the checkout does not know are left out.
        views: where they come from, see `engine.measuring.steps.VIEWS`.
        execution: fields of `Execution` that are otherwise than the configuration has them.
        checkout: whose step it is.
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
            [sys.executable, "-P", "-m", "engine.measuring.step_worker", request],
            env=os.environ | {"PYTHONPATH": search_path(checkout)},
            cwd=checkout,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ready(self) -> None:
        """Returns when the step can be timed.

        Raises:
            RuntimeError: it cannot be compiled or run.
        """
        for line in self._process.stdout or ():
            if line.strip() == "ready":
                return
        raise RuntimeError(f"the step ended with exit code {self._process.wait()}")

    def ask(self, what: str) -> Any:
        """The answer to one line: see the module."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the step ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """Ends the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def take_turns(workers: Mapping[str, Any], repeats: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each worker, one sample a round; every second round goes backwards."""
    rounds = in_turns({name: partial(one.ask, f"sample {steps}") for name, one in workers.items()}, repeats)
    return {name: [taken[name] for taken in rounds] for name in workers}


def main(request: Mapping[str, Any]) -> None:
    """Serves one step.

    Args:
        request: "config", "views" and "execution", see `StepWorker`.
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
    """Kernels of so many steps, or on a CPU operators: name, and begin and end in microseconds."""
    events = read(record(lambda: case.advance(steps), case.feed.execution.device)[0])
    kernels = [event for event in events if event.kind == DEVICE]
    return [{"name": event.name, "begin": event.begin, "end": event.end} for event in kernels or outermost(events)]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
