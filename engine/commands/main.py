"""The command line: `remixmatch train | eval | predict | doctor | reproduce | ablate | report | bench`.

A mistake of the user's is one line on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_type_hints

import numpy as np
import tyro

from engine.commands.parsing import parse, show_usage
from engine.config import config as configuration
from engine.config import methods, presets
from engine.config.config import folder_name
from engine.distributed import launch
from engine.errors import RankError, Stopped, UserError
from engine.imports import uncollected
from engine.runs.folder import check_folder, default_folder
from engine.training import ranges
from pipelines.cache import set_data_dir

# Threads that wait for one another spin, by default for so long that a step takes ten times as long where a second
# process wants the same core. GNU's OpenMP reads this when torch is loaded, which no import above does
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

COMMANDS = {
    "train": "train a preset: remixmatch train PRESET [--seed N] [--out DIR] [--resume] ...",
    "eval": "test accuracy of a run: remixmatch eval DIR [--json]",
    "predict": "classify images with a run: remixmatch predict DIR IMAGE-OR-FOLDER... [--csv FILE]",
    "export": "the trained model as safetensors, torch.export or ONNX: remixmatch export DIR --to FORMAT",
    "data": "data sets and folders of images: prepare, list, info, split, check-split",
    "doctor": "what of GPU, driver, torch, triton, DALI and apex is here, and what to do about the rest",
    "reproduce": "a table of the paper, from runs over methods and seeds: remixmatch reproduce TABLE ...",
    "ablate": "what each component costs and what it brings: remixmatch ablate PRESET [--time-only] ...",
    "profile": "where a training step's time goes: remixmatch profile PRESET [flags of train]",
    "report": "runs, or a folder of reproduce or ablate, as an HTML page: remixmatch report RUN... [--out FILE]",
    "bench": "measurements: remixmatch bench NAME ...; remixmatch bench --help lists them",
}


# commands whose module is imported when they are called
ELSEWHERE = {
    "reproduce": "engine.studies.reproduce",
    "ablate": "engine.studies.ablate",
    "profile": "engine.studies.profile",
    "report": "engine.report.command",
    "bench": "bench.cli",
}


@dataclass(frozen=True)
class _Folder:
    out: Path | None = None
    """The run's folder; by default runs/PRESET-seedN, numbered on if that exists."""
    resume: bool = False
    """Go on with the run in --out, by default the newest of this preset and seed."""
    quiet: bool = False
    """Print nothing but the summary and warnings."""


@dataclass(frozen=True)
class _OutputOptions(configuration.OutputOptions, _Folder):
    """Where the run goes, and what is written on the way."""


@dataclass(frozen=True)
class _Ablations:
    ablate: tuple[str, ...] = ()
    """Ablations of the paper by name, such as k=4, no-rotation, no-alignment or mean-guess; an unknown name lists
    them. Each sets fields that are flags, too."""


@dataclass(frozen=True)
class _MethodOptions(configuration.MethodOptions, _Ablations):
    """What is learned, from which rows, with which losses. Paper: ReMixMatch (ICLR 2020), section 3."""


@dataclass(frozen=True)
class _Source:
    data: Path | None = None
    """A folder of images that `remixmatch data prepare` has prepared, instead of --dataset."""
    data_dir: Path | None = None
    """Where prepared data sets lie; by default the variable REMIXMATCH_DATA, or ~/.cache/remixmatch."""
    class_prior: Path | None = None
    """A JSON object with the known probability of each class, instead of --class-distribution."""


@dataclass(frozen=True)
class _DataOptions(configuration.DataOptions, _Source):
    """Images, and which of them keep their label."""


@dataclass(frozen=True)
class _Ranks:
    gpus: int = 1
    """Ranks on this machine, a GPU each, or a process each on a CPU: more than one are started by torchrun."""
    max_restarts: int = 0
    """How often torchrun starts the ranks again, from the last good checkpoint, after one of them has died."""
    timeout: float = 600.0
    """Seconds that a rank waits for another one before it ends with a message."""
    check_ranks: int = 0
    """For debugging: steps between comparisons of the ranks' states, bit for bit; 0 for none."""


@dataclass(frozen=True)
class _ExecutionOptions(_Ranks, configuration.ExecutionOptions):
    """Where and how it is computed."""


@dataclass(frozen=True)
class TrainOptions:
    """Trains a preset, or what the flags make of it."""

    preset: tyro.conf.Suppress[str]
    method: _MethodOptions
    data: _DataOptions
    augmentation: configuration.AugmentationOptions
    network: configuration.NetworkOptions
    optimisation: configuration.OptimisationOptions
    execution: _ExecutionOptions
    output: _OutputOptions

    @classmethod
    def of(cls, config: configuration.Config) -> Self:
        """The options whose values are a configuration's, and otherwise the defaults."""
        sections = {}
        for name, section in get_type_hints(cls, include_extras=True).items():
            if name != "preset":
                known = {field.name for field in dataclasses.fields(section)} & vars(config).keys()
                sections[name] = section(**{field: getattr(config, field) for field in known})
        return cls(preset=config.preset, **sections)

    def with_config(self, config: configuration.Config) -> Self:
        """These options with the values of a configuration."""
        sections = {name: section for name, section in vars(self).items() if dataclasses.is_dataclass(section)}
        for name, section in sections.items():
            known = {field: getattr(config, field) for field in vars(section).keys() & vars(config).keys()}
            sections[name] = dataclasses.replace(section, **known)  # type: ignore[type-var]
        return dataclasses.replace(self, **sections)  # type: ignore[arg-type]

    def resolved(self) -> Self:
        """These options with what the data say: sides, network, marginal.

        Raises:
            UserError: there are no such data, or the configuration does not fit them.
        """
        configuration.validate(self.config, self.execution.gpus)
        data = configuration.open_data(self.config.dataset)
        config = configuration.resolve(self.config, data)
        if self.data.class_prior:
            prior = configuration.read_prior(self.data.class_prior, data.classes)
            config = dataclasses.replace(config, class_distribution=prior)
        configuration.check_data(config, data)
        return self.with_config(config)

    @property
    def config(self) -> configuration.Config:
        """The configuration among the options."""
        values: dict[str, Any] = {}
        for section in (self, *vars(self).values()):
            values |= vars(section) if dataclasses.is_dataclass(section) else {}
        if self.data.data:
            values["dataset"] = folder_name(self.data.data)
        return configuration.Config(**{name: values[name] for name in vars(configuration.Config())})


Options = TypeVar("Options", bound=TrainOptions)


@dataclass
class EvalOptions:
    """Test accuracy of a run's EMA model."""

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    json: bool = False
    """Print a JSON object."""
    data_dir: Path | None = None
    """Where prepared data sets lie; by default the variable REMIXMATCH_DATA, or ~/.cache/remixmatch."""


@dataclass
class PredictOptions:
    """Class and probabilities of images, by a run's EMA model."""

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    images: tyro.conf.Positional[tuple[Path, ...]] = field(default_factory=tuple)
    """Image files, and folders of them; other modes become RGB and other sizes are resized, with a warning."""
    json: bool = False
    """Print a JSON object a line."""
    csv: Path | None = None
    """Write a table to this file: image, class, and a probability for each class."""
    batch: int = 256
    """Images of a folder that are in memory at a time."""


@dataclass
class ExportOptions:
    """Writes a run's EMA model for others: uint8 images in, class probabilities out."""

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    to: Literal["safetensors", "torch", "onnx"] = "safetensors"
    """Parameters and what rebuilds the network; a program of torch.export; ONNX."""
    out: Path | None = None
    """The file; by default model.safetensors, model.pt2 or model.onnx in the run's folder."""


@dataclass
class DoctorOptions:
    """What of GPU, driver, torch, triton, DALI and apex is here, and what to do about the rest.

    Exit code 1 where something that training needs is missing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `remixmatch`; see `guarded` for its exit codes."""
    guarded(_dispatch, list(sys.argv[1:] if arguments is None else arguments))


def guarded(command: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls a command with its arguments.

    Exits with 0, 2 for a user's mistake, 1 where another rank is lost, 128 + its number after a signal; so it does, and
    without a word, where whoever reads its output has gone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may have letters that it has not
    try:
        try:
            command(argv)
        finally:
            sys.stdout.flush()  # here, where a reader who has gone can be met, and not when Python ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
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
        show_usage("COMMAND ...", COMMANDS, "remixmatch COMMAND --help says more.")
    elif command == "train":
        _train(argv[1:])
    elif command == "eval":
        _evaluate(parse(EvalOptions, "eval", argv[1:]))
    elif command == "predict":
        _predict(parse(PredictOptions, "predict", argv[1:]))
    elif command == "export":
        _export(parse(ExportOptions, "export", argv[1:]))
    elif command == "data":
        from engine.commands import data

        data.main(argv[1:])
    elif command == "doctor":
        parse(DoctorOptions, "doctor", argv[1:])
        from engine.commands.doctor import report

        sys.exit(0 if report() else 1)
    elif command in ELSEWHERE:
        import_module(ELSEWHERE[command]).main(argv[1:])
    else:
        raise UserError(f"unknown command '{command}'; there are {', '.join(COMMANDS)}")


def _train(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        texts = {
            name: f"{config.dataset}, {config.labels} labels, K = {config.k}, {config.steps} steps"
            for name, config in presets.PRESETS.items()
        }
        show_usage("train PRESET [flags]", texts, "remixmatch train PRESET --help lists every flag with its default.")
        if not argv:
            raise UserError("train needs a preset")
        return
    ranges.begin("set up")
    options: TrainOptions = parse_train(argv, presets.preset(argv[0]))
    check_ranks(options)
    set_data_dir(options.data.data_dir)
    configuration.validate(options.config)
    launch.end_with_parent()
    # alone, before torch is imported; ranks agree on what rank 0 finds
    if not launch.under_torchrun():
        options = _settled(options, argv, options.output.resume)
    launching = not launch.under_torchrun() and (options.execution.gpus > 1 or options.execution.max_restarts > 0)

    ranges.begin("import")
    with uncollected():
        from engine import run
        from engine.distributed import collectives
        from engine.training.execution import pick_device

    if launching:
        check_places(options)
        # with the folder, which each rank would otherwise choose anew; the last of two equal flags counts
        arguments = ["train", *argv, "--out", str(options.output.out)]
        launch.launch(arguments, options.execution.gpus, options.execution.max_restarts)
        return
    ranges.begin("build")
    collectives.start(pick_device(options.config), options.execution.timeout)
    try:
        if launch.under_torchrun():
            # of ranks that are started again, those of another machine than the failed one's do not know that they are
            resume = options.output.resume or any(collectives.everyones(launch.restarted()))
            options = collectives.on_first(lambda: _settled(options, argv, resume))
        output, execution = options.output, options.execution
        assert output.out is not None
        summary = run.train(
            options.config, output.out, output.resume, output.quiet, execution.timeout, execution.check_ranks
        )
    except RuntimeError as error:
        if lost := collectives.lost(error):
            raise lost from error
        raise
    if collectives.rank() == 0:
        print(
            f"{summary['preset']} seed {summary['seed']}: test accuracy {summary['test_accuracy']:.2f} %, "
            f"median of the last 20 evaluations {summary['median_last_20']:.2f} %, "
            f"{summary['train_seconds']:.0f} s; see {output.out}/summary.json, curves.png, views.png"
        )
        if "held_out_test_images" in summary:
            print(
                f"tested on {summary['held_out_test_images']} labeled images that were held out: there is no test part"
            )
        if "paper_error" in summary:
            deviation = "" if summary["paper_deviation"] is None else f" ± {summary['paper_deviation']:.2f}"
            other = "" if summary["same_settings_as_paper"] else ", with other settings than the preset's"
            print(
                f"test error: paper {summary['paper_error']:.2f}{deviation} % ({summary['paper_source']}), "
                f"ours {summary['error']:.2f} % (median of the last 20), difference "
                f"{summary['difference_to_paper']:+.2f} points{other}"
            )
    collectives.stop()


def parse_train(
    argv: list[str],
    base: configuration.Config,
    kind: type[Options] = TrainOptions,  # type: ignore[assignment]
    command: str = "train",
) -> Options:
    """The options over a configuration. Method and ablations set other fields, which flags of their own override.

    Args:
        argv: the preset, and flags.
        base: what flags are over.
        kind: of the options.
        command: that they are of.
    """

    def parsed(config: configuration.Config) -> Options:
        return parse(kind, f"{command} {argv[0]}", argv[1:], default=kind.of(config))

    options = parsed(base)
    method, ablations = options.method.method, options.method.ablate
    if method == base.method and not ablations:
        return options
    changed = base if method == base.method else methods.with_method(base, method)
    return parsed(methods.ablate(changed, *ablations))


def check_ranks(options: TrainOptions) -> None:
    """Raises UserError where a flag of ranks cannot work."""
    execution = options.execution
    for flag, least in (("gpus", 1), ("max_restarts", 0), ("check_ranks", 0)):
        if getattr(execution, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}, got {getattr(execution, flag)}")
    if not execution.timeout > 0:
        raise UserError(f"--timeout must be more than 0 seconds, got {execution.timeout}")
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if launch.under_torchrun() and execution.gpus not in (1, int(local)):
        raise UserError(f"--gpus {execution.gpus} under a torchrun of {local}: leave out one of the two")


def check_places(options: TrainOptions) -> None:
    """Raises UserError where there are fewer GPUs than ranks."""
    import torch

    from engine.training.execution import pick_device

    gpus = options.execution.gpus
    places = torch.cuda.device_count() if pick_device(options.config).type == "cuda" else gpus
    if gpus > places:
        raise UserError(f"--gpus {gpus}: torch sees {places} here; --device cpu trains without any")


def _settled(options: TrainOptions, argv: list[str], resume: bool) -> TrainOptions:
    """The options with the run's folder, and with the configuration that the run in it was begun with.

    A run goes on as it was begun: only flags that are given can disagree with it.

    Raises:
        UserError: data or folder are not such that the run can be trained.
    """
    folder = options.output.out or default_folder(options.config, resume)
    if resume and (folder / "config.json").exists():
        begun = configuration.load_config(folder / "config.json")
        preset = options.config.preset
        if begun.preset != preset:
            raise UserError(f"{folder} was begun with another configuration: preset {begun.preset} -> {preset}")
        options = parse_train(argv, begun)
    options = dataclasses.replace(options, output=dataclasses.replace(options.output, out=folder, resume=resume))
    settled = options.resolved()
    config = settled.config
    check_folder(config, folder, resume)
    if options.config.network == "auto" and not options.output.quiet:
        sides = configuration.open_data(config.dataset).sides
        _warn(f"--network auto: {config.architecture} for images of {sides[1]}x{sides[0]} pixels")
    return settled


def _evaluate(options: EvalOptions) -> None:
    from engine import run
    from engine.inference.evaluation import evaluate
    from pipelines.folder import some

    set_data_dir(options.data_dir)
    trained = run.load_ema_model(options.dir, _warn)
    config, data = trained.config, configuration.open_data(trained.config.dataset)
    if (data.classes, data.sides) != (trained.classes, trained.sides):
        was, now = (
            f"{sides[1]}x{sides[0]} pixels of {len(classes)} classes"
            for classes, sides in ((trained.classes, trained.sides), (data.classes, data.sides))
        )
        differing = sorted(set(trained.classes) ^ set(data.classes))
        raise UserError(
            f"{options.dir} was trained on images of {was}, and its data has {now} now"
            + (f", which differ in {some(differing)}" if differing else "")
        )
    accuracy, loss = evaluate(trained.network, data.test_images, data.test_labels, trained.device)
    result = {"preset": config.preset, "images": len(data.test_labels), "test_accuracy": accuracy, "test_loss": loss}
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{config.preset}: test accuracy {accuracy:.2f} % of {len(data.test_labels)} images, loss {loss:.4f}")


def _predict(options: PredictOptions) -> None:
    from engine import run
    from engine.inference import predict

    if options.batch < 1:
        raise UserError(f"--batch must be at least 1, got {options.batch}")
    files, many = predict.find_images(options.images)
    trained = run.load_ema_model(options.dir, _warn)
    network, device, side = trained.network, trained.device, trained.sides[0]
    if not many:  # each of them was named, and is expected to be one
        images = np.stack([predict.read_image(path, side, _warn) for path in files])
        found = zip(files, predict.probabilities(network, images, device), strict=True)
    else:
        found = predict.classify(network, files, side, device, options.batch, _warn)  # type: ignore[assignment]
    count = 0
    if options.csv:
        count = predict.write_csv(options.csv, trained.classes, iter(found))
        if count:
            print(f"{options.csv}: {count} of {len(files)} images")
    else:
        for path, values in found:
            count += 1
            _print_prediction(path, dict(zip(trained.classes, map(float, values), strict=True)), options.json)
    if many and count < len(files):
        _warn(f"{len(files) - count} of {len(files)} files cannot be read")
    if not count:
        raise UserError("no image could be read")


def _print_prediction(path: Path, named: dict[str, float], as_json: bool) -> None:
    best = max(named, key=named.__getitem__)
    if as_json:
        print(json.dumps({"image": str(path), "class": best, "probabilities": named}))
        return
    ranked = sorted(named.items(), key=lambda item: -item[1])
    print(f"{path}: {best}  ({', '.join(f'{name} {p:.3f}' for name, p in ranked)})")


def _export(options: ExportOptions) -> None:
    from engine import run
    from engine.inference import export

    trained = run.load_ema_model(options.dir, _warn)
    path = options.out or options.dir / f"model{export.SUFFIXES[options.to]}"
    network = trained.network.cpu().float()
    export.export(network, trained.config, trained.classes, trained.sides, options.to, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(trained.classes)} classes, images of {trained.sides}")


def _warn(text: str) -> None:
    print(f"remixmatch: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
