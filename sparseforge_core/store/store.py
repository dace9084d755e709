"""The write side of the store: plan, claim, beat, finish, fail. Every promise of the grid is kept here.

One live attempt per cell and stage is a unique index; a result is committed in one transaction that first checks
that the attempt is still the live one; recording twice is recording once.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import sqlalchemy as sa

from sparseforge_core.errors import CellTaken, StoreError
from sparseforge_core.store import ledger, planning, schema
from sparseforge_core.store.causes import RELEASED
from sparseforge_core.store.curves import curve_row
from sparseforge_core.store.engine import LOCK_SECONDS, clock, make_engine, reading, writing
from sparseforge_core.store.health import problems
from sparseforge_core.store.migrate import upgrade
from sparseforge_core.store.outcomes import outcome_row
from sparseforge_core.store.rows import (
    Attempt,
    AttemptRecord,
    Curve,
    Measurement,
    Outcomes,
    PlannedCell,
    PlannedSlot,
    PlannedSuite,
    Provenance,
    PublishedNumber,
    StageState,
)
from sparseforge_core.store.states import cell_attempts, stage_states

log = logging.getLogger(__name__)


class ResultStore:
    """Everything that writes. Opening it creates or upgrades the schema; threads may share one, processes may not.

    `url` is a SQLite file or a PostgreSQL database; `lock_seconds` is how long to wait for another writer; with
    `create=False` a SQLite file that is not there is one that is away. Every method raises StoreError when the database
    is unreachable, away, locked, read-only, full or not ours.
    """

    def __init__(self, url: str, *, lock_seconds: float = LOCK_SECONDS, create: bool = True) -> None:
        self.engine = make_engine(url, lock_seconds=lock_seconds)
        upgrade(self.engine, lock_seconds=lock_seconds, create=create)

    def close(self) -> None:
        """Close every connection; the store opens new ones if it is used again."""
        self.engine.dispose()

    # ---------------------------------------------------------------- what is wanted, and what is to be done

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

        `stages` holds stage names by cell key. Quoted numbers are replaced only if some are given. Raises RecipeDrift
        if a recipe or suite of the same key resolves differently now than when it was stored; then nothing is written.
        """
        with writing(self.engine) as connection:
            planning.write_grid(connection, grid, title, published=bool(published))
            planning.write_cells(connection, cells)
            planning.write_suites(connection, suites)
            planning.replace_stages(connection, grid, stages, cells)
            planning.replace_slots(connection, grid, slots)
            if published:
                planning.replace_published(connection, published)

    def work(self, grid: str) -> list[StageState]:
        """Every planned stage of a grid with its present state, in planned order."""
        with reading(self.engine) as connection:
            return stage_states(connection, grid)

    def cell_body(self, cell_key: str) -> str:
        """The cell file of a planned cell. Raises StoreError for a key that was never planned."""
        return self._text(schema.cell.c.body, cell_key)

    def suite_spec(self, suite_key: str) -> str:
        """The JSON of a planned suite. Raises StoreError for a key that was never planned."""
        return self._text(schema.suite.c.spec, suite_key)

    def _text(self, column: sa.Column[str], key: str) -> str:
        with reading(self.engine) as connection:
            found = connection.execute(sa.select(column).where(column.table.c.key == key)).scalar()
        if found is None:
            raise StoreError(f"the store has no {column.table.name} {key!r}; plan a grid that has it first")
        return str(found)

    # ---------------------------------------------------------------- attempts

    def claim(self, cell_key: str, stage: str, provenance: Provenance) -> Attempt:
        """Take a stage. Raises CellTaken if it is done or held, StoreError if no grid plans it."""
        planned = schema.stage
        wanted = (planned.c.cell_key == cell_key) & (planned.c.stage == stage)
        try:
            with writing(self.engine) as connection:
                if connection.execute(sa.select(sa.func.count()).select_from(planned).where(wanted)).scalar() == 0:
                    raise StoreError(f"no grid in the store plans stage {stage!r} of cell {cell_key!r}; plan it first")
                now = clock(connection)
                values = {"status": "running", "started": now, "heartbeat": now, "error": "", **asdict(provenance)}
                insert = sa.insert(schema.attempt).values(cell_key=cell_key, stage=stage, **values)
                key = connection.execute(insert).inserted_primary_key
        except sa.exc.IntegrityError as error:
            raise CellTaken(f"stage {stage} of cell {cell_key} is {self._holder(cell_key, stage)}") from error
        assert key is not None
        return Attempt(id=int(key[0]), cell_key=cell_key, stage=stage)

    def _holder(self, cell_key: str, stage: str) -> str:
        live = [a for a in self.attempts(cell_key) if a.stage == stage and a.status in ("running", "done")]
        if not live:
            return "held by an attempt that has just ended; try again"
        if live[0].status == "done":
            return f"done (attempt {live[0].id}); nothing to run"
        with reading(self.engine) as connection:
            silent = (clock(connection) - live[0].heartbeat).total_seconds()
        origin = live[0].provenance
        return f"held by attempt {live[0].id}, process {origin.pid} on {origin.host}, last heard of {silent:.0f} s ago"

    def heartbeat(self, attempt: Attempt) -> bool:
        """Say that an attempt is alive; False if it is no longer the live one and must stop."""
        with writing(self.engine) as connection:
            return _touch(connection, attempt, heartbeat=clock(connection))

    def finish(
        self,
        attempt: Attempt,
        measurements: Iterable[Measurement],
        context: dict[str, Any],
        items_sha256: str | None = None,
        *,
        outcomes: Iterable[Outcomes] = (),
        curves: Iterable[Curve] = (),
        error: str = "",
    ) -> None:
        """Commit an attempt's measurements and mark it done, in one transaction that also enters them in the log.

        `outcomes` are those of the items behind the measurements, `curves` what training showed of itself, `error` says
        why measurements have no value (the run diverged).

        Finishing the same attempt again changes nothing. Raises CellTaken if another attempt has taken its place, and
        StoreError for measurements that cannot be stored; then nothing is written.
        """
        rows = _measurement_rows(attempt, measurements)
        _require_json(context, f"context of stage {attempt.stage} of cell {attempt.cell_key}")
        place = {"cell_key": attempt.cell_key, "attempt_id": attempt.id}
        items = [{**place, "stage": attempt.stage, **outcome_row(outcome)} for outcome in outcomes]
        shapes = [{**place, **curve_row(curve)} for curve in curves]
        done = {"status": "done", "context": context, "items_sha256": items_sha256, "error": error.replace("\0", "\\0")}
        table, tries = schema.measurement, schema.attempt
        with writing(self.engine) as connection:
            now = clock(connection)
            if not _touch(connection, attempt, heartbeat=now, finished=now, **done):
                status = connection.execute(sa.select(tries.c.status).where(tries.c.id == attempt.id)).scalar()
                if status == "done":
                    log.info("attempt %d of cell %s was recorded before", attempt.id, attempt.cell_key)
                    return
                raise CellTaken(
                    f"attempt {attempt.id} of stage {attempt.stage} of cell {attempt.cell_key} is {status or 'unknown'}"
                    " and no longer the live one; its results were not recorded"
                )
            for part, own in ((table, rows), (schema.outcome, items)):
                stage = (part.c.cell_key == attempt.cell_key) & (part.c.stage == attempt.stage)
                connection.execute(sa.delete(part).where(stage))
                planning.upsert(connection, part, own)
            if shapes:
                connection.execute(sa.delete(schema.curve).where(schema.curve.c.cell_key == attempt.cell_key))
                planning.upsert(connection, schema.curve, shapes)
            ledger.append(connection, attempt.id)

    def fail(self, attempt: Attempt, error: str, *, status: Literal["failed", "interrupted"] = "failed") -> None:
        """End an attempt with its error text; one that is no longer live is left as it is."""
        text = error.replace("\0", "\\0")  # PostgreSQL stores no NUL
        with writing(self.engine) as connection:
            _touch(connection, attempt, status=status, finished=clock(connection), error=text)

    def expire(self, older_than: datetime.timedelta) -> int:
        """Mark running attempts without a heartbeat for that long as lost; returns how many."""
        return self._lose(lambda now: schema.attempt.c.heartbeat < now - older_than, "no heartbeat")

    def release_dead(
        self, host: str, alive: Callable[[int], bool], *, cell: str | None = None, why: str = "its process is gone"
    ) -> int:
        """Mark running attempts of this host (or those of one cell) whose process is gone as lost; returns how many."""
        table = schema.attempt
        held = sa.select(table.c.id, table.c.pid).where(table.c.status == "running", table.c.host == host)
        held = held if cell is None else held.where(table.c.cell_key == cell)
        with reading(self.engine) as connection:
            running = connection.execute(held).all()
        dead = [row.id for row in running if not alive(row.pid)]
        return self._lose(lambda _now: table.c.id.in_(dead), why) if dead else 0

    def release(self, stages: Iterable[tuple[str, str]], provenance: Provenance) -> int:
        """Count the tries of these (cell key, stage) anew: a mark among their attempts; returns how many were marked.

        One that is running or done by now is left as it is.
        """
        table, count = schema.attempt, 0
        with writing(self.engine) as connection:
            now = clock(connection)
            mark = {"status": "interrupted", "started": now, "heartbeat": now, "finished": now, **asdict(provenance)}
            mark["error"] = f"{RELEASED}to be tried again, on request"
            for cell_key, stage in stages:
                place = (table.c.cell_key == cell_key) & (table.c.stage == stage)
                live = sa.select(sa.func.count()).select_from(table).where(place, schema.LIVE)
                if not connection.execute(live).scalar():
                    connection.execute(sa.insert(table).values(cell_key=cell_key, stage=stage, **mark))
                    count += 1
        return count

    def _lose(self, which: Callable[[datetime.datetime], sa.ColumnElement[bool]], why: str) -> int:
        table = schema.attempt
        with writing(self.engine) as connection:
            now = clock(connection)
            update = sa.update(table).where(table.c.status == "running", which(now))
            return connection.execute(update.values(status="lost", finished=now, error=why)).rowcount

    # ---------------------------------------------------------------- looking back

    def attempts(self, cell_key: str) -> list[AttemptRecord]:
        """Every try at the stages of a cell, oldest first."""
        with reading(self.engine) as connection:
            return cell_attempts(connection, cell_key)

    def fsck(self) -> list[str]:
        """What in the store contradicts itself, one sentence each; an empty list is a sound store."""
        with reading(self.engine) as connection:
            return problems(connection)


def _touch(connection: sa.Connection, attempt: Attempt, **values: Any) -> bool:
    """Change an attempt if it is still the live one, and say whether it was: the fence against stale writers."""
    table = schema.attempt
    live = sa.update(table).where(table.c.id == attempt.id, table.c.status == "running")
    return connection.execute(live.values(**values)).rowcount == 1


def _measurement_rows(attempt: Attempt, measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for m in measurements:
        about = f"measurement {m.metric} of stage {attempt.stage} of cell {attempt.cell_key}"
        if m.metric in rows:
            raise StoreError(f"{about} comes twice; each metric of a stage has one value")
        diverged = m.value is None or not math.isfinite(m.value)
        if diverged and m.detail.get("status") != "diverged":
            raise StoreError(f"{about} is {m.value} without being marked diverged")
        _require_json(m.detail, f"detail of {about}")
        stderr = None if diverged or m.stderr is None or not math.isfinite(m.stderr) else m.stderr
        place = {"cell_key": attempt.cell_key, "stage": attempt.stage, "attempt_id": attempt.id}
        rows[m.metric] = {**asdict(m), "value": None if diverged else m.value, "stderr": stderr, **place}
    return list(rows.values())


def _require_json(body: dict[str, Any], about: str) -> None:
    """Both databases must be able to keep it: SQLite would take a NaN that PostgreSQL refuses."""
    try:
        json.dumps(body, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{about} is no JSON ({error}); write numbers that are not finite as null") from error
