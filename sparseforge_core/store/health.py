"""What in a store contradicts itself: checks that read everything and change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import sqlalchemy as sa

from sparseforge_core.store import ledger, schema


def problems(connection: sa.Connection) -> list[str]:
    """One sentence for each contradiction; empty for a sound store."""
    found = [*_file(connection), *_cells(connection), *_results(connection), *_slots(connection)]
    found += [trouble.sentence for trouble in ledger.breaks(connection)]
    return sorted(found)


def _file(connection: sa.Connection) -> Iterator[str]:
    """SQLite's own checks; a PostgreSQL server looks after itself."""
    if connection.dialect.name != "sqlite":
        return
    for (text,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if text != "ok":
            yield f"the file is damaged: {text}"
    for row in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"table {row[0]}: row {row[1]} refers to a missing row of {row[2]}"


def _cells(connection: sa.Connection) -> Iterator[str]:
    cell, needed = schema.cell, schema.requirement
    rows = connection.execute(sa.select(cell.c.key, cell.c.recipe_key, cell.c.seed, cell.c.body)).all()
    for row in rows:
        if row.key != f"{row.recipe_key}-s{row.seed}":
            yield f"cell {row.key} is filed under recipe {row.recipe_key}, seed {row.seed}"
        yield from _unreadable(row.body, f"cell {row.key}")
    known = {row.key for row in rows}
    for row in connection.execute(sa.select(needed)):
        if row.required_key not in known:
            yield f"cell {row.cell_key} requires cell {row.required_key}, which is not planned"
    for table in (schema.recipe, schema.suite):
        for key, text in connection.execute(sa.select(table.c.key, table.c.spec)):
            yield from _unreadable(text, f"{table.name} {key}")


def _results(connection: sa.Connection) -> Iterator[str]:
    attempt, m = schema.attempt, schema.measurement
    columns = sa.select(attempt.c.id, attempt.c.cell_key, attempt.c.stage, attempt.c.status)
    tries = {row.id: row for row in connection.execute(columns)}
    measured = set()
    for row in connection.execute(sa.select(m)):
        about = f"measurement {row.metric} of stage {row.stage} of cell {row.cell_key}"
        measured.add(row.attempt_id)
        source = tries.get(row.attempt_id)
        if source is None or source.status != "done" or (source.cell_key, source.stage) != (row.cell_key, row.stage):
            yield f"{about} comes from attempt {row.attempt_id}, which did not finish that stage"
        if row.value is None and row.detail.get("status") != "diverged":
            yield f"{about} has no value and is not marked diverged"
    for source in tries.values():
        if source.status == "done" and source.id not in measured:
            yield f"stage {source.stage} of cell {source.cell_key} is done without a measurement"


def _slots(connection: sa.Connection) -> Iterator[str]:
    slot, stage = schema.slot, schema.stage
    suites = set(connection.execute(sa.select(schema.suite.c.key)).scalars())
    cells = {(row.recipe_key, row.seed): row.key for row in connection.execute(sa.select(schema.cell))}
    planned = {(row.grid, row.cell_key, row.stage) for row in connection.execute(sa.select(stage))}
    for _, key, name in sorted(planned):
        if name != "train" and name not in suites:
            yield f"cell {key} plans stage {name}, which is no stored suite"
    for row in connection.execute(sa.select(slot).where(slot.c.recipe_key.is_not(None))):
        for seed in row.seeds:
            for name in row.suite_keys:
                if (row.grid, cells.get((row.recipe_key, seed)), name) not in planned:
                    place = f"row {row.row} of {row.exhibit} in grid {row.grid}"
                    yield f"{place} shows suite {name} of seed {seed}, which is not planned"


def _unreadable(text: str, about: str) -> Iterator[str]:
    try:
        json.loads(text)
    except ValueError as error:
        yield f"{about} holds no JSON: {error}"
