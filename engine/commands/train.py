"""`remixmatch train PRESET`: train a run on one or more ranks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.commands.options import ConfigurationOptions, TrainOptions, check_gpu_count, check_ranks, parse_train
from engine.commands.output import show_warnings_only
from engine.commands.parsing import show_usage_if_asked
from engine.config import presets
from engine.config.checks import CLIENTS, validate
from engine.config.config import Config, changes
from engine.config.files import config_yaml, read_config
from engine.config.warnings import warnings_about
from engine.distributed import launch
from engine.errors import UserError
from engine.imports import gc_paused
from engine.runs.folder import default_folder, has_run, run_config
from engine.runs.headline import evaluations_of, shown_results
from engine.runs.setup import RunSetup, setup_run
from engine.training import ranges
from pipelines.data.cache import set_data_dir

log = logging.getLogger(__name__)

_Read = Callable[[Path], Mapping[str, Any]]  # See `read_config`.


def main(argv: list[str]) -> None:
    """Entry point of `remixmatch train`.

    Args:
        argv: The preset and flags.

    Raises:
        UserError: Invalid preset, flags, data or folder.
        Stopped: A signal arrived; the current step is saved.
    """
    texts = {name: _summarize(config) for name, config in presets.PRESETS.items()}
    more = "'remixmatch train digits-40 --help' lists all flags with the defaults of that preset."
    read = functools.cache(read_config)  # A pipe can be read only once.
    argv = _with_preset(argv, read)
    if show_usage_if_asked(argv, "preset", "train PRESET [flags]", texts, more):
        return
    ranges.enter("set up")
    parse = functools.partial(_parse, argv, read=read)
    options = parse()
    if options.folder.quiet:
        show_warnings_only()
    ranks = options.ranks
    check_ranks(ranks)
    set_data_dir(options.source.data_dir)
    if options.others["configuration"].print_config:
        _print_config(parse, options)
        return
    file = options.others["configuration"].config
    if file and _uses_torchrun(options) and not (file.is_file() or file.is_dir()):
        raise UserError(f"--config {file} must be a file and not a pipe, since each rank reads it")
    launch.die_with_parent()
    # A single process sets up before it imports torch; with several ranks, rank 0 does it for all.
    setup = None if launch.is_torchrun_worker() else _set_up(parse, options, options.folder.resume)

    ranges.enter("import")
    with gc_paused():
        from engine import run
        from engine.distributed import collectives
        from engine.training.execution import pick_device

    if setup and _uses_torchrun(options):
        check_gpu_count(setup.config, ranks)
        # With the folder, which each rank would otherwise choose itself. The last of two equal flags wins.
        launch.launch(["train", *argv, "--out", str(setup.folder)], ranks.gpus, ranks.max_restarts)
        return
    ranges.enter("build")
    with collectives.group(pick_device(setup.config if setup else options.config), ranks.timeout):
        if setup is None:
            # After a restart, ranks on other machines than the failed one do not know that they were restarted.
            resume = options.folder.resume or any(collectives.all_gather_object(launch.restarted()))
            setup = run.share(lambda: _set_up(parse, options, resume))
        summary = run.train(setup, options.folder.quiet, ranks.timeout, ranks.check_ranks)
        if collectives.rank() == 0:
            assert setup.folder is not None
            _print_summary(summary, setup.config, setup.folder)


def _uses_torchrun(options: TrainOptions) -> bool:
    return options.ranks.gpus > 1 or options.ranks.max_restarts > 0


def _set_up(parse: Callable[..., TrainOptions], options: TrainOptions, resume: bool) -> RunSetup:
    """Set up a run. When resuming, flags override the configuration the run was started with, not the preset.

    Raises:
        UserError: The data or folder does not fit the run.
    """
    # If this process launches ranks, the first of them reports.
    report = launch.is_torchrun_worker() or not _uses_torchrun(options)
    folder = options.folder.out or default_folder(options.config, resume)
    if begun := _begun(options, folder, resume):
        # A copied config.json must not send metrics to a server: only --log on this command line does.
        online = begun.log in CLIENTS
        options = parse(dataclasses.replace(begun, log="tensorboard") if online else begun)
        if report and online and options.config.log != begun.log:
            log.warning(f"{folder} was logged to {begun.log}; to continue there, add --log {begun.log}")
    elif report and options.folder.resume:
        log.info(f"no run in {folder}; starting a new one")
    ranks = launch.world_size_from_env(options.ranks.gpus)
    setup = setup_run(options.config, folder, resume, ranks, options.source.class_prior)
    if report and options.config.network == "auto":
        height, width = setup.data.sides
        log.info(f"--network auto: {setup.config.architecture} for images of {width}x{height} pixels")
    if report and not begun:
        for warning in warnings_about(setup.config, options.given, options.ablations.ablate):
            log.warning(warning)
    return setup


def _begun(options: TrainOptions, folder: Path, resume: bool) -> Config | None:
    """Return the configuration of the run to resume; None if there is none.

    Raises:
        UserError: The run is of another preset or method.
    """
    if not (resume and has_run(folder)):
        return None
    begun, preset = run_config(folder), options.config.preset
    changed = {"preset": (begun.preset, preset)}
    if "method" in options.given:
        changed["method"] = (begun.method, options.config.method)
    for name, (before, now) in changed.items():
        if before != now:
            raise UserError(f"{folder} was started with a different configuration: {name} {before} -> {now}")
    return begun


def _parse(argv: Sequence[str], begun: Config | None = None, read: _Read = read_config) -> TrainOptions:
    others = {"configuration": ConfigurationOptions()}
    return parse_train(argv, presets.preset(argv[0]), others=others, begun=begun, read=read)


def _with_preset(argv: list[str], read: _Read) -> list[str]:
    """Return the arguments with the preset of the file of --config, if they begin with a flag.

    Raises:
        UserError: The file cannot be read, or does not name its preset.
    """
    if not argv or not argv[0].startswith("-"):
        return argv
    for word, following in reversed(list(itertools.pairwise([*argv, ""]))):  # The last of two equal flags wins.
        flag, equal, value = word.partition("=")
        if flag == "--config" and (path := value if equal else following):
            if preset := read(Path(path)).get("preset"):
                return [preset, *argv]
            raise UserError(f"--config {path} names no preset: remixmatch train PRESET --config {shlex.quote(path)}")
    return argv


def _print_config(parse: Callable[..., TrainOptions], options: TrainOptions) -> None:
    """Print the configuration with the sources of its values. The data is opened only if a value depends on it."""
    folder = options.folder.out or default_folder(options.config, options.folder.resume)
    if begun := _begun(options, folder, options.folder.resume):
        options = parse(begun)
    config, sources = options.config, dict(options.sources)
    validate(config, launch.world_size_from_env(options.ranks.gpus))
    if config.network == "auto" or config.max_shift < 0 or options.source.class_prior:
        config = setup_run(options.config, class_prior=options.source.class_prior).config
        sources |= dict.fromkeys(changes(options.config, config), "data")
        if options.source.class_prior:
            sources["class_distribution"] = "--class-prior"
    print(config_yaml(config, sources), end="")


def _summarize(config: Config) -> str:
    """Describe a preset in one line."""
    labels = "all labels" if config.split == "all" else f"{config.labels} labels"
    views = f"K = {config.k}" if config.unlabeled else "supervised"
    dataset = "your images (--data DIR)" if config.dataset == "folder" else config.dataset
    return f"{dataset}, {labels}, {views}, {config.steps} steps"


def _print_summary(summary: Mapping[str, Any], config: Config, folder: Path) -> None:
    evaluations, last, middle = evaluations_of(summary, config), summary["test_accuracy"], summary["median_last_20"]
    print(
        f"{summary['preset']} seed {summary['seed']}: test accuracy {shown_results(evaluations, last, middle)}; "
        f"{summary['train_seconds']:.0f} s; see {folder}/summary.json, curves.png, views.png"
    )
    if "held_out_test_images" in summary:
        print(f"tested on {summary['held_out_test_images']} held-out labeled images (the data has no test part)")
    if "paper_error" in summary:
        deviation = "" if summary["paper_deviation"] is None else f" ± {summary['paper_deviation']:.2f}"
        other = "" if summary["same_settings_as_paper"] else " (settings differ from the preset)"
        first, name = (middle, evaluations.median_name) if evaluations.median_first else (last, "after the last step")
        print(
            f"test error: paper {summary['paper_error']:.2f}{deviation} % ({summary['paper_source']}), "
            f"ours {100 - first:.2f} % ({name}), difference {100 - first - summary['paper_error']:+.2f} pp{other}"
        )
