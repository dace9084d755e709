"""Histograms as files: each as data, and a few of them as small pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparseforge_core import files

PICTURES = 6
"""Pictures a cell, shared among its kinds of site, with two of each at least: drawing is what mirroring costs."""


def write_histograms(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Write a journal's histogram lines as `<name>/step_000400.json`, and evenly spaced ones as `.png` beside it.

    The last step of each name is always among the pictures.
    """
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        name = line["histogram"]["name"].rpartition("/")[2]
        by_name.setdefault(name, {})[int(line["step"])] = line["histogram"]
    for name, steps in by_name.items():
        place = files.inside(folder, name, "histogram.name")
        place.mkdir(parents=True, exist_ok=True)
        for step, histogram in steps.items():
            body = {"edges": histogram["edges"], "counts": histogram["counts"]}
            (place / f"step_{step:06d}.json").write_text(json.dumps(body))
        for step in _spread(sorted(steps), max(2, PICTURES // len(by_name))):
            _draw(place / f"step_{step:06d}.png", steps[step], f"{name}, step {step}")


def _spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spaced and ending with the last."""
    if len(steps) <= count:
        return steps
    return [steps[round((index + 1) * len(steps) / count) - 1] for index in range(count)]


def _draw(path: Path, histogram: dict[str, Any], title: str) -> None:
    """Shares of mask values in (0, 1), 0 = pruned, 1 = kept; the same axes at every step, so that steps compare."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edges, counts = histogram["edges"], histogram["counts"]
    total = max(sum(counts), 1)
    figure = Figure(figsize=(4.0, 2.4))
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.2, top=0.88)
    axes = figure.add_subplot()
    axes.bar(edges[:-1], [count / total for count in counts], width=edges[1] - edges[0], align="edge", color="#0072B2")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1), xlabel="mask value", ylabel="share of weights", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


__all__ = ["PICTURES", "write_histograms"]
