"""Fixtures that run kernel launchers without a GPU: in Triton's interpreter, or only up to the launch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from interpreter import Interpreter
from triton.runtime.jit import JITFunction

from kernels import assemble, augment, convolution, guess


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Return a function that calls launchers with their kernels in Triton's interpreter."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@dataclass
class Launch:
    """A recorded kernel launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]  # Compiler options such as num_warps.


@pytest.fixture
def recorded_launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launch]:
    """Return a function that calls a launcher and returns the recorded launch without running the kernel."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def record(*args: Any, **kwargs: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
                options = {name: arguments.pop(name) for name in kwargs if name not in self.kernel.arg_names}
                launches.append(Launch(self.kernel, grid, arguments, options))

            return record

    for module in (guess, assemble, augment, convolution):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name)))

    def launch(launcher: Callable[..., Any], *args: Any) -> Launch:
        launches.clear()
        launcher(*args)
        (launched,) = launches
        return launched

    return launch
