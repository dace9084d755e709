"""The read side of the store: tidy frames for `analysis`. Opening it creates and changes nothing.

Row order is fixed in Python, so that SQLite and PostgreSQL give the same frames.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
import sqlalchemy as sa

from sparseforge_core.errors import StoreError, unknown
from sparseforge_core.store import schema
from sparseforge_core.store.causes import RELEASED
from sparseforge_core.store.curves import curve_from
from sparseforge_core.store.dossier import Dossier, dossier, matching, recipes_of
from sparseforge_core.store.engine import clock, make_engine, reading
from sparseforge_core.store.health import problems
from sparseforge_core.store.ledger import FIRST, ORIGIN, Break, breaks
from sparseforge_core.store.migrate import require_newest
from sparseforge_core.store.outcomes import unpack
from sparseforge_core.store.rows import AttemptRecord, Curve, StageState
from sparseforge_core.store.states import attempt_record, grid_attempts, stage_states

MEASUREMENT_COLUMNS = [
    "exhibit", "row", "label", "position", "recipe_key", "cell_key", "seed", "model", "family", "pattern", "method",
    "variant", "tokens", "stage", "suite", "metric", "value", "stderr", "n", "detail", "context",
]  # fmt: skip
TIDY_COLUMNS = [
    "method", "preset", "model", "tokens", "seed", "suite", "metric", "value", "stderr", "n", "cell_key", "commit",
]  # fmt: skip
SLOT_COLUMNS = [
    "exhibit", "row", "label", "position", "recipe_key", "seeds", "suite_keys", "note", "model", "tokens", "method",
]  # fmt: skip
CURVE_COLUMNS = ["exhibit", "row", "label", "position", "model", "method", "seed", "cell_key", "name", "curve"]
MISSING_COLUMNS = ["exhibit", "row", "cell_key", "stage", "status"]


class Results:
    """Reads a store. Raises StoreError if it is missing, empty, older, newer or somebody else's."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url, writable=False)
        require_newest(self.engine)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def grids(self) -> list[str]:
        """Names of the planned grids, the most recently planned last."""
        rows = self._rows(sa.select(schema.grid.c.name, schema.grid.c.planned_at))
        return [row.name for row in sorted(rows, key=lambda row: (row.planned_at, row.name))]

    def grid(self, name: str | None) -> dict[str, Any]:
        """One grid's name, title and whether it shows published numbers; None is the last planned one."""
        names = self.grids()
        if not names:
            raise StoreError("the store holds no grid yet; fill it with `make demo` or `sparseforge run demo`")
        chosen = name or names[-1]
        if chosen not in names:
            raise StoreError(unknown("grid in this store", chosen, names))
        row = self._rows(sa.select(schema.grid).where(schema.grid.c.name == chosen))[0]
        return {"name": row.name, "title": row.title, "published": bool(row.published)}

    def slots(self, grid: str) -> pd.DataFrame:
        """Rows of every exhibit of a grid, with what a listing shows of their recipes; a caption has no recipe."""
        frame = pd.DataFrame(self._slots(grid), columns=SLOT_COLUMNS)
        # pandas would make NaN of a missing key
        frame["recipe_key"] = frame["recipe_key"].astype(object).where(frame["recipe_key"].notna(), None)
        return frame.sort_values(["exhibit", "position", "row"], ignore_index=True)

    def measurements(self, grid: str) -> pd.DataFrame:
        """Measurements of done stages, once for each slot that shows their recipe, seed and suite.

        The train stage counts for every slot of its cell. Seeds that only another grid planned are left out. `value`
        is NaN where `detail` says that the run diverged.
        """
        recorded = self._measurements(grid)
        suites = self.suites()
        of_slot, of_record = MEASUREMENT_COLUMNS[:4], [c for c in MEASUREMENT_COLUMNS[4:] if c != "suite"]
        rows = []
        for slot in self._slots(grid):
            shown = [slot[name] for name in of_slot]
            stages, seeds = {"train", *slot["suite_keys"]}, set(slot["seeds"])
            rows += [
                [*shown, suites.get(record["stage"], record["stage"]), *(record[name] for name in of_record)]
                for record in recorded.get(slot["recipe_key"], [])
                if record["stage"] in stages and record["seed"] in seeds
            ]
        # as objects: reading texts back one by one out of Arrow's strings takes longer than everything else
        frame = pd.DataFrame(rows, columns=[*of_slot, "suite", *of_record], dtype=object)[MEASUREMENT_COLUMNS]
        frame = frame.astype({"value": float, "stderr": float, "seed": int, "position": int, "tokens": int, "n": int})
        return frame.sort_values(["exhibit", "position", "row", "seed", "stage", "metric"], ignore_index=True)

    def tidy(self, grid: str) -> pd.DataFrame:
        """One row for each measurement of a grid's done stages, whether an exhibit shows it or not.

        `preset` is what the grid calls the recipe; `commit` is that of the code that recorded the result.
        """
        m, a, c, r, planned = schema.measurement, schema.attempt, schema.cell, schema.recipe, schema.stage
        rows = self._rows(
            sa.select(r.c.method, r.c.variant.label("preset"), r.c.model, r.c.tokens, c.c.seed)
            .add_columns(m.c.stage.label("suite"), m.c.metric, m.c.value, m.c.stderr, m.c.n, m.c.cell_key)
            .add_columns(a.c.git_sha.label("commit"))
            .join(a, a.c.id == m.c.attempt_id)
            .join(c, c.c.key == m.c.cell_key)
            .join(r, r.c.key == c.c.recipe_key)
            .join(planned, sa.and_(planned.c.cell_key == m.c.cell_key, planned.c.stage == m.c.stage))
            .where(a.c.status == "done", planned.c.grid == grid)
        )
        frame = pd.DataFrame([dict(row._mapping) for row in rows], columns=TIDY_COLUMNS)
        frame["suite"] = frame["suite"].map(self.suites()).fillna(frame["suite"])
        return frame.sort_values(
            ["method", "preset", "tokens", "cell_key", "seed", "suite", "metric"], ignore_index=True
        )

    def missing(self, grid: str) -> pd.DataFrame:
        """What slots show and is not done: one row for each (slot, cell, stage), with its state."""
        states = self.stage_statuses(grid)
        cell = schema.cell
        known = self._rows(sa.select(cell.c.key, cell.c.recipe_key, cell.c.seed))
        cells = {(row.recipe_key, row.seed): row.key for row in known}
        rows = []
        for slot in sorted(self._slots(grid), key=lambda slot: (slot["exhibit"], slot["position"], slot["row"])):
            for seed in slot["seeds"]:
                key = cells.get((slot["recipe_key"], seed), f"{slot['recipe_key']}-s{seed}")
                for stage in ("train", *slot["suite_keys"]):
                    if (status := states.get((key, stage), "unplanned")) != "done":
                        rows.append([slot["exhibit"], slot["row"], key, stage, status])
        return pd.DataFrame(rows, columns=MISSING_COLUMNS)

    def progress(self, grid: str) -> tuple[list[StageState], list[AttemptRecord]]:
        """Every planned stage of a grid in planned order, and every try at its cells, as of one moment."""
        with reading(self.engine) as connection:
            return stage_states(connection, grid), grid_attempts(connection, grid)

    def cell_bodies(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The cell files of some cells, by key."""
        cell = schema.cell
        rows = self._rows(sa.select(cell.c.key, cell.c.body).where(cell.c.key.in_(keys))) if keys else ()
        return {row.key: json.loads(row.body)["cell"] for row in rows}

    def stage_statuses(self, grid: str | None = None) -> dict[tuple[str, str], str]:
        """State of every planned stage, of one grid or of all, by (cell key, stage)."""
        names = self.grids() if grid is None else [grid]
        with reading(self.engine) as connection:
            return {(s.cell_key, s.stage): s.status for name in names for s in stage_states(connection, name)}

    def cells_like(self, prefix: str) -> list[tuple[str, str, str, int]]:
        """(key, model, variant, seed) of every cell whose key begins so."""
        with reading(self.engine) as connection:
            return matching(connection, prefix)

    def dossier(self, cell_key: str) -> Dossier:
        """All that the store knows of a cell that `cells_like` has found, but its attempts."""
        with reading(self.engine) as connection:
            return dossier(connection, cell_key)

    def recipes(self, grid: str) -> dict[str, tuple[str, str]]:
        """(variant, the fully resolved recipe as JSON) of every recipe that a grid plans, by recipe key."""
        with reading(self.engine) as connection:
            return recipes_of(connection, grid)

    def published(self, exhibit: str) -> pd.DataFrame:
        """Quoted numbers of an exhibit, in the paper's order."""
        table = schema.published
        rows = self._rows(sa.select(table).where(table.c.exhibit == exhibit))
        frame = pd.DataFrame([dict(row._mapping) for row in rows], columns=[c.name for c in table.columns])
        return frame.sort_values(["position", "row", "column"], ignore_index=True)

    def outcomes(self, grid: str) -> dict[tuple[str, str, str], tuple[str, bytes]]:
        """(identity of the items, packed outcomes) of the cells that a grid shows, by cell key, stage and metric."""
        table, cell, slot = schema.outcome, schema.cell, schema.slot
        shown = sa.select(slot.c.recipe_key).where(slot.c.grid == grid, slot.c.recipe_key.is_not(None))
        rows = self._rows(
            sa.select(table.c.cell_key, table.c.stage, table.c.metric, table.c.identity, table.c.body)
            .join(cell, cell.c.key == table.c.cell_key)
            .where(cell.c.recipe_key.in_(shown))
        )
        return {(row.cell_key, row.stage, row.metric): (row.identity, row.body) for row in rows}

    def curves(self, grid: str) -> pd.DataFrame:
        """What training showed of itself: one row for each (slot, seed, curve), in the slots' order."""
        curve, cell, slot = schema.curve, schema.cell, schema.slot
        shown = sa.select(slot.c.recipe_key).where(slot.c.grid == grid, slot.c.recipe_key.is_not(None))
        rows = self._rows(
            sa.select(curve.c.cell_key, curve.c.name, curve.c.body, cell.c.recipe_key, cell.c.seed)
            .join(cell, cell.c.key == curve.c.cell_key)
            .where(cell.c.recipe_key.in_(shown))
        )
        known: dict[tuple[str, int], list[tuple[str, Curve]]] = {}
        for row in rows:
            found = row.cell_key, curve_from(row.name, row.body)
            known.setdefault((row.recipe_key, row.seed), []).append(found)
        lines = [
            [s["exhibit"], s["row"], s["label"], s["position"], s["model"], s["method"], seed, key, one.name, one]
            for s in self._slots(grid)
            for seed in s["seeds"]
            for key, one in known.get((s["recipe_key"], seed), [])
        ]
        frame = pd.DataFrame(lines, columns=CURVE_COLUMNS)
        return frame.sort_values(["exhibit", "position", "row", "seed", "name"], ignore_index=True)

    def origins(self, grid: str) -> dict[tuple[str, str], dict[str, Any]]:
        """Where the results of every done stage of a grid come from, by cell key and stage.

        Who measured with what, the attempts that it took, and the stage's place in the results log.
        """
        attempt, entry, stage = schema.attempt, schema.ledger, schema.stage
        wanted = sa.select(stage.c.cell_key).where(stage.c.grid == grid)
        tries = self._rows(sa.select(attempt).where(attempt.c.cell_key.in_(wanted)).order_by(attempt.c.id))
        links = {row.attempt_id: row for row in self._rows(sa.select(entry.c.id, entry.c.attempt_id, entry.c.digest))}
        count: dict[tuple[str, str], int] = {}
        found = {}
        for row in tries:
            place = row.cell_key, row.stage
            count[place] = count.get(place, 0) + (not row.error.startswith(RELEASED))
            if row.status != "done":
                continue
            link = links.get(row.id)
            found[place] = {
                **{name: getattr(row, name) for name in ("items_sha256", *ORIGIN)},
                "attempt": row.id,
                "attempts": count[place],
                "finished": row.finished.isoformat(timespec="seconds") if row.finished else "",
                "context": _sorted(row.context or {}),
                "entry": link.id if link else None,
                "digest": link.digest if link else "",
            }
        return found

    def values(self) -> dict[tuple[str, str, str], tuple[float | None, dict[str, Any]]]:
        """(value, detail) of every measurement of the store, by cell key, stage and metric."""
        m = schema.measurement
        rows = self._rows(sa.select(m.c.cell_key, m.c.stage, m.c.metric, m.c.value, m.c.detail))
        return {(row.cell_key, row.stage, row.metric): (row.value, row.detail) for row in rows}

    def items(self, cell_key: str, stage: str) -> dict[str, tuple[str, tuple[float | None, ...]]]:
        """(identity of the items, outcomes) of one stage, by metric. Raises ValueError for bytes nobody packed."""
        table = schema.outcome
        chosen = sa.select(table).where(table.c.cell_key == cell_key, table.c.stage == stage)
        return {row.metric: (row.identity, unpack(row.body)) for row in self._rows(chosen)}

    def items_hashes(self) -> dict[tuple[str, str], str | None]:
        """Hash of the items file of every done stage of the store, None for a stage without items."""
        table = schema.attempt
        chosen = sa.select(table.c.cell_key, table.c.stage, table.c.items_sha256).where(table.c.status == "done")
        return {(row.cell_key, row.stage): row.items_sha256 for row in self._rows(chosen)}

    def attempts(self, cell_key: str) -> list[AttemptRecord]:
        """Every try at the stages of a cell, oldest first."""
        table = schema.attempt
        chosen = sa.select(table).where(table.c.cell_key == cell_key).order_by(table.c.id)
        return [attempt_record(row) for row in self._rows(chosen)]

    def now(self) -> datetime.datetime:
        """The present moment by the clock that heartbeats are told by."""
        with reading(self.engine) as connection:
            return clock(connection)

    def problems(self) -> list[str]:
        """What in the store contradicts itself, one sentence each; an empty list is a sound store."""
        with reading(self.engine) as connection:
            return problems(connection)

    def breaks(self) -> list[Break]:
        """Every contradiction between the results log, itself and the results; see `ledger.py`."""
        with reading(self.engine) as connection:
            return breaks(connection)

    def log_head(self) -> tuple[int, str]:
        """(number of entries, hash of the last) of the results log: what to keep elsewhere."""
        rows = self._rows(sa.select(schema.ledger.c.id, schema.ledger.c.digest).order_by(schema.ledger.c.id))
        return len(rows), rows[-1].digest if rows else FIRST

    def suites(self) -> dict[str, str]:
        """Suite names by key."""
        return {row.key: row.name for row in self._rows(sa.select(schema.suite.c.key, schema.suite.c.name))}

    def suite_specs(self) -> dict[str, dict[str, Any]]:
        """The whole suites by key."""
        return {row.key: json.loads(row.spec) for row in self._rows(sa.select(schema.suite.c.key, schema.suite.c.spec))}

    def _slots(self, grid: str) -> list[dict[str, Any]]:
        slot, recipe = schema.slot, schema.recipe
        rows = self._rows(
            sa.select(*(column for column in slot.columns if column.name != "grid"))
            .add_columns(recipe.c.model, recipe.c.tokens, recipe.c.method)
            .outerjoin(recipe, recipe.c.key == slot.c.recipe_key)
            .where(slot.c.grid == grid)
        )
        return [dict(row._mapping) for row in rows]

    def _measurements(self, grid: str) -> dict[str, list[dict[str, Any]]]:
        """Done measurements of every recipe that a slot of the grid shows, by recipe key."""
        m, a, c, r = schema.measurement, schema.attempt, schema.cell, schema.recipe
        slot = schema.slot
        shown = sa.select(slot.c.recipe_key).where(slot.c.grid == grid, slot.c.recipe_key.is_not(None))
        rows = self._rows(
            sa.select(m.c.cell_key, m.c.stage, m.c.metric, m.c.value, m.c.stderr, m.c.n, m.c.detail, m.c.attempt_id)
            .add_columns(c.c.seed, c.c.recipe_key, r.c.model, r.c.family, r.c.pattern, r.c.method)
            .add_columns(r.c.variant, r.c.tokens)
            .join(a, a.c.id == m.c.attempt_id)
            .join(c, c.c.key == m.c.cell_key)
            .join(r, r.c.key == c.c.recipe_key)
            .where(a.c.status == "done", r.c.key.in_(shown))
        )
        done = self._rows(sa.select(a.c.id, a.c.context).where(a.c.status == "done"))
        contexts = {row.id: _sorted(row.context) for row in done}  # one for the many measurements of a stage
        grouped: dict[str, list[dict[str, Any]]] = {}
        names = rows[0]._fields if rows else ()
        for row in rows:
            record = dict(zip(names, row, strict=True))
            record |= {"detail": _sorted(record["detail"]), "context": contexts[record["attempt_id"]]}
            grouped.setdefault(record["recipe_key"], []).append(record)
        return grouped

    def _rows(self, statement: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        with reading(self.engine) as connection:
            return connection.execute(statement).all()


def _sorted(body: Any) -> Any:
    """The same JSON with sorted keys: PostgreSQL keeps another order than SQLite."""
    if isinstance(body, dict):
        return {key: _sorted(body[key]) for key in sorted(body)}
    return [_sorted(part) for part in body] if isinstance(body, list) else body
