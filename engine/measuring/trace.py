"""Record training steps with torch.profiler and analyze the trace.

The training loop enters named ranges (`engine.training.ranges`), which do not overlap within a thread. A kernel belongs
to the range in which it was launched. All kernels of a CUDA graph share one launch, so their ranges are learned from
the same step executed without a graph (`learn`).

Times of events are in microseconds of the trace's clock, results in milliseconds per step.
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

STEPS = "profiled steps"  # The range around all steps, in the training loop's thread.
OTHERS = "others"  # Time of the loop outside all ranges, and kernels launched outside all ranges.
TOP_OPERATORS = 10
_FINISH_TIMEOUT = 10.0  # Seconds to wait for open ranges of other threads.

RANGE, OPERATOR, CALL, DEVICE, COLLECTIVE = "range", "operator", "call", "device", "collective"
_KINDS = {
    "cpu_op": OPERATOR, "cuda_runtime": CALL, "cuda_driver": CALL, "kernel": DEVICE, "gpu_memcpy": DEVICE,
    "gpu_memset": DEVICE,
}  # fmt: skip

# Kinds of kernels by substrings of their names. The first match counts.
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
    """An event of a trace.

    Attributes:
        name: Its name.
        kind: RANGE; OPERATOR (a torch operator on the host); CALL (of the CUDA runtime or driver); DEVICE (a kernel,
            copy or fill); COLLECTIVE (between CPU ranks).
        begin: Time in microseconds.
        end: Time in microseconds.
        thread: Thread of the host, or stream of the device.
        launch: Correlation id shared by a call and everything it launched, 0 if none.
        node: Node of the CUDA graph in the order of capture, 0 if unknown.
        place: Index in the trace.
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
    """Listener that opens the entered range and closes the previous one. Each thread has at most one open range.

    Args:
        make: Function from a name to a context manager, such as torch.profiler's `record_function` or an NVTX range.

    Attributes:
        marks: Number of calls.
    """

    def __init__(self, make: Callable[[str], AbstractContextManager]) -> None:
        self.marks = 0
        self._make = make
        self._own = threading.local()
        self._busy: set[int] = set()

    def __call__(self, name: str) -> None:
        """Enter a range in this thread, or none for an empty name."""
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
        """Wait until no thread has an open range, since such a range would have no end in the trace.

        The wait has a timeout because a thread may have failed.
        """
        until = time.monotonic() + _FINISH_TIMEOUT
        while self._busy and time.monotonic() < until:
            time.sleep(1e-4)


def record(run: Callable[[], Any], device: torch.device) -> tuple[dict[str, Any], int]:
    """Record a function with torch.profiler, with all ranges and a range named STEPS around them.

    Returns:
        A trace in Chrome's format, and the number of ranges entered or left.
    """
    wanted = {ProfilerActivity.CPU} | ({ProfilerActivity.CUDA} if device.type == "cuda" else set())
    # Includes the threads that make plans and views.
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    opened = Ranges(record_function)
    if device.type == "cpu":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Otherwise Kineto reports the missing GPU as an error.
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
    """Return the events of a trace in Chrome's format, as exported by torch.profiler."""
    events = []
    for place, one in enumerate(trace["traceEvents"]):
        kind = _KINDS.get(one.get("cat", ""))
        if one.get("cat") == "user_annotation":
            known = one["name"] in RANGES or one["name"] == STEPS
            kind = RANGE if known else COLLECTIVE if one["name"].startswith("gloo:") else None
        if one.get("ph") == "X" and kind:
            args = one.get("args", {})
            ids = args.get("correlation", 0), args.get("graph node id", 0)
            events.append(Event(one["name"], kind, one["ts"], one["ts"] + one["dur"], one["tid"], *ids, place))
    return events


def spans(events: Iterable[Event]) -> Spans:
    """Return the union of the events' times as sorted, disjoint spans."""
    found: Spans = []
    for begin, end in sorted((event.begin, event.end) for event in events):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif end > begin:
            found.append((begin, end))
    return found


def subtract(included: Spans, excluded: Spans) -> Spans:
    """Return the parts of `included` outside `excluded`. Both must be sorted."""
    found = []
    for begin, end in included:
        first = bisect_right(excluded, begin, key=lambda span: span[1])
        for other_begin, other_end in excluded[first:]:
            if other_begin >= end:
                break
            if other_begin > begin:
                found.append((begin, other_begin))
            begin = other_end
        if begin < end:
            found.append((begin, end))
    return found


def length(intervals: Spans) -> float:
    """Return the total length in microseconds."""
    return sum(end - begin for begin, end in intervals)


def nested(events: Sequence[Event]) -> list[tuple[Event, float, bool]]:
    """Return each event, its time without nested events of the same thread, and whether it is outermost."""
    own = [event.end - event.begin for event in events]
    outer = [True] * len(events)
    open_events: dict[Any, list[int]] = defaultdict(list)
    for number in sorted(range(len(events)), key=lambda number: (events[number].begin, -events[number].end)):
        event = events[number]
        stack = open_events[event.thread]
        while stack and events[stack[-1]].end <= event.begin:
            stack.pop()
        if stack:
            own[stack[-1]] -= min(event.end, events[stack[-1]].end) - event.begin
            outer[number] = False
        stack.append(number)
    return list(zip(events, own, outer, strict=True))


def outermost(events: Iterable[Event]) -> list[Event]:
    """Return the operators that no other operator called."""
    return [event for event, _, outer in nested([e for e in events if e.kind == OPERATOR]) if outer]


def _ranges(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.kind == RANGE and event.name != STEPS]


def _loop(events: Iterable[Event]) -> Event:
    (steps,) = (event for event in events if event.kind == RANGE and event.name == STEPS)
    return steps


def range_finder(events: Iterable[Event]) -> Callable[[Any, float], str]:
    """Return a function that finds the range a thread was in at a time.

    Autograd's threads are in the range of the training loop. Threads without ranges, such as DALI's, are in OTHERS.
    """
    events = list(events)
    loop = _loop(events).thread
    autograd = {event.thread for event in events if event.kind == OPERATOR and event.name.startswith("autograd::")}
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in sorted(_ranges(events), key=lambda event: event.begin):
        threads[event.thread].append(event)

    def find_range(thread: Any, time: float) -> str:
        ranges = threads[loop] if thread in autograd else threads[thread]
        number = bisect_right(ranges, time, key=lambda event: event.begin) - 1
        return ranges[number].name if number >= 0 and time < ranges[number].end else OTHERS

    return find_range


def learn(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Return name and range of every kernel of a step without a graph, in launch order.

    If the device reports no kernels, return the outermost operators instead.
    """
    find_range = range_finder(events)
    operators = [(event, find_range(event.thread, event.begin)) for event in outermost(events)]
    return [(event.name, part) for event, part in _launched(events) or operators]


def _launched(events: Sequence[Event]) -> list[tuple[Event, str]]:
    find_range = range_finder(events)
    calls = {event.launch: event for event in events if event.kind == CALL}
    found = []
    for event in (event for event in events if event.kind == DEVICE):
        call = calls.get(event.launch)
        part = find_range(call.thread, call.begin) if call else OTHERS
        found.append((call.begin if call else event.begin, event, part))
    return [(event, part) for _, event, part in sorted(found, key=lambda each: each[0])]


def attribute(
    events: Sequence[Event], learned: Sequence[tuple[str, str]] = ()
) -> tuple[list[tuple[Event, str]], dict[str, int]]:
    """Attribute every device event to a range.

    A kernel of a graph replay belongs to the range of the kernels of the same name in `learned`. If those are in
    several ranges, kernels are matched in order of graph nodes, or of time if the trace has no node numbers. They are
    not attributed if their number differs from `learned`.

    Returns:
        Events with their ranges, and the number of replayed kernels attributed by "name", by "order" and "not at all".
    """
    graphs = {event.launch for event in events if event.kind == CALL and "GraphLaunch" in event.name}
    found = [each for each in _launched(events) if each[0].launch not in graphs]
    replays: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind == DEVICE and event.launch in graphs:
            replays[event.launch].append(event)
    learned_ranges: dict[str, list[str]] = defaultdict(list)
    for name, part in learned:
        learned_ranges[name].append(part)
    how = Counter({"name": 0, "order": 0, "not at all": 0})
    for kernels in replays.values():
        times = Counter(kernel.name for kernel in kernels)
        seen: Counter[str] = Counter()
        for kernel in sorted(kernels, key=lambda kernel: (kernel.node, kernel.begin)):
            parts = learned_ranges[kernel.name]
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
    """Return time and number of kernels per step by kind, in descending order of time, and the gaps.

    Args:
        events: Kernels with name, begin and end in microseconds. Kernels of different streams may overlap.
        steps: Number of steps in which they ran.

    Returns:
        For each kind, "ms" and "kernels" per step, and "share" of the time from the first to the last kernel.
    """
    if not events:
        return {}
    found: dict[str, list[float]] = {}
    for event in events:
        kind = next((kind for kind, words in KERNELS.items() if any(word in event["name"] for word in words)), OTHERS)
        found.setdefault(kind, []).append(event["end"] - event["begin"])
    busy = spans(Event(event["name"], DEVICE, event["begin"], event["end"]) for event in events)
    whole = busy[-1][1] - busy[0][0]
    kinds = {
        kind: {"ms": sum(times) / 1e3 / steps, "kernels": len(times) / steps, "share": sum(times) / whole}
        for kind, times in sorted(found.items(), key=lambda pair: -sum(pair[1]))
    }
    gaps = whole - length(busy)
    return kinds | {"gaps": {"ms": gaps / 1e3 / steps, "kernels": 0.0, "share": gaps / whole}}


def analyze(
    events: Sequence[Event],
    steps: int,
    learned: Sequence[tuple[str, str]] = (),
    view_threads_ms: float = 0.0,
) -> dict[str, Any]:
    """Analyze the steps of a trace. Times are per step.

    Args:
        events: Events with one range STEPS, in which all of the device's work ends.
        steps: Number of steps in it.
        learned: Result of `learn`, if the steps are replays of a graph.
        view_threads_ms: CPU time per step of threads that make views and are not in the trace.

    Returns:
        A dictionary with these keys:

        - "step_ms": Wall-clock time.
        - "named_share": Share of it inside ranges of the training loop.
        - "ranges": For each nonempty range, "ms" and "share" of the loop, "threads_ms" of other threads, "launches"
          (outermost operators if the device reports no kernels) and "device_ms".
        - "operators": The kernels that take the most time. Without a device: operators, without the time of the
          operators they call.
        - "hidden": For plans, views and the gradient exchange, the work, the time spent waiting for it, and the work
          hidden behind other work.
        - "kinds": Kernels by kind, if the device reports kernels.
        - "gaps": Idle time of the device by range of the loop, if the device reports kernels.
        - "attribution": How kernels of graph replays were attributed, if there are any.
    """
    window = _loop(events)
    whole, loop = window.end - window.begin, window.thread

    def ms_per_step(microseconds: float) -> float:
        return microseconds / 1e3 / steps

    cut = [
        dataclasses.replace(event, begin=max(event.begin, window.begin), end=min(event.end, window.end))
        for event in events
        if event.begin < window.end and event.end > window.begin and event is not window
    ]
    in_loop: Counter[str] = Counter()
    in_threads: Counter[str] = Counter()
    for event, own, _ in nested(_ranges(cut)):
        (in_loop if event.thread == loop else in_threads)[event.name] += own  # type: ignore[assignment]
    named = sum(in_loop.values())
    in_loop[OTHERS] = whole - named  # type: ignore[assignment]

    device, how = attribute([*cut, window], learned)
    times: dict[str, list[float]] = defaultdict(list)
    for event, part in device:
        times[part].append(event.end - event.begin)
    operators = [event for event in cut if event.kind == OPERATOR]
    if device:
        launches = Counter({part: len(taken) for part, taken in times.items()})
        cost: list[tuple[str, float]] = [(event.name, event.end - event.begin) for event, _ in device]
    else:
        find_range = range_finder([*cut, window])
        launches = Counter(find_range(event.thread, event.begin) for event in outermost(operators))
        for _, part in learned:  # A replay calls no operators. Count those that were captured.
            launches[part] += steps
        cost = [(event.name, own) for event, own, _ in nested(operators)]

    ranges = {}
    for name in (*RANGES, OTHERS):
        if name == OTHERS or in_loop[name] or in_threads[name] or launches[name]:
            ranges[name] = {
                "ms": ms_per_step(in_loop[name]), "share": in_loop[name] / whole,
                "threads_ms": ms_per_step(in_threads[name]),
                "launches": launches[name] / steps, "device_ms": ms_per_step(sum(times[name])),
            }  # fmt: skip
    found: dict[str, Any] = {
        "step_ms": ms_per_step(whole), "named_share": named / whole, "ranges": ranges,
        "operators": _most_expensive(cost, whole, steps), "hidden": {},
    }  # fmt: skip
    if device:
        found["kinds"] = by_kind([vars(event) for event, _ in device], steps)
        found["gaps"] = _gaps([*cut, window], steps)
    if sum(how.values()):
        found["attribution"] = how

    views = [event for event, part in device if part == "views"]
    alone = length(subtract(spans(views), spans(event for event, part in device if part != "views")))
    made = in_threads["views"] + in_loop["views"] + length(spans(views)) + 1e3 * steps * view_threads_ms
    found["hidden"]["plan"] = _hidden(ms_per_step(in_threads["plan"]), ms_per_step(in_loop["wait for plan"]))
    waited = in_loop["wait for views"] + in_loop["views"] + alone
    found["hidden"]["views"] = _hidden(ms_per_step(made), ms_per_step(waited))
    reduces = [event for event, _ in device if "nccl" in event.name.lower()]
    others = [event for event, _ in device if "nccl" not in event.name.lower()]
    if not reduces:  # CPU ranks: operators overlap with the exchange.
        reduces = [event for event in cut if event.kind == COLLECTIVE]
        others = [event for event in operators if not event.name.startswith("c10d") and event.thread == loop]
    if reduces:
        exchange = spans(reduces)
        exposed = subtract(exchange, spans(others))
        found["hidden"]["exchange"] = _hidden(ms_per_step(length(exchange)), ms_per_step(length(exposed)))
    return found


def _hidden(worked: float, waited: float) -> dict[str, float]:
    return {"worked_ms": worked, "waited_ms": waited, "hidden_ms": max(worked - waited, 0.0)}


def _most_expensive(cost: Iterable[tuple[str, float]], whole: float, steps: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = defaultdict(list)
    for name, taken in cost:
        times[name].append(taken)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP_OPERATORS]
    return [
        {"name": name, "ms": sum(taken) / 1e3 / steps, "share": sum(taken) / whole, "calls": len(taken) / steps}
        for name, taken in ordered
    ]


def _gaps(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Return the idle time of the device during the steps, by the range that the loop was in."""
    window = _loop(events)
    idle = subtract([(window.begin, window.end)], spans(event for event in events if event.kind == DEVICE))
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
        if left > 1e-3:  # The clock resolves a nanosecond.
            parts[OTHERS].append(left)
    return {
        "ms": length(idle) / 1e3 / steps, "share": length(idle) / (window.end - window.begin),
        "ranges": {
            name: {"ms": sum(taken) / 1e3 / steps, "gaps": len(taken) / steps, "longest_ms": max(taken) / 1e3}
            for name, taken in sorted(parts.items(), key=lambda item: -sum(item[1]))
        },
    }  # fmt: skip
