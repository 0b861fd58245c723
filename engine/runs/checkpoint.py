"""Checkpoints: written whole or not at all, the last few kept, and read back without trusting the file.

A checkpoint is one file `step-00001000.pt`. It is written under another name, flushed to the disk and renamed, so a
crash, a kill or a full disk leaves earlier ones as they were.
"""

from __future__ import annotations

import logging
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError
from pipelines.files import PARTIAL, atomic_write, first_line

log = logging.getLogger(__name__)

FORMAT = "remixmatch-checkpoint-2"
RETRY_SECONDS = 10.0  # between attempts to write a checkpoint while training goes on
PATIENCE_SECONDS = 10.0  # in which the last one of a run, after which nothing goes on, is tried again
_NAME = re.compile(r"step-(\d{8})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        path: the file.
        step: training steps done.
        content: what was given to `save`.
    """

    path: Path
    step: int
    content: dict[str, Any]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a folder, oldest first; anything else in it is passed over."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def save(folder: Path, step: int, content: dict[str, Any], keep: int, run: Mapping[str, Any] | None = None) -> Path:
    """Writes the checkpoint of a step and removes all but the newest `keep`.

    Args:
        folder: made if missing.
        step: training steps done.
        content: tensors, plain values, and lists and dictionaries of them.
        keep: files that stay, this one included.
        run: what the run is known by: plain values, see `load_newest`.

    Raises:
        OSError: it could not be written; earlier checkpoints are untouched and no part of it is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with atomic_write(path, sync=True) as file:
        torch.save({"format": FORMAT, "run": dict(run or {}), "step": step, "content": content}, file)
    # one of a later step was passed over when this run was resumed: it is no good, and does not count
    for old in [each for each in list_checkpoints(folder) if each.name <= path.name][:-keep]:
        old.unlink(missing_ok=True)
    for left in folder.glob(f".step-*.pt{PARTIAL}"):  # by a process that was killed
        left.unlink(missing_ok=True)
    return path


class Saver:
    """Checkpoints of one run, for as long as it trains: trouble with the folder is told, and the attempt repeated.

    Args:
        folder: of the checkpoints.
        keep: see `save`.
        prepare: called before each attempt, to make anew what else of the run's folder has gone.
        run: see `save`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        prepare: Callable[[], None],
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._keep, self._prepare, self._run = folder, keep, prepare, run
        self._trouble = ""
        self._again = 0.0  # time.monotonic() of the next attempt

    @property
    def due(self) -> bool:
        """Whether an attempt failed and the next one's time has come."""
        return bool(self._trouble) and time.monotonic() >= self._again

    def save(self, step: int, content: dict[str, Any]) -> bool:
        """Tries to write the checkpoint of a step, and says whether it is there: see the function `save`."""
        try:
            self._prepare()
            save(self._folder, step, content, self._keep, self._run)
        except OSError as error:
            trouble = error.strerror or str(error)
            if trouble != self._trouble:
                log.warning(
                    f"the checkpoint of step {step} could not be written ({trouble}); {self.last_good()}; "
                    f"training goes on and tries again every {RETRY_SECONDS:g} s"
                )
            self._trouble, self._again = trouble, time.monotonic() + RETRY_SECONDS
            return False
        if self._trouble:
            log.warning(f"checkpoints can be written again: step {step} is saved")
            self._trouble = ""
        return True

    def save_last(self, step: int, content: dict[str, Any]) -> None:
        """Writes the checkpoint after which training ends, with some patience.

        Raises:
            UserError: it could not be written; earlier checkpoints are untouched.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.save(step, content):
            if time.monotonic() >= end:
                raise UserError(
                    f"the checkpoint of step {step} could not be written ({self._trouble}); {self.last_good()}; "
                    "mend that and go on with --resume"
                )
            time.sleep(1.0)

    def last_good(self) -> str:
        """The newest checkpoint in words."""
        kept = list_checkpoints(self._folder)
        return f"the last good one is {kept[-1]}" if kept else "there is none before it"


def load_newest(folder: Path, run: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """Reads the newest good checkpoint, passing over damaged and foreign ones with a warning about each.

    Args:
        folder: where they lie.
        run: one that was saved with another value under one of these names is foreign.

    Returns:
        The checkpoint with its tensors on the CPU, or None where there is no good one.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load itself does not compare the checksums
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} has a wrong checksum")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in as many ways as there are bytes
            log.warning(f"{path} cannot be read ({first_line(error)}); trying the one before")
            continue
        if not isinstance(loaded, dict) or loaded.get("format") != FORMAT:
            log.warning(f"{path} is not a checkpoint of this engine; trying the one before")
            continue
        saved_identity = loaded["run"]
        if any(saved_identity.get(name, value) != value for name, value in (run or {}).items()):
            log.warning(f"{path} is a checkpoint of another run; trying the one before")
            continue
        return Checkpoint(path, loaded["step"], loaded["content"])
    return None
