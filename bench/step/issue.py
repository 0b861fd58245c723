"""`remixmatch bench issue`: issue slots and occupancy of each Triton kernel on an H100, from its machine code.

No GPU is needed: a kernel is launched up to Triton's compiler, and its SASS is disassembled. Each scheduler of a
multiprocessor issues one instruction of a warp per cycle, so the time of a launch is at least its warps' instructions
divided by the schedulers' rate. Instructions are those of the longest path: every loop (a branch backward) takes as
many trips as its caller says, on average over the programs, and of two branches forward the longer one is taken. So a
kernel whose warps take shorter paths needs less, and one whose threads diverge needs more. Called subroutines, such as
the slow path of a division, are not counted. Next to it is the bound of bytes, at the copy bandwidth of an H100.

The kernels of convolutions, `--kernels convolution_forward convolution_input_grad convolution_weight_grad`, are those
of the paper's training pass with K = 8 and B = 64, each with its first tiling. Masked rows are counted.

To analyze another kernel, call `issue_bound(record(launcher, *arguments), trips)`; if the number of trips is wrong, the
error lists the loops of its machine code.
"""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.registry import Bench, Table
from bench.step.kernels import BATCH_SIZES, GUESS_SIZES, KERNELS, Size
from engine.measuring import records
from kernels.assemble import launch_assemble_batch
from kernels.augment import launch_augment_views
from kernels.convolution import Shape, launch_forward, launch_input_grad, launch_weight_grad, tilings
from kernels.guess import launch_guess_labels

# Classes of instructions by the beginnings of their names. The first match counts.
CLASSES = {
    "matrix": ("HGMMA", "HMMA", "IMMA", "QGMMA", "UTCHMMA", "UTCQMMA"),
    "local": ("LDL", "STL"),  # Spills.
    "shared": ("LDS", "STS", "ATOMS"),  # Also LDSM and STSM.
    "global": ("LDG", "STG", "ATOMG", "RED", "UTMA", "LD.", "ST."),  # Also LDGSTS.
    "special": ("MUFU",),
    "synchronization": ("BAR", "WARPGROUP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "SYNCS"),
}
OTHER = "other"


@dataclass(frozen=True)
class Gpu:
    """Limits of a GPU. Those of a multiprocessor are from the CUDA programming guide's table of compute capabilities.

    Attributes:
        architecture: Compute capability times 10.
        multiprocessors: Their number.
        hertz: Clock of the multiprocessors.
        copy_bytes_per_second: Rate of a large copy.
        matmul_flops_per_second: Rate of a large bf16 matrix product.
        shared_bytes: Shared memory of a multiprocessor.
    """

    architecture: int
    multiprocessors: int
    hertz: float
    copy_bytes_per_second: float
    matmul_flops_per_second: float
    shared_bytes: int

    schedulers = 4
    registers = 65_536
    warps = 64
    blocks = 32
    reserved_bytes = 1024  # Shared memory that the system takes of each block.


# Clock: maximum boost of the H100 PCIe (NVIDIA's product brief). An SXM module may run faster, at up to 1.98 GHz.
# Both rates are measured (docs/measurements/h100.md).
H100 = Gpu(90, 132, 1.755e9, 3.0e12, 798e12, 228 * 1024)


@dataclass(frozen=True)
class KernelLaunch:
    """A launch of a Triton kernel that was recorded instead of executed.

    Attributes:
        kernel: The `triton.JITFunction`.
        grid: Programs along each axis.
        arguments: By parameter.
        options: Compiler options such as num_warps.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Instruction:
    """An instruction of SASS.

    Attributes:
        address: Its address in bytes.
        name: Opcode with its modifiers, such as LDG.E.128.
        conditional: Whether it has a predicate.
        target: Address that it branches to.
    """

    address: int
    name: str
    conditional: bool = False
    target: int | None = None


@dataclass(frozen=True)
class Loop:
    """A loop: addresses of its first and its last instruction, which branches back, and the number of outer loops."""

    first: int
    last: int
    depth: int


Trips = Sequence[float] | Callable[[Sequence[Loop]], Sequence[float]]


@dataclass(frozen=True)
class IssueBound:
    """Lower bounds of the time of a launch, and what limits its occupancy.

    Attributes:
        registers: Registers of a thread.
        spilled_bytes: Stack and local memory of a thread.
        shared_bytes: Shared memory of a block.
        blocks: Blocks that a multiprocessor runs at the same time.
        warps: Warps that a multiprocessor runs at the same time.
        waves: Blocks of the launch per block that the GPU runs at the same time.
        instructions: Instructions of a warp, by the names of CLASSES and OTHER.
        issue_seconds: Time to issue the instructions of all warps.
        matrix_seconds: Time of their matrix instructions at the rate of a large matrix product.
        bytes_seconds: Time to move the bytes.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks: int
    warps: int
    waves: float
    instructions: Mapping[str, float]
    issue_seconds: float
    matrix_seconds: float
    bytes_seconds: float


@contextmanager
def recorded() -> Iterator[list[KernelLaunch]]:
    """Record launches of Triton kernels instead of executing them."""
    from triton.runtime.jit import JITFunction

    launches: list[KernelLaunch] = []

    def run(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
        options = {name: arguments.pop(name) for name in named if name not in kernel.arg_names}
        size = grid(arguments) if callable(grid) else grid
        launches.append(KernelLaunch(kernel, tuple(size), arguments, options))

    original, JITFunction.run = JITFunction.run, run  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def record(launcher: Callable[..., Any], *arguments: Any) -> KernelLaunch:
    """Return the launch of a function that launches one Triton kernel, without executing it.

    Raises:
        ValueError: It launches none, or several.
    """
    with recorded() as launches:
        launcher(*arguments)
    if len(launches) != 1:
        raise ValueError(f"{launcher.__name__} launched {len(launches)} kernels, expected one")
    return launches[0]


def compile_launch(launch: KernelLaunch, architecture: int) -> Any:
    """Compile a recorded launch, specialized as on a GPU, where the allocator aligns tensors to more than 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([str(tool), option, str(path)], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers of a compiled kernel and its spilled bytes, which are stack and local memory."""
    text = _cuobjdump(cubin, "--dump-resource-usage")
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spilled_bytes": usage["STACK"] + usage["LOCAL"]}


def disassemble(cubin: bytes) -> str:
    """Return the SASS of a compiled kernel."""
    return _cuobjdump(cubin, "-sass")


def parse(sass: str) -> list[Instruction]:
    """Return the instructions of a listing by cuobjdump of one function.

    Raises:
        ValueError: The listing has several functions.
    """
    if sass.count("Function :") > 1:
        raise ValueError("the listing has several functions; only kernels without noinline functions are supported")
    instructions = []
    for address, predicate, name, operands in re.findall(
        r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*);", sass, re.MULTILINE
    ):
        target = None
        if name.startswith("BRA"):
            target = int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)
        # `BRA P1, 0x10` and `BRA.U !UP0, 0x10` have a condition among their operands.
        conditional = bool(predicate) or (target is not None and "," in operands)
        instructions.append(Instruction(int(address, 16), name, conditional, target))
    return instructions


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Return the loops by address, each outer loop before the loops in it."""
    ends: dict[int, int] = {}
    for one in instructions:
        # Code ends with a branch to itself, which never runs.
        if one.target is not None and one.target < one.address:
            ends[one.target] = max(one.address, ends.get(one.target, 0))
    spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))
    return [
        Loop(first, last, sum(a <= first and last <= b and (a, b) != (first, last) for a, b in spans))
        for first, last in spans
    ]


def longest_path(instructions: Sequence[Instruction], trips: Trips) -> dict[str, float]:
    """Count the instructions of the longest path by name.

    Args:
        instructions: Those of a kernel.
        trips: Mean number of trips of each of `loops` whenever it is entered, or a function that returns them.

    Raises:
        ValueError: The number of trips is not that of the loops.
    """
    found = loops(instructions)
    if callable(trips):
        trips = trips(found)
    if len(trips) != len(found):
        listed = ", ".join(f"{loop.first:#x} to {loop.last:#x} in {loop.depth} loops" for loop in found)
        raise ValueError(f"expected trips of {len(found)} loops, got {len(trips)}; loops: {listed or 'none'}")
    index = {one.address: place for place, one in enumerate(instructions)}

    def within(address: int, loop: Loop) -> bool:
        return loop.first <= address <= loop.last

    def successors(place: int) -> list[int]:
        one = instructions[place]
        after = [place + 1] if place + 1 < len(instructions) else []
        if one.name.startswith(("EXIT", "RET")):
            return after if one.conditional else []
        if one.target is None:
            return after
        if one.target > one.address:
            return [index[one.target], *(after if one.conditional else [])]
        if one.conditional:
            return after
        # A loop that ends with an unconditional branch is left from its middle.
        left = [loop for loop in found if loop.first == one.target]
        return [
            index[other.target]
            for other in instructions
            if other.target is not None and left and within(other.address, left[0]) and other.target > left[0].last
        ]

    repeats = [
        math.prod(trip for trip, loop in zip(trips, found, strict=True) if within(one.address, loop))
        for one in instructions
    ]
    longest = [0.0] * len(instructions)
    choice: list[int | None] = [None] * len(instructions)
    for place in reversed(range(len(instructions))):
        choice[place] = max(successors(place), key=lambda after: longest[after], default=None)
        after = choice[place]
        longest[place] = repeats[place] + (0 if after is None else longest[after])
    counts: dict[str, float] = defaultdict(float)
    taken: int | None = 0
    while taken is not None:
        counts[instructions[taken].name] += repeats[taken]
        taken = choice[taken]
    return counts


def by_class(counts: Mapping[str, float]) -> dict[str, float]:
    """Return the counts of instructions by the names of CLASSES and OTHER."""
    classes: dict[str, float] = defaultdict(float)
    for name, count in counts.items():
        classes[_class(name)] += count
    return classes


def matrix_flops(counts: Mapping[str, float]) -> float:
    """Return the operations of a warp's HMMA (Ampere) and HGMMA (Hopper) instructions, including those on padding."""
    flops = 0.0
    for name, count in counts.items():
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # Four warps together.
            flops += 2 * math.prod(map(int, shape.groups())) / 4 * count
        elif shape := re.match(r"HMMA\.(16)(8)(8|16)\b", name):
            flops += 2 * math.prod(map(int, shape.groups())) * count
    return flops


def _class(name: str) -> str:
    # LDGDEPBAR waits, LDGSTS loads.
    if name.startswith("LDGDEPBAR"):
        return "synchronization"
    return next((kind for kind, begins in CLASSES.items() if name.startswith(begins)), OTHER)


def occupancy(registers: int, warps: int, shared_bytes: int, gpu: Gpu = H100) -> int:
    """Return the number of blocks that a multiprocessor runs at the same time.

    Args:
        registers: Registers of a thread.
        warps: Warps of a block.
        shared_bytes: Shared memory of a block.
        gpu: The GPU.
    """
    of_warp = math.ceil(32 * registers / 256) * 256  # Registers are allocated to warps, 256 at a time.
    limits = gpu.blocks, gpu.warps // warps, gpu.registers // of_warp // warps
    return min(*limits, gpu.shared_bytes // (shared_bytes + gpu.reserved_bytes))


def issue_bound(launch: KernelLaunch, trips: Trips, moved: int | None = None, gpu: Gpu = H100) -> IssueBound:
    """Compile a launch and return its bounds.

    Args:
        launch: A recorded launch.
        trips: Mean number of trips of each loop in the machine code whenever it is entered, outer loops first; or a
            function that returns them for the result of `loops`.
        moved: Bytes read and written; by default those of all tensor arguments, once each.
        gpu: The GPU to compile for.

    Raises:
        ValueError: The number of trips is not that of the loops; the message lists these.
    """
    compiled = compile_launch(launch, gpu.architecture)
    cubin = compiled.asm["cubin"]
    counts = longest_path(parse(disassemble(cubin)), trips)
    usage = resources(cubin)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = occupancy(usage["registers"], warps, shared, gpu)
    programs = math.prod(launch.grid)
    if moved is None:
        tensors = {id(value): value for value in launch.arguments.values() if isinstance(value, torch.Tensor)}
        moved = sum(tensor.nbytes for tensor in tensors.values())
    rate = gpu.multiprocessors * gpu.schedulers * gpu.hertz
    return IssueBound(
        usage["registers"],
        usage["spilled_bytes"],
        shared,
        blocks,
        blocks * warps,
        programs / (blocks * gpu.multiprocessors) if blocks else math.inf,
        dict(by_class(counts)),
        programs * warps * sum(counts.values()) / rate,
        programs * warps * matrix_flops(counts) / gpu.matmul_flops_per_second,
        moved / gpu.copy_bytes_per_second,
    )


def _augment_trips(found: Sequence[Loop]) -> list[int]:
    """Return at most as many trips as for 32x32: three blocks of pixels, two operations, seven weights of a pixel."""
    outer = iter((3, 2))
    return [next(outer) if loop.depth == 0 else (3, 7)[loop.depth - 1] for loop in found]


# To add a kernel, append its launcher and the trips of its loops. Arguments and bytes are those of `bench kernels`.
LAUNCHERS: dict[str, tuple[Callable[..., Any], Size, Trips]] = {
    "guess_labels": (launch_guess_labels, GUESS_SIZES["cuda"]["step"], ()),
    "assemble_batch": (launch_assemble_batch, BATCH_SIZES["cuda"]["step"], ()),
    "augment_views": (launch_augment_views, BATCH_SIZES["cuda"]["step"], _augment_trips),
}


@dataclass(frozen=True)
class Layer:
    """A convolution of a network: its shape, and what its kernels add to the shape's work.

    Attributes:
        shape: Shape of the convolution.
        residual: Whether a tensor is added: a residual to y, or the gradient of a skip connection to that of x. In a
            network these are two convolutions of the same shape.
        statistics: Whether the statistics of y are computed, and their gradient is added to that of y.
    """

    shape: Shape
    residual: bool = False
    statistics: bool = True

    def __str__(self) -> str:
        _, inputs, height, width, outputs, taps, stride = self.shape
        return f"{inputs}->{outputs} {height}x{width}, {taps}x{taps}/{stride}" + ", residual" * self.residual


# Of the paper's training pass. The first convolution of a block has no residual, the shortcut no statistics.
LAYERS = (
    Layer(Shape(768, 16, 32, 32, 32, 3, 1)),
    Layer(Shape(768, 16, 32, 32, 32, 1, 1), statistics=False),
    Layer(Shape(768, 32, 32, 32, 32, 3, 1), residual=True),
    Layer(Shape(768, 32, 32, 32, 64, 3, 2)),
    Layer(Shape(768, 64, 16, 16, 64, 3, 1), residual=True),
    Layer(Shape(768, 64, 16, 16, 128, 3, 2)),
    Layer(Shape(768, 128, 8, 8, 128, 3, 1), residual=True),
)
CONVOLUTIONS = {f"convolution_{which}": which for which in ("forward", "input_grad", "weight_grad")}


def record_convolution(layer: Layer, which: str, tiling: Sequence[int]) -> KernelLaunch:
    """Return the launch of a kernel of `norm_act_conv` in bfloat16; see `kernels.convolution.tilings`."""
    samples, inputs, height, width, outputs, taps, stride = layer.shape

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)

    x, y = empty(samples, inputs, height, width), empty(samples, outputs, height // stride, width // stride)
    weight = empty(outputs, inputs, taps, taps)
    norm = [torch.empty(inputs, device="meta") for _ in range(4)]
    if which == "forward":
        residual = torch.empty_like(y) if layer.residual else None
        return record(launch_forward, x, *norm, weight, residual, stride, layer.statistics, tiling)
    if which == "input_grad":
        skip_grad = torch.empty_like(x) if layer.residual else None
        correction = (torch.empty_like(y), *torch.empty(2, outputs, device="meta")) if layer.statistics else ()
        return record(launch_input_grad, y, x, *norm, weight, stride, tiling, skip_grad, *correction)
    return record(launch_weight_grad, y, x, *norm, taps, stride, tiling)


def convolution_trips(launch: KernelLaunch) -> Trips:
    """Return the mean trips of the loops of a kernel in kernels/convolution.py, from the outermost to the innermost.

    Loops of one trip are no loops in the machine code, and the innermost ones may be unrolled.
    """
    a = launch.arguments
    name, rows, blocks = launch.kernel.__name__, a["ROWS"], a["C_IN"] / a["BLOCK_C"]
    per_split = a["tiles"] / launch.grid[0]
    if name == "_rows_kernel":  # One row more on each side, except above the image.
        trips = [rows + 2 - rows / a["H"], blocks]
    elif name == "_weight_grad_rows_kernel":  # Nor below the image.
        trips = [per_split, rows + 2 - 2 * rows / a["H"]]
    elif name == "_weight_grad_taps_kernel":
        trips = [per_split, rows]
    else:
        # The gradient with stride 2 has one or two of three taps along each axis, by the parity of a pixel.
        sparse = a["BACKWARD"] and a["TAPS"] == 3 and a["STRIDE"] == 2
        trips = [rows, *[1.5 if sparse else a["TAPS"]] * 2, blocks]
    trips = [count for count in trips if count != 1]
    return lambda found: [trips[loop.depth] for loop in found]


@dataclass
class IssueOptions:
    """Analyze the machine code of each kernel at the size of a training step."""

    out: Path = records.OUT / "issue.jsonl"
    """File to append the records to."""
    kernels: tuple[str, ...] = tuple(LAUNCHERS)
    """Kernels to analyze; convolution_forward, convolution_input_grad and convolution_weight_grad take longer."""


def main(options: IssueOptions) -> None:
    """Analyze every kernel, and write records.

    Raises:
        UserError: A kernel is unknown.
    """
    records.check_choices(options, kernels=(*LAUNCHERS, *CONVOLUTIONS))
    failures = records.Failures()
    for name in options.kernels:
        if name in CONVOLUTIONS:
            for layer in LAYERS:
                with failures.part(f"{name}, {layer}"):
                    _analyze_convolution(name, layer, options.out)
            continue
        launcher, size, trips = LAUNCHERS[name]
        with failures.part(name):
            case = KERNELS[name][0](size, torch.device("meta"))  # On a CPU it would be in float32.
            bound = issue_bound(record(launcher, *case.arguments()), trips, case.moved)
            _write(options.out, bound, kernel=name, shape=case.shape)
    failures.finish()


def _analyze_convolution(name: str, layer: Layer, out: Path) -> None:
    tiling = tilings(layer.shape, CONVOLUTIONS[name], H100.architecture)[0]
    launch = record_convolution(layer, CONVOLUTIONS[name], tiling)
    bound = issue_bound(launch, convolution_trips(launch))
    case = {"kernel": name, "shape": str(layer), "sizes": layer.shape, "tiling": tiling}
    _write(out, bound, **case, warps_of_block=launch.options["num_warps"], programs=math.prod(launch.grid))


def _write(out: Path, bound: IssueBound, **case: Any) -> None:
    fields = {
        **dataclasses.asdict(bound), "instructions": round(sum(bound.instructions.values())),
        **{kind: round(bound.instructions.get(kind, 0)) for kind in (*CLASSES, OTHER)},
        "issue_us": 1e6 * bound.issue_seconds, "matrix_us": 1e6 * bound.matrix_seconds,
        "bytes_us": 1e6 * bound.bytes_seconds,
    }  # fmt: skip
    BENCH.write(out, "issue", torch.device("cpu"), **case, **fields)


BENCH = Bench(
    options=IssueOptions,
    main=main,
    quick="--kernels guess_labels",
    tables={
        "issue": Table(
            key=("kernel", "shape"),
            source="Compiled for an H100",
            columns={
                "kernel": "{kernel}",
                "shape": "{shape}",
                "registers": "{registers}",
                "spilled bytes": "{spilled_bytes}",
                "shared bytes": "{shared_bytes}",
                "blocks per multiprocessor": "{blocks}",
                "warps per multiprocessor": "{warps}",
                "waves": "{waves:.2f}",
                "instructions of a warp": "{instructions}",
                **{kind: f"{{{kind}}}" for kind in CLASSES},
                "issue slots, us": "{issue_us:.2f}",
                "matrix instructions, us": "{matrix_us:.2f}",
                "bytes, us": "{bytes_us:.2f}",
            },
        ),
    },
)
