"""A run that `bench start` times: `python -m bench.runs.start_worker train PRESET ...`.

Prints its CPU time and when each of PARTS ended, in seconds, and ends with the first trained step. Nothing is imported
before the command would import it.
"""

from __future__ import annotations

import os
import sys
import time

# python: the interpreter; options: flags, data set and folder; imports: torch and what rests on it; trainer: network,
# optimiser, the run's folder; views: their pipeline and the first plans; step: the first views, and a step
PARTS = ("python", "options", "imports", "trainer", "views", "step")


def main() -> None:
    """Runs the command as far as its first step."""
    ends = [time.time()]
    from engine.commands import main as cli
    from engine.commands import train
    from engine.imports import uncollected

    settle = train._set_up

    def settled(*arguments):
        options = settle(*arguments)
        ends.append(time.time())
        with uncollected():
            from engine.run import Trainer  # what the command imports next, and how

        ends.append(time.time())
        begin, advance = Trainer.begin, Trainer.advance

        def marked_begin(trainer: Trainer) -> None:
            ends.append(time.time())
            begin(trainer)
            ends.append(time.time())

        def last_advance(trainer: Trainer) -> None:
            advance(trainer)
            trainer.feed.drain(trainer.step)  # waits for a device
            ends.append(time.time())
            print(time.process_time(), *ends, flush=True)
            os._exit(0)

        Trainer.begin, Trainer.advance = marked_begin, last_advance  # type: ignore[assignment, method-assign]
        return options

    train._set_up = settled
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
