"""Set up the emulated device at the start of every Python process that `bench/emulator/run.py` starts."""

import ctypes
import os

import torch
import torch.utils._triton

import kernels.assemble
import kernels.augment
import kernels.guess
import kernels.norm_act_conv  # noqa: F401  (these four modules register operators)

ctypes.CDLL(f"{os.environ['EMULATOR']}/operators.so").emulate_operators(b"remixmatch")
if not os.environ.get("EMULATED_IDLE"):
    compile_with_inductor = torch.compile

    def without_inductor(model, *, options=None, **others):
        """Compile without Inductor and its options, since its Triton kernels cannot run here."""
        return compile_with_inductor(model, backend="aot_eager", **others)

    torch.compile = without_inductor  # type: ignore[assignment]
    # Without Triton, nothing is chosen by timing its kernels.
    torch.utils._triton.has_triton = lambda **options: False  # type: ignore[assignment]

# CUPTI uses the driver, which is not emulated, so device activity cannot be profiled.
torch.profiler.supported_activities = lambda: {torch.profiler.ProfilerActivity.CPU}
