"""Charts of a report, as Vega-Lite by Altair. Each has a text for whoever does not see it, and a table of its data.

Charts are drawn in the browser as SVG, whose texts and lines the page's style sheet colours. Marks are coloured so that
they are seen on white and on black; where a colour stands for a number, the number is its opacity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import altair as alt
import numpy as np

from pipelines.ctaugment import THRESHOLD

# on white and on black the contrast of each is 3:1 at least
COLOURS = ("#3b82f6", "#d97706", "#16a34a", "#a855f7", "#ef4444", "#0d9488", "#ec4899", "#7c8594")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
BLUE, ORANGE, GREY = COLOURS[0], COLOURS[1], COLOURS[-1]
MOST_POINTS = 150  # of a line
FEW_POINTS = 16  # of a line whose points are shown
MOST_TIMES = 32  # columns of a heat map
MOST_CLASSES = 20  # of a chart over classes
MOST_TABLE_ROWS = 16

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # steps and values by name


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: what it shows.
        text: what is to be seen in it, in a sentence or two.
        spec: Vega-Lite.
        head: names of the columns of the table behind it.
        rows: of that table.
        note: how to read it.
        wide: whether it takes the page's width.
    """

    title: str
    text: str
    spec: dict[str, Any]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    wide: bool = False


def lines(
    title: str, unit: str, series: Series, note: str = "", limits: tuple[float, float] | None = None, best: str = ""
) -> Chart | None:
    """Values over steps, a line for each name; None without any.

    Args:
        title: of the chart.
        unit: title of the vertical axis.
        series: by name.
        note: how to read it.
        limits: of the vertical axis; by default what the values need.
        best: "highest" or "lowest" to say when that was.
    """
    series = {name: _finite(*each) for name, each in series.items()}
    series = {name: each for name, each in series.items() if each[0]}
    if not series:
        return None
    drawn = {name: thinned(*each) for name, each in series.items()}
    names = list(drawn)
    values: list[dict[str, Any]] = [
        {"k": name, "s": steps, "v": [short(v) for v in found], "few": len(steps) <= FEW_POINTS}
        for name, (steps, found) in drawn.items()
    ]
    base = (
        alt.Chart(alt.InlineData(values=values))
        .transform_flatten(["s", "v"])
        .encode(
            x=alt.X("s:Q", title="step", scale=alt.Scale(nice=False), axis=_step_axis()),
            y=alt.Y("v:Q", title=unit, scale=alt.Scale(domain=limits) if limits else alt.Scale(zero=False)),
            tooltip=[_tip("k:N", "line"), _tip("s:Q", "step"), _tip("v:Q", unit)],
            **_colours(names, "stroke"),
        )
    )
    # points that nobody sees, so that a finger or a mouse finds them
    points = {"size": 60, "opacity": 0} if sum(len(each["s"]) for each in values) < 1000 else False
    chart: Any = base.mark_line(strokeWidth=1.6, clip=True, point=points)
    if any(each["few"] for each in values):
        chart += base.mark_point(filled=True, size=28, opacity=1).transform_filter("datum.few")
    ends = [f"{name} {value(each[1][0])} at step {each[0][0]:,} and {value(each[1][-1])} at step {each[0][-1]:,}"
            for name, each in series.items()]  # fmt: skip
    text = f"{title}, in {unit}, over steps: {'; '.join(ends[:8])}" + ("; and more" if len(ends) > 8 else "") + "."
    if best and len(series) == 1:
        (steps, found), choose = next(iter(series.values())), max if best == "highest" else min
        place = found.index(choose(found))
        text += f" The {best} is {value(found[place])} at step {steps[place]:,}."
    return Chart(title, text, _spec(chart, 240), *_line_table(drawn), note)


def _finite(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Without what a run that diverged has in its last rows."""
    kept = [n for n, each in enumerate(values) if math.isfinite(each)]
    return [steps[n] for n in kept], [values[n] for n in kept]


def _line_table(series: Series) -> tuple[list[str], list[list[str]]]:
    """One column a line where all have the same steps; otherwise a row for each line's end."""
    names = list(series)
    columns = [list(steps) for steps, _ in series.values()]
    if len(names) <= 8 and all(steps == columns[0] for steps in columns):
        chosen = _spaced(len(columns[0]), MOST_TABLE_ROWS)
        rows = [[f"{columns[0][n]:,}", *(value(found[n]) for _, found in series.values())] for n in chosen]
        return ["step", *names], rows
    rows = []
    for name, (steps, found) in series.items():
        for n in _spaced(len(steps), 6 if len(names) <= 8 else 2):
            rows.append([name, f"{steps[n]:,}", value(found[n])])
    return ["line", "step", "value"], rows


def losses(series: Series) -> Chart | None:
    """The loss and its terms, by their names in metrics."""
    named = {"sum" if name == "loss" else name.removeprefix("loss_"): each for name, each in series.items()}
    named = {name: each for name, each in named.items() if any(each[1])}  # 0 where the method lacks a term
    note = (
        "Terms and their weighted sum: x of the labeled rows, u of the mixed unlabeled rows, u1 of one strong view "
        "unmixed, rot of the rotation task."
    )
    return lines("Losses", "nats", named, note)


def marginal_map(steps: Sequence[int], p_model: np.ndarray, p_labels: np.ndarray, classes: Sequence[str]) -> Chart:
    """How much more or less of each class is guessed than labels have, over time.

    Args:
        steps: of the columns.
        p_model: (S, L) p~(y).
        p_labels: (S, L) p(y).
        classes: (L,) names.
    """
    apart = 100 * (p_model - p_labels)
    shown = _largest(np.abs(apart).max(0), MOST_CLASSES)
    times = _spaced(len(steps), MOST_TIMES)
    values = [
        {"c": numbered(c, classes), "s": [steps[t] for t in times], "v": [short(apart[t, c]) for t in times]}
        for c in shown
    ]
    largest = max(float(np.abs(apart).max()), 1e-9)
    chart = (
        alt.Chart(alt.InlineData(values=values))
        .transform_flatten(["s", "v"])
        .transform_calculate(a="abs(datum.v)", k="datum.v < 0 ? 'guessed less' : 'guessed more'")
        .mark_rect()
        .encode(
            x=_steps(steps, times),
            y=_class_axis("c", [numbered(c, classes) for c in shown], "class"),
            color=alt.Color(
                "k:N",
                title=None,
                scale=alt.Scale(domain=["guessed more", "guessed less"], range=[ORANGE, BLUE]),
                legend=_legend(2 if _longest(classes) <= 8 else 1),
            ),
            opacity=alt.Opacity("a:Q", scale=alt.Scale(domain=[0, largest], range=[0.03, 1]), legend=None),
            tooltip=[_tip("c:N", "class"), _tip("s:O", "step"), _tip("v:Q", "p~(y) - p(y), points")],
        )
    )
    worst = int(np.abs(apart[-1]).argmax())
    text = (
        f"Heat map of p~(y) less p(y) by class and step. The largest difference at any time is {largest:.1f} points; "
        f"at step {steps[-1]:,} it is {apart[-1, worst]:+.1f} points, of class {classes[worst]}."
    )
    note = f"The mean guess of the last 128 steps less the labels' share. Full colour is {largest:.1f} points."
    if len(shown) < len(classes):
        note += f" The {len(shown)} classes of {len(classes)} that differ most."
    rows = [
        [classes[c], f"{100 * p_labels[-1, c]:.2f} %", f"{100 * p_model[-1, c]:.2f} %", f"{apart[-1, c]:+.2f}"]
        for c in shown
    ]
    head = ["class", "p(y) at the end", "p~(y) at the end", "difference, points"]
    title = "Classes over time: p~(y) - p(y)"
    return Chart(title, text, _spec(chart, max(110, 20 * len(shown))), head, rows, note)


def marginal_bars(step: int, p_model: np.ndarray, p_labels: np.ndarray, classes: Sequence[str]) -> Chart:
    """p(y) and p~(y) of each class at one step; both (L,)."""
    shown = _largest(np.abs(p_model - p_labels), MOST_CLASSES)
    names = [numbered(c, classes) for c in shown]
    kinds = {"p~(y), guessed": p_model, "p(y), labels": p_labels}
    values = [{"c": numbered(c, classes), "k": k, "v": short(100 * p[c])} for k, p in kinds.items() for c in shown]
    legend = _legend(2 if _longest(classes) <= 8 else 1)
    chart = (
        alt.Chart(alt.InlineData(values=values))
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            x=alt.X("v:Q", title="share, %", scale=alt.Scale(zero=True)),
            y=_class_axis("c", names, "class"),
            color=alt.Color(
                "k:N", title=None, scale=alt.Scale(domain=list(kinds), range=[ORANGE, BLUE]), legend=legend
            ),
            shape=alt.Shape("k:N", scale=alt.Scale(domain=list(kinds), range=["circle", "diamond"]), legend=legend),
            tooltip=[_tip("c:N", "class"), _tip("k:N", "of"), _tip("v:Q", "share, %")],
        )
    )
    gap = 50 * float(np.abs(p_model - p_labels).sum())
    text = f"p~(y) and p(y) by class at step {step:,}. They are {gap:.1f} % apart, in total variation distance."
    rows = [[classes[c], f"{100 * p_labels[c]:.2f} %", f"{100 * p_model[c]:.2f} %"] for c in shown]
    title = f"p~(y) and p(y) at step {step:,}"
    return Chart(title, text, _spec(chart, max(110, 20 * len(shown))), ["class", "p(y)", "p~(y)"], rows)


def bins_map(steps: Sequence[int], bins: Sequence[Mapping[str, Sequence[Sequence[float]]]]) -> Chart | None:
    """CTAugment's bins over time: which are drawn, and how their weights compare with the best of their parameter.

    Args:
        steps: of the columns.
        bins: for each step, weights by transformation, a list for each of its parameters.
    """
    parameters = [
        (f"{name} {number + 1}" if len(found) > 1 else name, name, number, len(weights))
        for name, found in bins[-1].items()
        for number, weights in enumerate(found)
    ]
    times = _spaced(len(steps), MOST_TIMES)
    place, labels, rows, values = 0, {}, [], []
    for label, name, number, count in parameters:
        found = [bins[t].get(name, [[]] * (number + 1))[number] for t in times]
        if any(len(each) != count for each in found):
            return None  # a folder in which versions were mixed
        weights = np.nan_to_num(np.array(found, dtype=np.float64))  # (S, bins)
        raised = weights + 0.01
        relative = raised / raised.max(1, keepdims=True)
        for b in range(count):
            drawn = [short(r) if r >= THRESHOLD else 0 for r in relative[:, b]]
            values.append({"y": place + b, "n": f"{label}, bin {b + 1} of {count}", "s": [steps[t] for t in times],
                           "v": drawn, "w": [short(w) for w in weights[:, b]]})  # fmt: skip
        labels[str(place + count // 2)] = label
        used = int((relative[-1] >= THRESHOLD).sum())
        lost = [str(b + 1) for b in range(count) if relative[-1, b] < THRESHOLD]
        rows.append([label, f"{used} of {count}", " ".join(lost) or "none", f"{weights[-1].min():.2f}",
                     f"{weights[-1].max():.2f}"])  # fmt: skip
        place += count + 2
    axis = alt.Axis(
        values=[int(each) for each in labels],
        labelExpr=f"({json.dumps(labels)})[datum.value]",
        title=None,
        ticks=False,
        domain=False,
        labelOverlap=False,
        labelPadding=4,
    )
    chart = (
        alt.Chart(alt.InlineData(values=values))
        .transform_flatten(["s", "v", "w"])
        .transform_calculate(k="datum.v > 0 ? 'drawn' : 'not drawn'")
        .mark_rect()
        .encode(
            x=_steps(steps, times),
            y=alt.Y("y:O", scale=alt.Scale(domain=list(range(place - 2)), padding=0), axis=axis),
            color=alt.Color(
                "k:N",
                title=None,
                scale=alt.Scale(domain=["drawn", "not drawn"], range=[COLOURS[5], ORANGE]),
                legend=_legend(2),
            ),
            opacity=alt.Opacity("v:Q", scale=alt.Scale(domain=[0, THRESHOLD, 1], range=[0.8, 0.12, 0.95]), legend=None),
            tooltip=[_tip("n:N", "bins"), _tip("s:O", "step"), _tip("w:Q", "weight")],
        )
    )
    used = sum(int(row[1].split()[0]) for row in rows)
    total = sum(count for *_, count in parameters)
    text = (
        f"Heat map of CTAugment's bins over steps. At step {steps[-1]:,} {used} of {total} bins are drawn: those whose "
        f"weight is at least {THRESHOLD} of the best of their parameter."
    )
    note = (
        "Each band is a parameter, its first bin on top. The stronger the colour, the nearer a bin's weight to the "
        f"best of its parameter; below {THRESHOLD} of that a bin is not drawn."
    )
    head = ["parameter", "bins drawn at the end", "bins not drawn", "least weight", "largest weight"]
    return Chart("CTAugment's bins", text, _spec(chart, 2 * place + 20), head, rows, note, wide=True)


def calibration(points: Mapping[str, Sequence[tuple[int, int]]]) -> Chart | None:
    """How often predictions of each confidence are right.

    Args:
        points: by name, for equal intervals of confidence how many predictions are in it and how many are right.
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
    names = list(points)
    diagonal = (
        alt.Chart(alt.InlineData(values=[{"c": 0, "v": 0}, {"c": 100, "v": 100}]))
        .mark_line(color=GREY, strokeDash=[4, 4], strokeWidth=1.2)
        .encode(x="c:Q", y="v:Q")
    )
    chart = (
        alt.Chart(alt.InlineData(values=values))
        .mark_point(filled=True, opacity=0.8)
        .encode(
            x=alt.X("c:Q", title="confidence, %", scale=alt.Scale(domain=[0, 100])),
            y=alt.Y("v:Q", title="right, %", scale=alt.Scale(domain=[0, 100])),
            size=alt.Size("n:Q", scale=alt.Scale(type="sqrt", range=[20, 320]), legend=None),
            tooltip=[_tip("k:N", "of"), _tip("c:Q", "confidence about, %"), _tip("v:Q", "right, %"),
                     _tip("n:Q", "predictions")],
            **_colours(names),
        )
    )  # fmt: skip
    text = "How often predictions are right, by their confidence: " + "; ".join(
        f"{name}: {sum(right for _, right in counts)} of {sum(count for count, _ in counts)} are right"
        for name, counts in points.items()
    )
    note = (
        "On the dashed line as many predictions are right as their confidence says; below it they are too sure. The "
        "larger a dot, the more predictions have that confidence."
    )
    head = ["predictions", "confidence", "how many", "right"]
    return Chart("Calibration", f"{text}.", _spec(diagonal + chart, 240), head, rows, note)


def recall(confusion: np.ndarray, classes: Sequence[str]) -> Chart:
    """Share of each class's test images that is found; confusion is (L, L) counts, truth by row."""
    totals = confusion.sum(1)
    found = 100 * np.diag(confusion) / np.maximum(totals, 1)
    shown = _largest(np.where(totals > 0, -found, -np.inf), MOST_CLASSES)
    values = [{"c": numbered(c, classes), "v": short(found[c]), "n": int(totals[c])} for c in shown]
    chart = (
        alt.Chart(alt.InlineData(values=values))
        .mark_bar(color=BLUE, height={"band": 0.7}, cornerRadiusEnd=2)
        .encode(
            x=alt.X("v:Q", title="recall, %", scale=alt.Scale(domain=[0, 100])),
            y=_class_axis("c", [numbered(c, classes) for c in shown], "class"),
            tooltip=[_tip("c:N", "class"), _tip("v:Q", "recall, %"), _tip("n:Q", "test images")],
        )
    )
    worst = shown[int(np.argmin(found[shown]))]
    text = f"Recall by class. The lowest is {found[worst]:.1f} %, of class {classes[worst]}."
    note = f"The {len(shown)} classes of {len(classes)} with the lowest recall." if len(shown) < len(classes) else ""
    rows = [[classes[c], f"{found[c]:.1f} %", str(int(np.diag(confusion)[c])), str(int(totals[c]))] for c in shown]
    head = ["class", "recall", "right", "test images"]
    return Chart("Recall by class", text, _spec(chart, max(110, 26 * len(shown) + 20)), head, rows, note)


def confusion_map(confusion: np.ndarray, classes: Sequence[str]) -> Chart:
    """Which classes are taken for which; confusion is (L, L) counts, truth by row."""
    totals = np.maximum(confusion.sum(1), 1)
    wrong = confusion - np.diag(np.diag(confusion))
    shown = _largest(wrong.sum(0) + wrong.sum(1), MOST_CLASSES)
    few = len(shown) <= 12
    values = [
        {"t": numbered(t, classes), "p": numbered(p, classes), "n": int(confusion[t, p]),
         "v": short(100 * confusion[t, p] / totals[t]), "k": "right" if t == p else "wrong"}
        for t in shown for p in shown if confusion[t, p]
    ]  # fmt: skip
    names = [numbered(c, classes) for c in shown]
    base = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X(
            "p:N",
            title="predicted",
            scale=alt.Scale(domain=names),
            axis=alt.Axis(
                orient="top",
                labelExpr=_LABEL,
                labelAngle=0 if _longest(classes) <= 3 else -90,
                labelLimit=90,
                labelOverlap="greedy",
            ),
        ),
        y=_class_axis("t", names, "true class"),
    )
    chart: Any = base.mark_rect().encode(
        color=alt.Color(
            "k:N", title=None, scale=alt.Scale(domain=["right", "wrong"], range=[BLUE, ORANGE]), legend=_legend(2)
        ),
        opacity=alt.Opacity("v:Q", scale=alt.Scale(type="sqrt", domain=[0, 100], range=[0.08, 0.9]), legend=None),
        tooltip=[_tip("t:N", "true class"), _tip("p:N", "predicted"), _tip("n:Q", "test images"),
                 _tip("v:Q", "of the class, %")],
    )  # fmt: skip
    if few:
        # on a cell of strong colour white, elsewhere as the page's style has it
        strong = "datum.v > 25"
        text_mark = base.mark_text(fontSize=11)
        chart = alt.layer(
            chart,
            text_mark.transform_filter(strong).encode(text="n:Q", color=alt.value("#fff")).properties(name="strong"),
            text_mark.transform_filter(f"!({strong})").encode(text="n:Q").properties(name="weak"),
        )
    pairs = _pairs(wrong)
    worst = [f"{classes[t]} taken for {classes[p]} ({wrong[t, p]})" for t, p in pairs[:3]]
    text = f"Confusion matrix of {confusion.sum():,} test images. " + (
        f"Most often: {', '.join(worst)}." if worst else "Nothing is wrong."
    )
    note = "" if len(shown) == len(classes) else f"The {len(shown)} classes of {len(classes)} with the most errors."
    rows = [
        [classes[t], classes[p], str(int(wrong[t, p])), f"{100 * wrong[t, p] / totals[t]:.1f} %"]
        for t, p in pairs[:MOST_TABLE_ROWS]
    ]
    head = ["true class", "predicted", "test images", "of the class"]
    return Chart("Confusion matrix", text, _spec(chart, max(150, 26 * len(shown) + 40)), head, rows, note)


def _pairs(wrong: np.ndarray) -> list[tuple[int, int]]:
    order = np.argsort(-wrong, axis=None, kind="stable")
    found = [divmod(int(flat), wrong.shape[1]) for flat in order[: MOST_TABLE_ROWS * 2]]
    return [pair for pair in found if wrong[pair]]


def dots(
    title: str,
    unit: str,
    groups: Mapping[str, Sequence[tuple[str, float]]],
    text: str,
    note: str = "",
    zero: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Chart:
    """A row of dots for each group and a tick at their mean.

    Args:
        title: of the chart.
        unit: title of the horizontal axis.
        groups: by name, the dots: name and value.
        text: what is to be seen.
        note: how to read it.
        zero: draw a line at 0.
        marks: published figures, by group.
    """
    names = list(groups)
    values = [{"g": group, "k": name, "v": short(v)} for group, found in groups.items() for name, v in found]
    means = [{"g": group, "v": short(mean(v for _, v in found))} for group, found in groups.items()]
    # room for a dot at either end, which would lie on the names otherwise
    x = alt.X("v:Q", title=unit, scale=alt.Scale(zero=False, padding=10), axis=alt.Axis(tickCount=5))
    y = _name_axis("g", names)
    layers: list[Any] = []
    if zero:
        layers.append(alt.Chart(alt.InlineData(values=[{"v": 0}])).mark_rule(color=GREY, strokeDash=[4, 4]).encode(x=x))
    layers.append(
        alt.Chart(alt.InlineData(values=means))
        .mark_tick(thickness=3, color=ORANGE, height={"band": 0.8})
        .encode(x=x, y=y, tooltip=[_tip("g:N", "group"), _tip("v:Q", f"mean, {unit}")])
    )
    layers.append(
        alt.Chart(alt.InlineData(values=values))
        .mark_point(filled=True, size=55, opacity=0.75, color=BLUE)
        .encode(x=x, y=y, tooltip=[_tip("g:N", "group"), _tip("k:N", "run"), _tip("v:Q", unit)])
    )
    if marks:
        published = [{"g": group, "v": v} for group, v in marks.items()]
        layers.append(
            alt.Chart(alt.InlineData(values=published))
            .mark_point(filled=True, shape="diamond", size=75, color=COLOURS[2])
            .encode(x=x, y=y, tooltip=[_tip("g:N", "group"), _tip("v:Q", f"paper, {unit}")])
        )
    rows = [[group, name, value(v)] for group, found in groups.items() for name, v in found]
    return Chart(title, text, _spec(alt.layer(*layers), max(90, 30 * len(names))), ["group", "run", unit], rows, note)


def shares(title: str, found: Sequence[tuple[str, float]]) -> Chart:
    """Bars of named shares, in 0..1."""
    values = [{"c": name, "v": short(100 * share)} for name, share in found]
    chart = (
        alt.Chart(alt.InlineData(values=values))
        .mark_bar(color=BLUE, height={"band": 0.7}, cornerRadiusEnd=2)
        .encode(
            x=alt.X("v:Q", title="share, %"),
            y=_name_axis("c", [name for name, _ in found]),
            tooltip=[_tip("c:N", "range"), _tip("v:Q", "share, %")],
        )
    )
    text = f"{title}. The largest is {found[0][0]} with {100 * found[0][1]:.0f} %."
    rows = [[name, f"{100 * share:.1f} %"] for name, share in found]
    return Chart(title, text, _spec(chart, max(90, 22 * len(found))), ["range", "share"], rows)


# Parts of charts

# classes are told apart by their number, which a label leaves out: names need not be unique
_LABEL = "replace(datum.label, /^[0-9]+: /, '')"


def numbered(number: int, classes: Sequence[str]) -> str:
    """A class's name with its number, which keeps order and tells equal names apart."""
    return f"{number}: {classes[number]}"


def _longest(names: Sequence[str]) -> int:
    return max(map(len, names))


def _class_axis(field: str, names: Sequence[str], title: str) -> alt.Y:
    return _name_axis(field, names, title, labelExpr=_LABEL)


def _name_axis(field: str, names: Sequence[str], title: str | None = None, **changes: Any) -> alt.Y:
    axis = alt.Axis(labelLimit=140, ticks=False, domain=False, labelOverlap=False, **changes)
    return alt.Y(f"{field}:N", title=title, scale=alt.Scale(domain=list(names)), axis=axis)


def _colours(names: Sequence[str], symbol: str = "circle") -> dict[str, Any]:
    """Colours by name, and dashes beside them where there are more names than colours."""
    shown = _legend(_columns(names), symbolType=symbol) if len(names) > 1 else None
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
    found: dict[str, Any] = {
        "color": alt.Color("k:N", title=None, scale=alt.Scale(domain=list(names), range=colours), legend=shown)
    }
    if len(names) > len(COLOURS):
        dashes = [DASHES[number // len(COLOURS) % len(DASHES)] for number in range(len(names))]
        scale = alt.Scale(domain=list(names), range=dashes)
        found["strokeDash"] = alt.StrokeDash("k:N", title=None, scale=scale, legend=shown)
    return found


def _columns(names: Sequence[str]) -> int:
    """Columns of a legend that is not wider than a phone."""
    return max(1, min(len(names), 250 // (7 * max(map(len, names)) + 34)))


def _legend(columns: int, **changes: Any) -> alt.Legend:
    return alt.Legend(orient="bottom", columns=columns, labelLimit=290, symbolOpacity=1, **changes)


def _step_axis() -> alt.Axis:
    return alt.Axis(format="~s", grid=False, tickCount=5)


def _steps(steps: Sequence[int], times: Sequence[int]) -> alt.X:
    """Columns of a heat map, of which a few are labeled."""
    labeled = [steps[times[n]] for n in _spaced(len(times), 4)]
    return alt.X(
        "s:O",
        title="step",
        scale=alt.Scale(padding=0),
        axis=alt.Axis(values=labeled, labelAngle=0, format="~s", ticks=False, domain=False, labelFlush=True),
    )


def _tip(shorthand: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(shorthand, title=title)


def _spec(chart: Any, height: int) -> dict[str, Any]:
    """Vega-Lite without what all charts share: see `CONFIG`."""
    spec = chart.properties(width="container", height=height).to_dict()
    del spec["config"], spec["$schema"]
    return spec


CONFIG = {
    "mark": {"aria": False},  # the page describes each chart as one image
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "autosize": {"type": "fit-x", "contains": "padding"},
    "view": {"stroke": None},
    "axis": {
        "aria": False,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "gridWidth": 1,
        "tickSize": 3,
    },
    "legend": {"aria": False, "labelFontSize": 12, "symbolStrokeWidth": 2.5, "rowPadding": 4, "columnPadding": 14},
}


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most MOST_POINTS points: means over as many steps each, at the last of them."""
    if len(steps) <= MOST_POINTS:
        return [int(step) for step in steps], list(values)
    parts = np.array_split(np.arange(len(steps)), MOST_POINTS)
    return [int(steps[part[-1]]) for part in parts], [mean(values[n] for n in part) for part in parts]


def _spaced(count: int, most: int) -> list[int]:
    """Numbers below `count`, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _largest(values: np.ndarray, most: int) -> list[int]:
    """Places of the largest values, in their own order."""
    return sorted(np.argsort(-values, kind="stable")[:most].tolist())


def short(number: float) -> float:
    """A number with four digits, which is what a chart shows."""
    return float(f"{number:.4g}")


def value(number: float) -> str:
    """A number for people."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
