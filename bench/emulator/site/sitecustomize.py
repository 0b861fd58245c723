"""What every Python does first, once `bench/emulator/run.py` has put this folder on its path."""

import ctypes
import os

import torch

import kernels.assemble
import kernels.augment
import kernels.guess  # noqa: F401  (all three for the operators that they define)

ctypes.CDLL(f"{os.environ['EMULATOR']}/operators.so").emulate_operators(b"remixmatch")
if not os.environ.get("EMULATED_IDLE"):
    whole = torch.compile

    def without_inductor(model, *, options=None, **others):
        """Inductor, whose options these are, would make Triton kernels, which cannot be executed."""
        return whole(model, backend="aot_eager", **others)

    torch.compile = without_inductor  # type: ignore[assignment]

# CUPTI asks the driver itself, which is not emulated: what a device does cannot be profiled
torch.profiler.supported_activities = lambda: {torch.profiler.ProfilerActivity.CPU}
