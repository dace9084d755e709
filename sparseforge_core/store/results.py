"""The read side of the store: tidy frames for `analysis`. Opening it creates and changes nothing.

Row order is fixed in Python, so that SQLite and PostgreSQL give the same frames.
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import sqlalchemy as sa

from sparseforge_core.errors import StoreError, unknown
from sparseforge_core.store import schema
from sparseforge_core.store.engine import check_revision, make_engine, readable_errors
from sparseforge_core.store.store import stage_states

MEASUREMENT_COLUMNS = [
    "exhibit", "row", "label", "position", "recipe_key", "cell_key", "seed", "model", "family", "pattern", "method",
    "variant", "tokens", "stage", "suite", "metric", "value", "stderr", "n", "detail", "context",
]  # fmt: skip
SLOT_COLUMNS = ["exhibit", "row", "label", "position", "recipe_key", "seeds", "suite_keys", "note", "model", "tokens", "method"]
MISSING_COLUMNS = ["exhibit", "row", "cell_key", "stage", "status"]


class Results:
    """Reads a store. Raises StoreError if it is missing, empty, older, newer or somebody else's."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url, writable=False)
        check_revision(self.engine, writable=False)

    def grids(self) -> list[str]:
        """Names of the planned grids, the most recently planned last."""
        grid = schema.grid
        return [row.name for row in self._rows(sa.select(grid.c.name).order_by(grid.c.planned_at, grid.c.name))]

    def grid(self, name: str | None) -> dict[str, Any]:
        """One grid's name, title and whether it shows published numbers; None is the last planned one."""
        names = self.grids()
        if not names:
            raise StoreError("the store holds no grid yet; fill it with `make demo` or `sparseforge run GRID`")
        chosen = name or names[-1]
        if chosen not in names:
            raise StoreError(unknown("grid in this store", chosen, names))
        row = self._rows(sa.select(schema.grid).where(schema.grid.c.name == chosen))[0]
        return {"name": row.name, "title": row.title, "published": bool(row.published)}

    def slots(self, grid: str) -> pd.DataFrame:
        """Rows of every exhibit of a grid, with what a listing shows of their recipes."""
        slot, recipe = schema.slot, schema.recipe
        rows = self._rows(
            sa.select(slot, recipe.c.model, recipe.c.tokens, recipe.c.method)
            .outerjoin(recipe, recipe.c.key == slot.c.recipe_key)
            .where(slot.c.grid == grid)
        )
        frame = pd.DataFrame([dict(row._mapping) for row in rows], columns=["grid", *SLOT_COLUMNS])
        return frame[SLOT_COLUMNS].sort_values(["exhibit", "position", "row"], ignore_index=True)

    def measurements(self, grid: str) -> pd.DataFrame:
        """Measurements of done stages, once for each slot that shows their cell and suite (train stages: always)."""
        slots = self.slots(grid)
        recorded = self._measurements()
        suites = self.suites()
        rows = []
        for slot in slots.itertuples():
            if slot.recipe_key is None or pd.isna(slot.recipe_key):
                continue
            for record in recorded.get(slot.recipe_key, []):
                if record["stage"] == "train" or record["stage"] in slot.suite_keys:
                    shown = {"exhibit": slot.exhibit, "row": slot.row, "label": slot.label, "position": slot.position}
                    rows.append({**record, **shown, "suite": suites.get(record["stage"], "train")})
        frame = pd.DataFrame(rows, columns=MEASUREMENT_COLUMNS)
        return frame.sort_values(["exhibit", "position", "row", "seed", "stage", "metric"], ignore_index=True)

    def missing(self, grid: str) -> pd.DataFrame:
        """Planned (slot, cell, stage) combinations that are not done, with their state."""
        with readable_errors(self.engine), self.engine.connect() as connection:
            states = {(s.cell_key, s.stage): s.status for s in stage_states(connection, grid)}
        rows = []
        for slot in self.slots(grid).itertuples():
            if slot.recipe_key is None or pd.isna(slot.recipe_key):
                continue
            for seed in slot.seeds:
                key = f"{slot.recipe_key}-s{seed}"
                for stage in ("train", *slot.suite_keys):
                    status = states.get((key, stage), "unplanned")
                    if status != "done":
                        rows.append([slot.exhibit, slot.row, key, stage, status])
        return pd.DataFrame(rows, columns=MISSING_COLUMNS)

    def stage_statuses(self, grid: str | None = None) -> dict[tuple[str, str], str]:
        """State of every planned stage, of one grid or of all, by (cell key, stage)."""
        names = self.grids() if grid is None else [grid]
        with readable_errors(self.engine), self.engine.connect() as connection:
            return {(s.cell_key, s.stage): s.status for name in names for s in stage_states(connection, name)}

    def published(self, exhibit: str) -> pd.DataFrame:
        """Quoted numbers of an exhibit, in the paper's order."""
        table = schema.published
        rows = self._rows(sa.select(table).where(table.c.exhibit == exhibit))
        frame = pd.DataFrame([dict(row._mapping) for row in rows], columns=[c.name for c in table.columns])
        return frame.sort_values(["position", "row", "column"], ignore_index=True)

    def suites(self) -> dict[str, str]:
        """Suite names by key."""
        return {row.key: row.name for row in self._rows(sa.select(schema.suite.c.key, schema.suite.c.name))}

    def suite_specs(self) -> dict[str, dict[str, Any]]:
        """The whole suites by key."""
        return {row.key: json.loads(row.spec) for row in self._rows(sa.select(schema.suite.c.key, schema.suite.c.spec))}

    def _measurements(self) -> dict[str, list[dict[str, Any]]]:
        m, a, c, r = schema.measurement, schema.attempt, schema.cell, schema.recipe
        rows = self._rows(
            sa.select(m.c.cell_key, m.c.stage, m.c.metric, m.c.value, m.c.stderr, m.c.n, m.c.detail, a.c.context)
            .add_columns(c.c.seed, c.c.recipe_key, r.c.model, r.c.family, r.c.pattern, r.c.method, r.c.variant, r.c.tokens)
            .join(a, a.c.id == m.c.attempt_id)
            .join(c, c.c.key == m.c.cell_key)
            .join(r, r.c.key == c.c.recipe_key)
            .where(a.c.status == "done")
        )
        grouped: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            grouped.setdefault(row.recipe_key, []).append(dict(row._mapping))
        return grouped

    def _rows(self, statement: Any) -> list[Any]:
        with readable_errors(self.engine), self.engine.connect() as connection:
            return list(connection.execute(statement).all())
