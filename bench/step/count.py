"""`remixmatch bench count`: launches, bytes and operations of the captured step on a GPU, counted without one.

The step is compiled and captured on the emulated device (`bench/emulator`), as it is on a GPU: by torch.compile with
the engine's options, for the compute capability of the target. What is counted is the launches of that capture: Triton
kernels that Inductor generates, calls of libraries (convolutions, matrix products), and operators that are not
compiled. Counts are the same on every machine. Bytes are those of each launch's inputs and outputs, once each, as
Inductor estimates them: caches are not modelled, nor what cuDNN moves inside a convolution, and a convolution's
backward pass is one call, of which cuDNN makes two kernels at least.

The least is what remains if all work between convolutions were part of them: the bytes of libraries' calls alone in the
networks, and everything's outside them. A predicted time is the sum over launches of the longer of bytes at a device's
copy bandwidth and operations at a share of its matrix rate, and of a constant for each. A budget holds the counts of
cases: `--budget FILE` ends with exit code 1 where a count is another, `--update` writes it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench.emulator.run import environment
from bench.registry import Bench, Table, markdown_table
from bench.step import throughput
from engine.config.checks import validate
from engine.config.config import Config
from engine.config.methods import ablate, with_method
from engine.config.presets import preset
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.counts import IMAGES, KINDS
from engine.measuring.process import output
from engine.training.ranges import PARTS

BUDGET = Path(__file__).parents[1] / "budget.json"
NETWORKS = ("probes", "guess", "forward", "backward")  # parts that are passes through a network
_BUDGETED = (*KINDS, "bytes")
LIBRARIES = ("aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm")


@dataclass(frozen=True)
class Device:
    """What a prediction assumes of a device.

    Attributes:
        name: its own.
        copy_bytes_per_second: of a large copy, read and written.
        matmul_flops_per_second: of a large bf16 matrix product.
        source: of both.
    """

    name: str
    copy_bytes_per_second: float
    matmul_flops_per_second: float
    source: str


@dataclass(frozen=True)
class Target:
    """A compute capability, the properties that Inductor asks for, and devices that have it."""

    capability: int
    multiprocessors: int
    memory_gib: int
    devices: tuple[Device, ...]


_ASSUMED = "assumed: 88 % of the memory's and 80 % of the arithmetic's data sheet"
TARGETS = {
    "sm_80": Target(80, 108, 80, (Device("A100 80 GB", 1.79e12, 250e12, _ASSUMED),)),
    "sm_90": Target(
        90, 132, 80, (Device("H100", 3.0e12, 798e12, "measured"), Device("H200", 4.3e12, 788e12, "measured"))
    ),
    "sm_100": Target(100, 148, 180, (Device("B200", 7.0e12, 1800e12, _ASSUMED),)),
}


@dataclass(frozen=True)
class Launch:
    """One launch of a step, see `bench.step.count_worker`."""

    part: str
    name: str
    bytes: int
    flops: int

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "triton" if self.name.startswith("triton ") else "library" if self.name in LIBRARIES else "operator"

    @property
    def least(self) -> int:
        """Bytes that would still move if a network were nothing but convolutions."""
        return self.bytes if self.kind == "library" or self.part not in NETWORKS else 0


@dataclass(frozen=True)
class Count:
    """What was counted of one case.

    Attributes:
        launches: of a step, in order.
        graph_bytes: what Inductor itself counts for all that it compiles.
        kernels: by name, where they were compiled: registers and spilled bytes of every candidate configuration.
    """

    launches: tuple[Launch, ...]
    graph_bytes: int = 0
    kernels: Mapping[str, Sequence[Mapping[str, int]]] = field(default_factory=dict)

    def by_part(self) -> dict[str, dict[str, int]]:
        """Launches of each kind, bytes, the least bytes and operations of each part that has launches, in order."""
        found: dict[str, dict[str, int]] = {}
        for part in PARTS:
            own = [launch for launch in self.launches if launch.part == part]
            if own:
                found[part] = {kind: sum(launch.kind == kind for launch in own) for kind in KINDS}
                found[part] |= {what: sum(getattr(launch, what) for launch in own) for what in ("bytes", "flops")}
                found[part]["least_bytes"] = sum(launch.least for launch in own)
        return found

    def total(self) -> dict[str, int]:
        """The sums of `by_part` over the parts."""
        parts = self.by_part().values()
        return {what: sum(part[what] for part in parts) for what in (*KINDS, "bytes", "least_bytes", "flops")}

    def seconds(self, device: Device, share: float, launch_seconds: float) -> float:
        """Predicted time of the step, each launch after the other."""
        rate = share * device.matmul_flops_per_second
        each = (max(one.bytes / device.copy_bytes_per_second, one.flops / rate) for one in self.launches)
        return sum(each) + launch_seconds * len(self.launches)


@dataclass
class CountOptions:
    """Counts launches, bytes and operations of the captured step for a GPU, without one."""

    out: Path = records.OUT / "count.jsonl"
    """Rows are added to this file."""
    preset: str = "cifar10-250"
    """What is trained."""
    methods: tuple[str, ...] = ()
    """Methods, such as fixmatch; by default the preset's."""
    ablate: tuple[str, ...] = ()
    """Ablations, each by itself, such as no-rotation."""
    k: tuple[int, ...] = ()
    """Strong views of an unlabeled image; by default the preset's, or the method's."""
    batch: int = 0
    """B; by default the preset's."""
    target: Literal["sm_80", "sm_90", "sm_100"] = "sm_90"
    """Compute capability of the GPU."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of the networks."""
    side: int = 0
    """Side of the images in pixels; by default that of the preset's data set."""
    classes: int = 0
    """L; by default that of the preset's data set."""
    cubins: bool = False
    """Compile every generated kernel for the target, in all configurations that Inductor would try: registers, spills.
    Takes minutes."""
    conv_share: float = 0.32
    """Share of the matrix rate that convolutions are assumed to reach."""
    launch_us: float = 4.0
    """What each launch of a graph is assumed to take beside its bytes or operations, in microseconds. With these two an
    H100's steps of five K are met within 1.1 %."""
    budget: Path | None = None
    """Compare with the counts in this file; exit code 1 where one is another."""
    update: bool = False
    """Write the counts to --budget instead."""


def main(options: CountOptions) -> None:
    """Counts every case, prints tables and predictions, and adds rows.

    Raises:
        UserError: a flag that cannot work; this is no checkout, or there is no C++ compiler.
    """
    if options.launch_us < 0:
        raise UserError(f"--launch-us must be at least 0, got {options.launch_us}")
    if not 0 < options.conv_share <= 1:
        raise UserError(f"--conv-share must be more than 0 and at most 1, got {options.conv_share}")
    if options.update and not options.budget:
        raise UserError("--update needs --budget FILE")
    differences: list[str] = []
    for varied, config in _configs(options):
        counted = count(config, options.target, _images(config, options), cubins=options.cubins)
        case = {
            "preset": config.preset, "k": config.k, "batch": config.batch, "target": options.target,
            "precision": options.precision, **varied,
        }  # fmt: skip
        predicted = {
            device: 1e3 * counted.seconds(device, options.conv_share, options.launch_us / 1e6)
            for device in TARGETS[options.target].devices
        }
        figures = {f"predicted_ms_{device.name.split()[0].lower()}": ms for device, ms in predicted.items()}
        BENCH.write(
            options.out, "count", torch.device("cpu"), **case, launches=len(counted.launches), **counted.total(),
            **figures, parts=counted.by_part(), **_measured(config),
        )  # fmt: skip
        _print(counted)
        for device, ms in predicted.items():
            print(
                f"predicted, not measured, for {device.name}: {ms:.2f} ms a step, from copies at "
                f"{device.copy_bytes_per_second / 1e12:.2f} TB/s, {device.matmul_flops_per_second / 1e12:.0f} TFLOP/s "
                f"({device.source}), convolutions at {options.conv_share:.0%}, {options.launch_us:g} us a launch"
            )
        if options.budget:
            if options.update:
                write_budget(options.budget, case, counted.by_part())
            else:
                differences += compare_budget(options.budget, case, counted.by_part())
    if differences:
        sys.exit("\n".join(f"remixmatch: {line}" for line in differences))


def _configs(options: CountOptions) -> list[tuple[dict[str, str], Config]]:
    """Each case: the method or ablation that it has by name, and its configuration."""
    base = dataclasses.replace(preset(options.preset), precision=options.precision)
    if options.batch:
        base = dataclasses.replace(base, batch=options.batch)
    named: list[tuple[dict[str, str], Config]] = [
        *(({"method": name}, with_method(base, name)) for name in options.methods),
        *(({"ablate": name}, ablate(base, name)) for name in options.ablate),
    ]
    named = named or [({}, base)]
    cases = [(varied, dataclasses.replace(one, k=k)) for varied, one in named for k in options.k or (one.k,)]
    for _, config in cases:
        validate(config)
    return cases


def _images(config: Config, options: CountOptions) -> tuple[int, int]:
    side, classes = IMAGES.get(config.dataset, (0, 0))
    side, classes = options.side or side, options.classes or classes
    if not side or not classes:
        raise UserError(f"preset {config.preset} has images of any size: give --side and --classes")
    return side, classes


def count(
    config: Config,
    target: str,
    images: tuple[int, int],
    inductor: Mapping[str, Any] | None = None,
    cubins: bool = False,
) -> Count:
    """Counts one captured step, in a process with an emulated device.

    Args:
        config: what is trained.
        target: of TARGETS.
        images: their side in pixels, and how many classes they have.
        inductor: options of Inductor that replace the engine's.
        cubins: whether to compile the generated kernels.

    Raises:
        UserError: this is no checkout, or there is no C++ compiler.
        RuntimeError: the step cannot be captured.
    """
    of, (side, classes) = TARGETS[target], images
    request = {
        "config": dataclasses.asdict(config), "sides": (side, side), "classes": classes,
        "capability": of.capability, "options": dict(inductor or {}), "cubins": cubins,
    }  # fmt: skip
    device = {
        "EMULATED_IDLE": "1", "EMULATED_DEVICES": "1", "EMULATED_CAPABILITY": str(of.capability),
        "EMULATED_MULTIPROCESSORS": str(of.multiprocessors), "EMULATED_MEMORY_GIB": str(of.memory_gib),
    }  # fmt: skip
    found = json.loads(output("bench.step.count_worker", json.dumps(request), **environment() | device))
    launches = tuple(Launch(**launch) for launch in found["launches"])
    return Count(launches, found["graph_bytes"], found.get("kernels", {}))


def _measured(config: Config) -> dict[str, float]:
    """The time of that very step, where there is a GPU and the preset is the paper's."""
    if not torch.cuda.is_available() or config.dataset != "cifar10":
        return {}
    case = dataclasses.replace(throughput.base_config("", True), k=config.k, batch=config.batch, mode="graph")
    return {"measured_ms": throughput.measure(case, 60, "synthetic")["step_ms"]}


def _print(counted: Count) -> None:
    heads = (*KINDS, "bytes", "least_bytes", "flops")
    parts = counted.by_part() | {"step": counted.total()}
    lines = [[name, *(f"{part[head]:,}" for head in heads)] for name, part in parts.items()]
    print(markdown_table(["part", *heads], lines))
    if counted.kernels:
        candidates = [(one["registers"], name) for name, tried in counted.kernels.items() for one in tried]
        registers, name = max(candidates)
        print(f"{len(candidates)} configurations of {len(counted.kernels)} kernels compiled")
        print(f"most registers: {registers}, {name}")
        spilling = [name for name, tried in counted.kernels.items() if any(one["spilled_bytes"] for one in tried)]
        print(f"kernels with a configuration that spills: {len(spilling)}", *sorted(spilling), sep="\n  ")


def _read_budget(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"torch": torch.__version__.split("+")[0], "cases": []}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a budget ({error})") from None


def write_budget(path: Path, case: Mapping[str, Any], counted: Mapping[str, Mapping[str, int]]) -> None:
    """Put a case's counts into a budget."""
    budget = _read_budget(path)
    others = [one for one in budget["cases"] if any(one[key] != value for key, value in case.items())]
    parts = {part: {what: found[what] for what in _BUDGETED} for part, found in counted.items()}
    cases = sorted([*others, {**case, "parts": parts}], key=lambda one: [one["preset"], one["target"], one["k"]])
    content = {"torch": torch.__version__.split("+")[0], "cases": cases}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compare_budget(path: Path, case: Mapping[str, Any], counted: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Where a case's counts differ from a budget, one line each; nothing where they are equal.

    Args:
        path: of the budget.
        case: what was counted, by the names of `CountOptions`.
        counted: `Count.by_part`.
    """
    budget = _read_budget(path)
    found = [one for one in budget["cases"] if all(one[key] == value for key, value in case.items())]
    if not found:
        return [f"{path} has no budget for {case}; add it by --update"]
    lines = []
    for part in PARTS:
        before, now = found[0]["parts"].get(part, {}), counted.get(part, {})
        pairs = [(what, before.get(what, 0), now.get(what, 0)) for what in _BUDGETED]
        changes = [f"{what} {old} -> {new}" for what, old, new in pairs if old != new]
        if changes:
            lines.append(f"{case['preset']}, K = {case['k']}, {case['target']}, {part}: {', '.join(changes)}")
    if lines:
        lines.append(f"if that is wanted, change {path} with it: --budget {path} --update")
    return lines


BENCH = Bench(
    options=CountOptions,
    main=main,
    quick=None,  # It builds the emulated device and compiles the paper's step: a minute.
    tables={
        "count": Table(
            key=("preset", "method", "ablate", "k", "batch", "target", "precision"),
            source="Counted",
            columns={
                "preset": "{preset}",
                "method": "{method}",
                "ablation": "{ablate}",
                "K": "{k}",
                "B": "{batch}",
                "target": "{target}",
                "precision": "{precision}",
                "launches": "{launches}",
                "Triton": "{triton}",
                "libraries": "{library}",
                "operators": "{operator}",
                "bytes": "{bytes:,}",
                "least bytes": "{least_bytes:,}",
                "FLOP": "{flops:,}",
                "predicted on H100, ms": "{predicted_ms_h100:.2f}",
                "predicted on H200, ms": "{predicted_ms_h200:.2f}",
                "measured, ms": "{measured_ms:.2f}",
            },
        ),
    },
)
