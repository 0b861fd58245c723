"""Train and use models from Python.

from engine.api import load, train

run = train("digits-40", seed=1, out="runs/one")
model = load(run.folder)
probabilities = model.predict(["a.png", "folder/"])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import Config, methods
from engine.config.checks import folder_name
from engine.config.presets import preset as find_preset
from engine.errors import unknown
from engine.runs.folder import default_folder
from engine.runs.setup import setup_run

if TYPE_CHECKING:
    import torch

    from engine.models.wide_resnet import TwoHeadNetwork


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: The run's folder.
        summary: Content of summary.json.
    """

    folder: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """EMA model of a run.

    Attributes:
        classes: Class names.
        side: Side of its images, in pixels.
    """

    classes: tuple[str, ...]
    side: int
    _network: TwoHeadNetwork
    _device: torch.device

    def predict(self, images: np.ndarray | Sequence[str | Path]) -> np.ndarray:
        """Predict class probabilities.

        Args:
            images: (N, side, side, 3) uint8, or image files and folders of image files.

        Returns:
            (N, L) float32, in the order of the images; images of a folder are sorted by name.

        Raises:
            UserError: An image cannot be read.
            ValueError: The array has a different shape or dtype.
        """
        from engine.inference import predict

        if not isinstance(images, np.ndarray):
            files, _ = predict.find_images([Path(path) for path in images])
            images = np.stack([predict.read_image(path, self.side, warn=False) for path in files])
        if images.dtype != np.uint8 or images.shape[1:] != (self.side, self.side, 3):
            raise ValueError(
                f"images must be (N, {self.side}, {self.side}, 3) uint8, got {images.shape} {images.dtype}"
            )
        return predict.probabilities(self._network, images, self._device)


def train(
    preset: str,
    data: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    ablate: Sequence[str] = (),
    **fields: Any,
) -> Run:
    """Train a preset in this process, like `remixmatch train`.

    Args:
        preset: Name of the preset.
        data: A prepared folder of images, for preset "folder".
        out: The run's folder; by default runs/PRESET-seedN.
        resume: Resume the run in `out`.
        ablate: Names of ablations, see `engine.config.methods`.
        fields: Fields of `engine.config.Config`, such as seed=1 or steps=500. method="fixmatch" also sets the other
            fields of that method.

    Raises:
        UserError: A value that is not allowed, missing data, or a folder that holds a different run.
    """
    known = [field.name for field in dataclasses.fields(Config)]
    if strange := [name for name in fields if name not in known]:
        raise unknown("configuration field", strange[0], known)
    config = find_preset(preset)
    if fields.get("method", config.method) != config.method:
        config = methods.with_method(config, fields["method"])
    config = dataclasses.replace(methods.ablate(config, *ablate), **fields)
    if data is not None:
        config = dataclasses.replace(config, dataset=folder_name(data))
    folder = Path(out) if out is not None else default_folder(config, resume)
    setup = setup_run(config, folder, resume)

    from engine import run

    return Run(folder, run.train(setup, quiet=True))


def load(folder: str | Path) -> Model:
    """Load the EMA model of a run's newest valid checkpoint.

    Raises:
        UserError: The folder holds no run, or no valid checkpoint.
    """
    from engine.inference.trained import load_ema_model

    trained = load_ema_model(Path(folder))
    return Model(trained.classes, trained.sides[0], trained.network, trained.device)
