"""`remixmatch train PRESET`: trains a run, on one rank or on several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.commands.options import TrainOptions, check_places, check_ranks, parse_train
from engine.commands.output import show_warnings_only
from engine.commands.parsing import usage_is_all
from engine.config import presets
from engine.config.config import load_config
from engine.distributed import launch
from engine.errors import UserError
from engine.imports import gc_paused
from engine.runs.folder import default_folder
from engine.runs.setup import RunSetup, setup_run
from engine.training import ranges
from pipelines.cache import set_data_dir

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Entry point of `remixmatch train`.

    Raises:
        UserError: a mistake in preset, flags, data or folder.
        Stopped: a signal came; the step reached is saved.
    """
    texts = {
        name: f"{config.dataset}, {config.labels} labels, K = {config.k}, {config.steps} steps"
        for name, config in presets.PRESETS.items()
    }
    more = "remixmatch train PRESET --help lists every flag with its default."
    if usage_is_all(argv, "preset", "train PRESET [flags]", texts, more):
        return
    ranges.enter("set up")
    options = parse_train(argv, presets.preset(argv[0]))
    if options.folder.quiet:
        show_warnings_only()
    ranks = options.ranks
    check_ranks(ranks)
    set_data_dir(options.source.data_dir)
    launch.die_with_parent()
    # alone, before torch is imported; ranks agree on what rank 0 finds
    setup = None if launch.is_torchrun_worker() else _set_up(argv, options, options.folder.resume)

    ranges.enter("import")
    with gc_paused():
        from engine import run
        from engine.distributed import collectives
        from engine.training.execution import pick_device

    if setup and (ranks.gpus > 1 or ranks.max_restarts > 0):
        check_places(setup.config, ranks)
        # with the folder, which each rank would otherwise choose anew; the last of two equal flags counts
        launch.launch(["train", *argv, "--out", str(setup.folder)], ranks.gpus, ranks.max_restarts)
        return
    ranges.enter("build")
    collectives.start(pick_device(setup.config if setup else options.config), ranks.timeout)
    try:
        if setup is None:
            # of ranks that are started again, those of another machine than the failed one's do not know that they are
            resume = options.folder.resume or any(collectives.all_gather_object(launch.restarted()))
            setup = run.share(lambda: _set_up(argv, options, resume))
        summary = run.train(setup, options.folder.quiet, ranks.timeout, ranks.check_ranks)
    except RuntimeError as error:
        if lost := collectives.lost(error):
            raise lost from error
        raise
    if collectives.rank() == 0:
        assert setup.folder is not None
        _print_summary(summary, setup.folder)
    collectives.stop()


def _set_up(argv: list[str], options: TrainOptions, resume: bool) -> RunSetup:
    """Sets up the run, with the configuration that the run in its folder was begun with.

    A run goes on as it was begun: only flags that are given can disagree with it.

    Raises:
        UserError: data or folder are not such that the run can be trained.
    """
    folder = options.folder.out or default_folder(options.config, resume)
    if resume and (folder / "config.json").exists():
        begun = load_config(folder / "config.json")
        preset = options.config.preset
        if begun.preset != preset:
            raise UserError(f"{folder} was begun with another configuration: preset {begun.preset} -> {preset}")
        options = parse_train(argv, begun)
    ranks = launch.world_size_from_env(options.ranks.gpus)
    setup = setup_run(options.config, folder, resume, ranks, options.source.class_prior)
    if options.config.network == "auto":
        height, width = setup.data.sides
        log.info(f"--network auto: {setup.config.architecture} for images of {width}x{height} pixels")
    return setup


def _print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    print(
        f"{summary['preset']} seed {summary['seed']}: test accuracy {summary['test_accuracy']:.2f} %, "
        f"median of the last 20 evaluations {summary['median_last_20']:.2f} %, "
        f"{summary['train_seconds']:.0f} s; see {folder}/summary.json, curves.png, views.png"
    )
    if "held_out_test_images" in summary:
        print(f"tested on {summary['held_out_test_images']} labeled images that were held out: there is no test part")
    if "paper_error" in summary:
        deviation = "" if summary["paper_deviation"] is None else f" ± {summary['paper_deviation']:.2f}"
        other = "" if summary["same_settings_as_paper"] else ", with other settings than the preset's"
        print(
            f"test error: paper {summary['paper_error']:.2f}{deviation} % ({summary['paper_source']}), "
            f"ours {summary['error']:.2f} % (median of the last 20), difference "
            f"{summary['difference_to_paper']:+.2f} points{other}"
        )
