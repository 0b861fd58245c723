"""Checkpoints: written whole or not at all, the last few kept, and read back without trusting the file.

A checkpoint is one file `step-00001000.pt`. It is written under another name, flushed to the disk and renamed, so a
crash, a kill or a full disk leaves earlier ones as they were.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = "remixmatch-checkpoint-1"
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


def save(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of a step and removes all but the newest `keep`.

    Args:
        folder: made if missing.
        step: training steps done.
        content: tensors, plain values, and lists and dictionaries of them.
        keep: files that stay, this one included.

    Raises:
        OSError: it could not be written; earlier checkpoints are untouched and no part of it is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    partial = folder / f"{path.name}.partial"
    try:
        with partial.open("wb") as file:
            # the zip writer inside torch.save turns a failed write into RuntimeError; _Guarded keeps its cause
            guarded = _Guarded(file)
            try:
                torch.save({"format": FORMAT, "step": step, "content": content}, guarded)  # type: ignore[arg-type]
            except RuntimeError:
                if guarded.error is None:
                    raise
            if guarded.error is not None:
                raise guarded.error
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(folder)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


class _Guarded:
    """A file that remembers the first error of a write."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Reads the newest good checkpoint, passing over damaged and foreign ones with a word about each.

    Args:
        folder: where they lie.
        warn: called with one line for each file passed over.

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
            warn(f"{path} cannot be read ({_first_line(error)}); trying the one before")
            continue
        if not isinstance(loaded, dict) or loaded.get("format") != FORMAT:
            warn(f"{path} is not a checkpoint of this engine; trying the one before")
            continue
        return Checkpoint(path, loaded["step"], loaded["content"])
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
