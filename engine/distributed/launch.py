"""Launch several ranks on one machine: `remixmatch train ... --gpus N` runs torchrun with `-m engine train ...`."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from engine.errors import Stopped
from pipelines.processes import python_environment

_PR_SET_PDEATHSIG = 1  # From linux/prctl.h.
PARENT = "REMIXMATCH_PARENT"  # Environment variable with the ID of the process that this one must not outlive.
_SAID = "REMIXMATCH_SAID"  # Environment variable with the path of a file that exists once rank 0 has said why it ends.


def launch(arguments: Sequence[str], ranks: int, max_restarts: int, module: str = "engine") -> None:
    """Run `python -m engine` on several ranks of this machine with torchrun, and wait for them.

    Args:
        arguments: Command line arguments of every rank.
        ranks: Number of ranks.
        max_restarts: How often to restart the ranks after one of them failed.
        module: The module to run instead of engine.

    Raises:
        SystemExit: A rank failed. The exit code is that of the first rank that failed.
        Stopped: This process received a signal and forwarded it to the ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_SAID] = os.path.join(folder, "said")
        _launch(arguments, ranks, max_restarts, module)


def _launch(arguments: Sequence[str], ranks: int, max_restarts: int, module: str) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.update(python_environment())  # torchrun hands it on to the ranks.
    # torchrun's store would keep the addresses of the ranks from before a restart.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # By default a single rank uses one thread per core, and each of several ranks a single thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    flags = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # A second SIGINT ends this process, and with it the ranks. torchrun would wait for them again.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # The ranks say what happens.
        raise SignalException(signal.Signals(number).name, signal.Signals(number))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    # Without "--", torchrun would read --log as an abbreviation of its own flags.
    flags += ["--signals-to-handle=SIGQUIT", "--module", "--", module]
    try:
        run.run(run.get_args_parser().parse_args([*flags, *arguments]))
    except ChildFailedError as error:
        codes = [failure.exitcode for _, failure in sorted(error.failures.items(), key=lambda item: item[1].timestamp)]
        if 2 in codes:  # Invalid input takes precedence over the failures that it causes on other ranks.
            sys.exit(2)
        first = codes[0] if codes else 1
        sys.exit(128 - first if first < 0 else first)  # The code of a killed rank is minus its signal.
    except SignalException as error:
        name, said = error.sigval.name, os.path.exists(os.environ[_SAID])
        text = "" if said else f"{name}: the ranks saved what they could; use --resume to continue"
        raise Stopped(text, error.sigval) from None


def tell_launcher() -> None:
    """Tell the process that launched the ranks, if there is one, that this rank has said why it ends."""
    if path := os.environ.get(_SAID):
        with contextlib.suppress(OSError):
            Path(path).touch()


def is_torchrun_worker() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size_from_env(default: int = 1) -> int:
    """Return the number of ranks in torchrun's environment, whether or not the process group exists yet."""
    return int(os.environ.get("WORLD_SIZE", default))


def restarted() -> bool:
    """Return whether torchrun started this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def die_with_parent() -> None:
    """Make Linux send SIGHUP to this process when its parent dies.

    This applies if the parent is torchrun or has set the variable PARENT. It keeps ranks and jobs from training on
    alone. The signal may arrive several times, once for every thread of the parent that ends.

    Raises:
        Stopped: The parent is gone already.
    """
    parent = os.environ.pop(PARENT, "")  # Child processes must not inherit it.
    if (is_torchrun_worker() or parent) and sys.platform == "linux":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores SIGHUP.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGHUP))
    if parent and os.getppid() != int(parent):  # The parent exited before prctl was called.
        raise Stopped("the parent process has ended", signal.SIGHUP)
