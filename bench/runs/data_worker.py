"""Training run of `bench data`: `python -m bench.runs.data_worker FOLDER STEPS VIEWS`.

Train on the cache `stl10` into FOLDER, and print a JSON object: median and mean milliseconds per step, CPU milliseconds
per step, and peak memory in MiB.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.runs.step_ends import on_step_end
from engine import run
from engine.config.config import Config
from engine.measuring.process import peak_memory
from engine.runs.setup import setup_run
from engine.training import ranges


def main() -> None:
    """Train, and print time and memory."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    ends: list[float] = []
    cpu: list[float] = []

    def ended() -> None:
        ends.append(time.perf_counter())
        cpu.append(time.process_time())

    # The network is small, so that the images take a visible share of the step.
    small: dict[str, Any] = {"width": 16, "blocks": 1, "scales": 2, "batch": 8, "k": 1, "views": sys.argv[3]}
    config = Config(
        dataset="stl10", labels=100, max_shift=12, steps=steps, eval_every=steps, checkpoint_every=steps, **small
    )
    with ranges.listening(on_step_end(ended)):
        run.train(setup_run(config, folder), quiet=True)
    times = [1e3 * (end - begin) for begin, end in pairwise(ends)]
    metrics = {"step_ms": median(times), "mean_step_ms": mean(times), "peak_memory_mib": peak_memory()}
    print(json.dumps(metrics | {"cpu_step_ms": 1e3 * (cpu[-1] - cpu[0]) / (steps - 1)}))


if __name__ == "__main__":
    main()
