"""Charts of a report in Vega-Lite, built with Altair, each with a text alternative and a table of its data.

The browser draws the charts as SVG, and the page's style sheet colors their text and lines. The colors of marks are
visible on white and on black. Heat maps encode numbers as opacity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import altair as alt
import numpy as np

from pipelines.ctaugment import THRESHOLD

# The contrast of each is at least 3:1 on white and on black.
COLORS = ("#3b82f6", "#d97706", "#16a34a", "#a855f7", "#ef4444", "#0d9488", "#ec4899", "#7c8594")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
BLUE, ORANGE, GRAY = COLORS[0], COLORS[1], COLORS[-1]
MOST_POINTS = 150  # in a line
FEW_POINTS = 16  # lines with at most this many points show them
MOST_TIMES = 32  # columns of a heat map
MOST_CLASSES = 20  # in a chart over classes
MOST_TABLE_ROWS = 16

Dots = Mapping[str, Sequence[tuple[str, float]]]  # names and values by group
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # steps and values by name


@dataclass(frozen=True)
class Chart:
    """A chart with its text alternative and its data as a table."""

    title: str
    text: str  # text alternative, in a sentence or two
    spec: dict[str, Any]  # Vega-Lite
    head: Sequence[str]  # column names of the table
    rows: Sequence[Sequence[str]]  # rows of the table
    note: str = ""  # how to read it
    wide: bool = False  # takes the full width of the page


def lines(
    title: str, unit: str, series: Series, note: str = "", limits: tuple[float, float] | None = None, best: str = ""
) -> Chart | None:
    """Draw a line over steps for each name; return None if no value is finite.

    `unit` is the title of the vertical axis, whose limits are `limits` or those of the values. For a single line, the
    text names the `best` value, "highest" or "lowest".
    """
    finite = {name: [p for p in zip(*line, strict=True) if math.isfinite(p[1])] for name, line in series.items()}
    points = {name: found for name, found in finite.items() if found}
    if not points:
        return None
    drawn = {name: thinned(*zip(*found, strict=True)) for name, found in points.items()}
    values: list[dict[str, Any]] = [
        {"k": name, "s": steps, "v": [*map(short, found)], "few": len(steps) <= FEW_POINTS}
        for name, (steps, found) in drawn.items()
    ]
    base = _chart(values, "s", "v").encode(
        alt.X("s:Q", title="step").scale(nice=False).axis(format="~s", grid=False, tickCount=5),
        alt.Y("v:Q", title=unit, scale=alt.Scale(domain=limits) if limits else alt.Scale(zero=False)),
        *_colors(list(drawn), "stroke"),
        tooltip=_tips({"k:N": "line", "s:Q": "step", "v:Q": unit}),
    )
    # Invisible points make a line easy to hit with a mouse or a finger.
    targets = {"size": 60, "opacity": 0} if sum(len(each["s"]) for each in values) < 1000 else False
    chart: Any = base.mark_line(strokeWidth=1.6, clip=True, point=targets)
    if any(each["few"] for each in values):
        chart += base.mark_point(filled=True, size=28, opacity=1).transform_filter("datum.few")
    told = [
        f"{name} " + " and ".join(f"{value(v)} at step {step:,}" for step, v in (found[0], found[-1]))
        for name, found in points.items()
    ]
    text = f"{title}, in {unit}, over steps: {'; '.join(told[:8])}" + ("; and more" if len(told) > 8 else "") + "."
    if best and len(points) == 1:
        step, v = {"highest": max, "lowest": min}[best](*points.values(), key=lambda point: point[1])
        text += f" The {best} is {value(v)} at step {step:,}."
    return Chart(title, text, _spec(chart, 240), *_line_table(drawn), note)


def _line_table(series: Series) -> tuple[list[str], list[list[str]]]:
    """Return one column per line if all have the same steps; otherwise a few rows per line."""
    few = len(series) <= 8
    first, *others = (steps for steps, _ in series.values())
    if few and all(steps == first for steps in others):
        chosen = _spaced(len(first), MOST_TABLE_ROWS)
        table = [[f"{first[n]:,}", *(value(found[n]) for _, found in series.values())] for n in chosen]
        return ["step", *series], table
    table = [
        [name, f"{steps[n]:,}", value(found[n])]
        for name, (steps, found) in series.items()
        for n in _spaced(len(steps), 6 if few else 2)
    ]
    return ["line", "step", "value"], table


def marginal_map(steps: Sequence[int], p_model: np.ndarray, p_labels: np.ndarray, classes: Sequence[str]) -> Chart:
    """Draw the difference between p~(y) and p(y) of each class over time.

    Args:
        steps: (S,) steps of the columns.
        p_model: (S, L) p~(y).
        p_labels: (S, L) p(y).
        classes: (L,) names.
    """
    apart = 100 * (p_model - p_labels)
    shown, few = _selected(np.abs(apart).max(0), classes, "that differ most")
    times = _spaced(len(steps), MOST_TIMES)
    kept = [steps[t] for t in times]
    largest = max(float(np.abs(apart).max()), 1e-9)
    values = [{"c": name, "s": kept, "v": [*map(short, apart[times, c])]} for c, name in shown.items()]
    more, less = "p~(y) larger", "p~(y) smaller"
    signed = _chart(values, "s", "v").transform_calculate(a="abs(datum.v)", k=f"datum.v < 0 ? '{less}' : '{more}'")
    chart = signed.mark_rect().encode(
        _steps(kept),
        _names("c", shown.values(), "class", labelExpr=_LABEL),
        _key(alt.Color, [more, less], [ORANGE, BLUE], 2 if max(map(len, classes)) <= 8 else 1),
        alt.Opacity("a:Q", legend=None).scale(domain=[0, largest], range=[0.03, 1]),
        tooltip=_tips({"c:N": "class", "s:O": "step", "v:Q": "p~(y) - p(y), pp"}),
    )
    worst = int(np.abs(apart[-1]).argmax())
    text = (
        f"Heat map of p~(y) minus p(y) by class and step. The largest difference at any step is {largest:.1f} pp. At "
        f"step {steps[-1]:,} it is {apart[-1, worst]:+.1f} pp, for class {classes[worst]}."
    )
    note = f"p~(y) is the mean prediction of the last 128 steps. Full color is {largest:.1f} pp. {few}"
    head = ["class", "p(y) at the end", "p~(y) at the end", "difference, pp"]
    rows = [
        [classes[c], f"{100 * p_labels[-1, c]:.2f} %", f"{100 * p_model[-1, c]:.2f} %", f"{apart[-1, c]:+.2f}"]
        for c in shown
    ]
    spec = _spec(chart, max(110, 20 * len(shown)))
    return Chart("Classes over time: p~(y) - p(y)", text, spec, head, rows, note.strip())


def marginal_bars(step: int, p_model: np.ndarray, p_labels: np.ndarray, classes: Sequence[str]) -> Chart:
    """Draw p(y) and p~(y) of each class at one step; both are (L,)."""
    shown, _ = _selected(np.abs(p_model - p_labels), classes)
    kinds = {"p~(y), predicted": p_model, "p(y), labels": p_labels}
    columns = 2 if max(map(len, classes)) <= 8 else 1
    values = [{"c": name, "k": k, "v": short(100 * p[c])} for k, p in kinds.items() for c, name in shown.items()]
    points = _chart(values).mark_point(filled=True, size=70, opacity=1)
    chart = points.encode(
        alt.X("v:Q", title="probability, %").scale(zero=True),
        _names("c", shown.values(), "class", labelExpr=_LABEL),
        _key(alt.Color, list(kinds), [ORANGE, BLUE], columns),
        _key(alt.Shape, list(kinds), ["circle", "diamond"], columns),
        tooltip=_tips({"c:N": "class", "k:N": "marginal", "v:Q": "probability, %"}),
    )
    gap = 50 * float(np.abs(p_model - p_labels).sum())
    text = f"p~(y) and p(y) by class at step {step:,}. Their total variation distance is {gap:.1f} %."
    rows = [[classes[c], f"{100 * p_labels[c]:.2f} %", f"{100 * p_model[c]:.2f} %"] for c in shown]
    spec = _spec(chart, max(110, 20 * len(shown)))
    return Chart(f"p~(y) and p(y) at step {step:,}", text, spec, ["class", "p(y)", "p~(y)"], rows)


def bins_map(steps: Sequence[int], bins: Sequence[Mapping[str, Sequence[Sequence[float]]]]) -> Chart | None:
    """Plot CTAugment's bins over time: which are drawn, and their weights relative to the parameter's largest.

    Args:
        steps: Steps of the columns.
        bins: For each step, weights by transformation, a list for each of its parameters.
    """
    times = _spaced(len(steps), MOST_TIMES)
    steps, bins = [steps[t] for t in times], [bins[t] for t in times]
    drawn: list[bool] = []  # for each bin, whether it is in use at the last step
    rows: list[list[str]] = []
    labels, values = {}, []
    for name, number in [(name, n) for name, found in bins[-1].items() for n in range(len(found))]:
        label = f"{name} {number + 1}" if len(bins[-1][name]) > 1 else name
        found = [each.get(name, [[]] * (number + 1))[number] for each in bins]
        count, place = len(found[-1]), len(drawn) + 2 * len(rows)
        if any(len(each) != count for each in found):
            return None  # the folder mixes versions
        weights = np.nan_to_num(np.array(found, dtype=np.float64))  # (S, bins)
        relative = (weights + 0.01) / (weights + 0.01).max(1, keepdims=True)
        for b in range(count):
            shown = [short(r) if r >= THRESHOLD else 0 for r in relative[:, b]]
            values.append({"y": place + b, "n": f"{label}, bin {b + 1} of {count}", "s": steps, "v": shown,
                           "w": [*map(short, weights[:, b])]})  # fmt: skip
        labels[place + count // 2] = label
        used, low, high = relative[-1] >= THRESHOLD, weights[-1].min(), weights[-1].max()
        lost = " ".join(str(b + 1) for b in np.flatnonzero(~used)) or "none"
        rows.append([label, f"{used.sum()} of {count}", lost, f"{low:.2f}", f"{high:.2f}"])
        drawn += used.tolist()
    places = len(drawn) + 2 * len(rows)
    label_of = f"({json.dumps(labels)})[datum.value]"
    axis = alt.Axis(
        values=list(labels), labelExpr=label_of, ticks=False, domain=False, labelOverlap=False, labelPadding=4
    )
    kinds = _chart(values, "s", "v", "w").transform_calculate(k="datum.v > 0 ? 'drawn' : 'not drawn'")
    chart = kinds.mark_rect().encode(
        _steps(steps),
        alt.Y("y:O", title=None, axis=axis).scale(domain=list(range(places - 2)), padding=0),
        _key(alt.Color, ["drawn", "not drawn"], [COLORS[5], ORANGE]),
        alt.Opacity("v:Q", legend=None).scale(domain=[0, THRESHOLD, 1], range=[0.8, 0.12, 0.95]),
        tooltip=_tips({"n:N": "bins", "s:O": "step", "w:Q": "weight"}),
    )
    text = (
        f"Heat map of CTAugment's bins over steps. At step {steps[-1]:,}, {sum(drawn)} of {len(drawn)} bins are drawn: "
        f"those with at least {THRESHOLD} times their parameter's largest weight."
    )
    note = (
        "Each band is a parameter, with its first bin on top. A stronger color means a weight closer to the "
        f"parameter's largest; bins below {THRESHOLD} times that are not drawn."
    )
    head = ["parameter", "bins drawn at the end", "bins not drawn", "smallest weight", "largest weight"]
    return Chart("CTAugment's bins", text, _spec(chart, 2 * places + 20), head, rows, note, wide=True)


def calibration(points: Mapping[str, Sequence[tuple[int, int]]]) -> Chart | None:
    """Plot accuracy against confidence of predictions.

    Args:
        points: By name, the numbers of all and of correct predictions in equal intervals of confidence.
    """
    values, rows = [], []
    for name, counts in points.items():
        for number, (count, right) in enumerate(counts):
            low, high = (100 * (number + more) // len(counts) for more in (0, 1))
            if count:
                values.append({"k": name, "c": (low + high) / 2, "v": short(100 * right / count), "n": count})
                rows.append([name, f"{low} to {high} %", str(count), f"{100 * right / count:.1f} %"])
    if not values:
        return None
    ends = _chart([{"c": 0, "v": 0}, {"c": 100, "v": 100}]).encode(x="c:Q", y="v:Q")
    diagonal = ends.mark_line(color=GRAY, strokeDash=[4, 4], strokeWidth=1.2)
    found = _chart(values).mark_point(filled=True, opacity=0.8)
    chart = found.encode(
        alt.X("c:Q", title="confidence, %").scale(domain=[0, 100]),
        alt.Y("v:Q", title="accuracy, %").scale(domain=[0, 100]),
        *_colors(list(points)),
        alt.Size("n:Q", legend=None).scale(type="sqrt", range=[20, 320]),
        tooltip=_tips({"k:N": "model", "c:Q": "confidence, %", "v:Q": "accuracy, %", "n:Q": "predictions"}),
    )
    sums = {name: np.sum(counts, axis=0) for name, counts in points.items()}
    told = "; ".join(f"{name}: {right} of {count} correct" for name, (count, right) in sums.items())
    text = f"Accuracy by confidence. {told}."
    note = (
        "On the dashed line, accuracy equals confidence; below it, predictions are overconfident. Larger dots stand "
        "for more predictions."
    )
    head = ["predictions", "confidence", "count", "accuracy"]
    return Chart("Calibration", text, _spec(diagonal + chart, 240), head, rows, note)


def recall(confusion: np.ndarray, classes: Sequence[str]) -> Chart:
    """Plot the recall of each class; confusion is (L, L) counts, whose rows are true classes."""
    right, totals = np.diag(confusion), confusion.sum(1)
    found = 100 * right / np.maximum(totals, 1)
    shown, note = _selected(np.where(totals > 0, -found, -np.inf), classes, "with the lowest recall")
    values = [{"c": name, "v": short(found[c]), "n": int(totals[c])} for c, name in shown.items()]
    x = alt.X("v:Q", title="recall, %").scale(domain=[0, 100])
    y = _names("c", shown.values(), "class", labelExpr=_LABEL)
    chart = _bars(values, x, y, {"c:N": "class", "v:Q": "recall, %", "n:Q": "test images"})
    worst = min(shown, key=found.__getitem__)
    text = f"Recall by class. The lowest is {found[worst]:.1f} %, for class {classes[worst]}."
    rows = [[classes[c], f"{found[c]:.1f} %", str(right[c]), str(totals[c])] for c in shown]
    spec, head = _spec(chart, max(110, 26 * len(shown) + 20)), ["class", "recall", "correct", "test images"]
    return Chart("Recall by class", text, spec, head, rows, note)


def confusion_map(confusion: np.ndarray, classes: Sequence[str]) -> Chart:
    """Draw the confusion matrix; confusion is (L, L) counts, whose rows are true classes."""
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    wrong = confusion - np.diag(np.diag(confusion))
    shown, note = _selected(wrong.sum(0) + wrong.sum(1), classes, "with the most errors")
    values = [
        {"t": shown[t], "p": shown[p], "n": int(confusion[t, p]), "v": short(share[t, p]),
         "k": "correct" if t == p else "wrong"}
        for t in shown for p in shown if confusion[t, p]
    ]  # fmt: skip
    angle = 0 if max(map(len, classes)) <= 3 else -90
    base = _chart(values).encode(
        alt.X("p:N", title="predicted")
        .scale(domain=list(shown.values()))
        .axis(orient="top", labelExpr=_LABEL, labelAngle=angle, labelLimit=90, labelOverlap="greedy"),
        _names("t", shown.values(), "true class", labelExpr=_LABEL),
    )
    chart: Any = base.mark_rect().encode(
        _key(alt.Color, ["correct", "wrong"], [BLUE, ORANGE]),
        alt.Opacity("v:Q", legend=None).scale(type="sqrt", domain=[0, 100], range=[0.08, 0.9]),
        tooltip=_tips({"t:N": "true class", "p:N": "predicted", "n:Q": "test images", "v:Q": "% of the class"}),
    )
    if len(shown) <= 12:
        # White on cells of strong color, otherwise the color of the style sheet.
        counts = base.mark_text(fontSize=11).encode(text="n:Q")
        strong = counts.transform_filter("datum.v > 25").encode(color=alt.value("#fff")).properties(name="strong")
        chart = alt.layer(chart, strong, counts.transform_filter("!(datum.v > 25)").properties(name="weak"))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_TABLE_ROWS].tolist()
    pairs = [pair for flat in order if wrong[pair := divmod(flat, len(classes))]]
    worst = ", ".join(f"{classes[t]} predicted as {classes[p]} ({wrong[t, p]})" for t, p in pairs[:3])
    text = f"Confusion matrix of {confusion.sum():,} test images. "
    text += f"Most frequent errors: {worst}." if worst else "There are no errors."
    head = ["true class", "predicted", "test images", "share of the class"]
    rows = [[classes[t], classes[p], str(wrong[t, p]), f"{share[t, p]:.1f} %"] for t, p in pairs]
    spec = _spec(chart, max(150, 26 * len(shown) + 40))
    return Chart("Confusion matrix", text, spec, head, rows, note)


def dots(
    title: str, unit: str, groups: Dots, text: str, note: str = "", zero: bool = False, marks: Mapping[str, float] = {}
) -> Chart:
    """Plot the values of each group as dots, with a tick at their mean and published results (`marks`) as diamonds.

    `unit` is the title of the horizontal axis; `zero` adds a line at 0.
    """
    # Without padding, dots at the ends overlap the names.
    x = alt.X("v:Q", title=unit).scale(zero=False, padding=10).axis(tickCount=5)
    y = _names("g", list(groups))
    values = [{"g": group, "k": name, "v": short(v)} for group, found in groups.items() for name, v in found]
    means = [{"g": group, "v": short(mean(v for _, v in found))} for group, found in groups.items()]
    published = [{"g": group, "v": v} for group, v in marks.items()]
    ticks = _chart(means).mark_tick(thickness=3, color=ORANGE, height={"band": 0.8})
    points = _chart(values).mark_point(filled=True, size=55, opacity=0.75, color=BLUE)
    diamonds = _chart(published).mark_point(filled=True, shape="diamond", size=75, color=COLORS[2])
    layers = [
        _chart([{"v": 0}] if zero else []).mark_rule(color=GRAY, strokeDash=[4, 4]).encode(x),
        ticks.encode(x, y, tooltip=_tips({"g:N": "group", "v:Q": f"mean, {unit}"})),
        points.encode(x, y, tooltip=_tips({"g:N": "group", "k:N": "run", "v:Q": unit})),
        diamonds.encode(x, y, tooltip=_tips({"g:N": "group", "v:Q": f"paper, {unit}"})),
    ]
    layers = [layer for layer in layers if layer.data["values"]]
    rows = [[group, name, value(v)] for group, found in groups.items() for name, v in found]
    return Chart(title, text, _spec(alt.layer(*layers), max(90, 30 * len(groups))), ["group", "run", unit], rows, note)


def shares(title: str, found: Sequence[tuple[str, float]]) -> Chart:
    """Draw a bar for each named share in 0..1; the largest comes first."""
    values = [{"c": name, "v": short(100 * share)} for name, share in found]
    x, y = alt.X("v:Q", title="share, %"), _names("c", [name for name, _ in found])
    chart = _bars(values, x, y, {"c:N": "range", "v:Q": "share, %"})
    text = f"{title}. The largest is {found[0][0]} with {100 * found[0][1]:.0f} %."
    rows = [[name, f"{100 * share:.1f} %"] for name, share in found]
    return Chart(title, text, _spec(chart, max(90, 22 * len(found))), ["range", "share"], rows)


# Parts of charts

# Numbers distinguish classes with equal names; axis labels omit them.
_LABEL = "replace(datum.label, /^[0-9]+: /, '')"


def _selected(scores: np.ndarray, classes: Sequence[str], why: str = "") -> tuple[dict[int, str], str]:
    """Return the MOST_CLASSES classes with the largest scores, by number, and a note if some are omitted."""
    shown = sorted(np.argsort(-scores, kind="stable")[:MOST_CLASSES].tolist())
    note = f"Shown are the {len(shown)} of {len(classes)} classes {why}." if len(shown) < len(classes) else ""
    return {c: f"{c}: {classes[c]}" for c in shown}, note


def _chart(values: list[dict[str, Any]], *flattened: str) -> alt.Chart:
    """Return a chart of values; the `flattened` fields are lists of equal lengths."""
    chart = alt.Chart(alt.InlineData(values=values))
    return chart.transform_flatten(list(flattened)) if flattened else chart


def _bars(values: list[dict[str, Any]], x: alt.X, y: alt.Y, tips: Mapping[str, str]) -> alt.Chart:
    bars = _chart(values).mark_bar(color=BLUE, height={"band": 0.7}, cornerRadiusEnd=2)
    return bars.encode(x, y, tooltip=_tips(tips))


def _names(field: str, names: Iterable[str], title: str | None = None, **changes: Any) -> alt.Y:
    axis = alt.Axis(labelLimit=140, ticks=False, domain=False, labelOverlap=False, **changes)
    return alt.Y(f"{field}:N", title=title, scale=alt.Scale(domain=list(names)), axis=axis)


def _steps(steps: Sequence[int]) -> alt.X:
    """Return the horizontal axis of a heat map, with a few labels."""
    labeled = [steps[n] for n in _spaced(len(steps), 4)]
    axis = alt.Axis(values=labeled, labelAngle=0, format="~s", ticks=False, domain=False, labelFlush=True)
    return alt.X("s:O", title="step", scale=alt.Scale(padding=0), axis=axis)


def _key(channel: Any, names: Sequence[str], looks: Sequence[Any], columns: int = 2, **changes: Any) -> Any:
    """Return a channel that distinguishes names, with a legend below the chart unless there is only one name."""
    legend = alt.Legend(orient="bottom", columns=columns, labelLimit=290, symbolOpacity=1, **changes)
    scale = alt.Scale(domain=names, range=looks)
    return channel("k:N", title=None, scale=scale, legend=legend if len(names) > 1 else None)


def _colors(names: Sequence[str], symbol: str = "circle") -> list[Any]:
    """Return colors by name, with dashes if there are more names than colors."""
    columns = max(1, min(len(names), 250 // (7 * max(map(len, names)) + 34)))  # fits the width of a phone
    colors = [COLORS[n % len(COLORS)] for n in range(len(names))]
    dashes = [DASHES[n // len(COLORS) % len(DASHES)] for n in range(len(names))]
    channels = {alt.Color: colors} | ({alt.StrokeDash: dashes} if len(names) > len(COLORS) else {})
    return [_key(channel, names, looks, columns, symbolType=symbol) for channel, looks in channels.items()]


def _tips(titles: Mapping[str, str]) -> list[alt.Tooltip]:
    return [alt.Tooltip(shorthand, title=title) for shorthand, title in titles.items()]


def _spec(chart: Any, height: int) -> dict[str, Any]:
    """Return the Vega-Lite specification without the configuration shared by all charts, which is in config.json."""
    spec = chart.properties(width="container", height=height).to_dict()
    del spec["config"], spec["$schema"]
    return spec


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return at most MOST_POINTS points: means over consecutive values, at the last step of each group."""
    if len(steps) <= MOST_POINTS:
        return [int(step) for step in steps], list(values)
    parts = np.array_split(np.arange(len(steps)), MOST_POINTS)
    return [int(steps[part[-1]]) for part in parts], [mean(values[n] for n in part) for part in parts]


def _spaced(count: int, most: int) -> list[int]:
    """Return evenly spaced integers below `count`, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def short(number: float) -> float:
    """Round a number to the four digits that a chart shows."""
    return float(f"{number:.4g}")


def value(number: float) -> str:
    """Format a number for display."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
