"""Runs in processes of their own: how tests start them, and what makes two of them the same."""

import socket
import sys
from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.progress import read_metrics
from engine.trainer import CHECKPOINTS

ROOT = Path(__file__).parents[2]


def command(*arguments):
    """The command line of `remixmatch` with this interpreter."""
    return [sys.executable, "-m", "engine", *map(str, arguments)]


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def final_state(folder):
    """Step and content of a run's newest checkpoint, which has to be good."""
    found = checkpoint.load_newest(folder / CHECKPOINTS, pytest.fail)
    return found.step, found.content


def assert_close(one, two):
    """Equal runs but for the order of sums: every row of metrics, and what the newest checkpoint holds."""
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert len(rows) == len(others)
    for a, b in zip(rows, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), (a["step"], name)
    (step, a), (other, b) = final_state(one), final_state(two)
    assert step == other == a["state"]["step"] == b["state"]["step"]
    for name, value in a["state"]["network"].items():
        torch.testing.assert_close(value, b["state"]["network"][name], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a["policy"]["weights"], b["policy"]["weights"], atol=1e-6, rtol=0)
