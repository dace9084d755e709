"""All that the store knows of one cell: who wants it, what it needs, what became of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from sparseforge_core.store import schema
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.states import cell_states

ABOUT = ("model", "family", "pattern", "method", "variant", "tokens")


@dataclass(frozen=True, kw_only=True)
class Dossier:
    """One cell, in the store's words."""

    key: str
    recipe_key: str
    seed: int
    pool: str
    cost_hours: float
    about: dict[str, Any]
    """What a listing shows: model, family, pattern, method, variant, tokens."""
    body: str
    """The cell file."""
    grids: tuple[str, ...]
    """Grids that plan it, the one planned last first."""
    shown: tuple[tuple[str, str, str, str], ...]
    """(grid, exhibit, row, label) of every row that shows it."""
    requires: tuple[tuple[str, str], ...]
    """(cell, state of its training) of the cells whose model it reads."""
    wanted_by: tuple[str, ...]
    """Cells that read its model."""
    states: tuple[StageState, ...]
    suites: dict[str, str]
    """Names of its suites by stage."""
    measurements: tuple[tuple[str, str, float | None, float | None], ...]
    """(stage, metric, value, standard error)."""


def matching(connection: sa.Connection, prefix: str) -> list[tuple[str, str, str, int]]:
    """(key, model, variant, seed) of every cell whose key begins so, sorted by key.

    A cell is called what the latest of its grids calls it; one that no grid wants any more by the
    last name of its recipe.
    """
    cell, recipe, stage, grid = schema.cell, schema.recipe, schema.stage, schema.grid
    variant = sa.func.coalesce(stage.c.variant, recipe.c.variant).label("variant")
    rows = connection.execute(
        sa.select(cell.c.key, recipe.c.model, variant, cell.c.seed)
        .join(recipe, recipe.c.key == cell.c.recipe_key)
        .outerjoin(stage, stage.c.cell_key == cell.c.key)
        .outerjoin(grid, grid.c.name == stage.c.grid)
        .where(cell.c.key.startswith(prefix, autoescape=True))
        .order_by(grid.c.planned_at, grid.c.name)
    )
    return sorted({row.key: (row.key, row.model, row.variant, row.seed) for row in rows}.values())


def dossier(connection: sa.Connection, key: str) -> Dossier:
    """Of a cell that some grid has planned."""
    cell, recipe, needed = schema.cell, schema.recipe, schema.requirement
    row = connection.execute(
        sa.select(cell, *(recipe.c[name] for name in ABOUT))
        .join(recipe, recipe.c.key == cell.c.recipe_key)
        .where(cell.c.key == key)
    ).one()
    states = cell_states(connection, key)
    required = sorted(connection.execute(sa.select(needed.c.required_key).where(needed.c.cell_key == key)).scalars())
    wanting = connection.execute(sa.select(needed.c.cell_key).where(needed.c.required_key == key)).scalars()
    measured = schema.measurement
    values = connection.execute(sa.select(measured).where(measured.c.cell_key == key))
    return Dossier(
        key=key,
        recipe_key=row.recipe_key,
        seed=row.seed,
        pool=row.pool,
        cost_hours=row.cost_hours,
        about={**{name: getattr(row, name) for name in ABOUT}, "variant": matching(connection, key)[0][2]},
        body=row.body,
        grids=_grids(connection, key),
        shown=_shown(connection, row.recipe_key, row.seed),
        requires=tuple((other, _training(connection, other)) for other in required),
        wanted_by=tuple(sorted(wanting)),
        states=tuple(states),
        suites=_suites(connection, [state.stage for state in states]),
        measurements=tuple(sorted((m.stage, m.metric, m.value, m.stderr) for m in values)),
    )


def recipes_of(connection: sa.Connection, grid: str) -> dict[str, tuple[str, str]]:
    """(variant, the fully resolved recipe as JSON) of every recipe that a grid plans, by recipe key.

    The variant is the grid's name of the first of its cells.
    """
    stage, cell, recipe = schema.stage, schema.cell, schema.recipe
    planned = (
        sa.select(cell.c.recipe_key, stage.c.variant)
        .join(stage, stage.c.cell_key == cell.c.key)
        .where(stage.c.grid == grid)
        .order_by(stage.c.position.desc())
    )
    variants = {row.recipe_key: row.variant for row in connection.execute(planned)}
    of_grid = sa.select(cell.c.recipe_key).join(stage, stage.c.cell_key == cell.c.key).where(stage.c.grid == grid)
    chosen = sa.select(recipe.c.key, recipe.c.spec).where(recipe.c.key.in_(of_grid))
    return {row.key: (variants[row.key], row.spec) for row in connection.execute(chosen)}


def _grids(connection: sa.Connection, key: str) -> tuple[str, ...]:
    stage, grid = schema.stage, schema.grid
    planned = sa.select(stage.c.grid).where(stage.c.cell_key == key)
    rows = connection.execute(sa.select(grid.c.name, grid.c.planned_at).where(grid.c.name.in_(planned)))
    return tuple(row.name for row in sorted(rows, key=lambda row: (row.planned_at, row.name), reverse=True))


def _shown(connection: sa.Connection, recipe_key: str, seed: int) -> tuple[tuple[str, str, str, str], ...]:
    slot = schema.slot
    rows = connection.execute(sa.select(slot).where(slot.c.recipe_key == recipe_key))
    return tuple(sorted((row.grid, row.exhibit, row.row, row.label) for row in rows if seed in row.seeds))


def _training(connection: sa.Connection, key: str) -> str:
    state = next((s for s in cell_states(connection, key) if s.stage == "train"), None)
    if state is None:
        return "not planned"
    return f"in quarantine ({state.cause})" if state.quarantined else state.cause or state.status


def _suites(connection: sa.Connection, stages: list[str]) -> dict[str, str]:
    suite = schema.suite
    rows = connection.execute(sa.select(suite.c.key, suite.c.spec).where(suite.c.key.in_(stages)))
    return {row.key: str(json.loads(row.spec).get("name", row.key)) for row in rows}
