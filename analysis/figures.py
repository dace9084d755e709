"""The figure: perplexity on each text, and accuracy, against retraining tokens; one line a method, with intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.accuracy_tables import MEAN
from analysis.aggregate import Estimate
from analysis.drawing import COLORS, MARKERS, new_figure, plain
from analysis.frames import ExhibitData
from analysis.table import quoted_rows
from sparseforge_core.store.shown import ShownCurve

FIGURE = "accuracy-vs-tokens"
DASHES: tuple[tuple[float, ...], ...] = ((5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3))
CHOICES = {"boolq": 2, "rte": 2, "winogrande": 2, "piqa": 2, "lambada_openai": math.inf}
"""Answers to choose from, any word for LAMBADA; the other tasks have four."""
GUESSING = "uniform guessing"
WIDTH, HEIGHT, ROW, USUAL = 7.4, 3.7, 0.19, 3
"""Inches: of the figure with one row of panels and the usual rows of legend, and of each row of legend more."""
PANELS = 3.0
"""Inches of each row of panels where there are several."""
ABREAST = 2
"""Panels in a row."""
ACCURACY = "accuracy"
SHORT = 20
"""Letters of a label up to which four stand abreast in the legend."""
LABEL_WIDTH = 0.15
"""Share of a panel's width that a label of the token axis needs."""
FAR = 1.5
"""Times the highest perplexity of a curve, and below the lowest, beyond which a method without retraining is named and
not drawn: its line would press the curves together."""
FLAT = "0.35"
"""Lines across are grey, told apart by their dashes, so that colours are left for the curves."""
WIDE_RANGE = 3.0
"""Ratio of largest to smallest perplexity from which the axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A method at a budget; accuracy in percent."""

    tokens: int
    perplexities: Mapping[str, Estimate]
    """By text."""
    accuracy: Estimate | None
    source: str = ""
    """Where a quoted point comes from; empty for our own."""
    diverged: int = 0
    """Seeds that gave no number because they diverged."""

    def of(self, quantity: str) -> Estimate | None:
        """The accuracy, or the perplexity on a text."""
        return self.accuracy if quantity == ACCURACY else self.perplexities.get(quantity)


def series(data: ExhibitData) -> dict[str, list[Point]]:
    """Points of each method by budget, quoted ones last; rows are named '<method>/<tokens>', 0 for no retraining.

    A quoted accuracy is drawn only if it is of the tasks of our own axis: its column is 'accuracy (<suite>)'. A quoted
    perplexity is one on the exhibit's first text.
    """
    texts = texts_of(data)
    metrics = {text: f"{text}:perplexity" for text in texts}
    accuracy = next((f"accuracy ({suite['name']})" for suite in data.of_kind("zero-shot")), "")
    found: dict[str, list[Point]] = {}
    for row in data.rows:
        diverged = max(row.diverged.get(metric, 0) for metric in (*metrics.values(), MEAN))
        values = {text: row.estimate(metric) for text, metric in metrics.items()}
        known = {text: value for text, value in values.items() if value is not None}
        point = Point(int(row.variant), known, _percent(row.estimate(MEAN)), diverged=diverged)
        found.setdefault(row.group, []).append(point)
    for name, numbers in quoted_rows(data.published).items():
        method, _, tokens = name.rpartition("/")
        said = {number.column: _quoted(number.value) for number in numbers if number.value is not None}
        source = numbers[0].source
        on_text = {texts[0]: said["perplexity"]} if "perplexity" in said else {}
        point = Point(int(tokens), on_text, said.get(accuracy), source)
        found.setdefault(method, []).append(point)
    return {name: sorted(points, key=lambda p: (bool(p.source), p.tokens)) for name, points in found.items()}


def texts_of(data: ExhibitData) -> tuple[str, ...]:
    """Names of the texts whose perplexities the exhibit has; one without a name if it has none."""
    return tuple(str(suite["name"]) for suite in data.of_kind("perplexity")) or ("",)


@dataclass(frozen=True)
class AccuracyVsTokens:
    """A panel for each text and one of accuracy. Methods without retraining are lines across; quoted points are hollow.

    Where an odd number of panels takes several rows, the legend has the place that is left.
    """

    points: dict[str, list[Point]]
    """By method."""
    guessing: float | None
    """Accuracy in percent of guessing; None where several suites share the axis, or none has one."""
    texts: tuple[str, ...] = ("",)
    """What perplexity is measured on."""

    def draw(self) -> Any:
        """The figure."""
        count = len(self.texts) + 1
        rows = -(-count // ABREAST)
        with new_figure(WIDTH, HEIGHT if rows == 1 else PANELS * rows) as figure:
            flat = [name for name, points in self.points.items() if any(p.tokens == 0 for p in points)]
            dashes = {name: DASHES[place % len(DASHES)] for place, name in enumerate(flat)}
            places = list(figure.subplots(rows, ABREAST, squeeze=False).flat)
            panels, free = places[:count], places[count:]
            for axes, text in zip(panels, self.texts, strict=False):
                off = beyond(self.points, text)
                near = {n: [p for p in points if p.tokens or n not in off] for n, points in self.points.items()}
                _panel(axes, near, dashes, text, f"P{self._named(text)[1:]} (lower is better)")
                _scale_perplexity(axes, near, text)
                _name_beyond(axes, off)
            _panel(panels[-1], self.points, dashes, ACCURACY, "Mean zero-shot accuracy, %")
            if self.guessing is not None:
                panels[-1].axhline(self.guessing, color="0.45", linewidth=0.9, label=GUESSING, zorder=1)
            _legend(figure, panels, free, self.points, [*self.texts, ACCURACY])
        return figure

    def _named(self, text: str) -> str:
        return f"perplexity on {text}" if len(self.texts) > 1 else "perplexity"

    def csv(self) -> str:
        """The numbers behind the figure, accuracy in percent."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["method", "tokens", "quantity", "mean", "std", "ci95", "n", "published in"])
        for name, points in self.points.items():
            for point in points:
                for quantity in (*self.texts, ACCURACY):
                    value = point.of(quantity)
                    if value is not None:
                        called = ACCURACY if quantity == ACCURACY else self._named(quantity)
                        numbers = ["" if v is None else f"{v:.12g}" for v in (value.mean, value.std, value.half)]
                        writer.writerow([name, point.tokens, called, *numbers, value.n, point.source])
                if point.diverged:
                    writer.writerow([name, point.tokens, "diverged", "", "", "", point.diverged, point.source])
        return out.getvalue()


def accuracy_vs_tokens(exhibits: Mapping[str, ExhibitData], _: Sequence[ShownCurve]) -> AccuracyVsTokens | None:
    """What the exhibit of that name has to draw; None for a grid without rows for it."""
    data = exhibits[FIGURE]
    if not data.rows and not data.published:
        return None
    suites = data.of_kind("zero-shot")
    guessing = chance(suites[0]["tasks"]) if len(suites) == 1 else None
    return AccuracyVsTokens(series(data), guessing, texts_of(data))


def beyond(drawn: Mapping[str, Sequence[Point]], text: str) -> dict[str, float]:
    """Perplexities of methods without retraining that lie far from all curves, by method; none without curves."""
    known = [(name, p.tokens, p.of(text)) for name, points in drawn.items() for p in points]
    curves = [value.mean for _, tokens, value in known if tokens and value]
    if not curves:
        return {}
    flat = {name: value.mean for name, tokens, value in known if not tokens and value}
    return {name: mean for name, mean in flat.items() if not min(curves) / FAR <= mean <= FAR * max(curves)}


def _name_beyond(axes: Any, off: Mapping[str, float]) -> None:
    lowest, highest = axes.get_ylim()
    ordered = sorted(off.items(), key=lambda pair: -pair[1])
    above = [f"{name} {mean:,.0f}" for name, mean in ordered if mean > highest]
    below = [f"{name} {mean:,.1f}" for name, mean in ordered if mean < lowest]
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 2.0}  # a line may run where the text stands
    place: dict[str, Any] = {"transform": axes.transAxes, "zorder": 10, "fontsize": 7.5, "color": FLAT, "bbox": behind}
    if above:
        axes.text(0.98, 0.98, "\n".join(["above the axis:", *above]), ha="right", va="top", **place)
    if below:
        axes.text(0.02, 0.02, "\n".join(["below the axis:", *below]), ha="left", va="bottom", **place)


def _panel(
    axes: Any, drawn: dict[str, list[Point]], dashes: Mapping[str, tuple[float, ...]], quantity: str, title: str
) -> None:
    budgets = sorted({p.tokens for points in drawn.values() for p in points if p.tokens})
    curves = [name for name, points in drawn.items() if any(p.tokens and not p.source for p in points)]
    colored = [name for name, points in drawn.items() if any(p.tokens for p in points)]
    for name, points in drawn.items():
        index = colored.index(name) if name in colored else None
        color = FLAT if index is None else COLORS[index % len(COLORS)]
        marker = MARKERS[(index or 0) % len(MARKERS)]
        # Our curves step aside a little, so that intervals at one budget stand beside each other.
        aside = 1.025 ** (curves.index(name) - (len(curves) - 1) / 2) if name in curves else 1.0
        for quoted in (False, True):
            found = [(p.tokens, p.of(quantity)) for p in points if bool(p.source) == quoted]
            known = [(tokens, value) for tokens, value in found if value is not None]
            shift = 1.0 if quoted else aside
            _curve(axes, [(t * shift, v) for t, v in known if t], color, marker, name, quoted)
            for _, value in (pair for pair in known if not pair[0]):
                _across(axes, value, color, dashes[name], name, quoted)
        _crosses(axes, [p.tokens * aside for p in points if p.tokens and p.diverged], color, name)
    axes.set_title(title)
    axes.set_xlabel("Retraining tokens")
    if budgets:
        axes.set_xscale("log")
        axes.set_xlim(budgets[0] / 1.35, budgets[-1] * 1.35)
        labelled = ticks(budgets)
        axes.set_xticks(labelled, [short(tokens) for tokens in labelled])
        axes.minorticks_off()
    else:
        axes.set_xticks([])
    plain(axes, "y")


def ticks(budgets: list[int]) -> list[int]:
    """The budgets to label on a logarithmic axis: ascending, without those whose label would touch the one before."""
    apart = max(math.log(budgets[-1] / budgets[0]) * LABEL_WIDTH, 1e-9)
    chosen = budgets[:1]
    for tokens in budgets[1:]:
        if math.log(tokens / chosen[-1]) >= apart:
            chosen.append(tokens)
    return chosen


def _curve(axes: Any, points: list[tuple[float, Estimate]], color: str, marker: str, name: str, quoted: bool) -> None:
    if not points:
        return
    axes.errorbar(
        [tokens for tokens, _ in points],
        [value.mean for _, value in points],
        yerr=[value.half or 0.0 for _, value in points],
        color=color,
        marker=marker,
        markersize=6.5 if quoted else 5,
        markerfacecolor="white" if quoted else color,
        linestyle=":" if quoted else "-",
        linewidth=1.0 if quoted else 1.5,
        capsize=0 if quoted else 2.5,
        elinewidth=0.9,
        label=f"{name} (published)" if quoted else name,
        zorder=3,
    )


def _crosses(axes: Any, places: list[float], color: str, name: str) -> None:
    """A cross at the upper edge for each budget at which seeds of a method diverged."""
    if places:
        top, label = axes.get_xaxis_transform(), f"{name}: diverged"
        axes.plot(places, [0.97] * len(places), "x", color=color, transform=top, label=label, zorder=4)


def _across(axes: Any, value: Estimate, color: str, dashes: tuple[float, ...], name: str, quoted: bool) -> None:
    label = f"{name} (published)" if quoted else name
    axes.axhline(
        value.mean, color=color, linestyle=(0, dashes), linewidth=0.8 if quoted else 1.3, label=label, zorder=2
    )
    if value.half is not None:
        axes.axhspan(value.mean - value.half, value.mean + value.half, color=color, alpha=0.12, linewidth=0, zorder=1)


def _scale_perplexity(axes: Any, drawn: dict[str, list[Point]], text: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    means = [value.mean for points in drawn.values() for p in points if (value := p.of(text)) is not None]
    if not means or max(means) < WIDE_RANGE * min(means):
        return
    axes.set_yscale("log")
    # An interval that reaches zero or beyond has no place on a logarithmic axis; the means decide what is seen.
    axes.set_ylim(min(means) / 1.35, max(means) * 1.35)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def chance(tasks: list[str]) -> float:
    """Mean accuracy in percent of guessing uniformly."""
    return 100.0 * sum(1 / CHOICES.get(task, 4) for task in tasks) / len(tasks)


def _legend(
    figure: Any, panels: Sequence[Any], free: Sequence[Any], drawn: dict[str, list[Point]], quantities: Sequence[str]
) -> None:
    named: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in named}
    if GUESSING in named:
        named[GUESSING] = named.pop(GUESSING)  # last
    values = [p.of(quantity) for points in drawn.values() for p in points for quantity in quantities]
    title = (
        "Bars and bands: 95 % t intervals over seeds"
        if any(v is not None and v.half is not None for v in values)
        else None
    )
    for axes in free:
        axes.set_axis_off()
    if named and free:
        free[0].legend(named.values(), named.keys(), loc="center", frameon=False, title=title)
    elif named:
        abreast = 4 if max(map(len, named)) <= SHORT else 3
        rows = -(-len(named) // abreast)
        figure.set_size_inches(WIDTH, figure.get_size_inches()[1] + ROW * max(0, rows - USUAL))
        columns = -(-len(named) // rows)
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False, title=title
        )


def _percent(value: Estimate | None) -> Estimate | None:
    if value is None:
        return None
    std, half = (None if v is None else 100.0 * v for v in (value.std, value.half))
    return Estimate(100.0 * value.mean, std, value.n, half)


def _quoted(value: float) -> Estimate:
    return Estimate(value, None, 1, None)


def short(tokens: int) -> str:
    """A number of tokens in three digits."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            whole = round(tokens / size)  # a budget in whole steps is a little more than it is called
            return f"{whole if abs(tokens - whole * size) < 0.006 * tokens else f'{tokens / size:.3g}'}{letter}"
    return str(tokens)
