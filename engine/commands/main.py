"""Command line: `remixmatch COMMAND ...`.

Invalid input ends a command with one line on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType

from engine.commands.output import messages_on_stderr
from engine.commands.parsing import show_usage
from engine.distributed.launch import tell_launcher
from engine.errors import Incomplete, RankError, Stopped, UserError, cannot_write, out_of_memory, unknown

log = logging.getLogger(__name__)

# OpenMP threads spin while they wait for one another, by default for so long that a step takes ten times as long when a
# second process needs the same core. GNU's OpenMP reads this when torch is loaded, which no import above does.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Function that each command calls with the words after it, imported on demand, and its description.
COMMANDS = {
    "train": (
        "engine.commands.train:main",
        "train a preset: remixmatch train PRESET [--seed N] [--out DIR] [--resume] [flags]",
    ),
    "eval": (
        "engine.commands.inference:evaluate",
        "print the test accuracy of a run: remixmatch eval DIR [--json]",
    ),
    "predict": (
        "engine.commands.inference:predict",
        "classify images with a trained run: remixmatch predict DIR IMAGES [--csv FILE]",
    ),
    "export": (
        "engine.commands.inference:export",
        "export a run's EMA model to safetensors, torch.export or ONNX: remixmatch export DIR [--to FORMAT]",
    ),
    "data": (
        "engine.commands.data:main",
        "manage data sets and folders of images: prepare, list, info, split, check-split",
    ),
    "doctor": (
        "engine.commands.doctor:main",
        "check the installation (versions, CPU, GPU, extras, data folder) and suggest fixes",
    ),
    "reproduce": (
        "engine.studies.reproduce:main",
        "train and write a table of the paper or of comparisons: remixmatch reproduce TABLE [flags]",
    ),
    "ablate": (
        "engine.studies.ablate:main",
        "measure each component's cost and benefit: remixmatch ablate PRESET [--time-only] [flags]",
    ),
    "profile": (
        "engine.studies.profile:main",
        "show where the time of a training step goes: remixmatch profile PRESET [flags of train]",
    ),
    "report": (
        "engine.report.command:main",
        "write an HTML report of runs, or of a folder of reproduce or ablate: remixmatch report DIRS [--out FILE]",
    ),
    "bench": (
        "bench.cli:main",
        "run a benchmark: remixmatch bench NAME [flags]; 'remixmatch bench --help' lists them",
    ),
    "completion": (
        "engine.commands.completion:main",
        "print a script that completes command lines in bash: remixmatch completion bash",
    ),
    "version": (
        "engine.commands.version:main",
        "print the version",
    ),
}


# What to do after an interrupt (SIGINT, Ctrl-C) of a command; the other commands leave nothing to continue.
INTERRUPTED = {
    "train": "use --resume to continue from the last checkpoint",
    "data prepare": "run the same command again to continue; decoded images are kept",
    "reproduce": "run the same command again to continue; finished runs are kept",
    "ablate": "run the same command again to continue; finished timings and runs are kept",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `remixmatch`; see `run_with_exit_codes` for its exit codes."""
    run_with_exit_codes(_dispatch, list(sys.argv[1:] if arguments is None else arguments))


def interrupted(argv: Sequence[str]) -> str:
    """Return the line for an interrupted command: what happened, and how to continue if that is possible."""
    advice = INTERRUPTED.get(" ".join(argv[:2])) or INTERRUPTED.get(" ".join(argv[:1]))
    return f"interrupted; {advice}" if advice else "interrupted"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, which ends a command like SIGINT."""

    number = signal.SIGTERM


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Raise Terminated on SIGTERM while the block runs, unless SIGTERM has a handler already."""
    process = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        # A forked process ends as it would without this handler.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or threading.current_thread() != threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_with_exit_codes(command: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run a command and turn its exceptions into exit codes.

    Exit codes are 0 for success, 2 for invalid input, 1 if some of the input was left out or another rank is lost, and
    128 + the number of a signal that stopped the command. If the reader of its output closes the pipe, it exits
    silently, as after SIGPIPE.

    Args:
        command: Function to call.
        argv: Its arguments.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # File names may contain characters the terminal cannot encode.
    with messages_on_stderr():
        try:
            try:
                with _sigterm_interrupts():
                    command(argv)
            finally:
                if sys.stdout is not None:  # It is if it was closed before Python started.
                    sys.stdout.flush()  # Here, where a closed pipe is handled, and not when Python exits.
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            if sys.stdout is not None:  # Discard what is left in its buffer.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if error.errno == errno.EPIPE:
                sys.exit(128 + signal.SIGPIPE)
            log.error(str(cannot_write(Path("the output"), error)))
            sys.exit(2)
        except (UserError, Stopped, KeyboardInterrupt) as error:
            text = interrupted(argv) if isinstance(error, KeyboardInterrupt) else str(error)
            if text and os.environ.get("RANK", "0") == "0":  # All ranks raise the same error.
                log.error(text)
                tell_launcher()
            sys.exit(2 if isinstance(error, UserError) else 128 + getattr(error, "number", signal.SIGINT))
        except Incomplete as error:
            log.error(str(error))
            sys.exit(1)
        except RankError as error:
            log.error(f"rank {os.environ.get('RANK', '0')}: {error}")
            sys.exit(1)
        except (MemoryError, RuntimeError) as error:
            reason = out_of_memory(error)
            if not reason:
                raise
            advice = "use a smaller --batch" if argv[:1] == ["predict"] else "end other programs, or use less data"
            log.error(f"out of memory ({reason}); {advice}")
            sys.exit(2)


def _dispatch(argv: list[str]) -> None:
    command = {"--version": "version", "-V": "version"}.get(argv[0], argv[0]) if argv else "--help"
    if command in ("-h", "--help"):
        texts = {name: text for name, (_, text) in COMMANDS.items()}
        show_usage("COMMAND ...", texts, "'remixmatch COMMAND --help' shows more about a command.")
    elif command in COMMANDS:
        module, function = COMMANDS[command][0].split(":")
        getattr(import_module(module), function)(argv[1:])
    else:
        raise unknown("command", command, COMMANDS)


if __name__ == "__main__":
    main()
