"""The read side of the store: records for `analysis`. Opening it creates and changes nothing.

Row order is fixed in Python, so that SQLite and PostgreSQL give the same records.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from sparseforge_core.errors import StoreError, unknown
from sparseforge_core.store import schema
from sparseforge_core.store.causes import RELEASED
from sparseforge_core.store.dossier import Dossier, dossier, matching, recipes_of
from sparseforge_core.store.engine import clock, make_engine, reading
from sparseforge_core.store.health import problems
from sparseforge_core.store.ledger import FIRST, ORIGIN, Break, breaks
from sparseforge_core.store.migrate import require_newest
from sparseforge_core.store.outcomes import unpack
from sparseforge_core.store.rows import AttemptRecord, PublishedNumber, StageState
from sparseforge_core.store.shown import (
    MissingStage,
    ShownCurve,
    ShownMeasurement,
    ShownSlot,
    StoredCurve,
    TidyMeasurement,
)
from sparseforge_core.store.states import cell_attempts, grid_attempts, stage_states, statuses


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

    def slots(self, grid: str) -> list[ShownSlot]:
        """Rows of every exhibit of a grid, in the exhibits' order."""
        slot, recipe = schema.slot, schema.recipe
        rows = self._rows(
            sa.select(slot.c.exhibit, slot.c.row, slot.c.label, slot.c.position, slot.c.recipe_key, slot.c.seeds)
            .add_columns(slot.c.suite_keys, slot.c.note, recipe.c.model, recipe.c.tokens, recipe.c.method)
            .outerjoin(recipe, recipe.c.key == slot.c.recipe_key)
            .where(slot.c.grid == grid)
        )
        return sorted((ShownSlot._make(row) for row in rows), key=lambda slot: (slot.exhibit, slot.position, slot.row))

    def measurements(self, grid: str, metrics: Collection[str] | None = None) -> list[ShownMeasurement]:
        """Measurements of done stages, once for each slot that shows their recipe, seed and suite.

        The train stage counts for every slot of its cell. Seeds that only another grid planned are left out. Of other
        stages only `metrics` are read, where they are given.
        """
        recorded = self._measurements(grid, metrics)
        suites = self.suites()
        found = []
        for slot in self.slots(grid):
            stages, seeds = {"train", *slot.suite_keys}, set(slot.seeds)
            for (stage, seed), rows in recorded.get(slot.recipe_key or "", {}).items():
                if stage in stages and seed in seeds:
                    place = slot.exhibit, slot.row, slot.position
                    suite = suites.get(stage, stage)
                    found += [ShownMeasurement(*place, row[0], seed, stage, suite, *row[1:]) for row in rows]
        return sorted(found, key=lambda m: (m.exhibit, m.position, m.row, m.seed, m.stage, m.metric))

    def tidy(self, grid: str) -> list[TidyMeasurement]:
        """Every measurement of a grid's done stages once."""
        m, a, c, r, planned = schema.measurement, schema.attempt, schema.cell, schema.recipe, schema.stage
        rows = self._rows(
            sa.select(r.c.method, planned.c.variant, r.c.model, r.c.tokens, c.c.seed, m.c.stage, m.c.metric, m.c.value)
            .add_columns(m.c.stderr, m.c.n, m.c.cell_key, a.c.git_sha)
            .join(a, a.c.id == m.c.attempt_id)
            .join(c, c.c.key == m.c.cell_key)
            .join(r, r.c.key == c.c.recipe_key)
            .join(planned, sa.and_(planned.c.cell_key == m.c.cell_key, planned.c.stage == m.c.stage))
            .where(a.c.status == "done", planned.c.grid == grid)
        )
        suites = self.suites()
        found = [TidyMeasurement._make(row)._replace(suite=suites.get(row.stage, row.stage)) for row in rows]
        return sorted(found, key=lambda m: (m.method, m.preset, m.tokens, m.cell_key, m.seed, m.suite, m.metric))

    def missing(self, grid: str) -> list[MissingStage]:
        """What slots show and is not done: one record for each (slot, cell, stage), with its state."""
        states = self.stage_statuses(grid)
        cell = schema.cell
        known = self._rows(sa.select(cell.c.key, cell.c.recipe_key, cell.c.seed))
        cells = {(row.recipe_key, row.seed): row.key for row in known}
        found = []
        for slot in self.slots(grid):
            for seed in slot.seeds:
                key = cells.get((slot.recipe_key, seed), f"{slot.recipe_key}-s{seed}")
                for stage in ("train", *slot.suite_keys):
                    if (status := states.get((key, stage), "unplanned")) != "done":
                        found.append(MissingStage(slot.exhibit, slot.row, key, stage, status))
        return found

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
            return {place: status for name in names for place, status in statuses(connection, name).items()}

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

    def published(self, exhibit: str) -> list[PublishedNumber]:
        """Quoted numbers of an exhibit, in the paper's order."""
        table = schema.published
        rows = self._rows(sa.select(table).where(table.c.exhibit == exhibit))
        found = [PublishedNumber(**row._mapping) for row in rows]
        return sorted(found, key=lambda number: (number.position, number.row, number.column))

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

    def curves(self, grid: str) -> list[ShownCurve]:
        """What training showed of itself: one record for each (slot, seed, curve), in the slots' order."""
        curve, cell, slot = schema.curve, schema.cell, schema.slot
        shown = sa.select(slot.c.recipe_key).where(slot.c.grid == grid, slot.c.recipe_key.is_not(None))
        rows = self._rows(
            sa.select(curve.c.cell_key, curve.c.name, curve.c.body, cell.c.recipe_key, cell.c.seed)
            .join(cell, cell.c.key == curve.c.cell_key)
            .where(cell.c.recipe_key.in_(shown))
        )
        known: dict[tuple[str, int], list[tuple[str, StoredCurve]]] = {}
        for row in rows:
            found = row.cell_key, StoredCurve(row.name, row.body)
            known.setdefault((row.recipe_key, row.seed), []).append(found)
        shows = [
            ShownCurve(s.exhibit, s.row, s.label, s.position, seed, key, stored.name, stored)
            for s in self.slots(grid)
            for seed in s.seeds
            for key, stored in known.get((s.recipe_key or "", seed), [])
        ]
        return sorted(shows, key=lambda c: (c.exhibit, c.position, c.row, c.seed, c.name))

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
        with reading(self.engine) as connection:
            return cell_attempts(connection, cell_key)

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

    def _measurements(
        self, grid: str, metrics: Collection[str] | None
    ) -> dict[str, dict[tuple[str, int], list[tuple[Any, ...]]]]:
        """Done measurements of every recipe that a slot of the grid shows, by recipe key, then (stage, seed).

        Each is (cell key, metric, value, stderr, n, detail, context).
        """
        m, a, c, slot = schema.measurement, schema.attempt, schema.cell, schema.slot
        shown = sa.select(slot.c.recipe_key).where(slot.c.grid == grid, slot.c.recipe_key.is_not(None))
        own = a.c.status == "done", c.c.recipe_key.in_(shown)
        asked = sa.true() if metrics is None else sa.or_(m.c.stage == "train", m.c.metric.in_(sorted(metrics)))
        # JSON as text, because most of it is the same text again: it is decoded once
        detail, context = sa.cast(m.c.detail, sa.Text), sa.cast(a.c.context, sa.Text)
        rows = self._rows(
            sa.select(c.c.recipe_key, m.c.stage, c.c.seed, m.c.cell_key, m.c.metric, m.c.value, m.c.stderr, m.c.n)
            .add_columns(detail, m.c.attempt_id)
            .join(a, a.c.id == m.c.attempt_id)
            .join(c, c.c.key == m.c.cell_key)
            .where(*own, asked)
        )
        done = self._rows(sa.select(a.c.id, context).join(c, c.c.key == a.c.cell_key).where(*own))
        contexts = {attempt: _decoded(text) or {} for attempt, text in map(tuple, done)}  # one for a whole stage
        details: dict[str, Any] = {}
        grouped: dict[str, dict[tuple[str, int], list[tuple[Any, ...]]]] = {}
        for recipe, stage, seed, *numbers, text, attempt in map(tuple, rows):
            if text not in details:
                details[text] = _decoded(text)
            place = grouped.setdefault(recipe, {}).setdefault((stage, seed), [])
            place.append((*numbers, details[text], contexts[attempt]))
        return grouped

    def _rows(self, statement: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        with reading(self.engine) as connection:
            return connection.execute(statement).all()


def _decoded(text: str | None) -> Any:
    return None if text is None else _sorted(json.loads(text))


def _sorted(body: Any) -> Any:
    """The same JSON with sorted keys: PostgreSQL keeps another order than SQLite."""
    if isinstance(body, dict):
        return {key: _sorted(body[key]) for key in sorted(body)}
    return [_sorted(part) for part in body] if isinstance(body, list) else body
