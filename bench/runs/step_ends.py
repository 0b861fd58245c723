"""Tells when a step of a run has ended, for the processes that `bench start` and `bench data` time."""

from __future__ import annotations

import threading
from collections.abc import Callable


def on_step_end(ended: Callable[[], None]) -> Callable[[str], None]:
    """Return a listener for `engine.training.ranges.listening` that calls a function after each step of a run.

    A step ends with the range "metrics" of the main thread. Until that waits for its first views, the step is only
    captured.
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
