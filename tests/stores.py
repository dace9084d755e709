"""Stores filled by hand, through the real write side: for tests of the store and of what reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sparseforge_core.store.rows import (
    Curve,
    Measurement,
    Outcomes,
    PlannedCell,
    PlannedSlot,
    PlannedSuite,
    Provenance,
)
from sparseforge_core.store.store import ResultStore

PROVENANCE = Provenance(
    git_sha="0123abc",
    dirty=True,
    lock_sha="ff",
    host="here",
    device="cpu",
    python="3.11",
    torch="2.13",
    command="t",
    pid=7,
)

PERPLEXITY = PlannedSuite(key="heldout-aaaaaa", name="heldout", spec_json='{"kind":"perplexity","window":128}')
ZERO_SHOT = PlannedSuite(key="zero-shot-7-bbbbbb", name="zero-shot-7", spec_json='{"kind":"zero-shot","limit":40}')


def planned_cell(name: str, seed: int = 0, spec: dict[str, Any] | None = None, **changes: Any) -> PlannedCell:
    """A cell whose recipe key follows from `name` alone, so that its spec can drift."""
    recipe_key = hashlib.sha256(name.encode()).hexdigest()[:12]
    values: dict[str, Any] = {
        "key": f"{recipe_key}-s{seed}",
        "recipe_key": recipe_key,
        "seed": seed,
        "model": "tiny-llama",
        "family": "llama",
        "pattern": "2:4",
        "method": "wanda",
        "variant": name,
        "tokens": 1_000_000,
        "spec_json": json.dumps(spec or {"name": name, "steps": 10}, sort_keys=True),
        "cell_json": json.dumps({"name": name, "seed": seed}),
    }
    return PlannedCell(**{**values, **changes})


def planned_slot(cell: PlannedCell, grid: str = "g", exhibit: str = "table-2", **changes: Any) -> PlannedSlot:
    """A row that shows a cell's recipe, seed 0, under both suites."""
    values: dict[str, Any] = {
        "grid": grid,
        "exhibit": exhibit,
        "row": cell.variant,
        "label": cell.variant.title(),
        "position": 0,
        "recipe_key": cell.recipe_key,
        "seeds": (0,),
        "suite_keys": (PERPLEXITY.key, ZERO_SHOT.key),
    }
    return PlannedSlot(**{**values, **changes})


def plan(
    store: ResultStore, cells: Sequence[PlannedCell], slots: Sequence[PlannedSlot] = (), grid: str = "g", **options: Any
) -> None:
    """Plan cells with three stages each: train and both suites."""
    stages = {cell.key: ("train", PERPLEXITY.key, ZERO_SHOT.key) for cell in cells}
    store.plan(grid, f"Grid {grid}", cells, (PERPLEXITY, ZERO_SHOT), slots, stages, **options)


def record(
    store: ResultStore,
    cell: PlannedCell,
    stage: str,
    *measurements: Measurement,
    outcomes: Sequence[Outcomes] = (),
    curves: Sequence[Curve] = (),
    **context: Any,
) -> None:
    """Claim a stage and finish it with these measurements."""
    attempt = store.claim(cell.key, stage, PROVENANCE)
    store.finish(attempt, measurements, context, "c0ffee", outcomes=outcomes, curves=curves)


def value(metric: str, number: float | None, stderr: float | None = None, n: int = 1, **detail: Any) -> Measurement:
    """A measurement in one line."""
    return Measurement(metric=metric, value=number, stderr=stderr, n=n, detail=detail)
