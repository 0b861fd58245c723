"""Checkpoints: atomic writes, pruning, and skipping of damaged and foreign files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from engine.runs import checkpoint

ROOT = Path(__file__).parents[3]


def content(value):
    return {"tensor": torch.full((1000,), float(value)), "list": [1, "a"], "number": value}


@pytest.mark.usefixtures("unwarned")
def test_saving_and_loading_keeps_the_newest_checkpoints(tmp_path):
    for step in (1, 2, 30, 400):
        checkpoint.save(tmp_path, step, content(step), keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000030.pt", "step-00000400.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030.pt", "step-00000400.pt"]
    found = checkpoint.load_newest(tmp_path)
    assert found.step == 400 and found.content["number"] == 400
    assert torch.equal(found.content["tensor"], content(400)["tensor"])


@pytest.mark.usefixtures("unwarned")
def test_missing_folder_and_empty_folder(tmp_path):
    assert checkpoint.load_newest(tmp_path / "none") is None
    assert checkpoint.load_newest(tmp_path) is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "text", "pipe"])
def test_damaged_and_foreign_files_fall_back_to_the_previous_checkpoint(tmp_path, caplog, damage):
    checkpoint.save(tmp_path, 1, content(1), keep=3)
    newest = checkpoint.save(tmp_path, 2, content(2), keep=3)
    data = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "flipped":  # one byte in the middle of the tensor
        newest.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :])
    elif damage == "pipe":
        newest.unlink()
        os.mkfifo(newest)
    elif damage == "foreign":
        torch.save({"model": torch.zeros(3)}, newest)
    else:
        newest.write_text("not a checkpoint")
    assert checkpoint.load_newest(tmp_path).step == 1
    (said,) = caplog.messages
    assert newest.name in said and "trying the previous one" in said and "\n" not in said


def test_code_in_a_checkpoint_is_not_executed(tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": checkpoint.FORMAT, "step": 9, "content": Evil()}, tmp_path / "step-00000009.pt")
    assert checkpoint.load_newest(tmp_path) is None
    assert caplog.messages and not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_earlier_checkpoints_and_no_partial_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, content(1), keep=3)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, content(2), keep=3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


@pytest.mark.usefixtures("unwarned")
def test_a_write_that_hits_the_file_size_limit(tmp_path):
    """The write really fails: the kernel refuses bytes past a limit, as a full disk does."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from engine.errors import UserError
from engine.runs import checkpoint
folder = Path({str(tmp_path)!r})
checkpoint.save(folder, 1, {{"x": torch.zeros(1000)}}, keep=3)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    checkpoint.save(folder, 2, {{"x": torch.zeros(1_000_000)}}, keep=3)
except OSError as error:
    print("refused", error.errno)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["refused", str(errno.EFBIG)], done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert checkpoint.load_newest(tmp_path).step == 1


def test_damaged_checkpoints_of_later_steps_do_not_count_as_kept(tmp_path):
    """They were skipped on resume. If they counted, the run would remove the checkpoint it has just written."""
    checkpoint.save(tmp_path, 3, content(3), keep=1)
    (tmp_path / "step-00000009.pt").write_bytes(b"damaged")
    checkpoint.save(tmp_path, 6, content(6), keep=1)
    assert checkpoint.load_newest(tmp_path).step == 6
    assert [path.name for path in tmp_path.iterdir() if "00003" in path.name] == []


def test_the_next_checkpoint_removes_partial_files_of_killed_processes(tmp_path):
    (tmp_path / ".step-00000002.pt.partial").write_bytes(b"part")
    checkpoint.save(tmp_path, 3, content(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003.pt"]


def test_a_checkpoint_of_another_run_is_skipped(tmp_path, caplog):
    checkpoint.save(tmp_path, 1, content(1), keep=3, run={"seed": 1, "width": 4})
    checkpoint.save(tmp_path, 2, content(2), keep=3, run={"seed": 2, "width": 4})
    assert checkpoint.load_newest(tmp_path, {"seed": 1, "width": 4, "newer": 0}).step == 1
    (said,) = caplog.messages
    assert "step-00000002.pt is a checkpoint of another run" in said
    with pytest.raises(UserError, match=r"one of another run \(seed is 2 and 1 more\); move the checkpoints"):
        checkpoint.load_newest(tmp_path, {"seed": 3, "width": 5})
    caplog.clear()
    assert checkpoint.load_newest(tmp_path).step == 2 and not caplog.messages
