"""The figures that show why: soft against hard masks, ablations, and the mask on its way from soft to hard.

Each takes the grid's exhibits and the curves of its training runs, and gives the numbers to draw; None where the store
has nothing to draw, as a store from before curves were recorded. The numbers draw themselves, in any process.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.accuracy_tables import MEAN
from analysis.aggregate import Estimate
from analysis.bands import LINES, Band, bands, bands_csv, draw_bands
from analysis.drawing import BAD, COLORS, GOOD, MARKERS, new_figure, plain
from analysis.frames import ExhibitData, ExhibitRow
from analysis.verdicts import Verdict, verdicts
from sparseforge_core.store.rows import Curve
from sparseforge_core.store.shown import ShownCurve

PICTURES = 6
"""Moments of a mask that are shown."""
LOSS = ("loss/task", "loss/total")
MIDDLE, GAP = "mask/mid_fraction", "mask/soft_hard_gap"
GAPS = (0, 0.001, 0.01, 0.1, 0.5)
"""Labels of the axis of soft-hard gaps."""


@dataclass(frozen=True)
class HardVsSoft:
    """Training loss of the retrained methods of Table 2, and where it ends: soft masks against hard ones."""

    bands: list[Band]
    """Of all rows; those that are drawn come first."""
    ends: list[tuple[int, str, Estimate | None]]
    """(number of the band, label, perplexity) of the rows whose losses are drawn."""

    def draw(self) -> Any:
        """The figure."""
        with new_figure(7.4, 3.4) as figure:
            left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
            draw_bands(left, self.bands, "Training loss")
            _ends(right, self.ends, len(self.bands[:LINES]))
        return figure

    def csv(self) -> str:
        """The curves."""
        return bands_csv("training loss", self.bands)


def hard_vs_soft(exhibits: Mapping[str, ExhibitData], curves: Sequence[ShownCurve]) -> HardVsSoft | None:
    """From Table 2, else from the figure's rows."""
    found = bands(curves, ("table-2", "accuracy-vs-tokens"), LOSS)
    if not found:
        return None
    data = exhibits["table-2"]
    metric = next((f"{suite['name']}:perplexity" for suite in data.of_kind("perplexity")), "")
    value = {row.label: row.estimate(metric) for row in data.rows}
    found = _lowest_first(found, {label: estimate.mean for label, estimate in value.items() if estimate is not None})
    ends = [(index, band.row, value[band.row]) for index, band in enumerate(found[:LINES]) if band.row in value]
    return HardVsSoft(found, ends)


def _lowest_first(found: Sequence[Band], means: Mapping[str, float]) -> list[Band]:
    """The `LINES` bands that end lowest, which are drawn, then the others; each part in the table's order."""
    drawn = {band.row for band in sorted(found, key=lambda band: means.get(band.row, math.inf))[:LINES]}
    return sorted(found, key=lambda band: band.row not in drawn)


def _ends(axes: Any, ends: Sequence[tuple[int, str, Estimate | None]], lines: int) -> None:
    for index, _, value in ends:
        if value is not None:
            axes.errorbar(
                value.mean, -index, xerr=value.half or 0.0, color=COLORS[index], marker=MARKERS[index], capsize=2.5
            )
    axes.set_yticks([-index for index, _, _ in ends], [label for _, label, _ in ends])
    axes.set_ylim(-lines + 0.4, 0.6)
    axes.set_xlabel("Final perplexity (95 % t)")
    plain(axes, "x")


@dataclass(frozen=True)
class MaskSoftness:
    """Share of mask entries in (0.1, 0.9), and mean distance to the hard mask, over training."""

    middle: list[Band]
    gap: list[Band]

    def draw(self) -> Any:
        """The figure."""
        with new_figure(7.4, 3.6) as figure:
            left, right = figure.subplots(1, 2)
            draw_bands(left, self.middle, "Mid-range share of the mask")
            draw_bands(right, self.gap, "Soft-hard gap, mean |m - hard m|")
            # Logarithmic down to the smallest gap that matters, then straight to zero, where every mask must end.
            right.set_yscale("symlog", linthresh=GAPS[1])
            right.set_yticks(GAPS, [f"{gap:g}" for gap in GAPS])
            right.set_ylim(-GAPS[1] / 10, 0.6)
            right.minorticks_off()
            handles, labels = left.get_legend_handles_labels()
            several = max(band.seeds for band in self.middle) > 1
            title = "Lines: mean over seeds; bands: lowest to highest seed" if several else None
            columns = min(4, len(labels))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, title=title)
        return figure

    def csv(self) -> str:
        """The curves of both panels."""
        return bands_csv(MIDDLE, self.middle) + bands_csv(GAP, self.gap, head=False)


def mask_softness(_: Mapping[str, ExhibitData], curves: Sequence[ShownCurve]) -> MaskSoftness | None:
    """From Table 3, else Table 2, else the figure's rows."""
    where = ("table-3", "table-2", "accuracy-vs-tokens")
    middle, gap = bands(curves, where, (MIDDLE,)), bands(curves, where, (GAP,))
    return MaskSoftness(middle, gap) if middle and gap else None


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
    """Accuracy in points, perplexity of each text in percent: rows against the full method, dense is none.

    Significant is what the table calls better or worse.
    """
    full = data.row(reference)
    texts = [suite["name"] for suite in data.of_kind("perplexity")]
    metrics = [("accuracy, points", MEAN)]
    metrics += [(f"perplexity{f' on {text}' if texts[1:] else ''}, %", f"{text}:perplexity") for text in texts]
    tested = {(metric, one.row): one for _, metric in metrics for one in verdicts(data, [("", metric)], reference)}
    found = []
    for row in data.rows:
        if full is None or row is full or row.is_reference:
            continue
        for quantity, metric in metrics:
            delta = _delta(row, full, quantity, metric, tested.get((metric, row.row)))
            if delta is not None:
                found.append(delta)
    return found


def _delta(row: ExhibitRow, full: ExhibitRow, quantity: str, metric: str, tested: Verdict | None) -> Delta | None:
    if tested is not None:
        parts = (tested.found.difference, tested.low, tested.high)
        value, low, high = (_hundredths(part, metric) for part in parts)
        significant = tested.says in ("better", "worse")
        return Delta(row.label, quantity, value, low, high, "bootstrap over seeds and items", significant)
    known = row.versus(full, metric, log=metric != MEAN)
    if known is None:
        return None
    how = f"over seeds that both have: {known.n}; no test"
    return Delta(row.label, quantity, _hundredths(known.mean, metric), None, None, how, False)


def _hundredths(difference: float, metric: str) -> float:
    """Points of an accuracy; percent of a perplexity, of which differences are those of logarithms."""
    return 100 * (difference if metric == MEAN else float(np.expm1(difference)))


@dataclass(frozen=True)
class Ablations:
    """Table 3 as differences to the full method; the criterion's ablations are among its rows."""

    deltas: list[Delta]

    def draw(self) -> Any:
        """The figure."""
        labels = list(dict.fromkeys(delta.label for delta in self.deltas))
        quantities = list(dict.fromkeys(delta.quantity for delta in self.deltas))
        with new_figure(7.4, 1.25 + 0.34 * len(labels)) as figure:
            panels = np.atleast_1d(figure.subplots(1, len(quantities), sharey=True))
            for axes, quantity in zip(panels, quantities, strict=True):
                for delta in (d for d in self.deltas if d.quantity == quantity):
                    _point(axes, delta, -labels.index(delta.label))
                axes.axvline(0, color="0.35", linewidth=0.9, zorder=1)
                better = "right" if "accuracy" in quantity else "left"
                axes.set_xlabel(f"Change of {quantity}\n(better: {better})")
                plain(axes, "x")
            panels[0].set_yticks([-n for n in range(len(labels))], labels)
            panels[0].set_ylim(-len(labels) + 0.5, 0.5)
            said = (
                "Against the full method; filled: significant, as in Table 3; bars: 95 % bootstrap over seeds and items"
            )
            if any(delta.low is None for delta in self.deltas):
                said += ";\nno bar: over the seeds that both have (not all are in), no test"
            figure.supxlabel(said, size=8)
        return figure

    def csv(self) -> str:
        """Every difference."""
        return _deltas_csv(self.deltas)


def ablations(exhibits: Mapping[str, ExhibitData], _: Sequence[ShownCurve]) -> Ablations | None:
    """From Table 3."""
    found = deltas(exhibits["table-3"])
    return Ablations(found) if found else None


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
    writer.writerow(["row", "quantity", "difference to full", "low95", "high95", "interval", "significant"])
    for d in found:
        numbers = ["" if v is None else f"{v:.6g}" for v in (d.value, d.low, d.high)]
        writer.writerow([d.label, d.quantity, *numbers, d.how, d.significant])
    return out.getvalue()


@dataclass(frozen=True)
class MaskHistograms:
    """Mask values of one SparseForge run, by kind of weight (rows) and moment (columns)."""

    label: str
    seed: int
    cell_key: str
    kinds: list[tuple[str, Curve]]

    def draw(self) -> Any:
        """The figure."""
        kinds = self.kinds
        with new_figure(7.4, 0.75 + 1.25 * len(kinds)) as figure:
            moments = min(PICTURES, *(len(curve.steps) for _, curve in kinds), PICTURES)
            panels = figure.subplots(len(kinds), moments, sharex=True, sharey=True, squeeze=False)
            for row, (kind, curve) in zip(panels, kinds, strict=True):
                _moments(row, kind, curve)
            for axes in panels[-1]:
                axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            run = f"{self.label}, seed {self.seed}, {self.cell_key}"
            figure.supxlabel(f"Mask value: 0 pruned, 1 kept ({run})", size=8.5)
        return figure

    def csv(self) -> str:
        """Every histogram of the run, drawn or not."""
        return _histograms_csv(self.label, self.kinds)


def mask_histograms(_: Mapping[str, ExhibitData], curves: Sequence[ShownCurve]) -> MaskHistograms | None:
    """Of the first run whose mask was ever soft, in Table 2, else in Table 3, else in the figure; else of any run."""
    order = ("table-2", "table-3", "accuracy-vs-tokens")
    own = [one for one in curves if one.name.startswith("histogram:") and one.exhibit in order]
    if not own:
        return None
    soft = {one.cell_key for one in own if _was_soft(one.curve)}
    first = min(own, key=lambda one: (one.cell_key not in soft, order.index(one.exhibit), one.position, one.seed))
    run = [one for one in own if (one.exhibit, one.row, one.seed) == (first.exhibit, first.row, first.seed)]
    kinds = [(one.name.rpartition("/")[2], one.curve) for one in sorted(run, key=lambda one: one.name)]
    return MaskHistograms(first.label, first.seed, first.cell_key, kinds)


def _was_soft(curve: Curve) -> bool:
    """Whether a histogram ever held an entry between the lowest and the highest values: a fixed mask never does."""
    return any(any(counts[1:-1]) for counts in curve.values if counts)


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
