"""Run that `bench start` times: `python -m bench.runs.start_worker train PRESET ...`.

Print its CPU time and the time when each of PARTS ended, in seconds, and exit after the first trained step. Nothing is
imported earlier than the command would import it.
"""

from __future__ import annotations

import os
import sys
import time

from bench.runs.step_ends import on_step_end

# Parts of a start, each with the range that begins when the part ends. python: the interpreter; options: flags, data
# set and folder; imports: torch and modules that depend on it; trainer: network, optimizer and the run's folder; views:
# their pipeline and the first plans; step: the first views and one step.
ENDS = {"options": "import", "imports": "build", "trainer": "prepare", "views": "wait for views"}
PARTS = ("python", *ENDS, "step")


def main() -> None:
    """Run the command up to its first step."""
    started = time.time()
    from engine.commands import main as cli
    from engine.training import ranges

    begun: dict[str, float] = {}

    def finish() -> None:
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        ends = [started, *(begun[name] for name in ENDS.values()), time.time()]
        print(time.process_time(), *ends, flush=True)
        os._exit(0)

    step_listener = on_step_end(finish)

    def listener(part: str) -> None:
        begun.setdefault(part, time.time())
        step_listener(part)

    with ranges.listening(listener):
        cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
