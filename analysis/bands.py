"""Curves of several seeds as one line with a band around it, over the share of training done."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.drawing import COLORS, MARKERS, plain
from sparseforge_core.store.curves import DIVERGED
from sparseforge_core.store.shown import ShownCurve

LINES = 7
"""Lines that a panel can hold and still be read; the CSV has all."""
GRID = 101
"""Points of the common axis on which curves of several seeds are averaged."""


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


def bands(curves: Sequence[ShownCurve], exhibits: tuple[str, ...], names: tuple[str, ...]) -> list[Band]:
    """The curves of the first of `exhibits` that has any of the first of `names` that it has, by row."""
    planned = {one.cell_key: int(one.curve.values[0]) for one in curves if one.name == DIVERGED}
    for exhibit in exhibits:
        for name in names:
            rows: dict[str, list[ShownCurve]] = {}
            for one in curves:
                if one.exhibit == exhibit and one.name == name:
                    rows.setdefault(one.row, []).append(one)
            if rows:
                return [_band(own, planned) for own in rows.values()]
    return []


def _band(rows: Sequence[ShownCurve], planned: Mapping[str, int]) -> Band:
    """The seeds of one row; a line ends where its first seed does.

    `planned` has the steps that cells which diverged should have made.
    """
    done = np.linspace(0, 1, GRID)
    lines = []
    for one in rows:
        key, curve = one.cell_key, one.curve
        known = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None]
        steps, values = zip(*known, strict=True) if known else ((0, 1), (np.nan, np.nan))
        whole, right = (planned[key], np.nan) if key in planned else (curve.steps[-1], None)
        lines.append(np.interp(done * whole, steps, values, left=np.nan, right=right))
    stacked = np.array(lines)
    label, ended = rows[0].label, sum(one.cell_key in planned for one in rows)
    return Band(
        label,
        f"{label} ({ended} diverged)" if ended else label,
        len(lines),
        done,
        stacked.mean(axis=0),
        stacked.min(axis=0),
        stacked.max(axis=0),
    )


def draw_bands(axes: Any, found: Sequence[Band], title: str) -> None:
    """The first LINES of them; `title` names the vertical axis."""
    for index, band in enumerate(found[:LINES]):
        marks = {"marker": MARKERS[index], "markevery": (8 + 2 * index, 25), "markersize": 4}
        axes.plot(100 * band.done, band.mean, color=COLORS[index], label=band.label, linewidth=1.4, **marks)
        if band.seeds > 1:
            axes.fill_between(100 * band.done, band.low, band.high, color=COLORS[index], alpha=0.15, linewidth=0)
    axes.set_xlabel("Training done, %")
    axes.set_ylabel(title)
    axes.set_xlim(0, 100)
    plain(axes, "y")


def bands_csv(quantity: str, found: Sequence[Band], *, head: bool = True) -> str:
    """Every second point of each line, to six significant digits."""
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
