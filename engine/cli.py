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
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import tyro

from engine import config as configuration
from engine.errors import RankError, Stopped, UserError

# Threads that wait for one another spin, by default for so long that a step takes ten times as long where a second
# process wants the same core. GNU's OpenMP reads this when torch is loaded, which no import above does
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

COMMANDS = {
    "train": "train a preset: remixmatch train PRESET [--seed N] [--out DIR] [--resume] ...",
    "eval": "test accuracy of a run: remixmatch eval DIR [--json]",
    "predict": "classify images with a run: remixmatch predict DIR IMAGE...",
    "doctor": "what of GPU, driver, torch, triton, DALI and apex is here, and what to do about the rest",
    "bench": "measurements: remixmatch bench NAME; README says which there are",
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
    """Print nothing but the summary and warnings."""
    gpus: int = 1
    """Ranks on this machine, a GPU each, or a process each on a CPU: more than one are started by torchrun."""
    max_restarts: int = 0
    """How often torchrun starts the ranks again, from the last good checkpoint, after one of them has died."""
    timeout: float = 600.0
    """Seconds that a rank waits for another one before it ends with a message."""
    check_ranks: int = 0
    """For debugging: steps between comparisons of the ranks' states, bit for bit; 0 for none."""


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
    """Entry point of `remixmatch`.

    Exits with 0, 2 for a user's mistake, 1 where another rank is lost, 128 + its number after a signal.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _dispatch(argv)
    except (UserError, Stopped, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":  # each of several ranks meets the same
            _warn(str(error) or "interrupted; go on from the last checkpoint with --resume")
        sys.exit(2 if isinstance(error, UserError) else 128 + getattr(error, "number", signal.SIGINT))
    except RankError as error:
        _warn(f"rank {os.environ.get('RANK', '0')}: {error}")
        sys.exit(1)


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

    from engine import distribution, launch, run

    launch.end_with_parent()
    options = parse(TrainOptions, f"train {argv[0]}", argv[1:], default=TrainOptions(config=preset))
    _check_ranks(options)
    configuration.validate(options.config)
    launching = not launch.under_torchrun() and (options.gpus > 1 or options.max_restarts > 0)
    if not launching:
        distribution.start(run.pick_device(options.config), options.timeout)
    try:
        # of ranks that torchrun starts again, those of another machine than the failed one do not know that they are
        resume = options.resume or any(distribution.everyones(launch.restarted()))
        options = distribution.on_first(lambda: _settled(options, argv, resume))
        assert options.out is not None
        if launching:
            configuration.validate(options.config, options.gpus)
            run.checked_data(options.config)
            run.check_folder(options.config, options.out, options.resume)
            # with the folder, which each rank would otherwise choose anew; the last of two equal flags counts
            launch.launch(["train", *argv, "--out", str(options.out)], options.gpus, options.max_restarts)
            return
        summary = run.train(
            options.config, options.out, options.resume, options.quiet, options.timeout, options.check_ranks
        )
    except RuntimeError as error:
        if lost := distribution.lost(error):
            raise lost from error
        raise
    if distribution.rank() == 0:
        print(
            f"{summary['preset']} seed {summary['seed']}: test accuracy {summary['test_accuracy']:.2f} %, "
            f"median of the last 20 evaluations {summary['median_last_20']:.2f} %, "
            f"{summary['train_seconds']:.0f} s; see {options.out}/summary.json, curves.png, views.png"
        )
    distribution.stop()


def _check_ranks(options: TrainOptions) -> None:
    from engine import launch

    for flag, least in (("gpus", 1), ("max_restarts", 0), ("check_ranks", 0)):
        if getattr(options, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}, got {getattr(options, flag)}")
    if not options.timeout > 0:
        raise UserError(f"--timeout must be more than 0 seconds, got {options.timeout}")
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if launch.under_torchrun() and options.gpus not in (1, int(local)):
        raise UserError(f"--gpus {options.gpus} under a torchrun of {local}: leave out one of the two")
    if not launch.under_torchrun() and options.gpus > 1:
        import torch

        from engine.run import pick_device

        places = torch.cuda.device_count() if pick_device(options.config).type == "cuda" else options.gpus
        if options.gpus > places:
            raise UserError(f"--gpus {options.gpus}: torch sees {places} here; --device cpu trains without any")


def _settled(options: TrainOptions, argv: list[str], resume: bool) -> TrainOptions:
    """The options with the run's folder, and with the configuration that the run in it was begun with.

    A run goes on as it was begun: only flags that are given can disagree with it.
    """
    from engine import run

    folder = options.out or run.default_folder(options.config, resume)
    if resume and (folder / "config.json").exists():
        begun = configuration.load_config(folder / "config.json")
        preset = options.config.preset
        if begun.preset != preset:
            raise UserError(f"{folder} was begun with another configuration: preset {begun.preset} -> {preset}")
        defaults = dataclasses.replace(options, config=begun)
        options = parse(TrainOptions, f"train {argv[0]}", argv[1:], default=defaults)
    return dataclasses.replace(options, out=folder, resume=resume)


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
