"""The state of every planned stage, read in one query per table; used by the write side and the read side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from sparseforge_core.store import schema
from sparseforge_core.store.causes import POLICIES, RELEASED, cause_of
from sparseforge_core.store.rows import AttemptRecord, Provenance, StageState, Status


def stage_states(connection: sa.Connection, grid: str) -> list[StageState]:
    """Planned stages of a grid in planned order, each with the state of its live attempt, else of its last one."""
    return _states(connection, schema.stage.c.grid == grid, _cells(grid))


def statuses(connection: sa.Connection, grid: str) -> dict[tuple[str, str], Status]:
    """The state alone of every planned stage of a grid, by (cell key, stage): what is asked of thousands at once."""
    stage = schema.stage
    planned = connection.execute(
        sa.select(stage.c.cell_key, stage.c.stage).where(stage.c.grid == grid).order_by(stage.c.position)
    )
    history = _history(connection, _cells(grid))
    return {(cell, name): _status(_shown(history.get((cell, name), ()))) for cell, name in planned}


def cell_states(connection: sa.Connection, cell_key: str) -> list[StageState]:
    """The same of one cell's stages, whichever grids plan them; each stage once."""
    found = _states(connection, schema.stage.c.cell_key == cell_key, sa.select(sa.literal(cell_key)))
    return list({state.stage: state for state in found}.values())


def _states(connection: sa.Connection, which: sa.ColumnElement[bool], cells: sa.Select[tuple[str]]) -> list[StageState]:
    stage, cell, recipe = schema.stage, schema.cell, schema.recipe
    planned = connection.execute(
        sa.select(stage.c.cell_key, stage.c.stage, stage.c.variant, cell.c.seed, cell.c.pool, cell.c.cost_hours)
        .add_columns(recipe.c.model, recipe.c.method, recipe.c.tokens)
        .join(cell, cell.c.key == stage.c.cell_key)
        .join(recipe, recipe.c.key == cell.c.recipe_key)
        .where(which)
        .order_by(stage.c.position)
    ).all()
    requires = _requirements(connection, cells)
    history = _history(connection, cells)
    return [_state(row, requires.get(row.cell_key, ()), history.get((row.cell_key, row.stage), ())) for row in planned]


def grid_attempts(connection: sa.Connection, grid: str) -> list[AttemptRecord]:
    """Every try at the cells of a grid, oldest first."""
    return _attempts(connection, schema.attempt.c.cell_key.in_(_cells(grid)))


def cell_attempts(connection: sa.Connection, cell_key: str) -> list[AttemptRecord]:
    """Every try at the stages of a cell, oldest first."""
    return _attempts(connection, schema.attempt.c.cell_key == cell_key)


def _attempts(connection: sa.Connection, which: sa.ColumnElement[bool]) -> list[AttemptRecord]:
    table = schema.attempt
    return [_attempt(row) for row in connection.execute(sa.select(table).where(which).order_by(table.c.id))]


def _attempt(row: sa.Row[Any]) -> AttemptRecord:
    known = dict(row._mapping)
    provenance = Provenance(**{f.name: known.pop(f.name) for f in fields(Provenance)})
    return AttemptRecord(**known, provenance=provenance)


def _state(row: Any, requires: Sequence[str], tries: Sequence[Any]) -> StageState:
    since = max((number for number, t in enumerate(tries) if t.error.startswith(RELEASED)), default=-1) + 1
    shown = _shown(tries)
    return StageState(
        **row._mapping,
        status=_status(shown),
        attempts=sum(t.status != "interrupted" for t in tries[since:]),
        alone=any(POLICIES[c].alone for t in tries[since:] if (c := cause_of(t.status, t.error)) is not None),
        error=shown.error if shown else "",
        requires=tuple(sorted(requires)),
    )


def _shown(tries: Sequence[Any]) -> Any:
    """The live attempt, else the last one; None if there was none."""
    return next((t for t in tries if t.status in ("running", "done")), tries[-1] if tries else None)


def _status(shown: Any) -> Status:
    return shown.status if shown else "pending"


def _requirements(connection: sa.Connection, cells: sa.Select[tuple[str]]) -> dict[str, list[str]]:
    table = schema.requirement
    found: dict[str, list[str]] = {}
    for row in connection.execute(sa.select(table).where(table.c.cell_key.in_(cells))):
        found.setdefault(row.cell_key, []).append(row.required_key)
    return found


def _history(connection: sa.Connection, cells: sa.Select[tuple[str]]) -> dict[tuple[str, str], list[Any]]:
    attempt = schema.attempt
    found: dict[tuple[str, str], list[Any]] = {}
    columns = sa.select(attempt.c.cell_key, attempt.c.stage, attempt.c.status, attempt.c.error)
    for row in connection.execute(columns.where(attempt.c.cell_key.in_(cells)).order_by(attempt.c.id)):
        found.setdefault((row.cell_key, row.stage), []).append(row)
    return found


def _cells(grid: str) -> sa.Select[tuple[str]]:
    return sa.select(schema.stage.c.cell_key).where(schema.stage.c.grid == grid)
