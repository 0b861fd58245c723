"""What a run tells while it goes on: metrics.jsonl, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between lines where the output is not a terminal


class MetricsLog:
    """Rows of metrics in a JSON-lines file and in TensorBoard; each row has its `step`.

    Resuming drops the rows of steps that will be trained again, so that a file reads like one undisturbed run.

    Args:
        folder: the run's.
        step: steps done when the run starts or resumes.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # tensorboard takes a second to import, which only training should pay
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """Adds one row."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left and closes both."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file; a last line that a kill cut short is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class ProgressLine:
    """Steps/s, images/s, losses and time left: a live bar on a terminal, a plain line now and then elsewhere.

    Args:
        steps: steps of the whole run.
        quiet: say nothing.
    """

    def __init__(self, steps: int, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._steps = steps
        self._bar: Progress | None = None

    def start(self, step: int, images_per_step: int) -> None:
        """Begins to count time, at `step` steps done; a step trains the network on so many images."""
        self._images_per_step = images_per_step
        self._begin = self._last_line = time.monotonic()
        self._start = step
        if self.console.is_terminal and not self.console.quiet:
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=self._steps, completed=step)
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the newest figures of `step` steps done."""
        now = time.monotonic()
        speed = (step - self._start) / max(now - self._begin, 1e-9)
        shown = [f"{speed:.2f} steps/s", f"{speed * self._images_per_step:,.0f} images/s"]
        shown += [f"{name} {value:.3f}" for name, value in values.items()]
        text = "  ".join(shown)
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last_line >= PLAIN_SECONDS or step == self._steps:
            self._last_line = now
            left = (self._steps - step) / max(speed, 1e-9)
            self.say(f"step {step}/{self._steps}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """Prints one line without disturbing the bar."""
        self.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()
