"""Curves: what training showed of itself over its steps, thinned so that a store of thousands of cells stays small."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sparseforge_core.store.rows import Curve

POINTS = 100
"""Points that are kept of a curve: the first, the last, and evenly spaced ones between."""
DIVERGED = "diverged"
"""The curve of a run that ended early: one point, at the last good step; its value is the steps that were planned."""
LEFT_OUT = ("tokens_per_second",)
"""Scalars that say something of the machine, not of the run."""


def curves_of(lines: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """The curves in the lines of a journal, by name; of a step that was logged twice the last line counts."""
    scalars: dict[str, dict[int, Any]] = {}
    edges: dict[str, tuple[float, ...]] = {}
    for line in lines:
        for name, value in line.get("scalars", {}).items():
            if name not in LEFT_OUT:
                scalars.setdefault(name, {})[int(line["step"])] = value
        if histogram := line.get("histogram"):
            name = f"histogram:{histogram['name']}"
            edges[name] = tuple(histogram["edges"])
            scalars.setdefault(name, {})[int(line["step"])] = list(histogram["counts"])
        if line.get("event") == DIVERGED:
            scalars[DIVERGED] = {int(line["detail"]["after"]): int(line["detail"]["of"])}
    return [_thinned(name, dict(sorted(points.items())), edges.get(name, ())) for name, points in scalars.items()]


def _thinned(name: str, points: dict[int, Any], edges: tuple[float, ...]) -> Curve:
    steps = list(points)
    if len(steps) > POINTS:
        chosen = sorted({round(index * (len(steps) - 1) / (POINTS - 1)) for index in range(POINTS)})
        steps = [steps[index] for index in chosen]
    return Curve(name=name, steps=tuple(steps), values=tuple(points[step] for step in steps), edges=edges)


def curve_row(curve: Curve) -> dict[str, Any]:
    """The columns that are the curve's own."""
    body = {"steps": curve.steps, "values": curve.values, "edges": curve.edges}
    return {"name": curve.name, "body": json.dumps(body, separators=(",", ":"), allow_nan=False)}


def curve_from(name: str, body: str) -> Curve:
    """What `curve_row` was given."""
    found = json.loads(body)
    return Curve(name=name, steps=tuple(found["steps"]), values=tuple(found["values"]), edges=tuple(found["edges"]))
