"""The pages of docs/measurements/ and docs/benchmarks.md agree with the records in bench/results/."""

import re
from functools import cache
from statistics import mean, median, stdev

import pytest
from scipy.stats import t as student

from bench.registry import find
from engine.measuring import records
from kernels import convolution
from tests.pages import TEXTS, agrees

H100 = "NVIDIA H100 80GB HBM3"
MACHINES = {"Intel Xeon, 2 cores": "Intel", "AMD EPYC, 2 cores": "EPYC", "NVIDIA H100": H100}
FILES = {
    path.relative_to(records.RESULTS).with_suffix("").as_posix(): path for path in records.RESULTS.rglob("*.jsonl")
}


@cache
def rows(name):
    return records.read(FILES[name])


def newest(name, device="", **case):
    """Return the last record of a case on a device."""
    return [row for row in rows(name) if device in row["device"] and case.items() <= row.items()][-1]


def page(name):
    return TEXTS[f"docs/measurements/{name}.md"]


def table(text, head):
    """Return the rows below the table head that contains these words."""
    return text.partition(head)[2].partition("\n\n")[0]


def cells(text, start):
    """Return the cells of the table row that starts with these."""
    (line,) = re.findall(rf"^\| {re.escape(start)} \|(.*)\|$", text, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def numbers(cell):
    return re.findall(r"(?<![\w.])[+-]?\d+(?:\.\d+)?", re.sub(r"(?<=\d) (?=\d{3}\b)", "", cell))


def agree(shown, wanted):
    """Check that numbers are what was measured, each to its own number of decimals."""
    assert len(shown) == len(wanted), (shown, wanted)
    for text, value in zip(shown, wanted, strict=True):
        assert agrees(text, value), (shown, wanted)


def test_the_overview_says_which_machine_made_which_records():
    found = table(page("index"), f"| records | {' | '.join(MACHINES)} |")
    assert set(re.findall(r"^\| `([\w/]+)` \|", found, re.MULTILINE)) == set(FILES)
    for name in FILES:
        measured = ["yes" if any(word in row["device"] for row in rows(name)) else "" for word in MACHINES.values()]
        assert cells(found, f"`{name}`") == measured, name


def test_what_is_not_measured_on_a_gpu_has_no_records():
    gpu = [row for name in FILES for row in rows(name) if not row["device"].startswith("CPU")]
    assert {row["device"] for row in gpu} == {H100}
    (said,) = re.findall(r"^\*\*Not measured on a GPU:\*\* (.+?)\n\n", page("h100"), re.MULTILINE | re.DOTALL)
    assert all(
        word in said for word in ("baseline", "convolutions", "uncaptured", "--deterministic", "pipelines", "apex")
    )
    assert not {"baseline", "convolutions", "pipelines", "data", "scaling"} & {row["bench"] for row in gpu}
    steps = [row for row in gpu if row["bench"] == "throughput"]
    assert {row["mode"] for row in steps} == {"graph", "eager"} and {row["optimizer"] for row in steps} == {"torch"}
    assert not any(row.get("deterministic") for row in steps)
    assert not any("dali" in (row.get("views"), row["versions"]["nvidia-dali-cuda130"]) for row in gpu)
    assert all(row.get("ranks", 1) == 1 for row in gpu)
    assert {"baseline", "convolutions", "pipelines", "data", "scaling"} <= find().keys()


def step(k, views, device=H100, **case):
    return newest("throughput", device, k=k, batch=64, mode="graph", views=views, **case)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_steps_of_the_h100(k):
    real, ready = step(k, "fused"), step(k, "synthetic")
    found = [numbers(cell)[0] for cell in cells(table(page("h100"), "on ready-made views, ms"), str(k))]
    wanted = [real["step_ms"], ready["step_ms"], real["images_per_second"], real["floor_ms"]]
    agree(found, [*wanted, real["floor_ratio"], real["peak_memory_mib"]])
    line = 4.4 + 0.54 * k
    assert abs(line / ready["step_ms"] - 1) < 0.014
    assert 1.003 < real["step_ms"] / ready["step_ms"] < 1.0135


def test_variants_of_the_h100():
    names = {"cuDNN by heuristic": "cuDNN by rule", "eight input channels": "8 input channels"}
    names["combined kernels with their own block sizes"] = "combined kernels, blocks of their own"
    found = re.findall(
        r"^\| (\w[^|]+) \| ([\d.]+) \|$", table(page("h100"), "| variant | time, relative |"), re.MULTILINE
    )
    assert len(found) == 7
    for name, ratio in found:
        agree([ratio], [newest("variants", H100, variant=names.get(name, name))["ratio"]])


def test_issue_slots():
    assemble, augment = (newest("runs/issue", kernel=kernel) for kernel in ("assemble_batch", "augment_views"))
    text = " ".join(page("h100").split())
    said = re.search(r"([\d.]+) us for `assemble_batch`, whose bytes take ([\d.]+), and at most (\d+) us", text)
    agree(said.groups(), [assemble["issue_us"], assemble["bytes_us"], augment["issue_us"]])


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_counts_and_their_predictions(k):
    case = {"ablate": f"k={k}"} if k not in (1, 8) else {}
    count = [
        row for row in rows("count") if row["preset"] == "cifar10-250" and not {"method", "convolutions"} & row.keys()
    ]
    count = [row for row in count if row["k"] == k and row.get("ablate") == case.get("ablate")][-1]
    (line,) = re.findall(rf"^\| ReMixMatch \| {k} \| 1 \|(.*)\|$", page("compiled-step"), re.MULTILINE)
    predicted = count["predicted_ms_h100"], count["predicted_ms_h200"]
    agree(numbers(line), [count["launches"], count["bytes"] / 1e9, *predicted])
    assert abs(predicted[0] / step(k, "synthetic")["step_ms"] - 1) < 0.048


def paper_count(k, **case):
    """Return the newest count of the paper's step, with cuDNN's convolutions unless the case says otherwise."""
    named = {"ablate", "method", "convolutions"} - case.keys()
    found = [row for row in rows("count") if row["preset"] == "cifar10-250" and not named & row.keys()]
    return [row for row in found if row["k"] == k and case.items() <= row.items()][-1]


def test_modeled_parts_of_the_step():
    count = paper_count(8)
    ranges = newest("runs/profile", H100)["ranges"]
    kinds = {row["kind"]: row["ms"] for row in rows("replay") if row["device"] == H100}
    modeled = count["predicted_parts_ms_h100"] | {"step": count["predicted_ms_h100"]}
    measured = {
        "reductions": kinds["reductions (batch norm)"],
        "pointwise kernels": kinds["pointwise and combined"],
        "step": newest("variants", H100, variant="baseline")["step_ms"],
        **{part: ranges[part]["device_ms"] for part in ("guess", "probes", "forward", "backward")},
    }
    names = {"pseudo-labels, 64 samples": "guess", "probes, 64 samples": "probes"}
    names |= {"forward pass": "forward", "backward pass": "backward"}
    lines = re.findall(r"^\| (\w[^|]+) \|(.*)\|$", table(page("compiled-step"), "| modeled / measured |"), re.MULTILINE)
    assert len(lines) == 10
    for name, line in lines:
        part = names.get(name, name)
        found = numbers(line)
        agree(found[:1], [modeled[part]])
        ratio = modeled[part] / float(found[1])
        if part in measured:
            agree(found[1:2], [measured[part]])
            ratio = modeled[part] / measured[part]
        agree(found[2:], [ratio])
        assert abs(ratio - 1) < (0.14 if part == "forward" else 0.101), name
    gradients = ("forward convolutions", "weight gradients", "input gradients")
    assert sum(modeled[name] for name in gradients) == pytest.approx(kinds["convolutions, products"], rel=0.02)


def test_the_fused_step_is_predicted():
    text = page("compiled-step").partition("**The fused step, predicted.**")[2].partition("**Issue slots**")[0]
    for k in (8, 1):
        fused, today = paper_count(k, convolutions="triton"), paper_count(k)
        wanted = [count for row in (fused, today) for count in (row["launches"], row["bytes"] / 1e9)]
        agree(cells(text, f"fused step, K = {k}"), [wanted[place] for place in (0, 2, 1, 3)])
    fused, today = paper_count(8, convolutions="triton"), paper_count(8)
    parts, modeled = (row["predicted_parts_ms_h100"] | {"step": row["predicted_ms_h100"]} for row in (fused, today))
    names = {"pseudo-labels, 64 samples": "guess", "probes, 64 samples": "probes"}
    names |= {"forward pass": "forward", "backward pass": "backward"}
    lines = re.findall(r"^\| (\w[^|]+) \|(.*)\|$", table(text, "| fused, predicted | today, modeled |"), re.MULTILINE)
    assert len(lines) == 10
    for name, line in lines:
        agree(numbers(line), [each[names.get(name, name)] for each in (parts, modeled)])
    shares, said = fused["predicted_ms_h100_by_share"], " ".join(text.split())
    (found,) = re.findall(
        r"with 0\.3 .*? takes ([\d.]+) ms, with 0\.8 it takes ([\d.]+) ms.*? it is ([\d.]+) ms inst", said
    )
    agree(found, [shares["0.3"], shares["0.8"], fused["predicted_ms_h100_with_issue"]])
    found = convolution.tilings(convolution.Shape(768, 32, 32, 32, 32, 3, 1), "weight_grad", 90)
    sums = {tiling[4]: tiling[0] * 4 * 32 * 32 * 9 / 1e6 for tiling in found}  # By BLOCK_C.
    agree(re.search(r"([\d.]+) MB instead of ([\d.]+) for 32 channels", said).groups(), [sums[16], sums[32]])
    backward = fused["parts"]["backward"]
    agree(re.findall(r"pass moves ([\d.]+) GB", said), [(backward["bytes"] - backward["least_bytes"]) / 1e9])
    # The log has them as first written.
    log = " ".join(page("log").partition("## 2026-11-30")[2].partition("\n\n- ")[0].split())
    names = {"pseudo-labels": "guess", "forward pass": "forward", "backward pass": "backward"}
    found = re.findall(r"([a-z-]+(?: [a-z]+)?) (\d\.\d\d)(?=[,;.])", log.partition("On an H200")[0])
    assert len(found) == 10
    agree([value for _, value in found], [parts[names.get(name, name)] for name, _ in found])
    one = paper_count(1, convolutions="triton")
    found = re.search(
        r"On an H200 ([\d.]+)\. At K = 1, ([\d.]+) and ([\d.]+)\. .* step is ([\d.]+) and ([\d.]+) on", log
    )
    wanted = [fused["predicted_ms_h200"], one["predicted_ms_h100"], one["predicted_ms_h200"]]
    agree(found.groups(), [*wanted, shares["0.3"], shares["0.8"]])


def test_issue_slots_of_the_convolutions():
    text = page("compiled-step")
    lines = re.findall(r"^\| (\w[^|]+), (\d+->\d+ [^|]+) \|(.*)\|$", text, re.MULTILINE)
    ratios, excess = {}, {}
    for which, layer, line in lines:
        kernel = f"convolution_{which.replace(' gradient', '_grad')}"
        row = [row for row in rows("runs/issue") if row["kernel"] == kernel]
        row = [one for one in row if one["shape"].removesuffix(", residual") == layer][-1]
        ratios[which, layer] = row["issue_us"] / row["bytes_us"]
        names = ("registers", "warps_of_block", "spilled_bytes", "shared_bytes", "blocks", "waves")
        wanted = [*(row[name] for name in names), row["issue_us"], row["matrix_us"], row["bytes_us"]]
        agree(numbers(line), [*wanted, ratios[which, layer]])
        samples, inputs, height, width, outputs, taps, stride = row["sizes"]
        flops = 2 * samples * height * width // stride**2 * inputs * outputs * taps**2
        excess[which, layer] = row["matrix_seconds"] * 798e12 / flops
        assert row["spilled_bytes"] == 0
        if which == "weight gradient":
            assert row["programs"] == 128 and row["waves"] <= 0.485
    assert len(lines) == 21
    narrow = [ratio for (_, layer), ratio in ratios.items() if layer.startswith(("16->32", "32->32"))]
    agree(re.findall(r"ratio is at most ([\d.]+)", text), [max(narrow)])
    agree(re.findall(r"with stride 2 \(([\d.]+)\)", text), [ratios["input gradient", "32->64 32x32, 3x3/2"]])
    agree(re.findall(r"of up to ([\d.]+)\.", text), [max(ratios.values())])
    for which in ("forward", "input gradient"):
        agree(re.findall(r"compute ([\d.]+) times\s+the products", text), [excess[which, "128->128 8x8, 3x3/1"]])
        assert excess[which, "64->64 16x16, 3x3/1"] == pytest.approx(17 / 16)


@pytest.mark.parametrize("name", ["FixMatch", "UDA", "MixMatch", "pseudo-label"])
def test_counts_of_other_methods(name):
    count = newest("count", preset="cifar10-250", method=name.lower())
    wanted = [count["launches"], count["bytes"] / 1e9, count["predicted_ms_h100"], count["predicted_ms_h200"]]
    agree([numbers(cell)[0] for cell in cells(page("compiled-step"), name)[2:]], wanted)


def test_steps_of_a_cpu():
    run = [row for row in rows("throughput") if "eager compile" in row["command"]]
    times = {(row["k"], row["mode"]): row for row in run}
    ratios = []
    for k in (1, 2, 4, 8, 16):
        eager, compiled = times[k, "eager"], times[k, "compile"]
        ratios.append(eager["step_ms"] / compiled["step_ms"])
        wanted = [eager["step_ms"], compiled["step_ms"], ratios[-1], eager["images_per_second"]]
        agree([numbers(cell)[0] for cell in cells(table(page("cpu"), "eager / compiled"), str(k))], wanted)
    for text in (page("cpu"), TEXTS["docs/benchmarks.md"]):
        agree(
            re.search(r"(1\.\d\d) to (1\.\d\d) times as (?:fast|many steps/s)", " ".join(text.split())).groups(),
            [min(ratios), max(ratios)],
        )


@pytest.mark.parametrize(
    ("start", "trainer", "beside", "k"),
    [
        ("plain, K = 1", "plain", None, 1),
        ("engine, K = 1", "engine", "plain", 1),
        ("plain, K = 8", "plain", None, 8),
        ("engine, K = 8", "engine", "plain", 8),
        ("usb, K = 2", "usb", None, 2),
        ("engine against usb, K = 2", "engine", "usb", 2),
        ("engine against usb, K = 8", "engine", "usb", 8),
        ("torchssl, K = 2", "torchssl", None, 2),
        ("engine against torchssl, K = 2", "engine", "torchssl", 2),
        ("engine against torchssl, K = 8", "engine", "torchssl", 8),
    ],
)
def test_baselines(start, trainer, beside, k):
    case = {"trainer": trainer, "k": k} | ({"beside": beside} if beside else {})
    real, ready = (newest("baseline", "EPYC", **case, data=data) for data in ("real", "synthetic"))
    wanted = [real["networks_ms"], real["rest_ms"], real["views_ms"], real["step_ms"]]
    if beside:
        for row in (ready, real):
            wanted += [row["engine_ratio"], row["engine_ratio_low"], row["engine_ratio_high"]]
    agree(numbers(" ".join(cells(page("cpu"), start))), wanted)


@pytest.mark.parametrize("augment", ["ctaugment", "randaugment"])
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_baselines_with_equal_work(mode, augment):
    case = {"beside": "plain", "mode": mode, "augment": augment, "clock": "cpu"}
    wanted = []
    for k in (1, 8):
        row = newest("baseline", **case, k=k)
        wanted += [row["engine_ratio"], row["engine_ratio_low"], row["engine_ratio_high"]]
    start = f"{'compiled' if mode == 'compile' else mode}, {'with' if augment == 'ctaugment' else 'without'} probes"
    agree(numbers(" ".join(cells(page("cpu"), start))), wanted)


BACKENDS = {
    "PIL, one process": "pil", "DALI, one thread": "dali-cpu-1", "DALI, two threads": "dali-cpu",
    "DALI's own RandAugment": "auto-aug-cpu", "graph of DALI's operators": "dali-graph-cpu",
}  # fmt: skip


@pytest.mark.parametrize("start", BACKENDS)
def test_times_of_views(start):
    for line in page("cpu").splitlines():
        if line.startswith(f"| {start}"):
            side, wall, cpu, ratio = numbers(line.partition(start)[2].partition("|")[2])
            row = newest("pipelines", "EPYC", backend=BACKENDS[start], side=int(side))
            agree([wall, cpu, ratio], [1e6 / row["views_per_second"], row["cpu_us"], row["cpu_ratio_to_pil"]])
    own, theirs = (
        [newest("pipelines", "EPYC", backend=name, side=side)["cpu_us"] for side in (32, 96)]
        for name in ("dali-cpu-1", "auto-aug-cpu")
    )
    assert [round(b / a, 1) for a, b in zip(own, theirs, strict=True)] == [3.2, 2.5]


def test_both_dali_pipelines_train_to_the_same_error():
    text, errors = TEXTS["docs/views.md"], {}
    for views in ("dali", "dali-graph"):
        errors[views] = [100 - row["median_last_20"] for row in rows("runs/graph") if row["views"] == views]
        agree(numbers(cells(text, f"`{views}`")[0]), [mean(errors[views]), stdev(errors[views])])
    differences = [after - before for before, after in zip(*errors.values(), strict=True)]
    assert abs(mean(differences)) < 2 * stdev(differences) / len(differences) ** 0.5, (
        "significant, unlike the page says"
    )


@pytest.mark.parametrize("scaling", ["strong", "weak"])
def test_scaling_before_and_after(scaling):
    times = {
        kind: [row["step_ms"] for row in rows("runs/partners") if (row["exchange"], row["scaling"]) == (kind, scaling)]
        for kind in ("gathered", "partners")
    }
    ratios = [after / before for before, after in zip(times["gathered"], times["partners"], strict=True)]
    said = re.search(rf"{scaling} scaling[^.]*?(\d\.\d\d) times[^(]*\((\d\.\d\d)\s+to\s+(\d\.\d\d)", page("ranks"))
    agree(said.groups(), [median(ratios), min(ratios), max(ratios)])


@pytest.mark.parametrize(("word", "commit"), [("busy", "9b438d02abaf"), ("quieter", "5470e6aafef1")])
@pytest.mark.parametrize(("k", "batch"), [(1, 64), (8, 64), (16, 64), (8, 448)])
def test_the_hosts_part_of_a_step(word, commit, k, batch):
    row = newest("host", commit=commit, k=k, batch=batch)
    parts = ("plan", "rows", "views", "planner", "policy", "to_device", "main", "total")
    agree(cells(page("cpu"), f"K = {k}, B = {batch}, {word}"), [row[f"{part}_us"] for part in parts])


def test_the_page_of_benchmarks_has_the_numbers_of_the_records():
    text = TEXTS["docs/benchmarks.md"]
    data = {row["part"]: row for row in rows("data")}
    named = newest("runs/profile", "CPU")
    for start, wanted in {
        "command to first trained step": [newest("start")["start_seconds"]],
        "SIGKILL of a rank to the group's next step": [newest("restart")["restart_seconds"]],
        "opening 50 000 images of 32x32": [1e3 * data["opening"]["open_seconds"]],
        "`data prepare` of JPEGs relative to DALI's decoding alone": [data["preparing"]["prepare_ratio"]],
        "training on 105 000 images of 96x96 relative to 5 000": [
            *(data["training"][name] for name in ("step_ratio", "least_step_ratio", "most_step_ratio")),
        ],
        "time of a digits-40 step in named ranges": [100 * named["named_share"], named["marks"], named["mark_ns"]],
    }.items():
        agree(numbers(cells(text, start)[0])[: len(wanted)], wanted)
    for shown in (text, page("cpu")):
        for k in (1, 8):
            ends = sorted(row["total_us"] / 1e3 for row in rows("host") if (row["k"], row["batch"]) == (k, 64))
            said = rf"{ends[0]:.1f} to {ends[-1]:.1f} ms (per step at K = {k}|at K = {k}|\(K = {k}\))"
            assert re.search(said, " ".join(shown.split()))


def test_twenty_seeds_of_digits():
    found = {
        row["seed"]: row["test_accuracy"]
        for row in rows("digits")
        if row["method"] == "digits-40" and "EPYC" in row["device"]
    }
    assert sorted(found) == list(range(20))
    blind = {row["seed"]: row["test_accuracy"] for row in rows("runs/blind") if row["method"] == "digits-40"}
    assert sorted(blind) == [5, 6, 7, 8, 9]
    (twenty,) = re.findall(r"^- digits-40: (.+) % over twenty", page("accuracy"), re.MULTILINE)
    agree(numbers(twenty), [mean(found.values()), stdev(found.values())])
    (five,) = re.findall(r"more digits seeds, run once with nothing changed\s+after, have (.+?) %", page("accuracy"))
    agree(numbers(five), [mean(blind.values()), stdev(blind.values())])


@pytest.mark.parametrize(("preset", "first"), [("digits-40", 0), ("fashion-100-small", 1)])
def test_errors_of_a_joint_guess(preset, first):
    runs = {(row["row"], row["seed"]): row for row in rows("runs/joint") if row["preset"] == preset}
    lines = re.findall(rf"^\| `{preset}` \| (.*?) \| (\d+) \|(.*)\|$", page("accuracy"), re.MULTILINE)
    assert [metric for metric, *_ in lines] == ["last evaluation", "median of the last 20"]
    for (_, count, line), metric in zip(lines, ("test_accuracy", "median_last_20"), strict=True):
        seeds = range(first, first + int(count))
        assert runs.keys() == {(name, seed) for name in ("remixmatch", "joint-guess") for seed in seeds}
        separate, joint = ([100 - runs[name, seed][metric] for seed in seeds] for name in ("remixmatch", "joint-guess"))
        differences = [b - a for a, b in zip(separate, joint, strict=True)]
        half = student.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
        middle = mean(differences)
        wanted = [mean(separate), stdev(separate), mean(joint), stdev(joint), middle, middle - half, middle + half]
        agree(numbers(line), wanted)
    seconds = [
        sum(row["cpu_seconds"] for (name, _), row in runs.items() if name == wanted)
        for wanted in ("remixmatch", "joint-guess")
    ]
    said = re.findall(r"took ([\d.]+) and ([\d.]+) times the CPU time", " ".join(page("accuracy").split()))
    agree([said[0][first]], [seconds[1] / seconds[0]])


def test_counts_of_a_joint_guess():
    text = " ".join(page("compiled-step").partition("**A joint guess**")[2].partition("\n\n")[0].split())
    for k in (8, 1):
        joint, separate = paper_count(k, ablate="joint-guess"), paper_count(k)
        (said,) = re.findall(
            rf"K = {k}: (\d+) launches, ([\d.]+) GB and ([\d.]+) ms \((\d+), ([\d.]+), ([\d.]+)\)", text
        )
        wanted = [(row["launches"], row["bytes"] / 1e9, row["predicted_ms_h100"]) for row in (joint, separate)]
        agree(said, [*wanted[0], *wanted[1]])
        if k == 8:
            (added,) = re.findall(r"([\d.]+) GB of it", text)
            agree([added], [(joint["parts"]["backward"]["bytes"] - separate["parts"]["backward"]["bytes"]) / 1e9])


def test_runs_of_the_h100_at_the_presets_own_size():
    runs = [row for row in rows("ablate") if row["bench"] == "reproduce" and row["device"] == H100]
    assert len(runs) == 26 and {row["steps"] for row in runs} == {8000}
    minutes = sorted(row["train_seconds"] / 60 for row in runs)
    assert f"{minutes[0]:.1f} to {minutes[-1]:.1f} minutes each" in " ".join(page("accuracy").split())
    for seed in (1, 2, 3):
        cpu = [row for row in rows("runs/fashion") if row["method"] == "fashion-100-small"]
        (cpu,) = (row for row in cpu if row["seed"] == seed and row.get("width") == 32)
        gpu = next(row for row in runs if row["row"] == "remixmatch" and row["seed"] == seed)
        wanted = [row[name] for name in ("test_accuracy", "median_last_20") for row in (cpu, gpu)]
        agree(cells(table(page("h100"), "median of last 20, H100"), str(seed)), wanted)
