"""Train and use models from Python.

from engine.api import load, train

run = train("digits-40", seed=1, out="runs/one")
model = load(run.folder)
probabilities = model.predict(["a.png", "folder/"])  # or arrays, PIL images, tensors
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import methods
from engine.config.checks import check_labels, folder_name
from engine.config.config import convert_fields
from engine.config.presets import preset as find_preset
from engine.config.scaling import scaled
from engine.config.values import convert, flag_of
from engine.config.warnings import warnings_about
from engine.errors import UserError
from engine.runs.folder import default_folder
from engine.runs.setup import setup_run

if TYPE_CHECKING:
    import torch

    from engine.models.wide_resnet import TwoHeadNetwork

log = logging.getLogger(__name__)


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

    def predict(self, images: Any, batch: int = 256) -> np.ndarray:
        """Predict class probabilities.

        Every image is converted to RGB, resized and center-cropped as in training, whatever its size and its form:

        - a path of an image or of a folder of images, which are sorted;
        - the content of an image file, as bytes or as a file open in binary mode;
        - a PIL image;
        - a uint8 array: gray (H, W), or (H, W, C) or (N, H, W, C) with C = 1, 3 or 4 channels (gray, RGB, RGBA);
        - a uint8 tensor, whose channels come first, as torchvision reads them: (H, W), (C, H, W) or (N, C, H, W);
        - a list or another iterable of these, such as a generator.

        Args:
            images: The images.
            batch: Number of images in a batch; no more are in memory at a time.

        Returns:
            (N, L) float32, in the order of the images.

        Raises:
            TypeError: `images` has none of these types, or `batch` is no integer.
            ValueError: An array or a tensor has another shape or dtype, or `batch` is less than 1.
            UserError: An image, an open file or a folder cannot be read, or a folder has no images.
        """
        from engine.inference.inputs import each_image
        from engine.inference.predict import classify

        if (batch := convert("batch", int, batch)) < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        predicted = classify(self._network, each_image(images), self.side, self._device, batch)
        rows = [probabilities for _, probabilities in predicted]
        return np.stack(rows) if rows else np.empty((0, len(self.classes)), np.float32)


def train(
    preset: str,
    data: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    ablate: str | Sequence[str] = (),
    size: int | None = None,
    steps_scale: float = 1.0,
    progress: bool = True,
    callback: Callable[[int, dict[str, float]], object] | None = None,
    **fields: Any,
) -> Run:
    """Train a preset in this process, like `remixmatch train`.

    Args:
        preset: Name of the preset.
        data: Your own images, for preset "folder" or any other:

            - a prepared folder of images;
            - a data set in the style of torchvision, whose items are (image, label), or of Hugging Face, whose items
              are mappings with `image` and `label`;
            - several of these, as a tuple (train, test), or as a mapping with `train` and optionally `unlabeled` and
              `test`; `unlabeled` may also hold images alone;
            - arrays, as a mapping or an object with `train_images` and `train_labels`, and optionally `test_images`,
              `test_labels` and `classes`; or as tuples (images, labels), each in place of a data set above.

            Images may have the forms that `Model.predict` accepts, without random transforms: they are read once.
            Labels are names, or numbers from 0 without gaps; -1, None and NaN stand for unknown ones. Each class needs
            a labeled training image. `classes` holds their names in order, or maps names to numbers or numbers to
            names. The numbers of a data set refer to its own names if it has some, or else to those of the training
            data. Without test images, a fifth of the labeled images of each class is held out.
        out: The run's folder; by default runs/PRESET-seedN.
        resume: Resume the run in `out`.
        ablate: Names of ablations, see `engine.config.methods`.
        size: Side in pixels to which images given in Python are resized and cropped; by default the most common shorter
            side of the first 1000 training images.
        steps_scale: Scale steps, ramp, intervals, and the windows of EMA and batch norm together; fields that are given
            override it.
        progress: Show progress on a terminal or in a notebook, or as a line now and then on stderr. Warnings are logged
            in any case.
        callback: Called with the step and the metrics of each new line of metrics.jsonl, between two steps. Every
            `log_every` steps there are two lines: losses and the other metrics of the step; and throughput. Each
            evaluation adds one with test_accuracy, test_loss, and the means of the recalls. An exception that it raises
            ends the training and propagates; the current step is saved first, so that resume=True continues there.
        fields: Fields of `engine.config.Config`, such as seed=1 or steps=500. method="fixmatch" also sets the other
            fields of that method.

    Raises:
        UserError: A value that is not allowed, missing data, or a folder that holds a different run.
    """
    preset, resume = _argument("preset", str, preset), _argument("resume", bool, resume)
    names = _argument("ablate", tuple[str, ...], [ablate] if isinstance(ablate, str) else ablate)
    fields, progress = convert_fields(fields), _argument("progress", bool, progress)
    if callback is not None and not callable(callback):
        raise UserError(f"callback must be a function of step and metrics, got {type(callback).__name__}")
    for name, folder in (("out", out), ("data", data)):
        if folder == "":
            raise UserError(f"{name} must name a folder, got ''")
    if size is not None and (data is None or isinstance(data, (str, os.PathLike))):
        raise UserError("size requires images given in Python (data); the images of a data set keep their size")
    config = find_preset(preset)
    if fields.get("method", config.method) != config.method:
        config = methods.with_method(config, fields["method"])
    config = scaled(methods.ablate(config, *names), _argument("steps_scale", float, steps_scale))
    batch = config.batch
    config = dataclasses.replace(config, **fields)
    if "ramp_kimg" not in fields:
        config = methods.keep_ramp_steps(config, batch)
    if data is not None and "dataset" in fields:
        raise UserError("dataset and data both name the images; leave out one of them")
    given = {name: flag_of(name) for name in fields}
    check_labels(config, given)
    methods.check_ablations(names, config, fields)
    opened = None
    if isinstance(data, (str, os.PathLike)):
        config = dataclasses.replace(config, dataset=folder_name(Path(data)))
    elif data is not None:
        from engine.runs.python_data import python_data_set

        opened = python_data_set(data, size if size is None else _argument("size", int, size))
        config = dataclasses.replace(config, dataset=opened.name)
    folder = default_folder(config, resume) if out is None else Path(_argument("out", str, out))
    setup = setup_run(config, folder, resume, data=opened)
    if not setup.resumed:
        for warning in warnings_about(setup.config, given, names):
            log.warning(warning)

    from engine import run

    return Run(folder, run.train(setup, quiet=not progress, callback=callback))


def _argument(name: str, hint: Any, value: Any) -> Any:
    """Return an argument converted to its type, or raise UserError."""
    try:
        return convert(name, hint, value)
    except TypeError as error:
        raise UserError(str(error)) from None


def load(folder: str | Path) -> Model:
    """Load the EMA model of a run's newest valid checkpoint.

    Raises:
        UserError: The folder holds no run, or no valid checkpoint.
    """
    from engine.inference.trained import load_ema_model

    trained = load_ema_model(Path(folder))
    return Model(trained.classes, trained.sides[0], trained.network, trained.device)
