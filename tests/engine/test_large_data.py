"""Data sets that do not fit into memory: what a run takes does not grow with them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pipelines import cache
from tests.processes import ROOT

SCRIPT = """
import json, resource, sys
from pathlib import Path
from engine import run
from engine.config import Config
config = Config(
    dataset="stl10", labels=100, k=1, batch=8, width=16, blocks=1, scales=2, max_shift=12, weak_anchor=False, steps=100,
    eval_every=100, checkpoint_every=100, device="cpu", views=sys.argv[2],
)
run.train(config, Path(sys.argv[1]), quiet=True)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))
"""


def peak(folder, images, views):
    """GiB of a process that trains a hundred steps on so many images of 96x96."""
    os.environ["REMIXMATCH_DATA"] = str(folder / "data")
    with cache.writing(cache.data_dir() / "stl10") as temporary:
        for part, rows in (("train", images), ("test", 100)):
            cache.array(temporary, f"{part}_images", (rows, 96, 96, 3))
            cache.save(temporary, f"{part}_labels", np.where(np.arange(rows) < 5000, np.arange(rows) % 10, -1))
        cache.finish(temporary, "stl10", tuple("abcdefghij"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder / f"run {images}", views], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
@pytest.mark.parametrize("views", ["dali", "fused"])
def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch, views):
    monkeypatch.setenv("REMIXMATCH_DATA", "")  # so that it is put back
    assert peak(tmp_path, 105_000, views) - peak(tmp_path, 200, views) < 2
