"""The page of a report: sections about each run and about several runs, and their HTML."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import itertools
import operator
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, TypeVar

import jinja2
import numpy as np
import vl_convert
from altair import VEGALITE_VERSION
from PIL import Image

from engine.config.config import changed_fields
from engine.config.methods import uses_some
from engine.config.presets import command
from engine.errors import UserError
from engine.report import charts
from engine.report.charts import Chart
from engine.report.reading import REFERENCE, Found, RunData
from engine.runs.headline import MEDIAN_OF
from engine.runs.progress import THROUGHPUT

MANY = 8  # with more runs, show fewer images, and draw one line per group
LOSSLESS_SIDE = 32  # images up to this side in pixels are PNGs
PIXELATED_SIDE = 48  # images up to this side in pixels are enlarged without smoothing
MOST_LINES = 24  # in a chart
INTERVALS = 10  # of confidence
MOST_CLASSES = 20  # in a table of recalls

T = TypeVar("T")
Line = tuple[list[float], list[float]]  # steps and values


@dataclass(frozen=True)
class Gallery:
    """Images under one heading."""

    title: str
    pictures: Sequence[tuple[str, str, Sequence[str]]]  # data URI, text alternative, caption lines
    pixelated: bool = False  # enlarged without smoothing


@dataclass(frozen=True)
class Grid:
    """A table; a cell with the key "href" is a link."""

    title: str
    head: Sequence[str]
    rows: Collection[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of a page; parts that are None are omitted."""

    title: str
    parts: Sequence[Chart | Gallery | Grid | None] = ()
    note: str = ""


def render(found: Found, title: str = "", written: str = "") -> str:
    """Return the page as self-contained HTML.

    Args:
        found: Content of the page.
        title: The title; by default the name of the run or table.
        written: Text of the footer.
    """
    runs = found.runs
    several, many = len(runs) > 1, len(runs) > MANY
    usual = str(found.table.get("title") or f"{len(runs)} runs") if several else runs[0].name
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["slug"] = lambda text: re.sub(r"\W+", "-", text.lower())
    environment.globals["next_id"] = map("chart-{}".format, itertools.count()).__next__
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return environment.get_template("page.html").render(
        title=title or usual,
        several=several,
        comparisons=compare(found) if several else [],
        articles=[article(run, many) for run in runs],
        library=library(),
        written=written,
    )


@functools.cache
def library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, escaped for an HTML page."""
    major, minor, *_ = VEGALITE_VERSION.split(".")
    known = vl_convert.get_vegalite_versions()
    version = f"{major}.{minor}" if f"{major}.{minor}" in known else known[-1]
    script = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub forgets a default
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


# One run


def article(run: RunData, many: bool) -> dict[str, Any]:
    """Return the content about one run: name, facts (name, value, text), the command that repeats it, and sections.

    With `many` runs it has fewer images.
    """
    profile = [charts.shares("Share of a step's time", run.profile[: charts.MOST_CLASSES])] if run.profile else []
    sections = [
        _learning(run), _guesses(run), _alignment(run), _augmentation(run), _errors(run, many), _views(run, many),
        _speed(run), Section("Profile", profile), _provenance(run),
    ]  # fmt: skip
    try:
        words = shlex.join(["remixmatch", *command(run.config)])
    except UserError:
        words = ""  # the preset is unknown
    shown = [section for section in sections if any(section.parts) or section.note]
    return {"name": run.name, "facts": _facts(run), "command": words, "sections": shown}


def _facts(run: RunData) -> list[tuple[str, str, str]]:
    c, summary = run.config, run.summary
    if run.done:
        evaluations = run.evaluations
        middle = (f"{summary['median_last_20']:.2f} %", evaluations.median_name)
        last = (f"{summary['test_accuracy']:.2f} %", f"after the last step, {summary['steps']:,}")
        first, second = (middle, last) if evaluations.median_first else (last, middle)
        facts = [("Test accuracy", *first), ("Last step" if evaluations.median_first else "Median", *second)]
    else:
        _, accuracies = run.series("test_accuracy")
        shown = f"{accuracies[-1]:.2f} %" if accuracies else "none yet"
        facts = [("Test accuracy so far", shown, f"step {run.last_step:,} of {c.steps:,}, not finished")]
    if "paper_error" in summary:
        paper = f"paper {_pm(summary['paper_error'], summary.get('paper_deviation'))} %"
        other = "" if summary.get("same_settings_as_paper") else ", settings differ from the preset"
        apart = run.error(run.evaluations.median_first) - summary["paper_error"]
        facts.append(("Difference in error", f"{apart:+.2f} pp", paper + other))
    if run.unequal and "balanced_accuracy" in summary:
        words = f"geometric mean of recalls {summary['geometric_mean']:.2f} %"
        facts.append(("Balanced accuracy", f"{summary['balanced_accuracy']:.2f} %", words))
    facts.append(("Data", c.dataset.rpartition("/")[2], f"{_labels(run):,} labels, seed {c.seed}"))
    facts.append(("Method", c.method, f"{c.architecture}, K = {c.k}, B = {c.batch}"))
    if run.done:
        facts.append(("Training", duration(summary["train_seconds"]), f"{summary['images_per_second']:,.0f} images/s"))
    return facts + _speed_facts(run)


def _speed_facts(run: RunData) -> list[tuple[str, str, str]]:
    """Return facts about the throughput in a run's metrics; none for runs of earlier versions."""
    found = {name: run.series(name)[1] for name in THROUGHPUT}
    if not all(found.values()):
        return []
    milliseconds, memory, lr = median(found["step_ms"]), max(found["memory_mib"]), found["lr"][-1]
    images = median(found["images_per_second"])
    words = f"median; {images:,.0f} images/s, peak memory {memory:,.0f} MiB, learning rate {lr:g}"
    facts = [("Step", f"{milliseconds:,.2f} ms", words)]
    if not run.done:
        left = (run.config.steps - run.last_step) * milliseconds / 1000
        facts.append(("Left", f"about {duration(left)}", "at this step time, without evaluations"))
    return facts


def _labels(run: RunData) -> int:
    return run.split.get("labels", run.config.labels)


def duration(seconds: float) -> str:
    """Format a duration, such as 2 h 05 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _pm(center: float | None, deviation: float | None) -> str:
    if center is None:
        return ""
    return f"{center:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _percents(run: RunData, name: str) -> Line:
    steps, values = run.series(name)
    return steps, [100 * each for each in values]


def _known(run: RunData, name: str) -> Line:
    """Return a metric, in percent, of pseudo-labels for images whose true labels are hidden from training."""
    rows = [row for row in run.history if row.get("guesses")]
    return [row["step"] for row in rows], [100 * row["guesses"][name] for row in rows]


def _learning(run: RunData) -> Section:
    names = dict.fromkeys(name for row in run.metrics for name in row if name.split("_")[0] == "loss")
    terms = {"sum" if name == "loss" else name.removeprefix("loss_"): run.series(name) for name in names}
    accuracy = charts.lines("Test accuracy", "%", {"EMA model": run.series("test_accuracy")}, best="highest")
    losses = charts.lines(
        "Losses", "nats", {name: line for name, line in terms.items() if any(line[1])},  # 0 if the method lacks it
        "The terms and their weighted sum. x: mixed labeled samples; u: mixed unlabeled samples; u1: one unmixed "
        "strong view; rot: rotation task.",
    )  # fmt: skip
    test_loss = charts.lines("Test loss", "nats", {"EMA model": run.series("test_loss")}, best="lowest")
    means = (
        {
            "balanced accuracy": run.series("balanced_accuracy"),
            "geometric mean": run.series("geometric_mean"),
        }
        if run.unequal
        else {}
    )
    recalls = charts.lines("Means of recalls", "%", means, "Arithmetic and geometric mean over the classes.", (0, 100))
    return Section("Accuracy and losses", [accuracy, recalls, losses, test_loss])


def _speed(run: RunData) -> Section:
    note = "Means since the previous point. Evaluations and checkpoints do not count."
    memory = "Since the run started or was resumed; of the first rank."
    return Section("Speed", [
        charts.lines("Step time", "ms", {"step": run.series("step_ms")}, note, best="lowest"),
        charts.lines("Images per second", "images/s", {"images": run.series("images_per_second")}, note),
        charts.lines("Peak memory", "MiB", {"memory": run.series("memory_mib")}, memory),
    ])  # fmt: skip


def _guesses(run: RunData) -> Section:
    if not run.config.unlabeled:
        return Section("Pseudo-labels", note="A supervised run has no pseudo-labels.")
    series = {
        "confidence in training": _percents(run, "confidence"),
        "confidence on hidden labels": _known(run, "confidence"),
        "accuracy on hidden labels": _known(run, "accuracy"),
    }
    note, points = "Confidence in training is the mean of the largest probabilities of the pseudo-labels used.", {}
    if compared := [row for row in run.history if row.get("guesses")]:
        last = compared[-1]
        note = (
            f"Hidden labels: true labels of {last['guesses']['images']} unlabeled training images, used only for this "
            f"chart and never for training. {note}"
        )
        points[f"pseudo-labels at step {last['step']:,}"] = last["guesses"]["bins"]
    if run.results:
        points["EMA model, test images"] = intervals(run.results)
    used = {"used": _percents(run, "guesses_used")} if uses_some(run.config) else {}
    return Section("Pseudo-labels", [
        charts.lines("Pseudo-labels over time", "%", series, note, (0, 100)),
        charts.calibration(points),
        charts.lines("Pseudo-labels used", "%", used),
    ])  # fmt: skip


def intervals(results: Mapping[str, np.ndarray]) -> list[tuple[int, int]]:
    """Return the numbers of all and of correct predictions in each of ten equal intervals of confidence."""
    right = results["predicted"] == results["labels"]
    place = np.minimum((results["confidence"].astype(float) * INTERVALS).astype(int), INTERVALS - 1)
    counts = (np.bincount(place[each], minlength=INTERVALS).tolist() for each in (slice(None), right))
    return list(zip(*counts, strict=True))


def _alignment(run: RunData) -> Section:
    if not run.config.unlabeled:
        return Section("Alignment")
    gap = {"distance": _percents(run, "alignment_gap")}
    shown = [charts.lines("Distance of p~(y) from p(y)", "%", gap, "Total variation distance.")]
    rows = [row for row in run.history if row.get("p_model") and row.get("label_marginal")]
    if rows and all(len(row["p_model"]) == len(run.classes) for row in rows):
        steps = [row["step"] for row in rows]
        p_model, p_labels = (np.nan_to_num([row[name] for row in rows]) for name in ("p_model", "label_marginal"))
        shown.append(charts.marginal_map(steps, p_model, p_labels, run.classes))
        shown.append(charts.marginal_bars(steps[-1], p_model[-1], p_labels[-1], run.classes))
    align = "on" if run.config.align else "off in this run"
    note = f"p~(y): the model's mean prediction. p(y): the label marginal. Distribution alignment is {align}."
    return Section("Alignment", shown, note)


def _augmentation(run: RunData) -> Section:
    if run.config.augment != "ctaugment":
        return Section("CTAugment")
    rows = [row for row in run.history if row.get("bins")]
    bins = charts.bins_map([row["step"] for row in rows], [row["bins"] for row in rows]) if rows else None
    omega = charts.lines(
        "Classification of probes", "omega", {"omega": run.series("omega")},
        "1 minus the total variation distance between f_ema's prediction and the label, averaged over labeled images.",
        (0, 1),
    )  # fmt: skip
    return Section("CTAugment", [bins, omega])


def confusion(run: RunData) -> np.ndarray:
    """Return (L, L) counts of test images; rows are true classes."""
    count = len(run.classes)
    flat = run.results["labels"].astype(np.int64) * count + run.results["predicted"]
    return np.bincount(flat, minlength=count * count).reshape(count, count)


def _errors(run: RunData, many: bool) -> Section:
    title, results = "Errors on the test images", run.results
    if not results or not run.classes:
        why = "are missing from this folder, or damaged" if run.done else "are written at the end of a run"
        return Section(title, note=f"Predictions on the test images {why}.")
    counts = confusion(run)
    total, kept = int(results["test_images"]), len(results["labels"])
    words = []
    for row in results["errors"][: 8 if many else None]:
        truth, guess = (run.classes[int(results[name][row])] for name in ("labels", "predicted"))
        sure = f"{100 * float(results['confidence'][row]):.0f} %"
        text = f"test image {int(row) * -(-total // kept)}: true class {truth}, predicted {guess} with {sure}"
        words.append((text, [f"true {truth}", f"predicted {guess}", sure]))
    gallery = _gallery("Most confident errors", results["error_images"], words) if words else None
    note = "" if total == kept else f"Based on {kept:,} of the {total:,} test images, evenly spaced."
    maps = [charts.recall(counts, run.classes), charts.confusion_map(counts, run.classes)]
    return Section(title, [*maps, gallery], note)


def _views(run: RunData, many: bool) -> Section:
    if not run.results:
        drawn = run.folder / "views.png"
        if many or not drawn.exists():
            return Section("Views")
        source, text = _uri("png", drawn.read_bytes()), "images with their weak and strong views"
        return Section("Views", [Gallery("Views of training images", [(source, text, [])])])
    shown = list(zip(run.results["views"], run.results["captions"], strict=True))[: 1 if many else 3]
    galleries = [
        _gallery(f"Image {n}", views, [(f"image {n}: {caption}", str(caption).split(", ")) for caption in captions])
        for n, (views, captions) in enumerate(shown, 1)
    ]
    note = "Training images with their views at the last step, and the transformations with their levels."
    return Section("Views", galleries, note)


def _gallery(title: str, images: np.ndarray, words: Sequence[tuple[str, Sequence[str]]]) -> Gallery:
    """Show the first of (N, H, W, 3) images with the text alternative and caption of each."""
    pictures = [(data_uri(image), *each) for image, each in zip(images[: len(words)], words, strict=True)]
    return Gallery(title, pictures, pixelated=max(images.shape[1:3]) <= PIXELATED_SIDE)


def data_uri(image: np.ndarray) -> str:
    """Encode (H, W, 3) uint8 as a PNG, or as a WebP if it is larger than LOSSLESS_SIDE."""
    content, picture = io.BytesIO(), Image.fromarray(image)
    if max(image.shape[:2]) > LOSSLESS_SIDE:
        picture.save(content, "WEBP", quality=82)
        return _uri("webp", content.getvalue())
    if (image == image[..., :1]).all():
        picture = picture.convert("L")
    picture.save(content, "PNG", optimize=True)
    return _uri("png", content.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _provenance(run: RunData) -> Section:
    c, summary, split, later = run.config, run.summary, run.split, "written at the end of the run"
    versions = summary.get("versions")
    rows = {
        "folder": run.folder.resolve().name,
        "label split": f"{c.split}, seed {c.seed}, {_labels(run)} labels",
        "SHA-256 of the split": split.get("sha256", "unknown"),
        "SHA-256 of the labeled images": split.get("images_sha256", "unknown"),
        "machine": summary.get("device", later),
        "ranks": summary.get("ranks", later),
        "commit": summary.get("commit", "unknown"),
        **(versions if isinstance(versions, dict) else {}),
    }
    settings = dataclasses.asdict(c).items()
    grids = [Grid("Environment", ["", ""], rows.items()), Grid("All settings", ["setting", "value"], settings)]
    note = "Run the command under the title, with the same versions on the same kind of machine."
    return Section("How to repeat this run", grids, note)


# Several runs


def compare(found: Found) -> list[Section]:
    """Return sections that compare several runs."""
    table = found.table
    sections = [_table(table["lines"])] if table.get("lines") else []
    sections += [_costs(table["costs"])] if table.get("costs") else []
    return [*sections, _results(found), _curves(found.runs)]


def _table(lines: Iterable[Any]) -> Section:
    """Show the lines of table.json, ignoring malformed ones."""
    found = [line for line in lines if isinstance(line, dict)]
    medians = all(line.get("median_first", True) for line in found)  # missing in tables of earlier versions
    counts = [line["evaluations"]["count"] for line in found if line.get("evaluations")]
    unequal = any(line.get("balanced") for line in found)
    rows = []
    for line in found:
        difference = "to_full" if medians else "last_to_full"
        spread, last, paper, full = (line.get(name) or {} for name in ("median", "last", "paper", difference))
        means = [line.get(name) or {} for name in ("balanced", "geometric")]
        interval = f" [{full['low']:+.2f}, {full['high']:+.2f}]" if full.get("low") is not None else ""
        rows.append([
            line.get("preset"), line.get("row"),
            f"{len(line.get('seeds', ()))} of {len(line.get('wanted', ()))}",
            *_in_order(medians, *(_pm(each.get("mean"), each.get("deviation")) for each in (spread, last))),
            *(_pm(each.get("mean"), each.get("deviation")) for each in means if unequal),
            _pm(paper.get("error"), paper.get("deviation")),
            f"{full['mean']:+.2f}{interval}" if "mean" in full else "",
        ])  # fmt: skip
    head = ["preset", "row", "seeds", *_in_order(medians, "error, %: median", "error, %: last evaluation"),
            *(("balanced accuracy, %", "geometric mean of recalls, %") if unequal else ()), "paper",
            f"difference from {REFERENCE}, pp"]  # fmt: skip
    note = (
        "Test errors of the EMA model: mean ± sample standard deviation over seeds. "
        f"{_error_note(medians, counts)} They are paired by seed, with 95 % CIs from Student's t-distribution."
    )
    return Section("Table", [Grid("Errors over seeds", head, rows, note)])


def _in_order(medians: bool, middle: str, last: str) -> tuple[str, str]:
    """Return the median and the last in the order of the page."""
    return (middle, last) if medians else (last, middle)


def _error_note(medians: bool, counts: Iterable[int]) -> str:
    """Say how many evaluations the medians are over, and which errors are compared."""
    known = sorted({min(count, MEDIAN_OF) for count in counts}) or [MEDIAN_OF]
    over = f"{known[0]} to {known[-1]}" if known[1:] else f"{known[0]}"
    why = f", since fewer than {MEDIAN_OF} evaluations of some runs follow the ramp"
    compared = "the medians" if medians else f"the last evaluation{why}"
    return f"Medians are over the last {over} evaluations. Differences are those of {compared}."


def _costs(variants: Sequence[dict[str, str]]) -> Section:
    """Show the costs that `remixmatch ablate` has measured for each variant's step."""
    columns = [
        ("step_ms", "ms per step", ".2f"), ("ratio", "relative to the full method", ".2f"),
        ("images_per_second", "images/s", ",.0f"), ("memory_mib", "MiB", ",.0f"),
        ("launches", "launches", ",.0f"), ("gigabytes", "GB", ".2f"),
    ]  # fmt: skip
    cells = {title: [_number(row, name, form) for row in variants] for name, title, form in columns}
    cells = {"variant": [row["variant"] for row in variants]} | {k: each for k, each in cells.items() if any(each)}
    ratios = {row["variant"]: float(row["ratio"]) for row in variants if _number(row, "ratio", "")}
    chart = None
    if ratios:
        slowest = max(ratios, key=ratios.__getitem__)
        text = f"Step time. The slowest variant is {slowest}: {ratios[slowest]:.2f} times the full method."
        drawn = {name: [(name, ratio)] for name, ratio in ratios.items()}
        chart = charts.dots("Step time", "relative to the full method", drawn, text)
    note = "Steps are timed with their views, interleaved with the full method's; ratios are medians over rounds."
    grid = Grid("Cost of each variant", list(cells), list(zip(*cells.values(), strict=True)), note)
    return Section("Cost", [chart, grid])


def _number(row: Mapping[str, Any], name: str, form: str) -> str:
    """Format a number of a row; return "" if it is missing or not a number."""
    try:
        return format(float(row[name]), form)
    except (KeyError, TypeError, ValueError):
        return ""


class Pair(NamedTuple):
    """A run, the reference that it is compared with, and the difference in test error in pp."""

    run: RunData
    other: RunData
    points: float


def differences(runs: Sequence[RunData]) -> dict[str, list[Pair]]:
    """Return the differences in test error from the reference, by group.

    The reference of a run is the run with the same seed in the first group with the same data set and number of labels.
    If there is only one group, the reference is the first run, and each other run counts as a group.
    """
    errors, names = _ended(runs, median_first(runs))
    alone = len({run.group for run in errors}) == 1
    firsts: dict[tuple[str, int], RunData] = {}
    seeds: dict[tuple[str, int], RunData] = {}
    found = []
    for run, error in errors.items():
        first = firsts.setdefault((run.config.dataset, _labels(run)), run)
        seeds.setdefault((run.group, run.config.seed), run)
        other = first if alone else seeds.get((first.group, run.config.seed), run)
        if other is not run and (alone or first.group != run.group):
            found.append((names[run], Pair(run, other, error - errors[other])))
    return _grouped(found)


def median_first(runs: Iterable[RunData]) -> bool:
    """Return whether errors are medians over the last evaluations: only if the median comes first in all runs."""
    return all(run.evaluations.median_first for run in runs if run.done)


def _ended(runs: Iterable[RunData], medians: bool) -> tuple[dict[RunData, float], dict[RunData, str]]:
    """Return the errors of finished runs and their group names, or their own names if there is only one group."""
    errors = {run: error for run in runs if (error := run.error(medians)) is not None}
    alone = len({run.group for run in errors}) == 1
    return errors, {run: run.name if alone else run.group for run in errors}


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for group, each in pairs:
        groups.setdefault(group, []).append(each)
    return groups


def _results(found: Found) -> Section:
    runs = found.runs
    apart, medians = differences(runs), median_first(runs)
    errors, names = _ended(runs, medians)
    by_run = {pair.run: f"{pair.points:+.2f}" for pairs in apart.values() for pair in pairs}
    rows = [
        [
            {"name": run.name, "href": f"#run-{number}"}, run.group, run.config.seed,
            f"{errors[run]:.2f}" if run in errors else "not finished",
            f"{run.error(not medians):.2f}" if run.done else "",
            by_run.get(run, ""), f"{run.last_step:,}", f"{_labels(run):,}",
            duration(run.summary["train_seconds"]) if run.done else "",
        ]
        for number, run in enumerate(runs)
    ]  # fmt: skip
    first, second = _in_order(medians, "median", "last")
    head = ["run", "group", "seed", f"error, % ({first})", second, "difference, pp", "steps", "labels", "time"]
    parts: list[Chart | Grid] = []
    if errors:
        groups = _grouped((names[run], (run.name, error)) for run, error in errors.items())
        best = min(errors, key=errors.__getitem__)
        text = f"Test errors of {len(errors)} runs. The lowest is {errors[best]:.2f} % ({best.name})."
        paper = {names[run]: run.summary["paper_error"] for run in errors if "paper_error" in run.summary}
        note = "Dots are runs, the tick is their mean" + (", the diamond is the paper's result." if paper else ".")
        parts.append(charts.dots("Test error", "error, %", groups, text, note, marks=paper))
    if apart:
        ends = [f"{group} {mean(pair.points for pair in pairs):+.2f}" for group, pairs in apart.items()]
        text = f"Mean differences in test error, pp: {'; '.join(ends[:10])}."
        references = dict.fromkeys(names[pair.other] for pairs in apart.values() for pair in pairs)
        note = f"Difference from {', '.join(references)} with the same seed if there are several; right is worse."
        drawn = {
            group: [(f"{run.name} - {other.name}", points) for run, other, points in pairs]
            for group, pairs in apart.items()
        }
        parts.append(charts.dots("Differences in test error", "pp", drawn, text, note, zero=True))
    parts.append(Grid("All runs", head, rows, _error_note(medians, [run.evaluations.count for run in errors])))
    note = f"Not on this page: {'; '.join(found.left_out)}." if found.left_out else ""
    return Section("Results", [*parts, _recalls(runs), _settings(runs)], note)


def _recalls(runs: Sequence[RunData]) -> Grid | None:
    """Show the recall of each class and both means, over the runs of each group that has unequal classes."""
    groups = _grouped((run.group, run) for run in runs if run.unequal and run.recalls)
    names = list(dict.fromkeys(name for members in groups.values() for run in members for name in run.recalls))
    shown = names if len(names) <= MOST_CLASSES else []

    def over(members: Sequence[RunData], read: Callable[[RunData], Any]) -> str:
        known = [value for run in members if (value := read(run)) is not None]
        return f"{mean(known):.2f}" if known else ""

    rows = [
        [
            group, len(members),
            over(members, lambda run: run.summary.get("balanced_accuracy")),
            over(members, lambda run: run.summary.get("geometric_mean")),
            *(over(members, operator.methodcaller("recall", name)) for name in shown),
        ]
        for group, members in groups.items()
    ]  # fmt: skip
    head = ["group", "runs", "balanced accuracy, %", "geometric mean, %", *shown]
    note = "Recall of each class at the last evaluation, in percent, mean over the runs of a group."
    return Grid("Recall by class", head, rows, note) if rows else None


def _settings(runs: Sequence[RunData]) -> Grid | None:
    """Show how the settings of each group differ from those of the first group."""
    base, *others = (members[0] for members in _grouped((run.group, run) for run in runs).values())
    rows = [
        [
            run.group,
            "; ".join(changed_fields(dataclasses.replace(base.config, seed=run.config.seed), run.config)) or "none",
        ]
        for run in others
    ]
    return Grid(f"Settings that differ from {base.group}", ["group", "settings"], rows) if rows else None


def _curves(runs: Sequence[RunData]) -> Section:
    """Show one chart per metric, with all runs."""
    unlabeled = [run for run in runs if run.config.unlabeled]
    learning = [run for run in runs if run.config.augment == "ctaugment"]
    known = "On unlabeled training images, compared with true labels that are hidden from training."
    return Section("Curves", [
        _curve("Test accuracy", "%", runs, RunData.series, "test_accuracy"),
        _curve("Test loss", "nats", runs, RunData.series, "test_loss"),
        _curve("Loss of labeled samples", "nats", runs, RunData.series, "loss_x"),
        _curve("Confidence of pseudo-labels", "%", unlabeled, _percents, "confidence"),
        _curve("Accuracy of pseudo-labels", "%", unlabeled, _known, "accuracy", known),
        _curve("Distance of p~(y) from p(y)", "%", unlabeled, _percents, "alignment_gap"),
        _curve("CTAugment's omega", "omega", learning, RunData.series, "omega"),
        _curve("Step time", "ms", runs, RunData.series, "step_ms"),
    ])  # fmt: skip


def _curve(
    title: str, unit: str, runs: Sequence[RunData], read: Callable[[RunData, str], Line], name: str, note: str = ""
) -> Chart | None:
    """Draw a line for each run; for many runs, the mean of each group, or the range of the only group."""
    known = {run: line for run in runs if (line := read(run, name))[0]}
    groups = _grouped((run.group, line) for run, line in known.items())
    found, notes = {run.name: line for run, line in known.items()}, [note] if note else []
    if len(known) > MANY and len(groups) == 1:
        kinds: dict[str, Callable[[Iterable[float]], Any]] = {"highest": max, "mean": mean, "lowest": min}
        found = {kind: over_runs(list(known.values()), combine) for kind, combine in kinds.items()}
        notes.append(f"Statistics over {len(known)} runs at each step.")
    elif len(known) > MANY and len(groups) < len(known):
        found = {group: over_runs(lines, mean) for group, lines in groups.items()}
        notes.append("Means over the runs of each group.")
    if len(found) > MOST_LINES:
        notes.append(f"Only the first {MOST_LINES} of {len(found)} lines are shown.")
        found = dict(itertools.islice(found.items(), MOST_LINES))
    return charts.lines(title, unit, found, " ".join(notes))


def over_runs(lines: Sequence[Line], kind: Callable[[Iterable[float]], Any]) -> Line:
    """Combine several lines into one, at the steps they have in common."""
    members = [dict(zip(*line, strict=True)) for line in lines]
    steps = sorted(set.intersection(*map(set, members)))
    return steps, [kind(each[step] for each in members) for step in steps]
