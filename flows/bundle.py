"""Carrying cells to a machine without a store, and their results home.

`write_bundle` makes the file that `python -m sparseforge_core.run bundle` runs there, in one warm process; what it
leaves under HOME/cells, copied back into our home, `ingest` records like any other result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from flows.cycle import record, recorded
from flows.grids.planned import Plan
from flows.home import Home
from flows.provenance import provenance
from flows.stages import TRAIN
from sparseforge_core import files
from sparseforge_core.errors import CellTaken
from sparseforge_core.store.rows import PlannedCell
from sparseforge_core.store.store import ResultStore


def write_bundle(plan: Plan, folder: Path, *, pool: str | None = None) -> int:
    """Write bundle.json with the cells of a plan, or of one pool of it, and the cells these need; returns how many."""
    suites = {suite.key: json.loads(suite.spec_json) for suite in plan.suites}
    cells = {cell.key: cell for cell in plan.cells}
    wanted = _with_required(cells, (c.key for c in plan.cells if pool is None or c.pool == pool))
    entries = [
        {
            "cell": json.loads(cells[key].cell_json),
            "suites": [suites[stage] for stage in plan.stages[key] if stage != TRAIN],
        }
        for key in wanted
    ]
    files.write_json(folder / "bundle.json", {"cells": entries})
    return len(entries)


def _with_required(cells: dict[str, PlannedCell], keys: Iterable[str]) -> list[str]:
    """The keys in an order in which each comes after the cells whose model it reads."""
    ordered: dict[str, None] = {}

    def add(key: str) -> None:
        for required in cells[key].requires:
            add(required)
        ordered.setdefault(key)

    for key in keys:
        add(key)
    return list(ordered)


def ingest(store: ResultStore, home: Home, grid: str) -> int:
    """Record every stage of a planned grid that is finished in the home and not in the store; returns how many.

    The attempts say the device and torch that measured, and this process as the one that recorded. Raises
    CheckpointMismatch for files of another cell or altered items; what was recorded before stays.
    """
    count = 0
    for state in store.work(grid):
        path = home.cell(state.cell_key) / state.stage / "measurements.json"
        if state.status in ("done", "running") or not path.is_file():
            continue
        context = json.loads(path.read_text())["context"]
        origin = replace(provenance(), device=str(context["device"]), torch=str(context["torch"]))
        try:
            attempt = store.claim(state.cell_key, state.stage, origin)
        except CellTaken:  # somebody was faster
            continue
        with recorded(store, attempt):
            record(store, attempt, path)
        count += 1
    return count
