"""The page of a report: what it shows of each run and of several, and its HTML."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
import numpy as np
import vl_convert
from altair import VEGALITE_VERSION
from PIL import Image

from engine.config.config import changed_fields
from engine.config.presets import command
from engine.errors import UserError
from engine.report import charts
from engine.report.charts import Chart
from engine.report.reading import REFERENCE, Found, Run

MANY = 8  # runs of which a page has fewer pictures, and lines are those of groups
LOSSLESS_SIDE = 32  # of pictures that stay PNGs, in pixels
PIXELATED_SIDE = 48  # of pictures that are enlarged pixel by pixel

MOST_LINES = 24  # of a chart

_INTERVALS = 10  # of confidence

Line = tuple[list[float], list[float]]  # steps and values


@dataclass(frozen=True)
class Picture:
    """An image with its words.

    Attributes:
        source: a data URI.
        text: for whoever does not see it.
        caption: below it, a line each.
    """

    source: str
    text: str
    caption: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Pictures under one heading."""

    title: str
    pictures: Sequence[Picture]
    note: str = ""
    pixelated: bool = True


@dataclass(frozen=True)
class Grid:
    """A table; cells may be (text, href)."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        parts: charts, galleries and tables, in their order.
        note: what to know about it.
    """

    title: str
    parts: list[Chart | Gallery | Grid] = field(default_factory=list)
    note: str = ""

    @property
    def layout(self) -> str:
        """Three charts stand beside one another where there is room, and the last of an odd number takes a row."""
        narrow = sum(isinstance(part, Chart) and not part.wide for part in self.parts)
        return "three" if narrow == 3 else "odd" if narrow % 2 else ""


@dataclass(frozen=True)
class Article:
    """All about one run.

    Attributes:
        run: which.
        facts: (name, value, words) for a glance.
        command: that repeats it.
        sections: its parts.
    """

    run: Run
    facts: Sequence[tuple[str, str, str]]
    command: str
    sections: Sequence[Section]


def render(found: Found, title: str = "", written: str = "") -> str:
    """The whole page as HTML that needs nothing else.

    Args:
        found: what it is about.
        title: its heading; by default the run's name, or that of the table.
        written: when and by what, for its foot.
    """
    runs = found.runs
    many = len(runs) > MANY
    articles = [article(run, many) for run in runs]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.tests |= {name.__name__.lower(): _is(name) for name in (Chart, Gallery)}
    environment.filters["slug"] = lambda text: re.sub(r"\W+", "-", text.lower())
    environment.globals["next_id"] = map("chart-{}".format, itertools.count()).__next__
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return environment.get_template("page.html").render(
        title=title or default_title(found),
        several=len(runs) > 1,
        comparisons=compare(found) if len(runs) > 1 else [],
        articles=articles,
        config=charts.CONFIG,
        library=library(),
        written=written,
    )


def _is(kind: type) -> Any:
    return lambda part: isinstance(part, kind)


def default_title(found: Found) -> str:
    """The run's name, or the table's."""
    if len(found.runs) == 1:
        return found.runs[0].name
    return str(found.table.get("title") or f"{len(found.runs)} runs")


@functools.cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which may stand in an HTML page."""
    major, minor, *_ = VEGALITE_VERSION.split(".")
    known = vl_convert.get_vegalite_versions()
    version = f"{major}.{minor}" if f"{major}.{minor}" in known else known[-1]
    script = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub forgets a default
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


# One run


def article(run: Run, many: bool = False) -> Article:
    """All about one run.

    Args:
        run: which.
        many: it is one of so many that the page shows fewer pictures of each.
    """
    made = [_learning(run), _guesses(run), _alignment(run), _augmentation(run), _errors(run, many), _views(run, many)]
    made += [_profile(run), _provenance(run)]
    try:
        words = shlex.join(["remixmatch", *command(run.config)])
    except UserError:
        words = ""  # a preset of another version
    return Article(run, _facts(run), words, [section for section in made if section.parts or section.note])


def _facts(run: Run) -> list[tuple[str, str, str]]:
    c, summary = run.config, run.summary
    _, accuracies = run.series("test_accuracy")
    facts = []
    if run.done:
        facts.append(("Test accuracy", f"{summary['median_last_20']:.2f} %", "median of the last 20 evaluations"))
        facts.append(("At the last step", f"{summary['test_accuracy']:.2f} %", f"step {summary['steps']:,}"))
    else:
        shown = f"{accuracies[-1]:.2f} %" if accuracies else "none yet"
        facts.append(("Test accuracy so far", shown, f"step {run.last_step:,} of {c.steps:,}: not finished"))
    if "paper_error" in summary:
        deviation = "" if summary.get("paper_deviation") is None else f" ± {summary['paper_deviation']:.2f}"
        other = "" if summary.get("same_settings_as_paper") else ", other settings than the preset's"
        facts.append((
            "Error - paper's", f"{summary['difference_to_paper']:+.2f} points",
            f"paper {summary['paper_error']:.2f}{deviation} %{other}",
        ))  # fmt: skip
    facts.append(("Data", c.dataset.rpartition("/")[2], f"{run.split.get('labels', c.labels):,} labels, seed {c.seed}"))
    facts.append(("Method", c.method, f"{c.architecture}, K = {c.k}, B = {c.batch}"))
    if run.done:
        facts.append(("Training", duration(summary["train_seconds"]), f"{summary['images_per_second']:,.0f} images/s"))
    return facts


def duration(seconds: float) -> str:
    """A time for people, such as 2 h 05 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _charts(*found: Chart | None) -> list[Chart | Gallery | Grid]:
    return [chart for chart in found if chart]


def _learning(run: Run) -> Section:
    accuracy = charts.lines(
        "Test accuracy", "%", {"EMA model": run.series("test_accuracy")}, "Of the EMA model, which is what counts.",
        best="highest",
    )  # fmt: skip
    names = dict.fromkeys(name for row in run.metrics for name in row if name.split("_")[0] == "loss")
    terms = {"sum" if name == "loss" else name.removeprefix("loss_"): run.series(name) for name in names}
    losses = charts.lines(
        "Losses", "nats", {name: line for name, line in terms.items() if any(line[1])},  # 0 where the method lacks it
        "Terms and their weighted sum: x of the labeled rows, u of the mixed unlabeled rows, u1 of one strong view "
        "unmixed, rot of the rotation task.",
    )  # fmt: skip
    test_loss = charts.lines("Test loss", "nats", {"EMA model": run.series("test_loss")}, best="lowest")
    return Section("Accuracy and losses", _charts(accuracy, losses, test_loss))


def _guesses(run: Run) -> Section:
    if not run.config.unlabeled:
        return Section("Guesses", note="A supervised run guesses no labels.")
    compared = [(row["step"], row["guesses"]) for row in run.history if row.get("guesses")]
    steps = [step for step, _ in compared]
    known = {
        "confidence of the same": (steps, [100 * each["confidence"] for _, each in compared]),
        "right, not seen by training": (steps, [100 * each["accuracy"] for _, each in compared]),
    }
    series = {"confidence in training": _percents(run, "confidence"), **known}
    words = ""
    if compared:
        words = (
            f"Guesses for {compared[-1][1]['images']} unlabeled training images whose labels the data set has: not "
            "seen by training, they are looked up for this chart alone. "
        )
    over_time = charts.lines(
        "Guesses over time", "%", series,
        words + "Confidence in training is that of a step's own guesses, aligned and sharpened.", (0, 100),
    )  # fmt: skip
    points = {}
    if compared:
        points[f"guesses at step {steps[-1]:,}"] = compared[-1][1]["bins"]
    if run.results:
        points["EMA model, test images"] = intervals(run.results)
    used = (
        charts.lines("Guesses that count", "%", {"used": _percents(run, "guesses_used")})
        if run.config.threshold
        else None
    )
    return Section("Guesses", _charts(over_time, charts.calibration(points), used))


def _percents(run: Run, name: str) -> Line:
    steps, values = run.series(name)
    return steps, [100 * each for each in values]


def intervals(results: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """For ten equal intervals of confidence, how many predictions are in it and how many are right."""
    right = results["predicted"] == results["labels"]
    place = np.minimum((results["confidence"].astype(float) * _INTERVALS).astype(int), _INTERVALS - 1)
    counts = (np.bincount(place[each], minlength=_INTERVALS).tolist() for each in (slice(None), right))
    return list(zip(*counts, strict=True))


def _alignment(run: Run) -> Section:
    if not run.config.unlabeled:
        return Section("Alignment")
    align = "on" if run.config.align else "off in this run"
    note = f"p~(y) is the mean guess, p(y) the labels' marginal; distribution alignment is {align}."
    gap = charts.lines(
        "Distance of p~(y) from p(y)",
        "%",
        {"distance": _percents(run, "alignment_gap")},
        "Half the sum of the differences.",
    )
    rows = [row for row in run.history if row.get("p_model") and row.get("label_marginal")]
    if not rows or any(len(row["p_model"]) != len(run.classes) for row in rows):
        return Section("Alignment", _charts(gap), note)
    p_model, p_labels = (
        np.nan_to_num(np.array([row[name] for row in rows], dtype=np.float64)) for name in ("p_model", "label_marginal")
    )
    steps = [row["step"] for row in rows]
    bars = charts.marginal_bars(steps[-1], p_model[-1], p_labels[-1], run.classes)
    over_time = charts.marginal_map(steps, p_model, p_labels, run.classes)
    return Section("Alignment", _charts(gap, over_time, bars), note)


def _augmentation(run: Run) -> Section:
    if run.config.augment != "ctaugment":
        return Section("CTAugment")
    omega = charts.lines(
        "Probes: how well they are classified", "omega", {"omega": run.series("omega")},
        "1 - half the sum of the differences between f_ema's prediction and the label, a mean over the labeled images.",
        (0, 1),
    )  # fmt: skip
    rows = [row for row in run.history if row.get("bins")]
    found = charts.bins_map([row["step"] for row in rows], [row["bins"] for row in rows]) if rows else None
    return Section("CTAugment", _charts(found, omega))


def confusion(run: Run) -> np.ndarray:
    """(L, L) counts of test images, truth by row."""
    count = len(run.classes)
    flat = run.results["labels"].astype(np.int64) * count + run.results["predicted"]
    return np.bincount(flat, minlength=count * count).reshape(count, count)


def _errors(run: Run, many: bool) -> Section:
    title = "Errors on the test images"
    if not run.results or not run.classes:
        why = "are not in this folder: its run is of an older version" if run.done else "are written at a run's end"
        return Section(title, note=f"Predictions on the test images {why}.")
    counts = confusion(run)
    results = run.results
    total, kept = int(results["test_images"]), len(results["labels"])
    note = "" if total == kept else f"Of {kept:,} of the {total:,} test images, evenly spaced."
    parts = _charts(charts.recall(counts, run.classes), charts.confusion_map(counts, run.classes))
    shown = 8 if many else len(results["errors"])
    pictures = []
    for row, image in list(zip(results["errors"], results["error_images"], strict=True))[:shown]:
        truth, guess = (run.classes[int(results[name][row])] for name in ("labels", "predicted"))
        sure = f"{100 * float(results['confidence'][row]):.0f} %"
        text = f"test image {int(row) * -(-total // kept)}: is {truth}, predicted {guess} with {sure}"
        pictures.append(Picture(data_uri(image), text, [f"is {truth}", f"predicted {guess}", sure]))
    if pictures:
        side = max(results["error_images"].shape[1:3])
        parts.append(Gallery("Most confident errors", pictures, pixelated=side <= PIXELATED_SIDE))
    return Section(title, parts, note)


def _views(run: Run, many: bool) -> Section:
    if not run.results:
        drawn = run.folder / "views.png"
        if many or not drawn.exists():
            return Section("Views")
        uri = "data:image/png;base64," + base64.b64encode(drawn.read_bytes()).decode()
        picture = Picture(uri, "images with their weak and strong views", [])
        return Section("Views", [Gallery("Views of training images", [picture], pixelated=False)])
    images, captions = run.results["views"], run.results["captions"]
    parts: list[Chart | Gallery | Grid] = []
    for number in range(min(len(images), 1 if many else 3)):
        pictures = [
            Picture(data_uri(image), f"image {number + 1}: {caption}", str(caption).split(", "))
            for image, caption in zip(images[number], captions[number], strict=True)
        ]
        parts.append(Gallery(f"Image {number + 1}", pictures, pixelated=max(images.shape[2:4]) <= PIXELATED_SIDE))
    return Section("Views", parts, "Training images with their views at the last step, and what was done to them.")


def data_uri(image: np.ndarray) -> str:
    """(H, W, 3) uint8 as a PNG, or as a WebP where that is much smaller."""
    content = io.BytesIO()
    picture = Image.fromarray(image)
    if max(image.shape[:2]) <= LOSSLESS_SIDE:
        if (image == image[..., :1]).all():
            picture = picture.convert("L")
        picture.save(content, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    picture.save(content, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def _profile(run: Run) -> Section:
    if not run.profile:
        return Section("Profile")
    return Section("Profile", [charts.shares("Share of a step's time", run.profile[: charts.MOST_CLASSES])])


def _provenance(run: Run) -> Section:
    c, summary, split = run.config, run.summary, run.split
    rows: list[tuple[str, str]] = [
        ("folder", run.folder.resolve().name),
        ("label split", f"{c.split}, seed {c.seed}, {split.get('labels', c.labels)} labels"),
        ("its SHA-256", str(split.get("sha256", "unknown"))),
        ("SHA-256 of the labeled images", str(split.get("images_sha256", "unknown"))),
        ("machine", str(summary.get("device", "written at the end of the run"))),
        ("ranks", str(summary.get("ranks", "written at the end of the run"))),
        ("commit", str(summary.get("commit", "unknown"))),
    ]
    versions = summary.get("versions")
    rows += [(name, str(each)) for name, each in versions.items()] if isinstance(versions, dict) else []
    settings = [(name, str(each)) for name, each in dataclasses.asdict(c).items()]
    return Section(
        "How to repeat it",
        [Grid("With what and where", ["", ""], rows), Grid("Every setting", ["setting", "value"], settings)],
        "The command under the title, with the same versions on the same kind of machine.",
    )


# Several runs


def compare(found: Found) -> list[Section]:
    """What several runs have in common, and where they differ."""
    runs = found.runs
    sections = []
    if found.table.get("lines"):
        sections.append(_table_section(found))
    if found.table.get("costs"):
        sections.append(_costs(found.table["costs"]))
    sections.append(_results(found))
    sections.append(_curves(runs))
    return sections


def _table_section(found: Found) -> Section:
    """The lines of table.json, as far as they are as expected."""
    rows = []
    for line in found.table["lines"]:
        if not isinstance(line, dict):
            continue
        spread, last, paper, full = (line.get(name) or {} for name in ("median", "last", "paper", "to_full"))
        interval = f" [{full['low']:+.2f}, {full['high']:+.2f}]" if full.get("low") is not None else ""
        rows.append([
            str(line.get("preset")), str(line.get("row")),
            f"{len(line.get('seeds', ()))} of {len(line.get('wanted', ()))}",
            _pm(spread.get("mean"), spread.get("deviation")), _pm(last.get("mean"), last.get("deviation")),
            _pm(paper.get("error"), paper.get("deviation")),
            f"{full['mean']:+.2f}{interval}" if "mean" in full else "",
        ])  # fmt: skip
    head = ["preset", "row", "seeds", "error, %: median of last 20", "last evaluation", "paper",
            f"difference to {REFERENCE}, points"]  # fmt: skip
    note = (
        "Test errors of the EMA model: mean ± sample standard deviation over seeds. Differences are paired by seed, "
        "with the 95 % interval of Student's t."
    )
    return Section("Table", [Grid("Errors over seeds", head, rows, note)])


def _costs(variants: Sequence[dict[str, str]]) -> Section:
    """What `remixmatch ablate` has measured of each variant's step."""
    columns = {
        "ms a step": ("step_ms", ".2f"), "times the full method": ("ratio", ".2f"),
        "images/s": ("images_per_second", ",.0f"), "MiB": ("memory_mib", ",.0f"),
        "launches": ("launches", ",.0f"), "GB": ("gigabytes", ".2f"),
    }  # fmt: skip
    shown = {title: each for title, each in columns.items() if any(_number(row, each[0]) for row in variants)}
    rows = [
        [row["variant"], *("" if (found := _number(row, name)) is None else format(found, form) for name, form in
                           shown.values())]
        for row in variants
    ]  # fmt: skip
    ratios = {row["variant"]: ratio for row in variants if (ratio := _number(row, "ratio")) is not None}
    parts: list[Chart | Gallery | Grid] = []
    if ratios:
        slowest = max(ratios, key=ratios.__getitem__)
        text = f"Time of a step. The longest is that of {slowest}: {ratios[slowest]:.2f} times the full method's."
        drawn = {name: [(name, ratio)] for name, ratio in ratios.items()}
        parts.append(charts.dots("Time of a step", "times the full method's", drawn, text))
    note = "Steps are timed with their views, in turns with the full method's: a ratio is the median over rounds."
    return Section("Cost", [*parts, Grid("Cost of each variant", ["variant", *shown], rows, note)])


def _number(row: dict[str, str], name: str) -> float | None:
    try:
        return float(row[name])
    except (KeyError, TypeError, ValueError):
        return None


def _pm(centre: float | None, deviation: float | None) -> str:
    if centre is None:
        return ""
    return f"{centre:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


@dataclass(frozen=True)
class Pair:
    """A run and the one that it is compared with.

    Attributes:
        run: which.
        other: the reference.
        points: how much larger the run's test error is.
    """

    run: Run
    other: Run
    points: float


def differences(runs: Sequence[Run]) -> dict[str, list[Pair]]:
    """Test errors less those of the reference, by group.

    The reference of a group is the first group of the same data and number of labels, of it the run with the same seed.
    Where there is one group only, it is the first run, and each other run counts as a group.
    """
    ended = [(run, run.error) for run in runs if run.error is not None]
    alone = len({run.group for run, _ in ended}) == 1
    reference: dict[tuple[Any, ...], str] = {}
    errors: dict[Any, tuple[Run, float]] = {}
    found: dict[str, list[Pair]] = {}
    for run, error in ended:
        group = reference.setdefault(_task(run), run.group)
        other = errors.setdefault(_task(run) if alone else (run.group, run.config.seed), (run, error))
        if not alone:
            other = errors.get((group, run.config.seed), (run, error))
        if other[0] is not run and (alone or group != run.group):
            found.setdefault(run.name if alone else run.group, []).append(Pair(run, other[0], error - other[1]))
    return found


def _task(run: Run) -> tuple[Any, ...]:
    """What has to be equal for errors to be compared."""
    return run.config.dataset, run.split.get("labels", run.config.labels)


def _results(found: Found) -> Section:
    runs = found.runs
    apart = differences(runs)
    by_run = {pair.run.name: pair.points for pairs in apart.values() for pair in pairs}
    rows = []
    for number, run in enumerate(runs):
        difference = by_run.get(run.name)
        rows.append([
            (run.name, f"#run-{number}"), run.group, str(run.config.seed),
            "not finished" if run.error is None else f"{run.error:.2f}",
            f"{100 - run.summary['test_accuracy']:.2f}" if run.done else "",
            "" if difference is None else f"{difference:+.2f}",
            f"{run.last_step:,}", f"{run.split.get('labels', run.config.labels):,}",
            duration(run.summary["train_seconds"]) if run.done else "",
        ])  # fmt: skip
    head = ["run", "group", "seed", "error, %", "last", "difference, points", "steps", "labels", "time"]  # fmt: skip
    parts: list[Chart | Gallery | Grid] = []
    ended = [(run, run.error) for run in runs if run.error is not None]
    alone = len({run.group for run, _ in ended}) == 1
    names = {run: run.name if alone else run.group for run, _ in ended}
    if ended:
        groups: dict[str, list[tuple[str, float]]] = {}
        for run, error in ended:
            groups.setdefault(names[run], []).append((run.name, error))
        best, lowest = min(ended, key=lambda each: each[1])
        text = f"Test errors of {len(ended)} runs. The lowest is {lowest:.2f} %, of {best.name}."
        paper = {names[run]: run.summary["paper_error"] for run, _ in ended if "paper_error" in run.summary}
        note = "A dot is a run, the tick the mean" + (", the diamond the paper's figure." if paper else ".")
        parts.append(charts.dots("Test error", "error, %", groups, text, note, marks=paper))
    if apart:
        ends = [f"{group} {mean(pair.points for pair in pairs):+.2f}" for group, pairs in apart.items()]
        text = f"Differences of test errors in points: {'; '.join(ends[:10])}."
        references = dict.fromkeys(names[pair.other] for pairs in apart.values() for pair in pairs)
        note = f"To {', '.join(references)}, for the same seed where seeds differ: to the right errors are higher."
        drawn = {
            group: [(f"{pair.run.name} - {pair.other.name}", pair.points) for pair in pairs]
            for group, pairs in apart.items()
        }
        parts.append(charts.dots("Differences in test error", "points", drawn, text, note, zero=True))
    parts.append(Grid("All runs", head, rows, "Errors are medians over the last 20 evaluations."))
    parts += [grid for grid in [_settings(runs)] if grid.rows]
    note = f"Not on this page: {'; '.join(found.left_out)}." if found.left_out else ""
    return Section("Results", parts, note)


def _settings(runs: Sequence[Run]) -> Grid:
    """How the settings of each group differ from those of the first."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.group, run)
    base, *others = first.values()
    rows = []
    for run in others:
        same = dataclasses.replace(base.config, seed=run.config.seed)
        rows.append([run.group, "; ".join(changed_fields(same, run.config)) or "none"])
    return Grid(f"Settings that differ from those of {base.group}", ["group", "settings"], rows)


def _curves(runs: Sequence[Run]) -> Section:
    """Each measure of all runs in one chart."""
    unlabeled = [run for run in runs if run.config.unlabeled]
    learning = [run for run in runs if run.config.augment == "ctaugment"]
    drawn = [
        _curve("Test accuracy", "%", {run: run.series("test_accuracy") for run in runs}),
        _curve("Test loss", "nats", {run: run.series("test_loss") for run in runs}),
        _curve("Loss of the labeled rows", "nats", {run: run.series("loss_x") for run in runs}),
        _curve("Confidence of the guesses", "%", {run: _percents(run, "confidence") for run in unlabeled}),
        _curve(
            "Guesses that are right", "%", {run: _right(run) for run in unlabeled},
            "Of unlabeled training images, by labels that are not seen by training.",
        ),
        _curve("Distance of p~(y) from p(y)", "%", {run: _percents(run, "alignment_gap") for run in unlabeled}),
        _curve("CTAugment's omega", "omega", {run: run.series("omega") for run in learning}),
    ]  # fmt: skip
    return Section("Curves", _charts(*drawn))


def _right(run: Run) -> Line:
    known = [(row["step"], 100 * row["guesses"]["accuracy"]) for row in run.history if row.get("guesses")]
    return [step for step, _ in known], [share for _, share in known]


def _curve(title: str, unit: str, series: dict[Run, Line], note: str = "") -> Chart | None:
    """A line for each run; of many runs the mean of each group, or the range of the one group that there is."""
    known = {run: line for run, line in series.items() if line[0]}
    groups: dict[str, list[Line]] = {}
    for run, line in known.items():
        groups.setdefault(run.group, []).append(line)
    found = {run.name: line for run, line in known.items()}
    if len(known) > MANY and len(groups) == 1:
        kinds: dict[str, Callable[[Iterable[float]], Any]] = {"highest": max, "mean": mean, "lowest": min}
        found = {name: over_runs(list(known.values()), kind) for name, kind in kinds.items()}
        note = f"{note} Over {len(known)} runs, step by step.".strip()
    elif len(known) > MANY and len(groups) < len(known):
        found = {group: over_runs(lines, mean) for group, lines in groups.items()}
        note = f"{note} Means over the runs of a group.".strip()
    if len(found) > MOST_LINES:
        note = f"{note} The first {MOST_LINES} of {len(found)}.".strip()
        found = dict(itertools.islice(found.items(), MOST_LINES))
    return charts.lines(title, unit, found, note)


def over_runs(lines: Sequence[Line], kind: Callable[[Iterable[float]], Any]) -> Line:
    """One line for several, at the steps that all of them have."""
    members = [dict(zip(*line, strict=True)) for line in lines]
    steps = sorted(set.intersection(*map(set, members)))
    return steps, [kind(each[step] for each in members) for step in steps]
