"""`remixmatch profile`: analysis of traces against references by hand; profiles of digits, complete and interrupted."""

import gzip
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench.emulator.run import environment
from engine.commands import main as cli
from engine.errors import Stopped, UserError
from engine.measuring import records
from engine.measuring.timing import Ceilings
from engine.measuring.trace import (
    CALL,
    COLLECTIVE,
    DEVICE,
    OPERATOR,
    OTHERS,
    RANGE,
    STEPS,
    Event,
    analyze,
    attribute,
    learn,
    read,
)
from engine.studies import profile
from engine.studies.profile import Ranges, parse_profile
from engine.training import ranges
from engine.training.execution import Execution

ROOT = Path(__file__).parents[3]
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="uses sizes for a CPU")
EMULATED = torch.cuda.is_available() and torch.cuda.get_device_name() == "emulated device"
TINY = ("digits-40", "--batch", "4", "--width", "8", "--k", "1", "--steps", "4", "--warm-up", "1", "--view-steps", "4")
LOOP, PLANNER, AUTOGRAD, DALI = 1, 2, 3, 4


def of_loop(name, begin, end):
    return Event(name, RANGE, begin, end, LOOP)


def kernel(name, begin, end, launch, stream=7, node=0):
    return Event(name, DEVICE, begin, end, stream, launch, node)


def call(begin, launch, thread=LOOP, name="cudaLaunchKernel"):
    return Event(name, CALL, begin, begin + 1, thread, launch)


BY_HAND = [
    of_loop(STEPS, 1000, 3000),
    of_loop("wait for plan", 1000, 1100), of_loop("views", 1100, 1200), of_loop("forward", 1250, 1700),
    of_loop("backward", 1700, 2500), of_loop("wait for device", 2500, 2950),
    Event("plan", RANGE, 900, 1090, PLANNER), Event("views", RANGE, 1090, 1390, PLANNER),
    Event("autograd::engine::evaluate_function: A", OPERATOR, 1800, 1900, AUTOGRAD),
    call(1150, 1), call(1300, 2), call(1400, 3), call(1850, 4, AUTOGRAD), call(2000, 5), call(1350, 6, DALI),
    kernel("augment", 1200, 1300, 1, 8), kernel("conv", 1310, 1500, 2), kernel("triton_red", 1500, 1600, 3),
    kernel("conv", 2000, 2600, 4), kernel("ncclDevKernel_AllReduce", 2500, 2800, 5, 9),
    kernel("warp", 1450, 1550, 6, 8),
    # After the last step, or before the first.
    of_loop("forward", 3000, 3500), call(3100, 7), kernel("conv", 3100, 3200, 7), kernel("conv", 900, 1000, 8),
    Event("views", RANGE, 3050, 3100, PLANNER),
]  # fmt: skip


def test_a_trace_written_by_hand():
    found = analyze(BY_HAND, steps=2, view_threads_ms=0.5)
    assert found["step_ms"] == 1 and found["named_share"] == pytest.approx(0.95)
    shown = found["ranges"]
    assert {name: (part["ms"], part["device_ms"], part["launches"]) for name, part in shown.items()} == {
        "wait for device": (0.225, 0, 0), "plan": (0, 0, 0), "wait for plan": (0.05, 0, 0),
        "views": (0.05, 0.05, 0.5), "forward": (0.225, 0.145, 1), "backward": (0.4, 0.45, 1),
        OTHERS: (0.05, 0.05, 0.5),
    }  # fmt: skip
    assert shown["plan"]["threads_ms"] == 0.045, "without the time before the first step"
    assert shown["views"]["threads_ms"] == 0.15
    assert found["gaps"] == {
        "ms": 0.405, "share": 0.405,
        "ranges": {
            # 1600 to 2000, while forward and backward are launched, and 1300 to 1310.
            "backward": {"ms": 0.15, "gaps": 0.5, "longest_ms": 0.3},
            "wait for device": {"ms": 0.075, "gaps": 0.5, "longest_ms": 0.15},
            "forward": {"ms": 0.055, "gaps": 1, "longest_ms": 0.1},
            "wait for plan": {"ms": 0.05, "gaps": 0.5, "longest_ms": 0.1},
            "views": {"ms": 0.05, "gaps": 0.5, "longest_ms": 0.1},
            OTHERS: {"ms": 0.025, "gaps": 0.5, "longest_ms": 0.05},
        },
    }  # fmt: skip
    assert found["hidden"] == {
        "plan": {"worked_ms": 0.045, "waited_ms": 0.05, "hidden_ms": 0},
        # Planner 0.15, loop 0.05, device 0.05 with nothing running alongside, other threads 0.5.
        "views": {"worked_ms": 0.75, "waited_ms": 0.1, "hidden_ms": 0.65},
        "exchange": {"worked_ms": 0.15, "waited_ms": 0.1, "hidden_ms": pytest.approx(0.05)},
    }  # fmt: skip
    assert [(one["name"], one["ms"], one["calls"]) for one in found["operators"][:2]] == [
        ("conv", 0.395, 1), ("ncclDevKernel_AllReduce", 0.15, 0.5),
    ]  # fmt: skip
    assert "attribution" not in found and found["kinds"]["reductions (batch norm)"]["kernels"] == 0.5


def test_random_traces_agree_with_a_count_by_microsecond():
    chance = random.Random(0)
    for _ in range(20):
        end, steps = 400, 4
        loop, planner, calls, kernels = [], [], [], []
        for events_of, thread in ((loop, LOOP), (planner, PLANNER)):
            time_ = chance.randrange(5)
            while (until := time_ + chance.randrange(1, 40)) < end:
                name = chance.choice(["views", "plan", "forward", "backward", "wait for views"])
                events_of.append(Event(name, RANGE, time_, until, thread))
                time_ = until + chance.choice([0, 0, 3])
        for number in range(1, 15):
            calls.append(call(chance.randrange(end), number, chance.choice([LOOP, PLANNER])))
            begin = chance.randrange(end - 60)
            kernels.append(kernel(f"k{number % 4}", begin, begin + chance.randrange(1, 60), number, number % 3))
        events = [*loop, *planner, *calls, *kernels, of_loop(STEPS, 0, end)]
        found = analyze(events, steps)

        def at(events_of, moment):
            return next((event.name for event in events_of if event.begin <= moment < event.end), OTHERS)

        def ms(count, steps=steps):
            return pytest.approx(count / 1e3 / steps)

        moments = range(end)
        where = {one.launch: at(loop if one.thread == LOOP else planner, one.begin) for one in calls}
        busy = [{where[one.launch] for one in kernels if one.begin <= moment < one.end} for moment in moments]
        for name, part in found["ranges"].items():
            count = sum(at(loop, moment) == name for moment in moments)
            assert part["ms"] == ms(count) and part["share"] == pytest.approx(count / end)
            if name != OTHERS:
                assert part["threads_ms"] == ms(sum(at(planner, moment) == name for moment in moments))
            own = [one for one in kernels if where[one.launch] == name]
            assert part["launches"] == len(own) / steps
            assert part["device_ms"] == ms(sum(one.end - one.begin for one in own))
        assert sum(part["share"] for part in found["ranges"].values()) == pytest.approx(1)
        idle = [at(loop, moment) for moment in moments if not busy[moment]]
        assert found["gaps"]["ms"] == ms(len(idle))
        gaps = {name: one["ms"] for name, one in found["gaps"]["ranges"].items()}
        assert gaps == {name: ms(idle.count(name)) for name in set(idle)}
        waited = sum(
            at(loop, moment) in ("views", "wait for views") for moment in moments
        ) + sum(parts_ == {"views"} for parts_ in busy)  # fmt: skip
        assert found["hidden"]["views"]["waited_ms"] == ms(waited)
        worked = sum(at(events_of, moment) == "views" for events_of in (loop, planner) for moment in moments)
        assert found["hidden"]["views"]["worked_ms"] == ms(worked + sum("views" in parts_ for parts_ in busy))


def test_operators_belong_to_the_range_of_their_call_and_have_self_times():
    steps = of_loop(STEPS, 0, 100)
    operators = [
        Event("outer", OPERATOR, 10, 40, LOOP), Event("inner", OPERATOR, 15, 25, LOOP),
        Event("inner", OPERATOR, 26, 30, LOOP), Event("innermost", OPERATOR, 16, 20, LOOP),
        Event("autograd::engine", OPERATOR, 50, 60, AUTOGRAD), Event("inner", OPERATOR, 5, 90, DALI),
        Event("c10d::allreduce_", OPERATOR, 61, 80, LOOP), Event("gloo:all_reduce", COLLECTIVE, 30, 80, 5),
    ]  # fmt: skip
    made = [of_loop("forward", 0, 45), of_loop("backward", 45, 100)]
    found = analyze([*operators, *made, steps], 1)
    assert {name: part["launches"] for name, part in found["ranges"].items()} == {
        "forward": 1, "backward": 2, OTHERS: 1
    }  # fmt: skip
    assert {one["name"]: one["ms"] for one in found["operators"]} == {
        "inner": pytest.approx(0.095), "outer": 0.016, "c10d::allreduce_": 0.019, "autograd::engine": 0.01,
        "innermost": 0.004,
    }  # fmt: skip
    assert "gaps" not in found
    assert found["hidden"]["exchange"] == pytest.approx(dict(worked_ms=0.05, waited_ms=0.04, hidden_ms=0.01))


def test_kernels_of_a_graph_are_attributed_by_name_and_by_order():
    once = [
        of_loop(STEPS, 0, 100), of_loop("probes", 0, 20), of_loop("forward", 20, 50), of_loop("update", 50, 100),
        *(call(begin, number) for number, begin in enumerate((10, 30, 35, 60, 65), 1)),
        # On their own stream, the probes' kernels run later than those of the forward pass.
        kernel("conv", 80, 90, 1, 8), kernel("conv", 40, 50, 2), kernel("norm", 50, 55, 3), kernel("adam", 70, 75, 4),
        kernel("copy", 76, 78, 5),
    ]  # fmt: skip
    learned = learn(once)
    assert learned == [
        ("conv", "probes"), ("conv", "forward"), ("norm", "forward"), ("adam", "update"), ("copy", "update")
    ]  # fmt: skip

    def replay(launch, begin, *nodes):
        return [
            call(begin, launch, name="cudaGraphLaunch"),
            kernel("conv", begin + 30, begin + 35, launch, 8, nodes[0]),
            kernel("conv", begin + 10, begin + 20, launch, 7, nodes[1]),
            kernel("norm", begin + 20, begin + 25, launch, 7, nodes[2]),
            kernel("adam", begin + 40, begin + 45, launch, 7, nodes[3]),
        ]

    numbered = replay(1, 1000, 1, 2, 3, 4)
    found, how = attribute([of_loop(STEPS, 990, 2000), *numbered], learned)
    assert [part for _, part in found] == ["probes", "forward", "forward", "update"] and how == {
        "name": 2, "order": 2, "not at all": 0
    }  # fmt: skip
    # Without node numbers, they are ordered by time.
    found, _ = attribute([of_loop(STEPS, 990, 2000), *replay(1, 1000, 0, 0, 0, 0)], learned)
    assert {(event.begin, part) for event, part in found if event.name == "conv"} == {
        (1010, "probes"), (1030, "forward"),
    }  # fmt: skip
    more = [kernel("conv", 1050, 1060, 1, 7, 9), kernel("new", 1060, 1070, 1, 7, 10), kernel("adam", 1080, 1090, 1)]
    found, how = attribute([of_loop(STEPS, 990, 2000), *numbered, *more], learned)
    assert how == {"name": 3, "order": 0, "not at all": 4}
    assert {part for event, part in found if event.name in ("conv", "new")} == {OTHERS}
    two = [of_loop(STEPS, 990, 2000), of_loop("replay", 990, 1005), *numbered, *replay(2, 1500, 11, 12, 13, 14)]
    analysis = analyze(two, 2, learned)
    assert analysis["ranges"]["probes"]["device_ms"] == 0.005 and analysis["ranges"]["forward"]["device_ms"] == 0.015
    assert analysis["attribution"] == {"name": 4, "order": 4, "not at all": 0}


def test_without_kernels_a_replay_has_the_captured_operators():
    once = [of_loop(STEPS, 0, 9), of_loop("forward", 0, 9), Event("aten::mm", OPERATOR, 1, 2, LOOP)]
    found = analyze([of_loop(STEPS, 0, 10), of_loop("replay", 0, 10)], 5, learn(once))
    assert found["ranges"]["forward"]["launches"] == 1


def test_ranges_are_cheap_without_a_listener():
    begin = time.perf_counter()
    for _ in range(1000):
        ranges.enter("forward")
        ranges.leave()
    assert time.perf_counter() - begin < 20e-3, "20 us per pair, a hundred times the usual time"
    heard = []
    with ranges.listening(heard.append):
        ranges.enter("views")
        ranges.leave()
    ranges.enter("forward")
    assert heard == ["views", ""]


def test_each_thread_has_one_range_at_a_time_and_finish_waits_for_the_last():
    seen, lock = [], threading.Lock()

    class Seen:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            with lock:
                seen.append(("begin", self.name))

        def __exit__(self, *error):
            with lock:
                seen.append(("end", self.name))

    opened = Ranges(Seen)
    for name in ("forward", "losses", "", ""):
        opened(name)
    assert seen == [("begin", "forward"), ("end", "forward"), ("begin", "losses"), ("end", "losses")]
    begun, go_on = threading.Event(), threading.Event()

    def plan():
        opened("plan")
        begun.set()
        go_on.wait(10)
        opened("")

    thread = threading.Thread(target=plan)
    thread.start()
    begun.wait(10)
    assert seen[-1] == ("begin", "plan")
    threading.Timer(0.05, go_on.set).start()
    opened.finish()
    assert seen[-1] == ("end", "plan") and opened.marks == 6
    thread.join()


def test_the_tables_of_a_gpu_show_kernels_gaps_counts_and_attribution():
    row = analyze(BY_HAND, steps=2)
    row |= dict(
        preset="cifar10-250", method="remixmatch", k=8, batch=64, mode="graph", precision="bfloat16", views="fused",
        ranks=1, device="a GPU", steps=2, unprofiled_step_ms=0.9, marks=7.0, mark_ns=20.0, marks_share=1e-5,
        kernels_reported=True, on_gpu=True, attribution={"name": 300, "order": 170, "not at all": 3},
    )  # fmt: skip
    row["ranges"]["forward"] |= {"bytes": 5e9, "bound_ms": 0.125}
    lines = profile.text(row).splitlines()

    def cells(name):
        return next(line for line in lines if line.startswith(f"{name} ")).removeprefix(name).split()

    heads = ["ms", "share,", "%", "threads,", "ms", "launches", "device,", "ms", "GB", "bound,", "ms"]
    assert cells("range") == heads
    assert cells("forward") == ["0.225", "22.5", "0.000", "1.0", "0.145", "5.000", "0.125"]
    assert cells("backward") == ["0.400", "40.0", "0.000", "1.0", "0.450"]
    printed = "\n".join(lines)
    for words in (
        "1.00 ms per step over 2 steps with the profiler, 0.90 ms without",
        "attributed to ranges: 300 by name, 170 by order among kernels of one name, 3 not at all",
        "the device is idle for 0.405 ms per step (40.5 %), while the host is in",
        "backward         0.150   0.5        0.300",
        "plan: 0.045 ms of work per step, 0.000 ms of it hidden; 0.050 ms of waiting",
        "kernel                      ms  share, %  calls",
        "reductions (batch norm)",
    ):
        assert words in printed, words


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Profile digits-40 on the CPU at the preset's size, because shares are tested; return its folder and output."""
    out = tmp_path_factory.mktemp("profile") / "one"
    command = [
        sys.executable,
        "-m",
        "engine.studies.profile",
        "digits-40",
        "--device",
        "cpu",
        "--steps",
        "16",
        "--out",
        out,
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done


def _environment():
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@CPU
def test_named_ranges_cover_nearly_all_of_a_step(profiled):
    out, done = profiled
    row = json.loads((out / "profile.json").read_text())
    assert row["named_share"] >= 0.95
    named = {name: part["share"] for name, part in row["ranges"].items()}
    assert sum(named.values()) == pytest.approx(1) and named[OTHERS] == pytest.approx(1 - row["named_share"])
    assert sum(part["ms"] for part in row["ranges"].values()) == pytest.approx(row["step_ms"])
    assert (
        set(ranges.PARTS) <= named.keys() and {"plan", "wait for plan", "views", "copy plan", "drain"} <= named.keys()
    )
    assert row["ranges"]["plan"]["threads_ms"] > 0 and row["hidden"]["views"]["worked_ms"] > 0
    assert row["marks"] == pytest.approx(18, abs=2) and row["marks_share"] < 1e-3
    assert row["command"].startswith("remixmatch profile digits-40") and row["steps"] == 16
    assert done.stderr == ""


@CPU
def test_table_and_json_agree_with_the_trace(profiled):
    out, done = profiled
    row = json.loads((out / "profile.json").read_text())
    with gzip.open(out / "profile" / "rank0.trace.json.gz") as file:
        trace = json.load(file)
    events = read(trace)
    assert {*ranges.PARTS, "views", "plan", "copy plan"} <= {event.name for event in events if event.kind == RANGE}
    assert len({event.thread for event in events if event.name == "plan"}) == 2, "the loop's and the planner's thread"
    found = analyze(events, row["steps"])
    for what in ("step_ms", "named_share", "ranges", "operators"):
        assert row[what] == found[what]
    assert len(row["operators"]) == 10
    lines = done.stdout.splitlines()
    for name, part in row["ranges"].items():
        cells = next(line for line in lines if line.startswith(f"{name} ")).removeprefix(name).split()
        assert cells == [
            f"{part['ms']:.3f}", f"{100 * part['share']:.1f}", f"{part['threads_ms']:.3f}", f"{part['launches']:.1f}"
        ]  # fmt: skip
    assert sorted(path.name for path in out.rglob("*")) == ["profile", "profile.json", "rank0.trace.json.gz"]


@CPU
def test_a_profile_is_not_overwritten(profiled):
    with pytest.raises(UserError, match="already contains a profile"):
        profile.main([*TINY, "--out", str(profiled[0])])


@CPU
@pytest.mark.parametrize("broken", [KeyboardInterrupt, OSError(28, "No space left on device", "there")])
@pytest.mark.parametrize(
    "where",
    ["engine.studies.profile._advance", "engine.studies.profile.gzip.open", "engine.studies.profile.write_text"],
)
def test_an_interrupted_profile_leaves_no_file_that_looks_complete(where, broken, tmp_path, monkeypatch):
    def fail(*arguments, **others):
        raise broken

    monkeypatch.setattr(where, fail)
    expected, words = (
        (Stopped, "no profile was written") if broken is KeyboardInterrupt else (UserError, "cannot write")
    )
    with pytest.raises(expected, match=words):
        profile.main([*TINY, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert ranges._listener is None
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name == "profile.json" or path.suffix == ".partial"]
    for path in left:  # The trace is complete before the table fails.
        json.loads(gzip.decompress(path.read_bytes()))


@CPU
def test_an_interrupt_prints_one_line(tmp_path):
    command = [sys.executable, "-m", "engine.studies.profile", "digits-40", "--device", "cpu", "--warm-up", "100000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, env=_environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # The test runner may ignore it.
    )  # fmt: skip
    try:
        while not (tmp_path / "out" / "profile").exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and errors == "remixmatch: interrupted; no profile was written\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "profile needs a preset"),
        (["digits-4"], "unknown preset 'digits-4'"),
        (["digits-40", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["digits-40", "--steps", "5000"], "--steps must be at most 1000 for profile, got 5000"),
        (["digits-40", "--warm-up", "0"], "--warm-up must be at least 1"),
        (["digits-40", "--resume"], "--resume is not supported by profile"),
        (["digits-40", "--max-restarts", "1"], "--max-restarts is not supported by profile"),
        (["digits-40", "--check-ranks", "1"], "--check-ranks is not supported by profile"),
        (["digits-40", "--k", "0"], "--k must be at least 1"),
        (["digits-40", "--gpus", "0"], "--gpus must be at least 1"),
        (["digits-40", "--gpus", "3", "--device", "cpu"], "--batch 16 cannot be shared by 3 ranks"),
        (["digits-40", "--device", "cpu", "--nvtx"], "--nvtx requires a GPU"),
        (["digits-40", "--device", "cpu", "--mode", "graph"], "--mode graph captures a CUDA graph and requires a GPU"),
        (["digits-40", "--device", "cpu", "--out", __file__], "is a file; --out expects a folder"),
        (["digits-40", "--no-such-flag"], "no-such-flag"),
    ],
)
def test_invalid_input(arguments, words, capsys):
    with pytest.raises(UserError, match=words):
        profile.main(arguments)


def test_invalid_input_gives_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run_with_exit_codes(profile.main, ["digits-40", "--steps", "0"])
    assert ended.value.code == 2 and capsys.readouterr().err == "remixmatch: --steps must be at least 1, got 0\n"


def test_flags_of_train_apply_and_the_folder_names_the_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["digits-40", "--method", "fixmatch", "--k", "3"]
    options = parse_profile(argv)
    assert options.config.hard_labels and options.config.k == 3 and options.config.threshold == 0.95
    assert profile._folder(options) == Path("runs/profile-digits-40-fixmatch")
    Path("runs/profile-digits-40-fixmatch").mkdir(parents=True)
    assert profile._folder(options) == Path("runs/profile-digits-40-fixmatch-2")


def test_the_printed_nsys_command_runs_this_command(tmp_path):
    argv = [*TINY, "--gpus", "2", "--method", "fixmatch"]
    words = shlex.split(profile.nsys_command(argv, tmp_path / "with space"))
    place = words.index("remixmatch")
    assert words[:2] == ["nsys", "profile"] and f"--output={tmp_path / 'with space'}/nsys" in words[:place]
    assert words[place + 1] == "profile"
    options = parse_profile(words[place + 2 :])
    assert options.others["profiling"].nvtx and options.ranks.gpus == 1 and options.config.method == "fixmatch"


def test_counts_come_from_the_newest_record_of_the_same_step(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "ours")
    monkeypatch.setattr(records, "OUT", tmp_path / "users")

    def row(number, **changes):
        same = {"preset": "cifar10-250", "k": 8, "batch": 64, "precision": "bf16", "parts": {"forward": number}}
        return same | changes

    for number in (1, 2):
        records.append(tmp_path / "ours" / "count.jsonl", row(number))
    others = [dict(k=4), dict(precision="fp16"), dict(method="fixmatch"), dict(ablate="no-rotation"), dict(batch=32)]
    for number, other in enumerate(others, 3):
        records.append(tmp_path / "ours" / "count.jsonl", row(number, **other))
    graph = Execution(torch.device("cpu"), torch.bfloat16, "graph", "fused")

    def found(*flags, execution=graph, images=(32, 10)):
        options = parse_profile(["cifar10-250", *flags])
        return profile._counted(options.config, execution, images)

    assert found() == {"forward": 2} and found("--seed", "3", "--steps", "7") == {"forward": 2}
    assert found("--k", "4") == {"forward": 3} and found("--batch", "32") == {"forward": 7}
    assert found("--method", "fixmatch", "--k", "8") == {"forward": 5}
    assert found("--ablate", "no-rotation") == {"forward": 6}
    for flags in (("--width", "64"), ("--micro-batches", "2"), ("--k", "5"), ("--augment", "randaugment")):
        assert found(*flags) == {}
    assert found(images=(96, 10)) == found(images=(32, 100)) == {}
    assert found(execution=Execution(torch.device("cpu"), torch.bfloat16, "eager", "fused")) == {}
    assert found(execution=Execution(torch.device("cpu"), torch.float32, "graph", "fused")) == {}
    for changes in ({}, {"preset": "of another version"}):
        records.append(tmp_path / "users" / "count.jsonl", row(8, **changes))
    assert found() == {"forward": 8}


def test_counted_ranges_have_bounds(monkeypatch):
    monkeypatch.setattr(profile, "ceilings", lambda device: Ceilings(1e10, 1e12))
    ranges = {"forward": {}, "update": {}, "plan": {}}
    kinds = {"triton": 1, "library": 2, "operator": 3}
    counts = {
        "forward": {**kinds, "bytes": 5e9, "least_bytes": 2e9, "flops": 1e11},
        "update": {**kinds, "bytes": 1e9, "least_bytes": 1e9, "flops": 5e11},
    }
    profile._add_counts(ranges, counts, torch.device("cpu"))
    assert ranges["plan"] == {} and ranges["forward"]["bytes"] == 5e9 and ranges["forward"]["counted_launches"] == 6
    assert ranges["forward"]["bound_ms"] == pytest.approx(200) and ranges["update"]["bound_ms"] == pytest.approx(500)


@CPU
def test_each_rank_writes_its_trace_and_rank_0_the_table(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "engine.studies.profile",
        *TINY,
        "--device",
        "cpu",
        "--gpus",
        "2",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads((out / "profile.json").read_text())
    assert row["ranks"] == len(row["ranks_step_ms"]) == 2 and row["hidden"]["exchange"]["worked_ms"] > 0
    assert sorted(path.name for path in (out / "profile").iterdir()) == [
        "rank0.trace.json.gz", "rank1.trace.json.gz"
    ]  # fmt: skip
    assert done.stdout.count("operator (self time)") == 1 and "2 ranks" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not EMULATED, reason="needs the emulated device: `make test-emulated`")
def test_a_captured_step_on_the_emulated_device(tmp_path, capsys):
    out = tmp_path / "out"
    profile.main([*TINY, "--out", str(out)])
    row = json.loads((out / "profile.json").read_text())
    printed = capsys.readouterr().out
    assert row["mode"] == "graph" and not row["kernels_reported"]
    assert "this device reports no kernels, so there are no kernel times or gaps; launches are captured" in printed
    launches = {name: part["launches"] for name, part in row["ranges"].items()}
    assert all(launches[part] > 0 for part in ranges.PARTS) and row["ranges"]["replay"]["ms"] > 0
    assert row["ranges"]["forward"]["ms"] == 0, "the host does not run it"
    assert (out / "profile" / "rank0.memory.pickle").stat().st_size > 0
    (command,) = (line for line in printed.splitlines() if "nsys profile" in line)
    words = shlex.split(command)
    profile.main(words[words.index("remixmatch") + 2 :])
    assert "4 steps with NVTX ranges" in capsys.readouterr().out


@pytest.mark.compiler
@CPU
def test_the_emulated_device_does_not_support_profiling():
    script = "import torch; print(torch.profiler.supported_activities())"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "CUDA" not in done.stdout
