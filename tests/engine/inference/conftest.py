"""A trained run, images, and their probabilities."""

import json

import pytest
import torch

from engine.api import train
from engine.inference.trained import load_ema_model
from pipelines.data.datasets import digits


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of a few steps, trained through the API."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    small = dict(steps=30, batch=8, k=1, width=16, device="cpu", eval_every=30, log_every=10)
    made = train("digits-40", out=folder, **small)
    assert (
        made.folder == folder
        and made.summary["steps"] == 30 == json.loads((folder / "summary.json").read_text())["steps"]
    )
    return folder


@pytest.fixture(scope="session")
def images():
    return digits().test_images[:9]


@pytest.fixture(scope="session")
def expected(trained, images):
    """Probabilities computed by the network itself, image by image."""
    network = load_ema_model(trained).network
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return torch.cat([network(image[None])[0].softmax(-1) for image in pixels]).numpy()
