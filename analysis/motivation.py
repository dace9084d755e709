"""The figures that show why: soft against hard masks, ablations, and the mask on its way from soft to hard.

Each takes the grid's exhibits and the curves of its training runs, and gives a figure with the rows behind it; None
where the store has nothing to draw, as a store from before curves were recorded.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.accuracy_tables import MEAN
from analysis.drawing import BAD, COLORS, GOOD, MARKERS, new_figure, plain
from analysis.frames import ExhibitData, ExhibitRow
from analysis.significance import compare, interval, paired
from sparseforge_core.store.curves import DIVERGED

LINES = 7
"""Lines that a panel can hold and still be read; the CSV has all."""
PICTURES = 6
"""Moments of a mask that are shown."""
LOSS = ("loss/task", "loss/total")
MIDDLE, GAP = "mask/mid_fraction", "mask/soft_hard_gap"
GAPS = (0, 0.001, 0.01, 0.1, 0.5)
"""Labels of the axis of soft-hard gaps."""
GRID = 101
"""Points of the common axis on which curves of several seeds are averaged."""

Made = tuple[Any, str] | None


@dataclass(frozen=True)
class Band:
    """One row's curve: mean over seeds, and the lowest and highest seed, over the share of training done."""

    row: str
    """The row's label; `label` also says how many seeds diverged."""
    label: str
    seeds: int
    done: Any
    mean: Any
    low: Any
    high: Any


def bands(curves: pd.DataFrame, exhibits: tuple[str, ...], names: tuple[str, ...]) -> list[Band]:
    """The curves of the first of `exhibits` that has any of the first of `names` that it has, by row."""
    ends = curves[curves.name == DIVERGED]
    planned = {key: int(curve.values[0]) for key, curve in zip(ends.cell_key, ends.curve, strict=True)}
    for exhibit in exhibits:
        for name in names:
            own = curves[(curves.exhibit == exhibit) & (curves.name == name)]
            if len(own):
                return [_band(str(rows.label.iloc[0]), rows, planned) for _, rows in own.groupby("row", sort=False)]
    return []


def _band(label: str, rows: pd.DataFrame, planned: Mapping[str, int]) -> Band:
    """`planned` has the steps that cells which diverged should have made; a line ends where its first seed does."""
    done = np.linspace(0, 1, GRID)
    lines = []
    for key, curve in zip(rows.cell_key, rows.curve, strict=True):
        known = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None]
        steps, values = zip(*known, strict=True) if known else ((0, 1), (np.nan, np.nan))
        whole, right = (planned[key], np.nan) if key in planned else (curve.steps[-1], None)
        lines.append(np.interp(done * whole, steps, values, left=np.nan, right=right))
    stacked = np.array(lines)
    ended = sum(key in planned for key in rows.cell_key)
    return Band(
        label,
        f"{label} ({ended} diverged)" if ended else label,
        len(lines),
        done,
        stacked.mean(axis=0),
        stacked.min(axis=0),
        stacked.max(axis=0),
    )


def hard_vs_soft(exhibits: Mapping[str, ExhibitData], curves: pd.DataFrame) -> Made:
    """Training loss of every retrained method of Table 2, and where it ends: soft masks against hard ones."""
    found = bands(curves, ("table-2", "accuracy-vs-tokens"), LOSS)
    if not found:
        return None
    with new_figure(7.4, 3.4) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _lines(left, found, "Training loss")
        data = exhibits["table-2"]
        _ends(right, data, [band.row for band in found[:LINES]])
    return figure, _bands_csv("training loss", found)


def _ends(axes: Any, data: ExhibitData, labels: list[str]) -> None:
    metric = next((f"{suite['name']}:perplexity" for suite in data.of_kind("perplexity")), "")
    rows = [(index, row) for index, label in enumerate(labels) for row in data.rows if row.label == label]
    for index, row in rows:
        value = row.estimate(metric)
        if value is not None:
            axes.errorbar(
                value.mean, -index, xerr=value.half or 0.0, color=COLORS[index], marker=MARKERS[index], capsize=2.5
            )
    axes.set_yticks([-index for index, _ in rows], [row.label for _, row in rows])
    axes.set_ylim(-len(labels) + 0.4, 0.6)
    axes.set_xlabel("Perplexity after training (95 % t)")
    plain(axes, "x")


def _lines(axes: Any, found: list[Band], title: str) -> None:
    for index, band in enumerate(found[:LINES]):
        marks = {"marker": MARKERS[index], "markevery": (8 + 2 * index, 25), "markersize": 4}
        axes.plot(100 * band.done, band.mean, color=COLORS[index], label=band.label, linewidth=1.4, **marks)
        if band.seeds > 1:
            axes.fill_between(100 * band.done, band.low, band.high, color=COLORS[index], alpha=0.15, linewidth=0)
    axes.set_xlabel("Training done, %")
    axes.set_ylabel(title)
    axes.set_xlim(0, 100)
    plain(axes, "y")


def mask_softness(_: Mapping[str, ExhibitData], curves: pd.DataFrame) -> Made:
    """Share of mask entries in (0.1, 0.9), and mean distance to the hard mask, over training."""
    where = ("table-3", "table-2", "accuracy-vs-tokens")
    middle, gap = bands(curves, where, (MIDDLE,)), bands(curves, where, (GAP,))
    if not middle or not gap:
        return None
    with new_figure(7.4, 3.6) as figure:
        left, right = figure.subplots(1, 2)
        _lines(left, middle, "Mid-range share of the mask")
        _lines(right, gap, "Soft-hard gap, mean |m - hard m|")
        # Logarithmic down to the smallest gap that matters, then straight to zero, where every mask must end.
        right.set_yscale("symlog", linthresh=GAPS[1])
        right.set_yticks(GAPS, [f"{gap:g}" for gap in GAPS])
        right.set_ylim(-GAPS[1] / 10, 0.6)
        right.minorticks_off()
        handles, labels = left.get_legend_handles_labels()
        title = "Lines: mean over seeds; bands: lowest to highest seed" if max(b.seeds for b in middle) > 1 else None
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, title=title
        )
    return figure, _bands_csv(MIDDLE, middle) + _bands_csv(GAP, gap, head=False)


def _bands_csv(quantity: str, found: list[Band], *, head: bool = True) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if head:
        writer.writerow(["quantity", "row", "seeds", "share of training", "mean", "lowest seed", "highest seed"])
    for band in found:
        for place in range(0, GRID, 2):
            values = [band.mean[place], band.low[place], band.high[place]]
            if not np.isnan(values[0]):
                done = f"{band.done[place]:.2f}"
                writer.writerow([quantity, band.label, band.seeds, done, *(f"{v:.6g}" for v in values)])
    return out.getvalue()


@dataclass(frozen=True)
class Delta:
    """A row of Table 3 minus the full method."""

    label: str
    quantity: str
    value: float
    low: float | None
    high: float | None
    how: str
    """Where the interval comes from."""
    significant: bool


def deltas(data: ExhibitData, reference: str = "full") -> list[Delta]:
    """Accuracy in points and perplexity in percent, each row against the full method; dense is no ablation."""
    full = data.row(reference)
    metrics = [("accuracy, points", MEAN)]
    metrics += [("perplexity, %", f"{suite['name']}:perplexity") for suite in data.of_kind("perplexity")[:1]]
    found = []
    for row in data.rows:
        if full is None or row is full or row.is_reference:
            continue
        for quantity, metric in metrics:
            delta = _delta(row, full, quantity, metric)
            if delta is not None:
                found.append(delta)
    return found


def _delta(row: ExhibitRow, full: ExhibitRow, quantity: str, metric: str) -> Delta | None:
    items, other = row.items(metric), full.items(metric)
    if items is not None and other is not None and paired(items, other):
        one, (low, high) = compare(items, other), interval(items, other)
        how = "bootstrap over seeds and items"
        return Delta(row.label, quantity, 100 * one.difference, 100 * low, 100 * high, how, one.p < 0.05)
    of, to = row.estimate(metric), full.estimate(metric)
    if of is None or to is None:
        return None
    value = of.mean - to.mean if metric == MEAN else float(np.log(of.mean / to.mean))
    return Delta(row.label, quantity, 100 * value, None, None, "no outcomes of single items", False)


def ablations(exhibits: Mapping[str, ExhibitData], _: pd.DataFrame) -> Made:
    """Table 3 as differences to the full method; the criterion's ablations are among its rows."""
    found = deltas(exhibits["table-3"])
    if not found:
        return None
    labels = list(dict.fromkeys(delta.label for delta in found))
    quantities = list(dict.fromkeys(delta.quantity for delta in found))
    with new_figure(7.4, 1.25 + 0.34 * len(labels)) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(quantities), sharey=True))
        for axes, quantity in zip(panels, quantities, strict=True):
            for delta in (d for d in found if d.quantity == quantity):
                _point(axes, delta, -labels.index(delta.label))
            axes.axvline(0, color="0.35", linewidth=0.9, zorder=1)
            better = "right" if "accuracy" in quantity else "left"
            axes.set_xlabel(f"Change of {quantity} (better: {better})")
            plain(axes, "x")
        panels[0].set_yticks([-n for n in range(len(labels))], labels)
        panels[0].set_ylim(-len(labels) + 0.5, 0.5)
        figure.supxlabel("Against the full method; filled: p < 0.05; bars: 95 % bootstrap over seeds and items", size=8)
    return figure, _deltas_csv(found)


def _point(axes: Any, delta: Delta, height: float) -> None:
    good = (delta.value > 0) == ("accuracy" in delta.quantity)
    color, marker = (GOOD, "^") if good else (BAD, "v")
    if delta.low is not None and delta.high is not None:
        axes.plot([delta.low, delta.high], [height, height], color=color, linewidth=1.3, zorder=2)
    face = color if delta.significant else "white"
    axes.plot(delta.value, height, marker=marker, color=color, markerfacecolor=face, markersize=6, zorder=3)


def _deltas_csv(found: list[Delta]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "quantity", "difference to full", "low95", "high95", "interval", "p < 0.05"])
    for d in found:
        numbers = ["" if v is None else f"{v:.6g}" for v in (d.value, d.low, d.high)]
        writer.writerow([d.label, d.quantity, *numbers, d.how, d.significant])
    return out.getvalue()


def mask_histograms(_: Mapping[str, ExhibitData], curves: pd.DataFrame) -> Made:
    """Mask values of one SparseForge run, by kind of weight (rows) and moment (columns)."""
    own = curves[curves.name.str.startswith("histogram:")]
    order = {name: place for place, name in enumerate(("table-2", "table-3", "accuracy-vs-tokens"))}
    own = own.assign(place=own.exhibit.map(order)).dropna(subset="place")
    own = own.sort_values(["place", "position", "seed"], kind="stable")
    if own.empty:
        return None
    first = own.iloc[0]
    own = own[(own.exhibit == first.exhibit) & (own.row == first.row) & (own.seed == first.seed)].sort_values("name")
    kinds = [(curve.name.rpartition("/")[2], curve) for curve in own.curve]
    with new_figure(7.4, 0.75 + 1.25 * len(kinds)) as figure:
        moments = min(PICTURES, *(len(curve.steps) for _, curve in kinds), PICTURES)
        panels = figure.subplots(len(kinds), moments, sharex=True, sharey=True, squeeze=False)
        for row, (kind, curve) in zip(panels, kinds, strict=True):
            _moments(row, kind, curve)
        for axes in panels[-1]:
            axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        figure.supxlabel(f"Mask value: 0 pruned, 1 kept ({first.label}, seed {first.seed}, {first.cell_key})", size=8.5)
    return figure, _histograms_csv(str(first.label), kinds)


def _moments(row: Any, kind: str, curve: Any) -> None:
    last = len(curve.steps) - 1
    chosen = [round(index * last / max(len(row) - 1, 1)) for index in range(len(row))]
    for axes, index in zip(row, chosen, strict=True):
        counts = np.array(curve.values[index], dtype=float)
        edges = curve.edges
        shares = 100 * counts / max(counts.sum(), 1)
        axes.stairs(shares, edges, fill=True, color=COLORS[0], linewidth=0)  # one path where bars would be twenty
        axes.set_title(f"step {curve.steps[index]:,}", size=8)
        plain(axes, "y")
    row[0].set_ylabel(f"{kind}\n% of weights", size=8.5)


def _histograms_csv(label: str, kinds: list[tuple[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "weights", "step", "from", "to", "count"])
    for kind, curve in kinds:
        for step, counts in zip(curve.steps, curve.values, strict=True):
            for low, high, count in zip(curve.edges[:-1], curve.edges[1:], counts, strict=True):
                writer.writerow([label, kind, step, f"{low:g}", f"{high:g}", count])
    return out.getvalue()
