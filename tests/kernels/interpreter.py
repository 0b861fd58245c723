"""Run launchers in Triton's interpreter on CPU tensors, in a subprocess.

Triton decides at import, for the whole process, whether kernels are compiled or interpreted. The tests need both, so
interpreted kernels run in a subprocess. Run as a script, this file serves the calls of `Interpreter`.
"""

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

ROOT = Path(__file__).parents[2]


class Interpreter:
    """Calls functions of the project in a subprocess, which the first call starts."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)` and copy back its changes to tensors in `args`."""
        if self._process is None:
            path = os.pathsep.join((str(ROOT), *sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((function.__module__, function.__name__, args), self._process.stdin)
        self._process.stdin.flush()
        try:
            result, args_after, error = pickle.load(self._process.stdout)
        except EOFError:
            code = self._process.wait()
            raise RuntimeError(f"the interpreter process died in {function.__name__} (exit code {code})") from None
        if error:
            raise RuntimeError(f"error in the interpreter process: {error}")
        for before, after in zip(args, args_after, strict=True):
            if isinstance(before, torch.Tensor):
                before.copy_(after)
        return result

    def close(self) -> None:
        """End the subprocess."""
        if self._process is not None:
            self._process.communicate()  # Closes its input, which ends `serve`.


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests (module, name, arguments) with (result, arguments, error) until the input ends."""
    while True:
        try:
            module, name, args = pickle.load(requests)
        except EOFError:
            return
        result, error = None, ""
        try:
            result = getattr(importlib.import_module(module), name)(*args)
        except Exception:
            error = traceback.format_exc()
        pickle.dump((result, args, error), replies)
        replies.flush()


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Keep printed output out of the replies.
    serve(sys.stdin.buffer, replies)
