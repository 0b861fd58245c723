"""What torch.profiler recorded of some steps, and what that says of one: pure functions of a trace's events.

The training loop marks where its parts begin (`engine.training.ranges`), which are ranges in the trace, one after
another in a thread. What is computed belongs to the range in which it was launched. The kernels of a CUDA graph have
one launch in common: theirs are learned from the same step executed launch by launch (`learn`).

Times of events are microseconds of the trace's clock; figures are milliseconds a step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from engine.training import ranges
from engine.training.ranges import RANGES

STEPS = "profiled steps"  # the range around all of them, in the training loop's thread
OTHERS = "others"  # time of the loop in no range, and kernels of none
DEAREST = 10
_PATIENCE = 10.0  # seconds for a plan to be finished

RANGE, OPERATOR, CALL, DEVICE, COLLECTIVE = "range", "operator", "call", "device", "collective"
_KINDS = {
    "cpu_op": OPERATOR, "cuda_runtime": CALL, "cuda_driver": CALL, "kernel": DEVICE, "gpu_memcpy": DEVICE,
    "gpu_memset": DEVICE,
}  # fmt: skip

# kinds of kernels, by what their names contain, the first that fits
KERNELS = {
    "engine's own": ("_assemble_kernel", "_guess_kernel", "_augment"),
    "reductions (batch norm)": ("triton_red", "triton_per"),
    "pointwise and combined": ("triton_",),
    "optimiser and average": ("multi_tensor", "adam", "foreach"),
    "convolutions, products": (
        *("conv", "xmma", "cudnn", "cutlass", "gemm", "wgrad", "dgrad", "fprop", "nchwToNhwc", "nhwcToNchw", "sm90_"),
        *("sm80_", "addmm", "mm"),
    ),
    "copies": ("Memcpy", "Memset", "copy"),
}

Spans = list[tuple[float, float]]


@dataclass(frozen=True)
class Event:
    """Something that took time.

    Attributes:
        name: its own.
        kind: RANGE; OPERATOR of torch on the host; CALL of the device's runtime; DEVICE for a kernel, copy or fill;
            COLLECTIVE of ranks on CPUs.
        begin: microseconds.
        end: likewise.
        thread: of the host; of the device a stream.
        launch: what a call and all that it launched have in common, 0 for nothing.
        node: of a CUDA graph, in the order of its capture, 0 where that is not known.
        place: in the trace.
    """

    name: str
    kind: str
    begin: float
    end: float
    thread: Any = 0
    launch: int = 0
    node: int = 0
    place: int = -1


class Ranges:
    """Opens a range where a part begins, and closes the one before it; a thread has one at a time.

    Args:
        make: a context manager for a name: torch.profiler's `record_function`, or NVTX's.

    Attributes:
        marks: how often it was called.
    """

    def __init__(self, make: Callable[[str], AbstractContextManager]) -> None:
        self.marks = 0
        self._make = make
        self._own = threading.local()
        self._busy: set[int] = set()

    def __call__(self, name: str) -> None:
        """A part begins in this thread; with "" none does."""
        self.marks += 1
        before = getattr(self._own, "range", None)
        if before:
            before.__exit__(None, None, None)
            self._busy.discard(threading.get_ident())
        self._own.range = self._make(name) if name else None
        if self._own.range:
            self._own.range.__enter__()
            self._busy.add(threading.get_ident())

    def finish(self) -> None:
        """Waits until no thread has a range: one that is open when the recording ends has no end.

        For some seconds at most: a thread may have failed.
        """
        until = time.monotonic() + _PATIENCE
        while self._busy and time.monotonic() < until:
            time.sleep(1e-4)


def record(run: Callable[[], Any], device: torch.device) -> tuple[dict[str, Any], int]:
    """What torch.profiler records of a function's work, with all ranges, and one named STEPS around them.

    Returns:
        A trace in Chrome's format, and how many marks there were.
    """
    wanted = {ProfilerActivity.CPU} | ({ProfilerActivity.CUDA} if device.type == "cuda" else set())
    # in plans' and views' threads, too
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    opened = Ranges(record_function)
    if device.type == "cpu":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports as an error that it finds no GPU
    activities = wanted & torch.profiler.supported_activities()
    recording = torch.profiler.profile(activities=activities, experimental_config=config)
    with recording as profiler, ranges.listening(opened), record_function(STEPS):
        run()
        if device.type == "cuda":
            ranges.enter("wait for device")
            torch.cuda.synchronize(device)
        ranges.leave()
        opened.finish()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_bytes()), opened.marks


def read(trace: Mapping[str, Any]) -> list[Event]:
    """The events of a trace in Chrome's format, as torch.profiler exports it."""
    events = []
    for place, one in enumerate(trace["traceEvents"]):
        kind = _KINDS.get(one.get("cat", ""))
        if one.get("cat") == "user_annotation":
            known = one["name"] in RANGES or one["name"] == STEPS
            kind = RANGE if known else COLLECTIVE if one["name"].startswith("gloo:") else None
        if one.get("ph") == "X" and kind:
            args = one.get("args", {})
            numbers = args.get("correlation", 0), args.get("graph node id", 0)
            events.append(Event(one["name"], kind, one["ts"], one["ts"] + one["dur"], one["tid"], *numbers, place))
    return events


def spans(events: Iterable[Event]) -> Spans:
    """When any of these events was going on: spans in order that do not touch."""
    found: Spans = []
    for begin, end in sorted((event.begin, event.end) for event in events):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif end > begin:
            found.append((begin, end))
    return found


def without(some: Spans, others: Spans) -> Spans:
    """What remains of some spans outside others; both in order."""
    found = []
    for begin, end in some:
        first = bisect_right(others, begin, key=lambda span: span[1])
        for other_begin, other_end in others[first:]:
            if other_begin >= end:
                break
            if other_begin > begin:
                found.append((begin, other_begin))
            begin = other_end
        if begin < end:
            found.append((begin, end))
    return found


def length(some: Spans) -> float:
    """Microseconds in all."""
    return sum(end - begin for begin, end in some)


def nested(events: Sequence[Event]) -> list[tuple[Event, float, bool]]:
    """Each event, its time without that of events within it in the same thread, and whether it is within none."""
    own = [event.end - event.begin for event in events]
    outer = [True] * len(events)
    going: dict[Any, list[int]] = defaultdict(list)
    for number in sorted(range(len(events)), key=lambda number: (events[number].begin, -events[number].end)):
        event = events[number]
        stack = going[event.thread]
        while stack and events[stack[-1]].end <= event.begin:
            stack.pop()
        if stack:
            own[stack[-1]] -= min(event.end, events[stack[-1]].end) - event.begin
            outer[number] = False
        stack.append(number)
    return list(zip(events, own, outer, strict=True))


def outermost(events: Iterable[Event]) -> list[Event]:
    """Operators that no other operator called."""
    return [event for event, _, outer in nested([e for e in events if e.kind == OPERATOR]) if outer]


def _ranges(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.kind == RANGE and event.name != STEPS]


def _loop(events: Iterable[Event]) -> Event:
    (steps,) = (event for event in events if event.kind == RANGE and event.name == STEPS)
    return steps


def placing(events: Iterable[Event]) -> Callable[[Any, float], str]:
    """A function of thread and time: the range that the thread was in; in autograd's threads that of the loop.

    Threads that have neither, such as DALI's, are in OTHERS.
    """
    events = list(events)
    loop = _loop(events).thread
    helpers = {event.thread for event in events if event.kind == OPERATOR and event.name.startswith("autograd::")}
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in sorted(_ranges(events), key=lambda event: event.begin):
        threads[event.thread].append(event)

    def place(thread: Any, time: float) -> str:
        ranges = threads[loop] if thread in helpers else threads[thread]
        number = bisect_right(ranges, time, key=lambda event: event.begin) - 1
        return ranges[number].name if number >= 0 and time < ranges[number].end else OTHERS

    return place


def learn(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Name and range of every kernel of a step that was executed launch by launch, in the order of launches.

    Where the device reports none, of every operator that no other called.
    """
    place = placing(events)
    operators = [(event, place(event.thread, event.begin)) for event in outermost(events)]
    return [(event.name, where) for event, where in _launched(events) or operators]


def _launched(events: Sequence[Event]) -> list[tuple[Event, str]]:
    place = placing(events)
    calls = {event.launch: event for event in events if event.kind == CALL}
    found = []
    for event in (event for event in events if event.kind == DEVICE):
        call = calls.get(event.launch)
        found.append((call.begin if call else event.begin, event, place(call.thread, call.begin) if call else OTHERS))
    return [(event, where) for _, event, where in sorted(found, key=lambda each: each[0])]


def attribute(
    events: Sequence[Event], learned: Sequence[tuple[str, str]] = ()
) -> tuple[list[tuple[Event, str]], dict[str, int]]:
    """The range of everything that the device did.

    Kernels of a graph's replay have that of the kernels of their name in `learned`. Where those are in several ranges,
    they are taken in order: of nodes where the trace numbers them, of time otherwise. A name that a replay has another
    number of times then says nothing.

    Returns:
        Events and ranges, and how many kernels of replays were attributed by "name", by "order", and "not at all".
    """
    graphs = {event.launch for event in events if event.kind == CALL and "GraphLaunch" in event.name}
    found = [each for each in _launched(events) if each[0].launch not in graphs]
    replays: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind == DEVICE and event.launch in graphs:
            replays[event.launch].append(event)
    where: dict[str, list[str]] = defaultdict(list)
    for name, part in learned:
        where[name].append(part)
    how = Counter({"name": 0, "order": 0, "not at all": 0})
    for kernels in replays.values():
        times = Counter(kernel.name for kernel in kernels)
        seen: Counter[str] = Counter()
        for kernel in sorted(kernels, key=lambda kernel: (kernel.node, kernel.begin)):
            parts = where[kernel.name]
            if len(set(parts)) == 1:
                by, part = "name", parts[0]
            elif len(parts) == times[kernel.name]:
                by, part = "order", parts[seen[kernel.name]]
            else:
                by, part = "not at all", OTHERS
            seen[kernel.name] += 1
            how[by] += 1
            found.append((kernel, part))
    return found, dict(how)


def by_kind(events: Sequence[Mapping[str, Any]], steps: int) -> dict[str, dict[str, float]]:
    """Time and kernels a step by kind, the largest first, and the gaps.

    Args:
        events: kernels with name, begin and end in microseconds; those of several streams may overlap.
        steps: so many steps they are of.

    Returns:
        For each kind "ms" and "kernels" a step, and "share" of the time from the first kernel to the last.
    """
    if not events:
        return {}
    found: dict[str, list[float]] = {}
    for event in events:
        kind = next((kind for kind, words in KERNELS.items() if any(word in event["name"] for word in words)), OTHERS)
        found.setdefault(kind, []).append(event["end"] - event["begin"])
    busy = spans(Event(event["name"], DEVICE, event["begin"], event["end"]) for event in events)
    whole = busy[-1][1] - busy[0][0]
    rows = {
        kind: {"ms": sum(times) / 1e3 / steps, "kernels": len(times) / steps, "share": sum(times) / whole}
        for kind, times in sorted(found.items(), key=lambda pair: -sum(pair[1]))
    }
    gaps = whole - length(busy)
    return rows | {"gaps": {"ms": gaps / 1e3 / steps, "kernels": 0.0, "share": gaps / whole}}


def analyse(
    events: Sequence[Event],
    steps: int,
    learned: Sequence[tuple[str, str]] = (),
    view_threads_ms: float = 0.0,
) -> dict[str, Any]:
    """What a trace says of one of its steps.

    Args:
        events: with one range STEPS, in which all of the device's work ended.
        steps: in it.
        learned: see `learn`, where steps are replays of a graph.
        view_threads_ms: CPU time a step of threads that make views and are not in the trace.

    Returns:
        "step_ms", of the wall clock; "named_share", of it in ranges of the training loop; "ranges", for each range in
        which there was something "ms" and "share" of the loop, "threads_ms" of other threads, "launches" (operators
        that no other called, where the device reports nothing), and "device_ms"; "operators", the dearest kernels, or
        without a device operators less what they called; and, as far as there is such a thing, "kinds" of kernels,
        "gaps" of the device with the range that the loop was in, "hidden", and "attribution" of a graph's kernels.
    """
    window = _loop(events)
    whole, loop = window.end - window.begin, window.thread

    def each(microseconds: float) -> float:
        return microseconds / 1e3 / steps

    cut = [
        dataclasses.replace(event, begin=max(event.begin, window.begin), end=min(event.end, window.end))
        for event in events
        if event.begin < window.end and event.end > window.begin and event is not window
    ]
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    for event, own, _ in nested(_ranges(cut)):
        (ours if event.thread == loop else theirs)[event.name] += own  # type: ignore[assignment]
    named = sum(ours.values())
    ours[OTHERS] = whole - named  # type: ignore[assignment]

    device, how = attribute([*cut, window], learned)
    times: dict[str, list[float]] = defaultdict(list)
    for event, part in device:
        times[part].append(event.end - event.begin)
    operators = [event for event in cut if event.kind == OPERATOR]
    if device:
        launches = Counter({part: len(taken) for part, taken in times.items()})
        cost: list[tuple[str, float]] = [(event.name, event.end - event.begin) for event, _ in device]
    else:
        place = placing([*cut, window])
        launches = Counter(place(event.thread, event.begin) for event in outermost(operators))
        for _, part in learned:  # a replay calls no operators: those are what was captured
            launches[part] += steps
        cost = [(event.name, own) for event, own, _ in nested(operators)]

    ranges = {}
    for name in (*RANGES, OTHERS):
        if name == OTHERS or ours[name] or theirs[name] or launches[name]:
            ranges[name] = {
                "ms": each(ours[name]), "share": ours[name] / whole, "threads_ms": each(theirs[name]),
                "launches": launches[name] / steps, "device_ms": each(sum(times[name])),
            }  # fmt: skip
    found: dict[str, Any] = {
        "step_ms": each(whole), "named_share": named / whole, "ranges": ranges,
        "operators": _dearest(cost, whole, steps), "hidden": {},
    }  # fmt: skip
    if device:
        found["kinds"] = by_kind([vars(event) for event, _ in device], steps)
        found["gaps"] = _gaps([*cut, window], steps)
    if sum(how.values()):
        found["attribution"] = how

    views = [event for event, part in device if part == "views"]
    alone = length(without(spans(views), spans(event for event, part in device if part != "views")))
    made = theirs["views"] + ours["views"] + length(spans(views)) + 1e3 * steps * view_threads_ms
    found["hidden"]["plan"] = _hidden(each(theirs["plan"]), each(ours["wait for plan"]))
    found["hidden"]["views"] = _hidden(each(made), each(ours["wait for views"] + ours["views"] + alone))
    reduces = [event for event, _ in device if "nccl" in event.name.lower()]
    beside = [event for event, _ in device if "nccl" not in event.name.lower()]
    if not reduces:  # ranks on CPUs: what is computed beside them is operators
        reduces = [event for event in cut if event.kind == COLLECTIVE]
        beside = [event for event in operators if not event.name.startswith("c10d") and event.thread == loop]
    if reduces:
        going = spans(reduces)
        found["hidden"]["exchange"] = _hidden(each(length(going)), each(length(without(going, spans(beside)))))
    return found


def _hidden(worked: float, waited: float) -> dict[str, float]:
    return {"worked_ms": worked, "waited_ms": waited, "hidden_ms": max(worked - waited, 0.0)}


def _dearest(cost: Iterable[tuple[str, float]], whole: float, steps: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = defaultdict(list)
    for name, taken in cost:
        times[name].append(taken)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))[:DEAREST]
    return [
        {"name": name, "ms": sum(taken) / 1e3 / steps, "share": sum(taken) / whole, "calls": len(taken) / steps}
        for name, taken in ordered
    ]


def _gaps(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """When the device did nothing between the first and the last step, by the range that the loop was in meanwhile."""
    window = _loop(events)
    idle = without([(window.begin, window.end)], spans(event for event in events if event.kind == DEVICE))
    loop = sorted((e for e in _ranges(events) if e.thread == window.thread), key=lambda event: event.begin)
    parts: dict[str, list[float]] = defaultdict(list)
    for begin, end in idle:
        left = end - begin
        first = bisect_left(loop, begin, key=lambda event: event.end)
        for event in loop[first : bisect_left(loop, end, key=lambda event: event.begin)]:
            within = min(event.end, end) - max(event.begin, begin)
            if within > 0:
                parts[event.name].append(within)
                left -= within
        if left > 1e-3:  # a nanosecond is what the clock resolves
            parts[OTHERS].append(left)
    return {
        "ms": length(idle) / 1e3 / steps, "share": length(idle) / (window.end - window.begin),
        "ranges": {
            name: {"ms": sum(taken) / 1e3 / steps, "gaps": len(taken) / steps, "longest_ms": max(taken) / 1e3}
            for name, taken in sorted(parts.items(), key=lambda item: -sum(item[1]))
        },
    }  # fmt: skip
