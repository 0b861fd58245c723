"""`remixmatch eval`, `predict` and `export`: use a trained run."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from engine.commands.parsing import DataDir, parse
from engine.errors import Incomplete, UserError
from engine.runs.identity import test_changes
from engine.runs.setup import open_data
from pipelines.data.cache import set_data_dir

log = logging.getLogger(__name__)

RunDir = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="The run's folder.")]


@dataclass
class EvalOptions:
    """Print the test accuracy of a run's EMA model."""

    dir: RunDir
    json: bool = False
    """Print the result as a JSON object."""
    data_dir: DataDir = None


@dataclass
class PredictOptions:
    """Predict classes and class probabilities of images with a run's EMA model."""

    dir: RunDir
    images: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGES", help_behavior_hint="(required)"),
    ] = ()
    """Image files, and folders of image files. Images are converted to RGB and resized with a warning."""
    json: bool = False
    """Print one JSON object per line."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """CSV file to write instead of printing: file, class, and one probability per class."""
    batch: int = 256
    """Number of images in a batch; no more are in memory at a time."""


@dataclass
class ExportOptions:
    """Export a run's EMA model, which takes uint8 images and returns class probabilities."""

    dir: RunDir
    to: Literal["safetensors", "torch", "onnx"] = "safetensors"
    """Format: safetensors (parameters and the network's settings), torch (a torch.export program), or onnx."""
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FILE",
            help="File to write.",
            help_behavior_hint="(default: model.safetensors, model.pt2 or model.onnx in the run's folder)",
        ),
    ] = None


def evaluate(argv: list[str]) -> None:
    """Run `remixmatch eval`."""
    options: EvalOptions = parse(EvalOptions, "eval", argv)
    from engine.inference.evaluation import evaluate as measure
    from engine.inference.trained import load_ema_model
    from pipelines.data.folder import some

    set_data_dir(options.data_dir)
    trained = load_ema_model(options.dir)
    config, data = trained.config, open_data(trained.config.dataset, begun=True)
    if (data.classes, data.sides) != (trained.classes, trained.sides):
        was, now = (
            f"{len(classes)} classes of {sides[1]}x{sides[0]} images"
            for classes, sides in ((trained.classes, trained.sides), (data.classes, data.sides))
        )
        differing = sorted(set(trained.classes) ^ set(data.classes))
        raise UserError(
            f"{options.dir} was trained on {was}, but its data now has {now}"
            + (f" (they differ in {some(differing)})" if differing else "")
        )
    if changed := test_changes(options.dir, data):
        log.warning(f"the test part is not the one of training; these differ: {', '.join(changed)}")
    accuracy, loss = measure(trained.network, data.test_images, data.test_labels, trained.device)
    result = {"preset": config.preset, "images": len(data.test_labels), "test_accuracy": accuracy, "test_loss": loss}
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{config.preset}: test accuracy {accuracy:.2f} % of {len(data.test_labels)} images, loss {loss:.4f}")


def predict(argv: list[str]) -> None:
    """Run `remixmatch predict`."""
    options: PredictOptions = parse(PredictOptions, "predict", argv)
    from engine.inference import predict
    from engine.inference.trained import load_ema_model

    if options.batch < 1:
        raise UserError(f"--batch must be at least 1, got {options.batch}")
    files = predict.find_images(options.images)
    trained = load_ema_model(options.dir)
    skip = len(files) > 1  # Otherwise the reason is the only message.
    warn = len(files) <= options.batch  # A message per file would hide the results of many.
    predicted = predict.classify(trained.network, files, trained.sides[0], trained.device, options.batch, skip, warn)
    rows = ((files[number], values) for number, values in predicted)
    count = 0
    if options.csv:
        count = predict.write_csv(options.csv, trained.classes, rows)
        if count:
            print(f"{options.csv}: {count} of {len(files)} images")
    else:
        for path, values in rows:
            count += 1
            _print_prediction(path, dict(zip(trained.classes, map(float, values), strict=True)), options.json)
    if not count:
        raise UserError("no image could be read")
    if count < len(files):
        raise Incomplete(f"{len(files) - count} of {len(files)} files could not be read as images")


def _print_prediction(path: Path, named: dict[str, float], as_json: bool) -> None:
    best = max(named, key=named.__getitem__)
    if as_json:
        print(json.dumps({"image": str(path), "class": best, "probabilities": named}))
        return
    ranked = sorted(named.items(), key=lambda item: -item[1])
    print(f"{path}: {best}  ({', '.join(f'{name} {p:.3f}' for name, p in ranked)})")


def export(argv: list[str]) -> None:
    """Run `remixmatch export`."""
    options: ExportOptions = parse(ExportOptions, "export", argv)
    from engine.inference import export
    from engine.inference.trained import load_ema_model

    trained = load_ema_model(options.dir)
    path = options.out or options.dir / f"model{export.SUFFIXES[options.to]}"
    network = trained.network.cpu().float()
    export.export(network, trained.config, trained.classes, trained.sides, options.to, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(trained.classes)} classes, images of {trained.sides}")
