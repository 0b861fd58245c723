"""Detection of the end of a training step, for the processes that `bench start` and `bench data` time."""

from __future__ import annotations

import threading
from collections.abc import Callable


def on_step_end(ended: Callable[[], None]) -> Callable[[str], None]:
    """Return a listener for `engine.training.ranges.listening` that calls a function after each training step.

    A step ends with the range "metrics" in the main thread. Before the main thread waits for its first views, steps are
    only captured.
    """
    last, training = "", False

    def listener(part: str) -> None:
        nonlocal last, training
        if threading.current_thread() is not threading.main_thread():
            return
        if part == "wait for views":
            training = True
        elif part == "" and last == "metrics" and training:
            ended()
        last = part

    return listener
