"""Recording what a grid wants: bulk upserts, and the guard against a key that changed its meaning."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from sparseforge_core.errors import RecipeDrift
from sparseforge_core.store import schema
from sparseforge_core.store.rows import PlannedCell, PlannedSlot, PlannedSuite, PublishedNumber

RECIPE_COLUMNS = ("model", "family", "pattern", "method", "variant", "tokens")
SHOWN_CHANGES = 5
"""How many differing fields a RecipeDrift names."""


def write_grid(connection: sa.Connection, name: str, title: str, *, published: bool) -> None:
    """Upsert the grid's own row; the latest planned one is the default of the tables."""
    row = {"name": name, "title": title, "published": published, "planned_at": datetime.datetime.now(datetime.UTC)}
    upsert(connection, schema.grid, [row])


def write_cells(connection: sa.Connection, cells: Sequence[PlannedCell]) -> None:
    """Upsert recipes, cells and what these require. Raises RecipeDrift."""
    specs = {cell.recipe_key: cell.spec_json for cell in cells}
    _refuse_drift(connection, schema.recipe, specs, "recipe", "bump the part's revision to make this a new recipe")
    recipes = {
        cell.recipe_key: {
            "key": cell.recipe_key,
            "spec": cell.spec_json,
            **{name: getattr(cell, name) for name in RECIPE_COLUMNS},
        }
        for cell in cells
    }
    upsert(connection, schema.recipe, list(recipes.values()))
    bodies = [
        {
            "key": cell.key,
            "recipe_key": cell.recipe_key,
            "seed": cell.seed,
            "body": cell.cell_json,
            "pool": cell.pool,
            "cost_hours": cell.cost_hours,
        }
        for cell in cells
    ]
    upsert(connection, schema.cell, bodies)
    requirements = [{"cell_key": cell.key, "required_key": key} for cell in cells for key in cell.requires]
    upsert(connection, schema.requirement, requirements)


def write_suites(connection: sa.Connection, suites: Sequence[PlannedSuite]) -> None:
    """Upsert suites. Raises RecipeDrift if one measures something else under its old key."""
    specs = {suite.key: suite.spec_json for suite in suites}
    _refuse_drift(connection, schema.suite, specs, "suite", "give the suite another version to make it a new one")
    upsert(connection, schema.suite, [{"key": s.key, "name": s.name, "spec": s.spec_json} for s in suites])


def replace_stages(
    connection: sa.Connection, grid: str, stages: Mapping[str, Sequence[str]], cells: Sequence[PlannedCell]
) -> None:
    """Make `stages` (stage names by cell key) all that the grid wants done, in this order, by the names of `cells`."""
    connection.execute(sa.delete(schema.stage).where(schema.stage.c.grid == grid))
    named = {cell.key: cell.variant for cell in cells}
    work = [(key, name) for key, names in stages.items() for name in names]
    rows = [
        {"grid": grid, "cell_key": key, "stage": name, "position": position, "variant": named[key]}
        for position, (key, name) in enumerate(work)
    ]
    upsert(connection, schema.stage, rows)


def replace_slots(connection: sa.Connection, grid: str, slots: Sequence[PlannedSlot]) -> None:
    """Make `slots` all that the grid's exhibits show."""
    connection.execute(sa.delete(schema.slot).where(schema.slot.c.grid == grid))
    rows = [{**asdict(s), "grid": grid, "seeds": list(s.seeds), "suite_keys": list(s.suite_keys)} for s in slots]
    upsert(connection, schema.slot, rows)


def replace_published(connection: sa.Connection, numbers: Sequence[PublishedNumber]) -> None:
    """Make `numbers` all that is quoted from papers."""
    connection.execute(sa.delete(schema.published))
    upsert(connection, schema.published, [asdict(number) for number in numbers])


def upsert(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, or give those whose primary key is known the new values."""
    if not rows:
        return
    insert: Any = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    update = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    if update:
        statement = statement.on_conflict_do_update(index_elements=keys, set_=update)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=keys)
    connection.execute(statement, [dict(row) for row in rows])


def _refuse_drift(
    connection: sa.Connection, table: sa.Table, wanted: Mapping[str, str], what: str, remedy: str
) -> None:
    for key, spec in connection.execute(sa.select(table.c.key, table.c.spec)):
        if key not in wanted or spec == wanted[key]:
            continue
        changes = list(_changes(json.loads(spec), json.loads(wanted[key])))
        if changes:
            more = f"; and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
            raise RecipeDrift(
                f"{what} {key} is stored with {'; '.join(changes[:SHOWN_CHANGES])}{more}, under the same key: "
                f"a default has changed. Restore it, or {remedy}"
            )


def _changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Fields whose value differs. A field that only one side has is no change: keys leave defaults out, so it is a
    field that was added or removed, at its default."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() & new.keys()):
            yield from _changes(old[name], new[name], f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _changes(before, after, f"{path}[{index}]")
    elif old != new:
        yield f"{path} = {json.dumps(old)} and now resolves to {json.dumps(new)}"
