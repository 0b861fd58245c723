"""`remixmatch bench report`: tables and charts from the rows of benches, tables also in docs/results.md."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from engine.errors import UserError
from engine.measuring import records
from engine.measuring.records import Row

BEGIN, END = "<!-- digits table: remixmatch bench report -->", "<!-- end of digits table -->"
LOW_ACCURACY = 96  # percent; runs of digits-40 below it have taken one style of writing for another digit
PERFORMANCE = ("<!-- performance table: remixmatch bench report -->", "<!-- end of performance table -->")

COLUMNS = {
    "throughput": {
        "preset": "{preset}",
        "K": "{k}",
        "B": "{batch}",
        "mode": "{mode}",
        "views": "{views}",
        "micro-batches": "{micro_batches}",
        "precision": "{precision}",
        "optimizer": "{optimizer}",
        "deterministic": "{deterministic}",
        "step, ms": "{step_ms:.2f}",
        "steps/s": "{steps_per_second:.1f}",
        "images/s": "{images_per_second:,.0f}",
        "host, ms": "{host_ms:.2f}",
        "roofline bound, ms": "{floor_ms:.2f}",
        "ratio to bound": "{floor_ratio:.2f}",
        "memory, MiB": "{peak_memory_mib:.0f}",
    },
    "baseline": {
        "trainer": "{trainer}",
        "beside": "{beside}",
        "K": "{k}",
        "B": "{batch}",
        "views": "{data}",
        "precision": "{precision}",
        "step, ms": "{step_ms:.2f}",
        "quartiles": "{step_ms_low:.2f} to {step_ms_high:.2f}",
        "networks, ms": "{networks_ms:.2f}",
        "the rest": "{rest_ms:.2f}",
        "views, ms": "{views_ms:.2f}",
        "images/s": "{images_per_second:,.0f}",
        "ratio to bound": "{floor_ratio:.2f}",
        "engine, times": "{engine_ratio:.2f}",
        "their quartiles": "{engine_ratio_low:.2f} to {engine_ratio_high:.2f}",
        "in images/s": "{engine_images_ratio:.2f}",
    },
    "count": {
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
    "variants": {
        "K": "{k}",
        "B": "{batch}",
        "variant": "{variant}",
        "step, ms": "{step_ms:.3f}",
        "quartiles": "{step_ms_low:.3f} to {step_ms_high:.3f}",
        "times as long as it is": "{ratio:.3f}",
        "memory, MiB": "{peak_memory_mib:.0f}",
    },
    "replay": {
        "K": "{k}",
        "B": "{batch}",
        "kind": "{kind}",
        "ms a step": "{ms:.3f}",
        "share": "{share:.1%}",
        "kernels": "{kernels:.0f}",
    },
    "convolutions": {
        "shape": "{shape}",
        "in the network": "{in_network}",
        "rows": "{rows}",
        "pass": "{pass}",
        "measured choice": "{benchmark}",
        "time, us": "{microseconds:.1f}",
        "roofline bound, us": "{floor_microseconds:.1f}",
        "ratio to bound": "{floor_ratio:.2f}",
    },
    "host": {
        "K": "{k}",
        "B": "{batch}",
        "plan, us": "{plan_us:.0f}",
        "rows": "{rows_us:.0f}",
        "views": "{views_us:.0f}",
        "planner's thread": "{planner_us:.0f}",
        "policy": "{policy_us:.0f}",
        "to_device": "{to_device_us:.0f}",
        "main thread": "{main_us:.0f}",
        "sum, us": "{total_us:.0f}",
        "quartiles": "{total_us_low:.0f} to {total_us_high:.0f}",
        "lag": "{lag}",
        "pinned": "{pinned}",
    },
    "scaling": {
        "preset": "{preset}",
        "K": "{k}",
        "scaling": "{scaling}",
        "ranks": "{ranks}",
        "DDP": "{ddp}",
        "B": "{batch}",
        "mode": "{mode}",
        "views": "{views}",
        "step, ms": "{step_ms:.2f}",
        "quartiles": "{step_ms_low:.2f} to {step_ms_high:.2f}",
        "images/s": "{images_per_second:,.0f}",
        "efficiency": "{efficiency:.1%}",
        "DDP costs": "{ddp_overhead_percent:+.1f} %",
        "ranks apart, ms": "{beside_step_ms:.2f}",
        "gradients, bytes": "{all_reduce_bytes:,}",
        "all-reduce, ms": "{all_reduce_ms:.2f}",
        "behind backward": "{overlap:.0%} {overlap_noise}",
        "other collectives": "{other_collectives}",
        "their bytes": "{other_total_bytes:,}",
    },
    "start": {
        "preset": "{preset}",
        "command to first step, s": "{start_seconds:.2f}",
        "interpreter": "{python_seconds:.2f}",
        "options, data, folder": "{options_seconds:.2f}",
        "imports": "{imports_seconds:.2f}",
        "network, optimiser": "{trainer_seconds:.2f}",
        "view pipeline": "{views_seconds:.2f}",
        "first step": "{step_seconds:.2f}",
        "CPU time": "{cpu_seconds:.2f}",
        "--help": "{help_seconds:.2f}",
    },
    "restart": {
        "preset": "{preset}",
        "ranks": "{ranks}",
        "kills": "{repeats}",
        "kill to next step, s": "{restart_seconds:.1f}",
        "longest, s": "{most_restart_seconds:.1f}",
        "new processes, s": "{regroup_seconds:.1f}",
        "imports to checkpoint, s": "{load_seconds:.1f}",
        "first step, s": "{first_step_seconds:.1f}",
        "steps lost": "{lost_steps:.0f}",
        "imports alone, s": "{import_seconds:.1f}",
    },
    "kernels": {
        "kernel": "{kernel}",
        "size": "{size}",
        "shape": "{shape}",
        "provider": "{provider}",
        "time, us": "{microseconds:.2f}",
        "quartiles": "{microseconds_low:.2f} to {microseconds_high:.2f}",
        "host, us": "{host_microseconds:.1f}",
        "bytes": "{bytes:,}",
        "GB/s": "{gigabytes_per_second:.3g}",
        "share of copy": "{share_of_copy:.1%}",
    },
    "pipelines": {
        "backend": "{backend}",
        "what": "{what}",
        "views/s": "{views_per_second:,.0f}",
        "quartiles": "{views_per_second_low:,.0f} to {views_per_second_high:,.0f}",
        "times PIL": "{ratio_to_pil:.2f}",
        "share of copy": "{share_of_copy:.2%}",
    },
    "opening": {
        "runs on the page": "{runs}",
        "MB": "{megabytes:.2f}",
        "written in, s": "{write_seconds:.1f}",
        "drawn at 1 400 pixels, s": "{desk_seconds:.2f}",
        "at 360, s": "{phone_seconds:.2f}",
        "browser": "{browser}",
    },
    "data": {
        "part": "{part}",
        "images": "{images:,}",
        "side": "{side}",
        "open, s": "{open_seconds:.4f}",
        "prepare, images/s": "{prepare_images_per_second:,.0f}",
        "DALI alone, images/s": "{dali_images_per_second:,.0f}",
        "prepare / DALI alone": "{prepare_ratio:.2f} ({least_prepare_ratio:.2f} to {most_prepare_ratio:.2f})",
        "views": "{views}",
        "step, ms": "{step_ms:.1f}",
        "with fewer images, ms": "{few_step_ms:.1f} ({few_images:,})",
        "step / with fewer": "{step_ratio:.2f} ({least_step_ratio:.2f} to {most_step_ratio:.2f})",
        "of CPU time": "{cpu_step_ratio:.2f}",
        "memory for the data, MiB": "{data_memory_mib:.0f}",
    },
}
BENCHES = ("digits", *COLUMNS)


@dataclass
class ReportOptions:
    """Prints the results as Markdown tables."""

    results: Path | None = None
    """The folder of the benches' rows, in a file a bench: digits.jsonl, throughput.jsonl and so on. By default
    bench-results where that is a folder, otherwise the measurements that come with the package."""
    readme: Path | None = None
    """Replace the tables in this file, README or another page, between their markers: digits, and performance where it
    has such markers."""
    charts: Path | None = None
    """Draw PNG charts into this folder."""


def main(options: ReportOptions) -> None:
    """Prints the tables, puts them into a page and draws charts.

    Raises:
        UserError: no results yet, or a page without the markers.
    """
    results = options.results or (records.OUT if records.OUT.is_dir() else records.RESULTS)
    rows = {bench: records.read(results / f"{bench}.jsonl") for bench in BENCHES}
    rows = {bench: found for bench, found in rows.items() if found}
    if not rows:
        raise UserError(
            f"{results} has no rows; measure them with: remixmatch bench {' | '.join(BENCHES)}, "
            f"each with --out {results}/NAME.jsonl"
        )
    print(f"remixmatch: rows of {results}", file=sys.stderr)  # beside the tables, which a user may redirect to a file
    tables = {bench: digits_table(r) if bench == "digits" else table(bench, r) for bench, r in rows.items()}
    if options.readme:
        _write_readme(options.readme, tables)
    if options.charts:
        from bench import charts  # matplotlib takes a second that tables need not pay

        charts.draw(rows, options.charts)
    print("\n\n".join(f"## {bench}\n\n{text}" for bench, text in tables.items()))
    counts = rows.get("count") or records.read(records.RESULTS / "count.jsonl")
    measured = rows.get("throughput", []) + rows.get("variants", [])
    if lines := predictions(counts, measured):
        print("\n## predictions\n\n" + "\n".join(lines))


def predictions(counts: Sequence[Row], measured: Sequence[Row]) -> list[str]:
    """What `bench count` has predicted for a device beside what was measured on it, one line a case.

    Args:
        counts: rows of `bench count`; the newest of a case counts.
        measured: rows of `bench throughput` or `bench variants`: those of the captured paper's step are taken.
    """
    lines = []
    papers = [
        row
        for row in counts
        if row["preset"].startswith("cifar10-") and "method" not in row and row.get("ablate", "k=").startswith("k=")
    ]
    newest = {(row["k"], row["batch"]): row for row in papers}
    for row in measured:
        captured = row.get("variant") == "as it is" or (row.get("mode") == "graph" and row.get("views") == "synthetic")
        count = newest.get((row["k"], row["batch"]))
        if not captured or count is None:
            continue
        for device in (name.removeprefix("predicted_ms_") for name in count if name.startswith("predicted_ms_")):
            if device.upper() in row["device"].upper():
                predicted, found = count[f"predicted_ms_{device}"], row["step_ms"]
                lines.append(
                    f"K = {row['k']}, B = {row['batch']}, {row['device']} ({row['bench']}): predicted {predicted:.2f} "
                    f"ms, measured {found:.2f} ms, {found / predicted:.2f} times as long"
                )
    return lines


def _write_readme(path: Path, tables: dict[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    performance = "\n\n".join(f"**{bench}**\n\n{made}" for bench, made in tables.items() if bench != "digits")
    if "digits" in tables and (BEGIN not in text or END not in text):
        raise UserError(f"{path} has no line '{BEGIN}' with '{END}' after it")
    for (begin, end), made in (((BEGIN, END), tables.get("digits")), (PERFORMANCE, performance)):
        if made and begin in text and end in text:
            before, rest = text.split(begin, 1)
            text = f"{before}{begin}\n{made}\n{end}{rest.split(end, 1)[1]}"
    path.write_text(text, encoding="utf-8")


def table(bench: str, rows: Sequence[Row]) -> str:
    """A table a device, one line a case, with a line below that says on what it was measured."""
    columns = COLUMNS[bench]
    parts = []
    for device, cases in records.newest(bench, rows).items():
        lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
        lines += ["| " + " | ".join(_cell(form, row) for form in columns.values()) + " |" for row in cases]
        versions = cases[-1]["versions"]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in cases))
        how = "Counted" if bench == "count" else f"Measured on {device}"
        lines += ["", f"{how}; torch {versions['torch']}, triton {versions['triton']}; {commits}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(form: str, row: Row) -> str:
    try:
        return form.format(**row)
    except (KeyError, TypeError):  # not measured here: a bound needs a GPU, a ratio the engine
        return ""


def digits_table(rows: Sequence[Row]) -> str:
    """A table a machine, one line a method: mean and sample standard deviation over seeds, in percent.

    LabelSpreading stands with the neighbour count of the best mean, chosen on the test images in its favour.
    """
    machines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        machines[re.sub(r", \d+ threads of \d+$", "", row["device"])].append(row)
    return "\n\n".join(map(_digits_of_a_machine, machines.values()))


def _digits_of_a_machine(rows: Sequence[Row]) -> str:
    methods: dict[str, dict[Any, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        methods[row["method"]][row.get("neighbours")].append(row)
    low = f"under {LOW_ACCURACY} %"
    lines = [
        f"| method | labels | seeds | test accuracy, % | lowest seed | {low} | median of last 20, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, variants in sorted(
        methods.items(), key=lambda item: (-item[1][next(iter(item[1]))][0]["labels"], item[0])
    ):
        neighbours, runs = max(variants.items(), key=lambda item: mean(r["test_accuracy"] for r in item[1]))
        name = method if neighbours is None else f"{method.split(',')[0]} of scikit-learn, {neighbours} neighbours"
        accuracies = [r["test_accuracy"] for r in runs]
        medians = [r["median_last_20"] for r in runs if "median_last_20" in r]
        cells = [
            name,
            str(runs[0]["labels"]),
            str(len(runs)),
            _spread(accuracies),
            f"{min(accuracies):.1f}",
            str(sum(accuracy < LOW_ACCURACY for accuracy in accuracies)),
            _spread(medians) if medians else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Measured on {rows[-1]['device']}; torch {rows[-1]['versions']['torch']}."]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"
