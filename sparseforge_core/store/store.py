"""The write side of the store: plan, claim, beat, finish, fail. Every promise of the grid is kept here.

One live attempt per cell and stage is a unique index; a result is committed in one transaction that first checks
that the attempt is still the live one; recording twice is recording once.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from sparseforge_core.errors import CellTaken, RecipeDrift, StoreError
from sparseforge_core.store import schema
from sparseforge_core.store.engine import make_engine, readable_errors, upgrade
from sparseforge_core.store.rows import (
    Attempt,
    Measurement,
    PlannedCell,
    PlannedSlot,
    PlannedSuite,
    Provenance,
    PublishedNumber,
    StageState,
)

CHUNK = 500
"""Rows per statement, below the parameter limits of both databases."""


class ResultStore:
    """Everything that writes. Opening it creates or upgrades the schema."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        upgrade(self.engine)

    # ---------------------------------------------------------------- planning

    def plan(
        self,
        grid: str,
        title: str,
        cells: Sequence[PlannedCell],
        suites: Sequence[PlannedSuite],
        slots: Sequence[PlannedSlot],
        stages: Mapping[str, Sequence[str]],
        *,
        published: Sequence[PublishedNumber] = (),
    ) -> None:
        """Record what a grid wants; its earlier slots and stages are replaced, results stay.

        Raises RecipeDrift if a recipe of the same key resolves differently now than when it was stored.
        """
        with readable_errors(self.engine), self.engine.begin() as connection:
            self._refuse_drift(connection, cells)
            now = _now()
            row = {"name": grid, "title": title, "published": bool(published), "planned_at": now}
            self._upsert(connection, schema.grid, [row], ["name"])
            recipes = {
                c.recipe_key: {
                    "key": c.recipe_key,
                    "model": c.model,
                    "family": c.family,
                    "pattern": c.pattern,
                    "method": c.method,
                    "variant": c.variant,
                    "tokens": c.tokens,
                    "spec": c.spec_json,
                }
                for c in cells
            }
            self._upsert(connection, schema.recipe, list(recipes.values()), ["key"])
            bodies = [
                {
                    "key": c.key,
                    "recipe_key": c.recipe_key,
                    "seed": c.seed,
                    "body": c.cell_json,
                    "pool": c.pool,
                    "cost_hours": c.cost_hours,
                }
                for c in cells
            ]
            self._upsert(connection, schema.cell, bodies, ["key"])
            needs = [{"cell_key": c.key, "required_key": r} for c in cells for r in c.requires]
            self._upsert(connection, schema.requirement, needs, ["cell_key", "required_key"])
            self._upsert(
                connection, schema.suite, [{"key": s.key, "name": s.name, "spec": s.spec_json} for s in suites], ["key"]
            )
            for table in (schema.stage, schema.slot):
                connection.execute(sa.delete(table).where(table.c.grid == grid))
            work = [(key, name) for key, names in stages.items() for name in names]
            rows = [{"grid": grid, "cell_key": k, "stage": n, "position": i} for i, (k, n) in enumerate(work)]
            self._upsert(connection, schema.stage, rows, ["grid", "cell_key", "stage"])
            slot_rows = [{**asdict(s), "seeds": list(s.seeds), "suite_keys": list(s.suite_keys)} for s in slots]
            self._upsert(connection, schema.slot, slot_rows, ["grid", "exhibit", "row"])
            if published:
                connection.execute(sa.delete(schema.published))
                self._upsert(
                    connection, schema.published, [asdict(p) for p in published], ["exhibit", "row", "column"]
                )

    def _refuse_drift(self, connection: sa.Connection, cells: Sequence[PlannedCell]) -> None:
        wanted = {c.recipe_key: c.spec_json for c in cells}
        known = connection.execute(sa.select(schema.recipe.c.key, schema.recipe.c.spec))
        for key, spec in known:
            if key in wanted and spec != wanted[key]:
                changes = "; ".join(_differences(json.loads(spec), json.loads(wanted[key]))[:5])
                raise RecipeDrift(
                    f"recipe {key} was stored differently from what it resolves to now, under the same key: {changes}. A "
                    "default has changed: restore it, or bump the part's revision to make this a new recipe"
                )

    def _upsert(
        self, connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]], key: list[str]
    ) -> None:
        insert: Any = postgresql.insert if self.engine.dialect.name == "postgresql" else sqlite.insert
        columns = [column.name for column in table.columns if column.name not in key]
        for start in range(0, len(rows), CHUNK):
            statement = insert(table).values(list(rows[start : start + CHUNK]))
            if columns:
                update = {name: statement.excluded[name] for name in columns}
                statement = statement.on_conflict_do_update(index_elements=key, set_=update)
            else:
                statement = statement.on_conflict_do_nothing(index_elements=key)
            connection.execute(statement)

    # ---------------------------------------------------------------- what is to be done

    def work(self, grid: str) -> list[StageState]:
        """Every planned stage of a grid with its present state, in planned order."""
        with readable_errors(self.engine), self.engine.connect() as connection:
            return stage_states(connection, grid)

    def cell_body(self, cell_key: str) -> str:
        """The cell file of a planned cell. Raises StoreError for a key that was never planned."""
        return self._body(schema.cell, cell_key, "cell")

    def suite_spec(self, suite_key: str) -> str:
        """The JSON of a planned suite. Raises StoreError for a key that was never planned."""
        return self._body(schema.suite, suite_key, "suite")

    def _body(self, table: sa.Table, key: str, what: str) -> str:
        column = table.c.body if what == "cell" else table.c.spec
        with readable_errors(self.engine), self.engine.connect() as connection:
            found = connection.execute(sa.select(column).where(table.c.key == key)).scalar()
        if found is None:
            raise StoreError(f"the store has no {what} {key!r}; plan its grid first")
        return str(found)

    # ---------------------------------------------------------------- attempts

    def claim(self, cell_key: str, stage: str, provenance: Provenance) -> Attempt:
        """Take a stage. Raises CellTaken if it is done or another attempt holds it."""
        now = _now()
        values = {
            "cell_key": cell_key,
            "stage": stage,
            "status": "running",
            "started": now,
            "heartbeat": now,
            "error": "",
            **asdict(provenance),
        }
        try:
            with readable_errors(self.engine), self.engine.begin() as connection:
                result = connection.execute(sa.insert(schema.attempt).values(**values))
                assert result.inserted_primary_key is not None
                number = int(result.inserted_primary_key[0])
        except sa.exc.IntegrityError as error:
            raise CellTaken(f"stage {stage} of cell {cell_key} is done or held by another attempt") from error
        return Attempt(id=number, cell_key=cell_key, stage=stage)

    def heartbeat(self, attempt: Attempt) -> bool:
        """Say that an attempt is alive; False if it is no longer the live one and must stop."""
        with readable_errors(self.engine), self.engine.begin() as connection:
            return self._touch(connection, attempt, heartbeat=_now())

    def finish(
        self,
        attempt: Attempt,
        measurements: Iterable[Measurement],
        context: dict[str, Any],
        items_sha256: str | None = None,
    ) -> None:
        """Commit an attempt's measurements and mark it done, in one transaction.

        Raises CellTaken if the attempt is no longer the live one; then nothing is written.
        """
        rows = [_measurement_row(attempt, m) for m in measurements]
        with readable_errors(self.engine), self.engine.begin() as connection:
            now = _now()
            done = {"status": "done", "heartbeat": now, "finished": now, "context": context, "items_sha256": items_sha256}
            if not self._touch(connection, attempt, **done):
                raise CellTaken(
                    f"attempt {attempt.id} of stage {attempt.stage} of cell {attempt.cell_key} is no longer the live one; "
                    "its results were not recorded"
                )
            table = schema.measurement
            own = (table.c.cell_key == attempt.cell_key) & (table.c.stage == attempt.stage)
            connection.execute(sa.delete(table).where(own))
            self._upsert(connection, table, rows, ["cell_key", "stage", "metric"])

    def fail(self, attempt: Attempt, error: str, *, status: str = "failed") -> None:
        """End an attempt as 'failed' or 'interrupted', with its error text; a stale attempt is left as it is."""
        with readable_errors(self.engine), self.engine.begin() as connection:
            self._touch(connection, attempt, status=status, finished=_now(), error=error)

    def expire(self, older_than: datetime.timedelta) -> int:
        """Mark running attempts without a heartbeat for that long as lost; returns how many."""
        limit = _now() - older_than
        return self._lose(schema.attempt.c.heartbeat < limit, "no heartbeat")

    def release_dead(self, host: str, alive: Callable[[int], bool]) -> int:
        """Mark running attempts of this host whose process is gone as lost; returns how many."""
        table = schema.attempt
        with readable_errors(self.engine), self.engine.connect() as connection:
            running = connection.execute(
                sa.select(table.c.id, table.c.pid).where(table.c.status == "running", table.c.host == host)
            ).all()
        dead = [row.id for row in running if not alive(row.pid)]
        return self._lose(table.c.id.in_(dead), "its process is gone") if dead else 0

    def _lose(self, which: Any, why: str) -> int:
        table = schema.attempt
        update = sa.update(table).where(table.c.status == "running", which)
        with readable_errors(self.engine), self.engine.begin() as connection:
            return int(connection.execute(update.values(status="lost", finished=_now(), error=why)).rowcount)

    def _touch(self, connection: sa.Connection, attempt: Attempt, **values: Any) -> bool:
        table = schema.attempt
        live = sa.update(table).where(table.c.id == attempt.id, table.c.status == "running")
        return connection.execute(live.values(**values)).rowcount == 1


def stage_states(connection: sa.Connection, grid: str) -> list[StageState]:
    """The state of each planned stage: a live attempt's if there is one, else that of the last attempt."""
    stage, cell, recipe, attempt = schema.stage, schema.cell, schema.recipe, schema.attempt
    planned = connection.execute(
        sa.select(stage, cell.c.seed, cell.c.pool, cell.c.cost_hours, recipe.c.model, recipe.c.method, recipe.c.variant)
        .add_columns(recipe.c.tokens)
        .join(cell, cell.c.key == stage.c.cell_key)
        .join(recipe, recipe.c.key == cell.c.recipe_key)
        .where(stage.c.grid == grid)
        .order_by(stage.c.position)
    ).all()
    requires: dict[str, list[str]] = {}
    for key, needed in connection.execute(sa.select(schema.requirement)):
        requires.setdefault(key, []).append(needed)
    history: dict[tuple[str, str], list[Any]] = {}
    attempts = sa.select(attempt.c.cell_key, attempt.c.stage, attempt.c.status, attempt.c.error).order_by(attempt.c.id)
    for row in connection.execute(attempts):
        history.setdefault((row.cell_key, row.stage), []).append(row)
    states = []
    for row in planned:
        tries = history.get((row.cell_key, row.stage), [])
        live = next((t for t in tries if t.status in ("running", "done")), tries[-1] if tries else None)
        states.append(
            StageState(
                cell_key=row.cell_key,
                stage=row.stage,
                status=live.status if live else "pending",
                attempts=sum(t.status in ("failed", "lost", "running", "done") for t in tries),
                error=live.error if live else "",
                requires=tuple(sorted(requires.get(row.cell_key, []))),
                pool=row.pool,
                cost_hours=row.cost_hours,
                model=row.model,
                method=row.method,
                variant=row.variant,
                seed=row.seed,
                tokens=row.tokens,
            )
        )
    return states


def _measurement_row(attempt: Attempt, m: Measurement) -> dict[str, Any]:
    if m.value is None or not math.isfinite(m.value):
        if m.detail.get("status") != "diverged":
            raise StoreError(f"measurement {m.metric} of cell {attempt.cell_key} is {m.value} without being marked diverged")
        return {**asdict(m), "value": None, "stderr": None, **_place(attempt)}
    return {**asdict(m), **_place(attempt)}


def _place(attempt: Attempt) -> dict[str, Any]:
    return {"cell_key": attempt.cell_key, "stage": attempt.stage, "attempt_id": attempt.id}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(set(old) | set(new)):
            lines += _differences(old.get(name, "(absent)"), new.get(name, "(absent)"), f"{path}.{name}" if path else name)
        return lines
    return [] if old == new else [f"{path}: was {old!r}, now {new!r}"]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
