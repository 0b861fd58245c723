"""Checkpoints: written atomically, pruned to the newest few, and verified when read.

A checkpoint is one file, such as `step-00001000.pt`. It is written under another name, flushed to disk and renamed, so
a crash, a kill or a full disk leaves earlier checkpoints intact.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config.config import Config
from engine.config.presets import PRESETS
from engine.errors import UserError
from pipelines.files import PARTIAL, atomic_write, first_line

log = logging.getLogger(__name__)

FORMAT = "remixmatch-checkpoint-2"
RETRY_SECONDS = 10.0  # between attempts to write a checkpoint while training continues
PATIENCE_SECONDS = 10.0  # how long to retry the last checkpoint of a run
_NAME = re.compile(r"step-(\d{8})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read.

    Attributes:
        path: The file.
        step: Training steps done.
        content: The `content` passed to `save`.
    """

    path: Path
    step: int
    content: dict[str, Any]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint files in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def save(folder: Path, step: int, content: dict[str, Any], keep: int, run: Mapping[str, Any] | None = None) -> Path:
    """Write the checkpoint of a step and remove all but the newest `keep`.

    Args:
        folder: Created if missing.
        step: Training steps done.
        content: Tensors, plain values, and lists and dictionaries of them.
        keep: Number of checkpoints to keep, including this one.
        run: The run's configuration; see `load_newest` and `newest_config`.

    Raises:
        OSError: The checkpoint could not be written. Earlier ones are intact, and no partial file is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with atomic_write(path, sync=True) as file:
        torch.save({"format": FORMAT, "run": dict(run or {}), "step": step, "content": content}, file)
    # Checkpoints of later steps were found invalid when this run was resumed, so they do not count.
    for old in [each for each in list_checkpoints(folder) if each.name <= path.name][:-keep]:
        old.unlink(missing_ok=True)
    for left in folder.glob(f".step-*.pt{PARTIAL}"):  # by a killed process
        left.unlink(missing_ok=True)
    return path


def newest_config(folder: Path) -> Config | None:
    """Return the configuration in the newest valid checkpoint, with a warning; None if there is no valid one."""
    for path in reversed(list_checkpoints(folder)):
        if config := _saved_config(path, path.stat().st_mtime_ns):
            return config
    return None


@functools.cache
def _saved_config(path: Path, changed: int) -> Config | None:
    """Return the configuration in a checkpoint; the time of its last change identifies the content."""
    try:
        run = _read(path)["run"]
        # Checkpoints of earlier versions lack `steps` and `log`.
        config = dataclasses.replace(PRESETS.get(run["preset"], Config()), **run)
    except Exception:  # damaged files raise all kinds of errors, and fields of a later version a TypeError
        return None
    log.warning(f"config.json of {path.parents[1]} is missing or damaged; using the configuration in {path}")
    return config


class Saver:
    """Writer of a run's checkpoints that reports failures and retries.

    Args:
        folder: Folder of the checkpoints.
        keep: See `save`.
        prepare: Called before each attempt, to restore other missing files of the run's folder.
        run: See `save`.
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
        """Whether the last attempt failed and it is time to retry."""
        return bool(self._trouble) and time.monotonic() >= self._again

    def save(self, step: int, content: dict[str, Any]) -> bool:
        """Try to write the checkpoint of a step, and return whether that succeeded; see the function `save`."""
        try:
            self._prepare()
            save(self._folder, step, content, self._keep, self._run)
        except OSError as error:
            trouble = error.strerror or str(error)
            if trouble != self._trouble:
                log.warning(
                    f"cannot write the checkpoint of step {step} ({trouble}); {self.last_good()}; "
                    f"training continues; retrying every {RETRY_SECONDS:g} s"
                )
            self._trouble, self._again = trouble, time.monotonic() + RETRY_SECONDS
            return False
        if self._trouble:
            log.warning(f"checkpoints can be written again; saved step {step}")
            self._trouble = ""
        return True

    def save_last(self, step: int, content: dict[str, Any]) -> None:
        """Write the run's last checkpoint, retrying for PATIENCE_SECONDS.

        Raises:
            UserError: The checkpoint could not be written. Earlier ones are intact.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.save(step, content):
            if time.monotonic() >= end:
                raise UserError(
                    f"cannot write the checkpoint of step {step} ({self._trouble}); {self.last_good()}; "
                    "fix the problem and use --resume"
                )
            time.sleep(1.0)

    def last_good(self) -> str:
        """Describe the newest checkpoint, for a message."""
        kept = list_checkpoints(self._folder)
        return f"the newest saved one is {kept[-1]}" if kept else "no earlier one exists"


def load_newest(
    folder: Path, run: Mapping[str, Any] | None = None, network: Mapping[str, Tensor] | None = None
) -> Checkpoint | None:
    """Load the newest valid checkpoint; skip damaged and foreign ones with a warning each.

    Args:
        folder: Folder of the checkpoints.
        run: Values that identify the run. A checkpoint saved with a different value for one of them is foreign.
        network: State of the run's network. A checkpoint whose networks have other tensors is foreign.

    Returns:
        The checkpoint with its tensors on the CPU, or None if all are damaged or there is none.

    Raises:
        UserError: There is no valid checkpoint, but a foreign one, which training would overwrite.
    """
    foreign = ""
    for path in reversed(list_checkpoints(folder)):
        try:
            found = _read(path)
            difference = _difference(found, run or {}, network)
        except Exception as error:  # damaged files raise all kinds of errors
            log.warning(f"{path} cannot be read ({first_line(error)}); trying the previous one")
            continue
        if not difference:
            return Checkpoint(path, found["step"], found["content"])
        log.warning(f"{path} is a checkpoint of another run ({difference}); trying the previous one")
        foreign = foreign or difference
    if foreign:
        raise UserError(
            f"{folder} has no valid checkpoint of this run, but one of another run ({foreign}); move the checkpoints "
            "of the other run away, or restore config.json and split.json of this run"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    """Read a file written by `save`; if that fails, raise any exception."""
    if not path.is_file():  # Opening a pipe would wait forever.
        raise ValueError("not a regular file")
    with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} has a wrong checksum")
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("not a checkpoint of this engine")
    return found


def _difference(found: dict[str, Any], run: Mapping[str, Any], network: Mapping[str, Tensor] | None) -> str:
    """Return what tells a checkpoint from those of a run, as text; "" if nothing does."""
    saved = found["run"]
    differing = [f"{name} is {saved[name]}" for name, value in run.items() if saved.get(name, value) != value]
    if network is not None and not differing:
        for part in ("network", "ema_model"):
            state = found["content"]["state"][part]
            shapes, expected = ({name: tuple(t.shape) for name, t in each.items()} for each in (state, network))
            names = [name for name in expected | shapes if shapes.get(name) != expected.get(name)]
            differing += [f"{part}.{name} is {shapes.get(name, 'missing')}" for name in names]
    more = f" and {len(differing) - 1} more" if differing[1:] else ""
    return f"{differing[0]}{more}" if differing else ""
