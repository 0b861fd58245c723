"""One step that `bench variants` or `ablate` times, in a process of its own; also that of an earlier checkout.

Run by its path, with the packages of a checkout on PYTHONPATH; the first argument is a request in JSON. Says `ready`
once the step has been compiled and warmed up, then answers each line of its input by a line: `sample N` by the seconds
a step takes over N of them, `profile N` by what the device did in N steps, `memory` by the MiB it has had at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import sys
from typing import Any

import torch

from bench import throughput
from bench.timing import sample
from engine import execution, step
from engine.config import Config


def main(request: dict[str, Any]) -> None:
    """Serves one variant.

    Args:
        request: "config", fields that replace those of the bench's step, unknown ones left out; "views", where they
            come from, by default ready-made; "inductor", options in place of the engine's, or null; "streams", whether
            passes may run beside one another; "benchmark", whether cuDNN measures its kernels. All but the first may
            be missing.
    """
    if request.get("inductor") is not None and hasattr(execution, "INDUCTOR"):
        execution.INDUCTOR = request["inductor"]
    if not request.get("streams", True):
        step._on = lambda stream: contextlib.nullcontext()  # type: ignore
        step._wait_for = lambda stream: None
    numerics = throughput.set_numerics

    def with_benchmark(deterministic: bool) -> None:
        numerics(deterministic)
        torch.backends.cudnn.benchmark = request["benchmark"]

    if "benchmark" in request:
        throughput.set_numerics = with_benchmark
    cuda = torch.cuda.is_available()
    known = {field.name for field in dataclasses.fields(Config)}
    changes: dict[str, Any] = {"mode": "graph" if cuda else "eager"}
    changes |= {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in request["config"].items()
        if name in known
    }
    config = dataclasses.replace(throughput.base_config("", cuda), **changes)
    case = throughput.Case.begin(config, request.get("views", "synthetic"))
    device = case.feed.execution.device
    case.advance(3 * config.view_steps)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *number = line.split()
        if what == "sample":
            steps = int(number[0]) * config.view_steps
            answer: Any = sample(lambda steps=steps: case.advance(steps), device, 1) / steps  # type: ignore[misc]
        elif what == "profile":
            answer = _profile(case, int(number[0]) * config.view_steps)
        else:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            answer = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident
        print(json.dumps(answer), flush=True)
    case.end()


def _profile(case: throughput.Case, steps: int) -> list[dict[str, Any]]:
    """Kernels of so many steps, or on a CPU operators: name, and begin and end in microseconds."""
    from bench.profile import record  # which an earlier checkout, that nobody profiles, may not have
    from bench.trace import DEVICE, outermost, read

    events = read(record(lambda: case.advance(steps), case.feed.execution.device)[0])
    kernels = [event for event in events if event.kind == DEVICE]
    return [{"name": event.name, "begin": event.begin, "end": event.end} for event in kernels or outermost(events)]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
