"""The figure: perplexity and accuracy against retraining tokens, one line a method, intervals over seeds."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from analysis.aggregate import Estimate
from analysis.frames import ExhibitData

# Okabe and Ito's palette: told apart by readers with any colour vision, and in grey by the markers.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
    ("#000000", "X"),
)
FONT = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8.5, "svg.hashsalt": "sparseforge"}


@dataclass(frozen=True)
class Point:
    """A method at a budget."""

    tokens: int
    perplexity: Estimate | None
    accuracy: Estimate | None


def series(data: ExhibitData) -> dict[str, list[Point]]:
    """Points of each method, by budget; rows are named '<method>/<tokens>', 0 tokens for one-shot methods."""
    metric = next((m for m in sorted(data.metrics()) if m.endswith(":perplexity")), "")
    found: dict[str, list[Point]] = {}
    for row in data.rows:
        point = Point(int(row.variant), row.estimate(metric), row.estimate("mean/acc"))
        found.setdefault(row.group, []).append(point)
    return {name: sorted(points, key=lambda p: p.tokens) for name, points in found.items()}


def accuracy_vs_tokens(data: ExhibitData) -> Any:
    """The figure of two panels. Methods without retraining are lines across, labelled where they end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(FONT):
        figure = Figure(figsize=(7.2, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        drawn = series(data)
        for axes, attribute, scale, title in (
            (left, "perplexity", 1.0, "Perplexity, held-out text (lower is better)"),
            (right, "accuracy", 100.0, "Mean zero-shot accuracy, %"),
        ):
            _panel(axes, drawn, attribute, scale, title)
        handles, labels = left.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _panel(axes: Any, drawn: dict[str, list[Point]], attribute: str, scale: float, title: str) -> None:
    budgets = sorted({p.tokens for points in drawn.values() for p in points if p.tokens})
    for (color, marker), (name, points) in zip(STYLES, drawn.items(), strict=False):
        known = [(p.tokens, getattr(p, attribute)) for p in points if getattr(p, attribute) is not None]
        across = [value for tokens, value in known if tokens == 0]
        along = [(tokens, value) for tokens, value in known if tokens]
        if along:
            half = [scale * (value.half or 0.0) for _, value in along]
            axes.errorbar(
                [tokens for tokens, _ in along],
                [scale * value.mean for _, value in along],
                yerr=half,
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.4,
                capsize=2.5,
                elinewidth=0.9,
                label=name,
            )
        for value in across:
            axes.axhline(scale * value.mean, color=color, linestyle=(0, (5, 3)), linewidth=1.2, label=name)
    axes.set_title(title)
    axes.set_xlabel("retraining tokens")
    if budgets:
        axes.set_xscale("log")
        axes.set_xlim(budgets[0] / 1.25, budgets[-1] * 1.25)
        axes.set_xticks(budgets, [_short(tokens) for tokens in budgets])
        axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def figure_csv(data: ExhibitData) -> str:
    """The numbers behind the figure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "tokens", "quantity", "mean", "std", "ci95", "n"])
    for name, points in series(data).items():
        for point in points:
            for quantity in ("perplexity", "accuracy"):
                value = getattr(point, quantity)
                if value is not None:
                    spread = ["" if v is None else repr(v) for v in (value.std, value.half)]
                    writer.writerow([name, point.tokens, quantity, repr(value.mean), *spread, value.n])
    return out.getvalue()


def _short(tokens: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return str(tokens)
