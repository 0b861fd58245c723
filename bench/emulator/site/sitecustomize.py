"""What every Python does first, once `bench/emulator/run.py` has put this folder on its path."""

import ctypes
import functools
import os

import torch

import kernels.assemble
import kernels.augment
import kernels.guess  # noqa: F401  (all three for the operators that they define)

ctypes.CDLL(f"{os.environ['EMULATOR']}/operators.so").emulate_operators(b"remixmatch")
if not os.environ.get("EMULATED_IDLE"):
    # Inductor would make Triton kernels, which cannot be executed
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
