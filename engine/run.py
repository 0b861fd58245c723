"""One run, from start or resume to its final files.

Files of its folder:
config.json  split.json  metrics.jsonl  history.jsonl  tensorboard/  logged.json  checkpoints/  summary.json
curves.png  views.png  results.npz  ema.safetensors  .lock (during training)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.config.checks import check_data, validate
from engine.config.config import Config, changes
from engine.config.presets import PRESETS, PUBLISHED
from engine.distributed import collectives
from engine.errors import RankError, UserError, cannot_write, out_of_memory
from engine.inference import predict
from engine.inference.export import safetensors_bytes
from engine.measuring.provenance import commit, device_name, versions
from engine.runs import history
from engine.runs.folder import check_folder
from engine.runs.identity import changed_parts, fingerprint
from engine.runs.progress import ProgressLine, read_metrics
from engine.runs.setup import RunSetup, open_data, write_run_files
from engine.training.execution import Execution
from engine.training.trainer import Callback, Trainer
from pipelines.files import Locked, lock, write_bytes, write_text

LOCK = ".lock"  # Name of the file that is locked during training.
log = logging.getLogger(__name__)


def share(make: Callable[[], RunSetup]) -> RunSetup:
    """Set up a run on rank 0 and share it: the other ranks open the same data and take over everything else.

    Args:
        make: Sets up the run; called on rank 0.

    Raises:
        UserError: Raised on every rank if `make` raises it on rank 0.
        RankError: Another rank does not have the data, or has other data.
    """
    own: list[RunSetup] = []

    def first() -> tuple[Any, ...]:
        own.append(make())
        setup = own[0]
        return fingerprint(setup.data), setup.config, setup.split, setup.folder, setup.resumed

    parts, config, *rest = collectives.run_on_rank_0(first)
    if own:
        return own[0]
    try:
        _, data = check_data(config, open_data(config.dataset, begun=rest[-1]))
    except UserError as error:
        raise RankError(str(error)) from error
    if changed := changed_parts(parts, fingerprint(data), parts):
        raise RankError(
            f"rank {collectives.rank()} has other data of {config.dataset} than rank 0; these differ: "
            f"{', '.join(name for _, name in changed)}"
        )
    return RunSetup(config, data, *rest)


def train(
    setup: RunSetup,
    quiet: bool = False,
    timeout: float = math.inf,
    check_ranks: int = 0,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Train a run to its last step and write all files of its folder.

    Args:
        setup: The run; must have a folder.
        quiet: Show no progress.
        timeout: See `Trainer`.
        check_ranks: See `Trainer`.
        callback: See `Trainer`.

    Returns:
        The content of summary.json.

    Raises:
        UserError: See `Execution.pick`; training diverged; or a file could not be written.
        Stopped: See `Trainer.run`.
    """
    assert setup.folder is not None, "a run needs a folder to be trained"
    folder = setup.folder
    trainer: Trainer | None = None
    with contextlib.ExitStack() as held:
        try:
            progress = ProgressLine(setup.config.steps, quiet or collectives.rank() > 0)
            trainer = Trainer(setup, progress, timeout, check_ranks, callback)
            # First write, only after all checks have passed.
            collectives.run_on_rank_0(lambda: _begin(setup, folder, held))
            if setup.resumed:
                if trainer.resume():
                    log.info(f"resuming {folder} from step {trainer.step}")
                else:
                    log.info(f"{folder} has no valid checkpoint; starting from step 0")
            try:
                trainer.run()
            finally:
                progress.close()
            summary = _summary(setup.config, trainer)
            collectives.run_on_rank_0(lambda: _finish(folder, summary, trainer))
        except (MemoryError, OSError, RuntimeError) as error:
            if reason := out_of_memory(error):
                text = f"out of memory ({reason}); {less_memory(setup.config, trainer.execution if trainer else None)}"
                # Other ranks have memory left, and learn of it by losing this one.
                raise (RankError if collectives.ranks() > 1 else UserError)(text) from error
            if not isinstance(error, OSError):
                raise
            raise cannot_write(folder, error, "saved files are intact; fix the problem and use --resume") from error
    return summary


def less_memory(config: Config, execution: Execution | None) -> str:
    """Return which flags make a run need less memory.

    Args:
        config: Configuration of the run.
        execution: How it is executed, if that is known.
    """
    flags = []
    for count in range(config.micro_batches_of(collectives.ranks()) + 1, config.batch + 1):
        with contextlib.suppress(UserError):
            validate(dataclasses.replace(config, micro_batches=count), collectives.ranks())
            flags.append(f"--micro-batches {count}")
            break
    if execution and execution.device.type == "cuda" and execution.resident:
        flags.append("--resident host")
    flags.append(f"--batch less than {config.batch}")
    return f"saved files are intact; start a new run with {' or '.join(flags)}"


def _begin(setup: RunSetup, folder: Path, held: contextlib.ExitStack) -> None:
    """Lock the folder and write the first files.

    Raises:
        UserError: Another process trains in the folder, or another run has started there.
    """
    commit()  # Cached now: the run uses the code from its start, whatever is committed meanwhile.
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(lock(folder / LOCK))
    except Locked as error:
        raise UserError(f"{folder} is being trained by {error}; wait until it has finished, or stop it") from None
    # Another run may have started there since this one was set up.
    check_folder(setup.config, folder, resume=setup.resumed)
    write_run_files(setup)


def _published(config: Config, accuracy: float) -> dict[str, Any]:
    """Compare a run's test error with the paper's result for its preset; empty if there is none.

    The paper's results are for ReMixMatch, so other methods have none. The difference is in percentage points.
    """
    if config.preset not in PUBLISHED or config.method != "remixmatch":
        return {}
    published = PUBLISHED[config.preset]
    return {
        "paper_error": published.error,
        "paper_deviation": published.deviation,
        "paper_source": published.source,
        "error": 100.0 - accuracy,
        "difference_to_paper": 100.0 - accuracy - published.error,
        "same_settings_as_paper": not changes(PRESETS[config.preset], config, ignored=("seed", "log")),
    }


def _summary(config: Config, trainer: Trainer) -> dict[str, Any]:
    return {
        "preset": config.preset,
        "method": config.method,
        "seed": config.seed,
        "labels": len(trainer.feed.split),
        **({"held_out_test_images": trainer.data.held_out} if trainer.data.held_out else {}),
        "k": config.k,
        **trainer.summary(),
        **_published(config, trainer.summary()["median_last_20"]),
        "ranks": collectives.ranks(),
        "versions": versions(),
        "device": device_name(trainer.execution.device),
        "commit": commit(),
    }


def _finish(folder: Path, summary: Mapping[str, Any], trainer: Trainer) -> None:
    # Imported here, since importing matplotlib takes a second.
    from engine.runs.pictures import draw_curves, draw_views, make_views

    write_bytes(folder / "ema.safetensors", safetensors_bytes(trainer.state.ema_model))
    draw_curves(read_metrics(folder / "metrics.jsonl"), folder / "curves.png")
    views = make_views(trainer.feed, trainer.step)
    draw_views(views, folder / "views.png")
    data, rows = trainer.data, history.predicted_rows(trainer.data)
    probabilities = predict.probabilities(trainer.state.ema_model, data.test_images[rows], trainer.execution.device)
    history.save_results(folder, probabilities, rows, data, views)
    # Written last: its presence marks the run as complete.
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
