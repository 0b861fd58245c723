"""README, docs/results.md and docs/reproduce.md agree with the records in bench/results/.

The statistics here are written independently of `engine.studies`.
"""

import re
from functools import cache
from math import sqrt
from statistics import mean, median, stdev

import pytest
from scipy.stats import t as student

from engine.config.methods import ABLATIONS, METHODS
from engine.config.presets import PRESETS
from engine.measuring import records
from engine.studies.paper_tables import K_OF_METHODS, MARGINALS, TABLES
from tests.pages import TEXTS, agrees

RECORDS = {name: records.read(records.RESULTS / f"{name}.jsonl") for name in ("ablate", "reproduce", "throughput")}
# The kind of number in a column, by words of its head.
KINDS = {
    "error of the last model, %": "last error",
    "difference of last models, pp": "last difference",
    "recall of class": "recall",
    "error, %": "error",
    "worst seed": "worst",
    "minutes": "minutes",
    "difference, pp": "difference",
    "relative step time": "ratio",
    "launches": "counts",
}
INTERVAL = re.compile(r"(\*\*)?[+-]\d+\.\d+ \[([+-]\d+\.\d+), ([+-]\d+\.\d+)\](\*\*)?")


def tables(text):
    """Yield each table of a page as a list of lines of cells, without the line below the head."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *lines = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        yield [head, *lines]


def table(page, first):
    """Return the lines of the table whose first head is given, without the head."""
    (found,) = [lines for head, *lines in tables(TEXTS[page]) if head[0] == first]
    return found


def named(cell):
    """Return the file and name of the method or ablation in the first cell of a line, or None."""
    for code in re.findall(r"`([^`]+)`", cell):
        if code in MARGINALS:
            return "reproduce", code
        if code in ABLATIONS:
            return "ablate", code
    if cell.startswith("full method"):
        return "ablate", "remixmatch"
    method = cell.lower().replace(" ", "-")
    return ("reproduce", method) if method in METHODS else None


def columns(head):
    """Return (preset, steps, kind) for each column; the preset is the last one named so far.

    The number of steps is the preset's unless the head gives another one.
    """
    preset, steps, found = None, 0, []
    for cell in head:
        # The longest match, because some names are prefixes of others.
        if name := max((name for name in PRESETS if name in cell), key=len, default=None):
            given = re.search(r"(\d[\d ]*) steps", cell)
            preset, steps = name, int(given[1].replace(" ", "")) if given else PRESETS[name].steps
        found.append((preset, steps, next((kind for word, kind in KINDS.items() if word in cell), None)))
    return found


def runs(file, preset, steps, row):
    """Return the records of finished runs."""
    case = {"bench": "reproduce", "preset": preset, "steps": steps, "row": row}
    return [each for each in RECORDS[file] if case.items() <= each.items()]


def errors(file, preset, steps, row, accuracy="median_last_20"):
    """Return test errors by seed."""
    return {each["seed"]: 100 - each[accuracy] for each in runs(file, preset, steps, row)}


def numbers(file, preset, steps, row, kind):
    """Return the numbers that a cell has to show."""
    if kind in ("ratio", "counts"):
        names = {"ratio": ("costs", "ratio"), "counts": ("counts", "launches", "gigabytes")}[kind]
        found = [
            each
            for each in RECORDS[file]
            if each.get("kind") == names[0] and each["preset"] == preset and each["variant"] == row
        ]
        return [found[-1][name] for name in names[1:]] if found else []
    if kind == "minutes":  # Minimum and maximum; some early records lack the CPU time.
        taken = [each["cpu_seconds"] / 60 for each in runs(file, preset, steps, row) if each.get("cpu_seconds")]
        ends = min(taken), max(taken)
        return ends if round(ends[0], 1) < round(ends[1], 1) else ends[:1]
    if kind == "recall":  # Of every class, in order.
        classes = zip(*(each["recall"].values() for each in runs(file, preset, steps, row)), strict=True)
        return list(map(mean, classes))
    accuracy = "test_accuracy" if kind.startswith("last") else "median_last_20"
    own, full = (errors(file, preset, steps, each, accuracy) for each in (row, "remixmatch"))
    if kind == "worst":
        return [max(own.values())] if own else []
    if kind.endswith("error"):
        return [mean(own.values()), *([stdev(own.values())] if len(own) > 1 else [])] if own else []
    differences = [own[seed] - full[seed] for seed in own.keys() & full.keys()] if row != "remixmatch" else []
    return interval(differences) if len(differences) > 1 else differences


def interval(differences):
    """Return the mean of paired differences and both ends of its 95 % interval."""
    half = float(student.ppf(0.975, len(differences) - 1)) * stdev(differences) / sqrt(len(differences))
    return [mean(differences), mean(differences) - half, mean(differences) + half]


def checked(page):
    """Yield (first cell of the line, cell, kind, numbers that it has to show)."""
    for head, *lines in tables(TEXTS[page]):
        kinds = columns(head)
        for line in lines:
            if (place := named(line[0])) is None:
                continue
            for cell, (preset, steps, kind) in zip(line[1:], kinds[1:], strict=True):
                if preset and kind:
                    file = "reproduce" if preset in TABLES["imbalance"].presets else place[0]
                    yield line[0], cell, kind, numbers(file, preset, steps, place[1], kind)


@pytest.mark.parametrize(("page", "minimum"), [("README.md", 20), ("docs/results.md", 255)])
def test_tables_agree_with_the_records(page, minimum):
    found = list(checked(page))
    assert len(found) >= minimum
    for name, cell, _, wanted in found:
        shown = re.findall(r"[+-]?\d+(?:\.\d+)?", cell)
        assert len(shown) == len(wanted), (name, cell, wanted)
        for text, value in zip(shown, wanted, strict=True):
            assert agrees(text, value), (name, cell, wanted)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_bold_differences_are_those_whose_interval_excludes_zero(page):
    found = [(name, cell, wanted) for name, cell, kind, wanted in checked(page) if kind.endswith("difference") and cell]
    assert {cell.startswith("**") for _, cell, _ in found} == {True, False}
    for name, cell, (_, low, high) in found:
        assert INTERVAL.fullmatch(cell), cell
        assert cell.startswith("**") == cell.endswith("**") == (low > 0 or high < 0), (name, cell)


def test_signs_compare_with_the_paper():
    seen = set()
    for head, *lines in tables(TEXTS["docs/results.md"]):
        if "sign" not in head:
            continue
        for line in lines:
            cells = dict(zip(head, line, strict=True))
            paper = cells["difference in the paper, on CIFAR-10"]
            wanted = ""
            if paper:
                _, low, high, _ = INTERVAL.fullmatch(cells["difference, pp (95 % CI)"]).groups()
                significant = float(low) > 0 or float(high) < 0
                wanted = "n.s." if not significant else "same" if (float(low) > 0) == (float(paper) > 0) else "opposite"
            assert cells["sign"] == wanted, line
            seen.add(wanted)
    assert seen == {"", "n.s.", "same"}


def test_every_measured_variant_is_in_the_results():
    shown = {
        (preset, place[1])
        for head, *lines in tables(TEXTS["docs/results.md"])
        for preset, *_ in columns(head)
        for place in map(named, (line[0] for line in lines))
        if place
    }
    measured = {
        (each["preset"], each.get("variant") or each["row"])
        for name in ("ablate", "reproduce")
        for each in RECORDS[name]
    }
    # The rows over K have a test of their own.
    assert {(preset, row) for preset, row in measured if row not in K_OF_METHODS} <= shown


def over_k(method, k, steps):
    """Return the errors and the CPU milliseconds per step of the runs with some K, by seed."""
    own = PRESETS["digits-40"].k if method == "remixmatch" else 1  # A run with a method's own K has the method's name.
    names = {f"{method}-k{k}"} | ({method} if k == own else set())
    return {
        each["seed"]: (100 - each["median_last_20"], 1000 * each["cpu_seconds"] / each["steps"])
        for each in RECORDS["reproduce"]
        if each["preset"] == "digits-40" and each["row"] in names and each["steps"] == steps
    }


def k_of(first):
    """Return {(method, K): other cells} of a table over K."""
    found = {}
    for case, *cells in table("docs/results.md", first):
        method, k = re.fullmatch(r"(\w+), K = (\d)", case).groups()
        found[method.lower(), int(k)] = cells
    return found


def check_over_k(cells, steps_of, words):
    """Check the errors in a table over K, the differences from K = 1, and the label splits that the page names.

    Args:
        cells: The error and the difference, by method and K.
        steps_of: Maps a method and K to the number of steps.
        words: What precedes "label splits 0 to N" on the page.

    Returns:
        The seeds of these splits.
    """
    text = " ".join(TEXTS["docs/results.md"].split())
    (last,) = re.findall(rf"{re.escape(words)}, label splits 0 to (\d)", text)
    seeds = range(int(last) + 1)
    assert list(cells) == [(each["method"], each["k"]) for each in K_OF_METHODS.values()]
    found = {case: over_k(*case, steps_of(*case)) for case in cells}
    # Some runs are also those of a table over all seeds. No seed that all cases have is left out.
    assert all(set(runs) in (set(seeds), set(TABLES["k-samples"].seeds)) for runs in found.values())
    assert set.intersection(*map(set, found.values())) == set(seeds)
    for (method, k), (error, difference) in cells.items():
        mine, single = ([found[case][seed][0] for seed in seeds] for case in ((method, k), (method, 1)))
        assert all(map(agrees, error.split(" ± "), (mean(mine), stdev(mine)))), (method, k)
        if k == 1:
            assert not difference
            continue
        wanted = interval([a - b for a, b in zip(mine, single, strict=True)])
        shown = re.findall(r"[+-]\d+\.\d+", difference)
        assert len(shown) == 3 and all(map(agrees, shown, wanted)), (method, k, wanted)
        assert difference.startswith("**") == (wanted[1] > 0 or wanted[2] < 0), (method, k, wanted)
    return seeds


def test_the_table_over_k_at_equal_samples_agrees_with_the_records():
    def trained(method, k):  # Per step and labeled image: the views, and ReMixMatch's u_weak, u_1 and rotation.
        return 4 + k if method == "remixmatch" else 1 + 7 * k

    def steps_of(method, k):
        return round(PRESETS["digits-40"].steps * trained(method, 1) / trained(method, k))

    lines = k_of("`digits-40`, equal samples")
    assert {case: int(steps.replace(" ", "")) for case, (steps, *_) in lines.items()} == {
        case: steps_of(*case) for case in lines
    }
    words = "**Equal samples** (`remixmatch reproduce k-samples`)"
    check_over_k({case: cells for case, (_, *cells) in lines.items()}, steps_of, words)


def test_the_table_over_k_at_equal_steps_agrees_with_the_records():
    lines, whole = k_of("`digits-40`, equal steps"), PRESETS["digits-40"].steps
    check_over_k({case: cells[:2] for case, cells in lines.items()}, lambda *_: 351, "and 351 steps")
    seeds = check_over_k({case: cells[2:4] for case, cells in lines.items()}, lambda *_: whole, "all 2 500 steps")
    for case, (*_, milliseconds) in lines.items():
        runs = over_k(*case, whole)
        assert agrees(milliseconds, median(runs[seed][1] for seed in seeds)), case


def test_accuracies_on_fashion_mnist_agree_with_the_records():
    found = records.read(records.RESULTS / "runs" / "fashion.jsonl")
    lines = {re.sub(r".*`(.*)`.*", r"\1", line[0]): line[1:] for line in table("docs/results.md", "accuracy, %")}
    accuracies = {
        name: [
            each["test_accuracy"]
            for seed in (1, 2, 3)
            for each in found
            if (each["method"], each["seed"], each["steps"]) == (name, seed, PRESETS[name].steps)
        ]
        for name in lines
        if name in PRESETS
    }
    first, second = accuracies.values()
    accuracies["difference"] = [a - b for a, b in zip(first, second, strict=True)]
    assert accuracies.keys() == lines.keys()
    for name, (*by_seed, summary) in lines.items():
        values = accuracies[name]
        shown, wanted = [*by_seed, *summary.split(" ± ")], [*values, mean(values), stdev(values)]
        assert all(map(agrees, shown, wanted)) and len(shown) == len(wanted) == 5, (name, wanted)


# Coverage


@cache
def recorded():
    """Return [preset, method or ablation, steps, device] of every finished training run in bench/results/."""
    found = []
    for path in sorted(records.RESULTS.rglob("*.jsonl")):
        for each in records.read(path):
            preset = each.get("preset", each.get("method"))
            if "test_accuracy" in each and preset in PRESETS:
                row = each.get("row") or PRESETS[preset].method
                found.append((preset, row, each["steps"], each["device"]))
    return found


def on_gpu(device):
    return not device.startswith("CPU")


def test_presets_said_to_be_trained_have_recorded_runs():
    lines = table("docs/results.md", "preset")
    shown = {line[0].strip("`"): (int(line[2]), int(line[3])) for line in lines}
    devices = {name: [device for preset, *_, device in recorded() if preset == name] for name in PRESETS}
    counted = {
        name: (sum(not on_gpu(each) for each in found), sum(map(on_gpu, found))) for name, found in devices.items()
    }
    assert shown == {name: count for name, count in counted.items() if any(count)}
    untrained = TEXTS["docs/results.md"].partition("No other preset has a recorded run:")[2].partition(".")[0]
    assert set(re.findall(r"`(.*?)`", untrained)) == PRESETS.keys() - shown.keys()
    not_recorded = TEXTS["docs/results.md"].partition("Nor have the methods ")[2].partition(".")[0]
    assert set(re.findall(r"`(.*?)`", not_recorded)) == set(METHODS) - {row for _, row, *_ in recorded()}


def test_only_one_kind_of_gpu_has_trained_and_the_pages_say_how_often():
    gpu_runs = [each for each in recorded() if on_gpu(each[3])]
    assert {device for *_, device in gpu_runs} == {"NVIDIA H100 80GB HBM3"}
    assert all(preset.startswith("fashion") for preset, *_ in gpu_runs)
    assert f"except those of {len(gpu_runs)} runs on an H100" in " ".join(TEXTS["docs/results.md"].split())
    assert f"and {len(gpu_runs)} Fashion-MNIST runs" in TEXTS["README.md"]


def test_tables_of_reproduce_that_are_said_to_be_trained_are():
    lines = table("docs/reproduce.md", "table")
    states = {name: state for names, _, state in lines for name in re.findall(r"`(.*?)`", names)}
    assert states.keys() == TABLES.keys()
    complete = {(preset, row) for preset, row, steps, _ in recorded() if steps == PRESETS[preset].steps}
    for name, state in states.items():
        if name in ("k", "k-samples"):  # Their numbers have tests of their own.
            assert state.startswith({"k": "all rows, seeds 0 to 2:", "k-samples": "all rows:"}[name]), name
            continue
        wanted = {(preset, row) for preset in TABLES[name].presets for row in TABLES[name].rows}
        missing = wanted - complete
        if missing == wanted:
            assert state.startswith("nothing"), name
        elif not missing:
            assert state.startswith("all methods:"), name
        else:
            trained, short = re.fullmatch(r"(.*); the others in runs of ([\d ]+) of [\d ]+ steps: .*", state).groups()
            assert set(re.split(", | and ", trained)) == {row for _, row in wanted - missing}, name
            steps = int(short.replace(" ", ""))
            assert missing <= {(preset, row) for preset, row, count, _ in recorded() if count == steps}, name


def test_readme_says_what_has_not_been_trained():
    trained = {PRESETS[preset].dataset for preset, *_ in recorded()}
    names = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "SVHN": "svhn", "STL-10": "stl10"}
    (claim,) = re.findall(
        r"The presets for (.*?) are tested on small archives.*have not been trained", TEXTS["README.md"]
    )
    assert set(re.split(r", | and ", claim)) == set(names) and not trained & set(names.values())


def test_readme_names_hardware_versions_and_seeds_of_its_table():
    text = " ".join(TEXTS["README.md"].split())
    shown = [each for name in ("digits-40", "fashion-100-small") for row in METHODS
             for each in runs("reproduce", name, PRESETS[name].steps, row)]  # fmt: skip
    devices = {(each["preset"], each["device"].split(",")[1]) for each in shown}
    assert devices == {("digits-40", " Intel(R) Xeon(R) Processor"), ("fashion-100-small", " AMD EPYC")}
    assert {each["device"].split(",")[2] for each in shown} == {" 1 threads of 2"}
    assert "one thread of an Intel Xeon (digits) or an AMD EPYC CPU (Fashion-MNIST" in text
    ((engine, torch),) = {(each["versions"]["remixmatch-engine"], each["versions"]["torch"]) for each in shown}
    assert f"Version {engine}, torch {torch.rpartition('.')[0]}," in text
    seeds = {(each["preset"], each["row"]): 0 for each in shown}
    for each in shown:
        seeds[each["preset"], each["row"]] += 1
    assert set(seeds.values()) == {5} and "over 5 seeds" in text


def test_readme_gives_the_measured_speed_on_an_h100():
    text = " ".join(TEXTS["README.md"].split())
    steps = {
        each["k"]: each
        for each in RECORDS["throughput"]
        if "H100" in each["device"] and each["mode"] == "graph" and each["views"] == "fused"
    }
    milliseconds = {k: each["step_ms"] for k, each in steps.items()}
    images = {k: each["images_per_second"] * each["step_ms"] for k, each in steps.items()}
    (claim,) = re.findall(r"On one H100, [^.]* K = 8 takes .*? hours", text)
    shown = re.findall(r"([\d.]+) (?:ms|times|hours)", claim)
    wanted = (
        milliseconds[8],
        milliseconds[8] / milliseconds[1],
        images[8] / images[1],
        milliseconds[8] * 2**20 / 3.6e6,
    )
    assert len(shown) == len(wanted) and all(map(agrees, shown, wanted)), wanted
