"""Results of `remixmatch reproduce`: a table in Markdown and JSON, from the jobs' folders or from their records."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.config.config import EXECUTION_FIELDS, Config, changes
from engine.config.presets import PRESETS, command, preset
from engine.config.scaling import SCALED
from engine.errors import UserError, cannot_write
from engine.runs.folder import read_split
from engine.runs.headline import evaluations_of, unequal_classes
from engine.studies import statistics
from engine.studies.jobs import Status, status
from engine.studies.paper_tables import (
    K_OF_METHODS,
    PUBLISHED_ABLATIONS,
    PUBLISHED_ERRORS,
    REMIXMATCH,
    TABLES,
    Entry,
    compared_with,
    papers_difference,
)
from pipelines.files import write_text


def read_statuses(out: Path, entries: Sequence[Entry]) -> dict[str, Status]:
    """Return the status of each job, by its digest."""
    return {entry.job.digest: status(out, entry.job) for entry in entries}


def title(name: str, entries: Sequence[Entry], scale: float = 1.0) -> str:
    """Return a title that says what the table shows, and how it deviates from the paper's settings.

    Args:
        name: Name of the table.
        entries: Jobs of the table.
        scale: --steps-scale.
    """
    words = [f"{name}: test error in percent"]
    fewer = sorted({(each.job.config.steps, each.base.steps) for each in entries})
    fewer = [(steps, whole) for steps, whole in fewer if steps != whole]
    if fewer:
        counts = ", ".join(f"{steps:,} steps instead of {whole:,}" for steps, whole in fewer)
        rehearsal = all(steps < whole for steps, whole in fewer)
        words.append(f"{'REHEARSAL with ' if rehearsal else ''}{counts}")
    known = EXECUTION_FIELDS | ({"steps"} if scale == 1 else set(SCALED))
    changed: dict[str, None] = {}
    for each in entries:
        for name, (_, now) in changes(each.base, each.job.config, ignored=known).items():
            changed[f"{name} {now}"] = None
    if changed:
        words.append(f"settings changed from the presets: {', '.join(changed)}")
    return "; ".join(words)


def write_tables(name: str, entries: Sequence[Entry], out: Path, found: Mapping[str, Status], scale: float) -> None:
    """Write table.md and table.json, and chart.png for a table over K, and print the table."""
    lines = make_lines(name, entries, found)
    states = [(entry, found.get(entry.job.digest, Status("waiting"))) for entry in entries]
    notes = [
        f"Not in the table: {entry.job.name}, {each.state}" + (f": {each.reason}" if each.reason else "")
        for entry, each in states
        if each.state != "done"
    ]
    done = [each for _, each in states if each.state == "done"]
    if done:
        places = dict.fromkeys(str(each.summary.get("device")) for each in done)
        torches = dict.fromkeys(str(each.summary.get("versions", {}).get("torch")) for each in done)
        commits = dict.fromkeys(each.commit or "unknown" for each in done)
        notes.append(f"Trained on {'; '.join(places)}; torch {', '.join(torches)}; commit {', '.join(commits)}.")
    head = title(name, entries, scale)
    over_k = any(entry.row in K_OF_METHODS for entry in entries)
    full = "K = 1" if over_k else REMIXMATCH
    text = statistics.markdown(head, lines, full, notes)
    content = {
        "table": name,
        "title": head,
        "lines": statistics.to_json(lines),
        "cells": [_job_json(entry, found.get(entry.job.digest, Status("waiting")), out) for entry in entries],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "table.md", text, shared=True)
        write_text(out / "table.json", json.dumps(content, indent=1) + "\n", shared=True)
        if drawn := _by_k(lines):
            from engine.studies import charts  # Importing matplotlib takes a second.

            charts.error_over_k(drawn, head, out / "chart.png")
    except OSError as error:
        raise cannot_write(out, error) from error
    print(text, end="")
    print(f"\n{out / 'table.md'}, {out / 'table.json'}" + (f", {out / 'chart.png'}" if drawn else ""))


def _by_k(lines: Sequence[statistics.Line]) -> dict[str, dict[int, statistics.Line]]:
    """Return the lines of a table over K that have results, by method with preset, and K."""
    found: dict[str, dict[int, statistics.Line]] = {}
    for line in lines:
        if line.row in K_OF_METHODS and line.error:
            settings = K_OF_METHODS[line.row]
            found.setdefault(f"{settings['method']}, {line.preset}", {})[settings["k"]] = line
    return found


def make_lines(name: str, entries: Sequence[Entry], found: Mapping[str, Status]) -> list[statistics.Line]:
    """Return the lines of a table, preset by preset, from the finished jobs.

    Args:
        name: Name of the table.
        entries: Jobs of the table.
        found: Status of each job, by its digest.
    """
    runs: dict[tuple[str, str], dict[int, statistics.Result]] = {}
    wanted: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        place = entry.preset, entry.row
        wanted.setdefault(place, []).append(entry.seed)
        done = runs.setdefault(place, {})
        each = found.get(entry.job.digest)
        if each and each.state == "done":
            median, last = (100 - each.summary[key] for key in ("median_last_20", "test_accuracy"))
            done[entry.seed] = statistics.Result(
                median,
                last,
                each.summary["steps"],
                entry.job.config.split,
                _seconds(each.summary),
                evaluations_of(each.summary, entry.job.config),
                _recalls(each.summary, entry.job.config),
            )
    ablation = TABLES[name].kind == "ablation"
    figures = PUBLISHED_ABLATIONS if ablation else PUBLISHED_ERRORS
    lines = [
        statistics.line(
            row,
            preset_name,
            sorted(wanted[preset_name, row]),
            runs[preset_name, row],
            runs.get((preset_name, compared_with(row))) if row != compared_with(row) else None,
            figures.get((preset_name, row)),
            papers_difference(row, preset(preset_name).k) if ablation else None,
        )
        for preset_name in dict.fromkeys(entry.preset for entry in entries)
        for row in dict.fromkeys(entry.row for entry in entries if entry.preset == preset_name)
    ]
    return statistics.choose_first(lines)


def _recalls(summary: Mapping[str, Any], config: Config) -> dict[str, float]:
    """Return the recalls of the classes with test images; empty if classes are equal, or recalls were not recorded."""
    found = summary.get("recall", {}) if unequal_classes(summary, config) else {}
    return {name: recall for name, recall in found.items() if recall is not None}


def _seconds(summary: Mapping[str, Any]) -> float | None:
    """Return the training time: CPU time on a CPU (None in records without it), wall-clock time on a GPU."""
    return summary["cpu_seconds"] if summary["device"].startswith("CPU") else summary["train_seconds"]


def _job_json(entry: Entry, each: Status, out: Path) -> dict[str, Any]:
    split = read_split(out / entry.job.name)
    return {
        "row": entry.row,
        "preset": entry.preset,
        "seed": entry.seed,
        "cell": entry.job.name,
        "state": each.state,
        "reason": each.reason,
        "host": each.host,
        "commit": each.commit or "unknown",
        "split_sha256": split.get("sha256"),
        "summary": dict(each.summary),
        "config": dataclasses.asdict(entry.job.config),
    }


_SUMMED_UP = ("steps", "test_accuracy", "median_last_20", "train_seconds", "cpu_seconds")
_RECALLS = ("balanced_accuracy", "geometric_mean", "recall")
_EVALUATIONS = ("evaluations", "evaluations_after_ramp")  # Missing in summaries of earlier versions.


def collect(entries: Sequence[Entry], out: Path, path: Path) -> None:
    """Append a record for every finished job that has none yet.

    Args:
        entries: The jobs.
        out: Folder of the jobs.
        path: File of the records.
    """
    from engine.measuring import records

    known = {row.get("cell") for row in records.read(path) if row["bench"] == "reproduce"}
    count = 0
    for entry in entries:
        each = status(out, entry.job)
        if each.state != "done" or entry.job.digest in known:
            continue
        config, when = entry.job.config, (out / entry.job.name / "summary.json").stat().st_mtime
        records.append(path, {
            "bench": "reproduce",
            "row": entry.row,
            "preset": entry.preset,
            "seed": entry.seed,
            **{name: each.summary[name] for name in _SUMMED_UP},
            **{name: each.summary[name] for name in _EVALUATIONS if name in each.summary},
            **({name: each.summary[name] for name in _RECALLS} if _recalls(each.summary, config) else {}),
            "cell": entry.job.digest,
            "changes": {
                name: value
                for name, value in dataclasses.asdict(config).items()
                if value != getattr(PRESETS[entry.preset], name)
            },
            "device": each.summary["device"],
            "versions": each.summary["versions"],
            "commit": each.commit or "unknown",
            "command": shlex.join(["remixmatch", *command(config)]),
            "date": datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d"),
        })  # fmt: skip
        count += 1
    print(f"{path}: {count} records added")


def collected(paths: Sequence[Path]) -> dict[str, Status]:
    """Read finished jobs, by digest, from records that --collect wrote; later records take precedence.

    Raises:
        UserError: A file is missing, or was not written by --collect.
    """
    from engine.measuring import records

    found = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"--from {path}: file not found")
        try:
            for row in records.read(path):
                if row["bench"] == "reproduce":
                    found[row["cell"]] = Status("done", row["steps"], row, commit=row["commit"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--from {path}: not a file written by --collect ({error!r})") from None
    return found
