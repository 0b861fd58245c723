"""The command line: `remixmatch COMMAND ...`.

A mistake of the user's is one line on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from engine.commands.output import messages_on_stderr
from engine.commands.parsing import show_usage
from engine.errors import RankError, Stopped, UserError

log = logging.getLogger(__name__)

# Threads that wait for one another spin, by default for so long that a step takes ten times as long where a second
# process wants the same core. GNU's OpenMP reads this when torch is loaded, which no import above does
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# what each calls with the words after it, imported when it is called, and what it does
COMMANDS = {
    "train": (
        "engine.commands.train:main",
        "train a preset: remixmatch train PRESET [--seed N] [--out DIR] [--resume] ...",
    ),
    "eval": (
        "engine.commands.inference:evaluate",
        "test accuracy of a run: remixmatch eval DIR [--json]",
    ),
    "predict": (
        "engine.commands.inference:predict",
        "classify images with a run: remixmatch predict DIR IMAGE-OR-FOLDER... [--csv FILE]",
    ),
    "export": (
        "engine.commands.inference:export",
        "the trained model as safetensors, torch.export or ONNX: remixmatch export DIR --to FORMAT",
    ),
    "data": (
        "engine.commands.data:main",
        "data sets and folders of images: prepare, list, info, split, check-split",
    ),
    "doctor": (
        "engine.commands.doctor:main",
        "what of GPU, driver, torch, triton, DALI and apex is here, and what to do about the rest",
    ),
    "reproduce": (
        "engine.studies.reproduce:main",
        "a table of the paper, from runs over methods and seeds: remixmatch reproduce TABLE ...",
    ),
    "ablate": (
        "engine.studies.ablate:main",
        "what each component costs and what it brings: remixmatch ablate PRESET [--time-only] ...",
    ),
    "profile": (
        "engine.studies.profile:main",
        "where a training step's time goes: remixmatch profile PRESET [flags of train]",
    ),
    "report": (
        "engine.report.command:main",
        "runs, or a folder of reproduce or ablate, as an HTML page: remixmatch report RUN... [--out FILE]",
    ),
    "bench": (
        "bench.cli:main",
        "measurements: remixmatch bench NAME ...; remixmatch bench --help lists them",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `remixmatch`; see `run_with_exit_codes` for its exit codes."""
    run_with_exit_codes(_dispatch, list(sys.argv[1:] if arguments is None else arguments))


def run_with_exit_codes(command: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls a command with its arguments.

    Exits with 0, 2 for a user's mistake, 1 where another rank is lost, 128 + its number after a signal; so it does, and
    without a word, where whoever reads its output has gone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may have letters that it has not
    with messages_on_stderr():
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
                log.error(str(error) or "interrupted; go on from the last checkpoint with --resume")
            sys.exit(2 if isinstance(error, UserError) else 128 + getattr(error, "number", signal.SIGINT))
        except RankError as error:
            log.error(f"rank {os.environ.get('RANK', '0')}: {error}")
            sys.exit(1)


def _dispatch(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        texts = {name: text for name, (_, text) in COMMANDS.items()}
        show_usage("COMMAND ...", texts, "remixmatch COMMAND --help says more.")
    elif command in COMMANDS:
        module, function = COMMANDS[command][0].split(":")
        getattr(import_module(module), function)(argv[1:])
    else:
        raise UserError(f"unknown command '{command}'; there are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
