"""The command line: `remixmatch train | eval | predict | doctor | bench`.

A mistake of the user's is one line on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import tyro

from engine import config as configuration
from engine.errors import UserError

# Threads that wait for one another spin, by default for so long that a step takes ten times as long where a second
# process wants the same core. GNU's OpenMP reads this when torch is loaded, which no import above does
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

COMMANDS = {
    "train": "train a preset: remixmatch train PRESET [--seed N] [--out DIR] [--resume] ...",
    "eval": "test accuracy of a run: remixmatch eval DIR [--json]",
    "predict": "classify images with a run: remixmatch predict DIR IMAGE...",
    "doctor": "what of GPU, driver, torch, triton, DALI and apex is here, and what to do about the rest",
    "bench": "measurements: remixmatch bench digits | throughput | kernels | pipelines | baseline | report",
}


@dataclass
class TrainOptions:
    """Where a run goes, and its configuration."""

    config: Annotated[configuration.Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """The run's folder; by default runs/PRESET-seedN, numbered on if that exists."""
    resume: bool = False
    """Go on with the run in --out, by default the newest of this preset and seed."""
    quiet: bool = False
    """Print nothing but the summary."""


@dataclass
class EvalOptions:
    """Test accuracy of a run's averaged network."""

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    json: bool = False
    """Print a JSON object."""


@dataclass
class PredictOptions:
    """Class and probabilities of images, by a run's averaged network."""

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    images: tyro.conf.Positional[tuple[Path, ...]] = field(default_factory=tuple)
    """Image files; other modes become RGB and other sizes are resized, with a word about it."""
    json: bool = False
    """Print a JSON object a line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `remixmatch`; exits with 0, 2 for a user's mistake, or 130 after an interrupt."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _dispatch(argv)
    except UserError as error:
        print(f"remixmatch: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("remixmatch: interrupted; go on from the last checkpoint with --resume", file=sys.stderr)
        sys.exit(130)


def _dispatch(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print("usage: remixmatch COMMAND ...\n")
        for name, text in COMMANDS.items():
            print(f"  {name:8} {text}")
        print("\nremixmatch COMMAND --help says more.")
    elif command == "train":
        _train(argv[1:])
    elif command == "eval":
        _evaluate(parse(EvalOptions, "eval", argv[1:]))
    elif command == "predict":
        _predict(parse(PredictOptions, "predict", argv[1:]))
    elif command == "doctor":
        from engine.doctor import report

        sys.exit(0 if report() else 1)
    elif command in COMMANDS and (found := entry_points(group="remixmatch.commands", name=command)):
        next(iter(found)).load()(argv[1:])
    else:
        raise UserError(f"unknown command '{command}'; there are {', '.join(COMMANDS)}")


def parse(options: Any, command: str, argv: list[str], **default: Any) -> Any:
    """Fills a dataclass from flags; tyro's framed complaint becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(options, prog=f"remixmatch {command}", args=argv, **default)
    except SystemExit as ended:
        if not ended.code:
            raise
        words = re.sub(r"[\u2500-\u257f]+", " ", complaint.getvalue()).split()
        raise UserError(" ".join(words)) from None


def _train(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: remixmatch train PRESET [flags]\n\npresets:")
        for name, config in configuration.PRESETS.items():
            print(f"  {name:24} {config.dataset}, {config.labels} labels, K = {config.k}, {config.steps} steps")
        print("\nremixmatch train PRESET --help lists every flag with its default.")
        if not argv:
            raise UserError("train needs a preset")
        return
    preset = configuration.preset(argv[0])

    from engine import distribution, run

    defaults = TrainOptions(config=preset)
    options = parse(TrainOptions, f"train {argv[0]}", argv[1:], default=defaults)
    configuration.validate(options.config)
    distribution.start(run.pick_device(options.config))
    try:
        folder = options.out or run.default_folder(options.config, options.resume)
        folder = Path(distribution.agreed(str(folder)))
        if options.resume and (folder / "config.json").exists():
            # a run goes on as it was begun: only flags that are given can disagree with it
            begun = configuration.load_config(folder / "config.json")
            if begun.preset != preset.preset:
                raise UserError(
                    f"{folder} was begun with another configuration: preset {begun.preset} -> {preset.preset}"
                )
            defaults = dataclasses.replace(defaults, config=begun)
            options = parse(TrainOptions, f"train {argv[0]}", argv[1:], default=defaults)
        summary = run.train(options.config, folder, options.resume, options.quiet)
        if distribution.rank() == 0:
            print(
                f"{summary['preset']} seed {summary['seed']}: test accuracy {summary['test_accuracy']:.2f} %, "
                f"median of the last 20 evaluations {summary['median_last_20']:.2f} %, "
                f"{summary['train_seconds']:.0f} s; see {folder}/summary.json, curves.png, views.png"
            )
    finally:
        distribution.stop()


def _evaluate(options: EvalOptions) -> None:
    from engine import run
    from engine.evaluation import evaluate

    config, data, network, device = run.load_average(options.dir, _warn)
    accuracy, loss = evaluate(network, data.test_images, data.test_labels, device)
    result = {"preset": config.preset, "images": len(data.test_labels), "test_accuracy": accuracy, "test_loss": loss}
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{config.preset}: test accuracy {accuracy:.2f} % of {len(data.test_labels)} images, loss {loss:.4f}")


def _predict(options: PredictOptions) -> None:
    from engine import predict, run

    if not options.images:
        raise UserError("predict needs at least one image")
    _, data, network, device = run.load_average(options.dir, _warn)
    height, width = data.test_images.shape[1:3]
    images = [predict.read_image(path, height, width, _warn) for path in options.images]
    for path, probabilities in zip(options.images, predict.probabilities(network, images, device), strict=True):
        named = dict(zip(data.classes, probabilities, strict=True))
        best = max(named, key=named.__getitem__)
        if options.json:
            print(json.dumps({"image": str(path), "class": best, "probabilities": named}))
        else:
            ranked = sorted(named.items(), key=lambda item: -item[1])
            print(f"{path}: {best}  ({', '.join(f'{name} {p:.3f}' for name, p in ranked)})")


def _warn(text: str) -> None:
    print(f"remixmatch: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
