"""Training and using a model from Python.

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
from engine.errors import UserError
from engine.runs.folder import default_folder
from engine.runs.setup import setup_run

if TYPE_CHECKING:
    import torch

    from engine.models.wide_resnet import TwoHeadNetwork


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: what it wrote.
        summary: what stands in summary.json.
    """

    folder: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The EMA model of a run.

    Attributes:
        classes: names.
        side: of its images, in pixels.
    """

    classes: tuple[str, ...]
    side: int
    _network: TwoHeadNetwork
    _device: torch.device

    def predict(self, images: np.ndarray | Sequence[str | Path]) -> np.ndarray:
        """Class probabilities.

        Args:
            images: (N, side, side, 3) uint8, or image files and folders of them.

        Returns:
            (N, L) float32, in the order of the images; of a folder, in the order of its sorted names.

        Raises:
            UserError: an image cannot be read.
            ValueError: an array of another shape or dtype.
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
    """Trains a preset, as `remixmatch train` does, in this process.

    Args:
        preset: its name.
        data: with preset "folder", a prepared folder of images.
        out: the run's folder; by default runs/PRESET-seedN.
        resume: go on with the run in `out`.
        ablate: names of ablations, see `engine.config.methods`.
        fields: of `engine.config.Config`, such as seed=1 or steps=500; method="fixmatch" sets its other fields, too.

    Raises:
        UserError: a value that cannot work, data that is not there, or a folder that holds another run.
    """
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(Config)})
    if unknown:
        raise UserError(f"no field of the configuration: {', '.join(unknown)}")
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
    """The EMA model of a run's newest good checkpoint.

    Raises:
        UserError: the folder holds no run, or no good checkpoint.
    """
    from engine.inference.trained import load_ema_model

    trained = load_ema_model(Path(folder))
    return Model(trained.classes, trained.sides[0], trained.network, trained.device)
