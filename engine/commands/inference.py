"""`remixmatch eval`, `predict` and `export`: use a trained run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from engine.commands.parsing import DataDir, parse
from engine.errors import Incomplete, UserError, printable
from engine.runs.identity import changed_test_parts
from engine.runs.setup import open_data
from pipelines.data.cache import set_data_dir

log = logging.getLogger(__name__)

RunDir = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="The run's folder.")]


@dataclass
class EvalOptions:
    """Print the test accuracy of a run's EMA model, and the recall of each class."""

    dir: RunDir
    json: bool = False
    """Print the result as a JSON object, with the confusion matrix."""
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
    """CSV file to write instead of printing: file, class, and one probability per class; - for standard output."""
    top: int | None = None
    """Print or write only this number of classes, the most probable first."""
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
    with_resize: bool = False
    """Take images of any size and resize them as predict does; for torch and onnx."""


def evaluate(argv: list[str]) -> None:
    """Run `remixmatch eval`."""
    options: EvalOptions = parse(EvalOptions, "eval", argv)
    from engine.inference import confusion
    from engine.inference.evaluation import evaluate as measure
    from engine.inference.trained import load_ema_model
    from pipelines.files import some

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
    if changed := changed_test_parts(options.dir, data):
        log.warning(f"the test part has changed since training; these differ: {', '.join(changed)}")
    labels = data.test_labels
    accuracy, loss, predicted = measure(trained.network, data.test_images, labels, trained.device)
    matrix = confusion.confusion_matrix(labels, predicted.cpu().numpy(), len(data.classes))
    recalls = confusion.recalls(matrix)
    balanced, geometric = confusion.balanced_accuracy(recalls), confusion.geometric_mean(recalls)
    result = {"preset": config.preset, "images": len(labels), "test_accuracy": accuracy, "test_loss": loss}
    if options.json:
        result |= {"balanced_accuracy": balanced, "geometric_mean": geometric, "classes": data.classes}
        result |= {"recall": dict(zip(data.classes, recalls, strict=True)), "confusion_matrix": matrix.tolist()}
        print(json.dumps(result))
        return
    print(f"{config.preset}: test accuracy {accuracy:.2f} % of {len(labels)} images, loss {loss:.4f}")
    absent = recalls.count(None)
    without = f"; {absent} {'class has' if absent == 1 else 'classes have'} no test images" if absent else ""
    print(f"balanced accuracy {balanced:.2f} %, geometric mean of recalls {geometric:.2f} %{without}")
    print(*map(printable, confusion.recall_table(matrix, data.classes)), sep="\n")


def predict(argv: list[str]) -> None:
    """Run `remixmatch predict`."""
    options: PredictOptions = parse(PredictOptions, "predict", argv)
    from engine.inference import predict
    from engine.inference.trained import load_ema_model
    from pipelines.data.image_files import describe_remarks

    for flag, value in (("batch", options.batch), ("top", options.top)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, got {value}")
    if options.json and options.csv:
        raise UserError("--json prints and --csv writes the result; leave one of them out")
    files = predict.find_images(options.images)
    trained = load_ema_model(options.dir)
    skip = len(files) > 1  # Otherwise the reason is the only message.
    warn = len(files) <= options.batch  # A message per file would hide the results of many.
    remarks: list[tuple[str, str]] = []
    note = None if warn else lambda name, remark: remarks.append((name, remark))
    found: dict[int, int] = {}  # Predicted class of each file that could be read.

    def rows() -> Iterator[tuple[Path, np.ndarray]]:
        for number, values in predict.classify(
            trained.network, files, trained.sides[0], trained.device, options.batch, skip, warn, note
        ):
            found[number] = int(values.argmax())
            yield files[number], values

    if options.csv:
        place = Path("/dev/stdout") if str(options.csv) == "-" else options.csv
        if predict.write_csv(place, trained.classes, rows(), options.top) and place.parent != Path("/dev"):
            print(f"{place}: {len(found)} of {len(files)} images")
    else:
        for path, values in rows():
            named = [(trained.classes[number], float(values[number])) for number in predict.ranked(values, options.top)]
            if not options.json:
                listed = ", ".join(f"{name} {p:.3f}" for name, p in named)
                print(printable(f"{path}: {named[0][0]}  ({listed})"))
                continue
            if options.top is None:
                named = list(zip(trained.classes, map(float, values), strict=True))
            best = trained.classes[int(values.argmax())]
            print(json.dumps({"image": str(path), "class": best, "probabilities": dict(named)}))
    for line in describe_remarks(remarks):
        log.warning(line)
    if not found:
        raise UserError("no image could be read")
    if len(found) > 1:
        _summarize([files[number] for number in found], np.array(list(found.values())), trained.classes)
    if len(found) < len(files):
        raise Incomplete(f"{len(files) - len(found)} of {len(files)} files could not be read as images")


def _summarize(files: Sequence[Path], predicted: np.ndarray, classes: Sequence[str]) -> None:
    """Log how often each class is predicted, and the recalls if every file is in a folder named after a class."""
    from engine.inference import confusion

    counts = sorted(
        zip(np.bincount(predicted, minlength=len(classes)), classes, strict=True), key=lambda each: -each[0]
    )
    shown = [f"{name} {count}" for count, name in counts if count]
    more = f", and {len(shown) - 20} other classes" if len(shown) > 20 else ""
    log.info(f"predicted classes: {', '.join(shown[:20])}{more}")
    if all(path.parent.name in classes for path in files):
        labels = np.array([classes.index(path.parent.name) for path in files])
        matrix = confusion.confusion_matrix(labels, predicted, len(classes))
        recalls = confusion.recalls(matrix)
        log.info(
            f"compared with the names of the folders: accuracy {confusion.accuracy(matrix):.2f} %, "
            f"balanced accuracy {confusion.balanced_accuracy(recalls):.2f} %, "
            f"geometric mean of recalls {confusion.geometric_mean(recalls):.2f} %"
        )
        for line in confusion.recall_table(matrix, classes):
            log.info(line)


def export(argv: list[str]) -> None:
    """Run `remixmatch export`."""
    options: ExportOptions = parse(ExportOptions, "export", argv)
    from engine.inference import export
    from engine.inference.trained import load_ema_model

    trained = load_ema_model(options.dir)
    path = options.out or options.dir / f"model{export.SUFFIXES[options.to]}"
    export.export(trained, options.to, path, options.with_resize)
    sides = "any size" if options.with_resize else f"{trained.sides[1]}x{trained.sides[0]} pixels"
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(trained.classes)} classes, images of {sides}")
