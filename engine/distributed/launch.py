"""Several ranks on one machine: `remixmatch train ... --gpus N` starts what `torchrun -m engine train ...` starts."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from engine.errors import Stopped

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PARENT = "REMIXMATCH_PARENT"  # the variable that names the process without which this one should not train on


def launch(arguments: Sequence[str], ranks: int, max_restarts: int, module: str = "engine") -> None:
    """Runs `python -m engine` as a group of ranks on this machine, by torchrun, and waits for its end.

    Args:
        arguments: of each rank's command line.
        ranks: processes.
        max_restarts: how often a group that lost a rank is started again.
        module: what each rank runs instead of engine.

    Raises:
        SystemExit: the group failed, with the exit code of the rank that failed first.
        Stopped: a signal came, which the ranks have been told of.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun's own store would still have the addresses of the ranks from before a restart
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # one rank would otherwise have as many threads as there are cores, several would have one
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    flags = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        # torchrun would wait for its ranks once more: the second SIGINT ends this process, and with it the ranks
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise SignalException("SIGINT", signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    # without the two dashes torchrun would take our --log for one of its own flags that begin so
    flags += ["--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT", "--module", "--", module]
    try:
        run.run(run.get_args_parser().parse_args([*flags, *arguments]))
    except ChildFailedError as error:
        codes = [failure.exitcode for _, failure in sorted(error.failures.items(), key=lambda item: item[1].timestamp)]
        if 2 in codes:  # a mistake of the user's counts, whoever was lost because of it
            sys.exit(2)
        first = codes[0] if codes else 1
        sys.exit(128 - first if first < 0 else first)  # a killed rank has the negative of its signal
    except SignalException as error:
        raise Stopped(
            f"{error.sigval.name}: the ranks have saved what they could; go on with --resume", error.sigval
        ) from None


def is_torchrun_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size_from_env(otherwise: int = 1) -> int:
    """Return how many ranks torchrun's environment speaks of, joined or not; without one, what is given."""
    return int(os.environ.get("WORLD_SIZE", otherwise))


def restarted() -> bool:
    """Whether torchrun started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def die_with_parent() -> None:
    """Has the system send SIGHUP to this process when torchrun, or whoever else asked for that, is killed.

    So no rank, and no cell of a table, trains on by itself. The signal may come several times, once for each thread of
    the parent's that ends.
    """
    parent = os.environ.pop(PARENT, "")  # not for processes that this one starts
    if (is_torchrun_worker() or parent) and sys.platform == "linux":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGHUP))
    if parent and os.getppid() != int(parent):  # it was gone before the system was asked
        raise Stopped("the process that started this one is gone", signal.SIGHUP)
