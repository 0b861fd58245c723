"""A step that `bench count` counts, captured on the emulated device: `python -m bench.step.count_worker REQUEST`.

torch.compile does all that it does for a GPU of the target's compute capability, up to the source of its Triton
kernels. Those are not executed: each launch is recorded with the bytes that Inductor estimates for it. Operators that
are not compiled, and calls of libraries in what is, are recorded by the emulated device, with the bytes of their
arguments and results. The request and the answer are JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engine.config.config import Config
from engine.training import ranges
from engine.training.cuda_graph import make_step
from engine.training.execution import INDUCTOR, Execution, set_numerics
from engine.training.feed import Feed
from engine.training.state import make_state
from pipelines.cache import DataSet

_TRITON = "triton"
_PART = "part"
_runtime = ctypes.CDLL(None)  # the emulated one, which was loaded first
_runtime.emulated_launch.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
_runtime.emulated_mark.argtypes = [ctypes.c_char_p]
_runtime.emulated_recorded.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
_runtime.emulated_recorded.restype = ctypes.c_size_t


class _Kernel:
    """A Triton kernel of Inductor's, whose launches are recorded.

    Args:
        name: its own.
        source: the text of the module that defines it.
    """

    made: dict[str, _Kernel] = {}  # noqa: RUF012  by source: equal ones are compiled once

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        found = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", source)
        assert found is not None, f"Inductor has estimated no bytes for {name}"
        self.bytes = round(float(found[1]) * 1e9)
        self.made[source] = self

    def run(self, *arguments: Any, stream: int, **options: Any) -> None:
        """Takes the place of a launch."""
        _runtime.emulated_launch(f"{_TRITON} {self.name}".encode(), self.bytes, stream)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Counts the captured step of a configuration.

    Args:
        request: "config", fields of `Config`; "sides", (H, W) of the images; "classes", L; "capability", of the device,
            such as 90; "options", of Inductor, which replace the engine's; "cubins", whether to compile the kernels.

    Returns:
        "launches": of one step, in order, each with part, name, bytes and flops; "graph_bytes": what Inductor counts
        for all graphs that it compiles; "kernels", by name, if asked for: registers and spills of every candidate.
    """
    config = Config(**request["config"] | {"class_distribution": ()})
    _pretend(request["capability"])
    graphs = _record_graphs()
    launches = _capture(config, request["sides"], request["classes"], request["options"])
    answer: dict[str, Any] = {"launches": launches, "graph_bytes": sum(graphs)}
    if request["cubins"]:
        answer["kernels"] = {kernel.name: _usage(kernel) for kernel in _Kernel.made.values()}
    return answer


def _pretend(capability: int) -> None:
    """Has Inductor and Triton find a device of that compute capability, and leave its kernels unlaunched."""
    import triton
    from torch._inductor import config as inductor
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    inductor.compile_threads = 1
    inductor.profile_bandwidth = True  # writes each kernel's bytes beside it
    inductor.force_disable_caches = True
    inductor.use_static_triton_launcher = False  # which would load a compiled kernel
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": _Kernel(name, source)  # type: ignore
    device = torch.device("cuda", 0)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: device,
        get_current_stream=lambda *_: 0,
        is_active=lambda: True,
    )
    triton.runtime.driver.set_active(driver)
    triton_helpers.set_driver_to_gpu = lambda: None  # the one above is active
    # cuDNN's answer, which gives channels-last results for channels-last rows or weights
    ask = torch._C._conv_determine_backend_memory_format

    def memory_format(rows: Any, weight: Any, backend: Any) -> Any:
        last = torch.channels_last
        given = rows.is_contiguous(memory_format=last) or weight.is_contiguous(memory_format=last)
        return last if given else ask(rows, weight, backend)

    torch._C._conv_determine_backend_memory_format = memory_format  # type: ignore[assignment]


def _record_graphs() -> list[int]:
    """Has Inductor note the bytes of every graph from here on; returns the list."""
    from torch._inductor.graph import GraphLowering

    graphs: list[int] = []
    generate = GraphLowering.codegen

    def codegen(graph: GraphLowering) -> Any:
        result = generate(graph)
        graphs.append(int(graph.count_bytes()[0]))
        return result

    GraphLowering.codegen = codegen  # type: ignore
    return graphs


def _capture(config: Config, sides: list[int], classes: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    labels = np.arange(max(config.labels, classes)) % classes
    images = np.zeros((len(labels), *sides, 3), np.uint8)
    data = DataSet(config.dataset, tuple(map(str, range(classes))), images, labels, images[:1], labels[:1])
    execution = dataclasses.replace(Execution.pick(config, images.shape), inductor=INDUCTOR | options)
    set_numerics(config.deterministic)
    feed = Feed(config, data, np.arange(config.labels), execution)
    state = make_state(config, classes, execution.device, data.sides)

    def mark(part: str) -> None:
        _runtime.emulated_mark(f"{_PART} {part}".encode())

    with _recorded_captures(), ranges.listening(mark):
        make_step(config, state, feed.layout, execution, feed.example)
    length = _runtime.emulated_recorded(None, 0)
    text = ctypes.create_string_buffer(length)
    _runtime.emulated_recorded(text, length)
    launches, part = [], "none"
    for line in text.value.decode().splitlines():
        if line.startswith(f"{_PART} "):
            part = line.removeprefix(f"{_PART} ")
            continue
        name, size, flops = line.split("\t")
        launches.append({"part": part, "name": name, "bytes": int(size), "flops": int(flops)})
    return launches


@contextlib.contextmanager
def _recorded_captures() -> Iterator[None]:
    """Has every capture begin a new record."""
    whole = torch.cuda.graph

    class Recorded(whole):  # type: ignore[misc, valid-type]
        def __enter__(self) -> None:
            super().__enter__()
            _runtime.emulated_record()

    torch.cuda.graph = Recorded  # type: ignore[misc]
    try:
        yield
    finally:
        torch.cuda.graph = whole  # type: ignore[misc]


def _usage(kernel: _Kernel) -> list[dict[str, Any]]:
    """Registers, spills and warps of each configuration that Inductor would try on the device."""
    from torch._inductor.async_compile import _load_triton_kernel_from_source

    tuner = _load_triton_kernel_from_source(kernel.name, kernel.source)
    found = []
    for candidate in tuner.configs:
        compiled = tuner._precompile_config(candidate)
        binary = compiled.kernel.asm["cubin"]
        found.append({"warps": candidate.num_warps, **resources(binary)})
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a compiled kernel, and bytes of stack and local memory, which are spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spilled_bytes": usage["STACK"] + usage["LOCAL"]}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
