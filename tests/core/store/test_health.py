"""A store that contradicts itself is told so, one sentence for each contradiction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from sparseforge_core.store import schema
from sparseforge_core.store.store import ResultStore
from tests.stores import PERPLEXITY, PROVENANCE, plan, planned_cell, planned_slot, record, value

CELL = planned_cell("wanda")


@pytest.fixture
def store(store_url: str) -> Iterator[ResultStore]:
    opened = ResultStore(store_url)
    plan(opened, [CELL], [planned_slot(CELL)])
    record(opened, CELL, "train", value("loss", 1.0))
    assert opened.fsck() == []
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        (sa.delete(schema.measurement), f"stage train of cell {CELL.key} is done without a measurement"),
        (
            sa.update(schema.attempt).values(status="lost"),
            f"measurement loss of stage train of cell {CELL.key} comes from attempt 1, which did not finish that stage",
        ),
        (
            sa.update(schema.measurement).values(value=None),
            f"measurement loss of stage train of cell {CELL.key} has no value and is not marked diverged",
        ),
        (
            sa.insert(schema.requirement).values(cell_key=CELL.key, required_key="gone-s0"),
            f"cell {CELL.key} requires cell gone-s0, which is not planned",
        ),
        (sa.update(schema.cell).values(seed=5), f"cell {CELL.key} is filed under recipe {CELL.recipe_key}, seed 5"),
        (
            sa.update(schema.cell).values(body="["),
            f"cell {CELL.key} holds no JSON: Expecting value: line 1 column 2 (char 1)",
        ),
        (
            sa.delete(schema.suite).where(schema.suite.c.key == PERPLEXITY.key),
            f"cell {CELL.key} plans stage {PERPLEXITY.key}, which is no stored suite",
        ),
        (
            sa.update(schema.slot).values(suite_keys=[PERPLEXITY.key], seeds=[3]),
            f"row wanda of table-2 in grid g shows suite {PERPLEXITY.key} of seed 3, which is not planned",
        ),
    ],
)
def test_each_contradiction_is_found(store: ResultStore, statement: sa.Executable, sentence: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(statement)
    assert sentence in store.fsck()


def test_running_and_failed_attempts_are_no_contradiction(store: ResultStore) -> None:
    store.fail(store.claim(CELL.key, PERPLEXITY.key, PROVENANCE), "no")
    store.claim(CELL.key, PERPLEXITY.key, PROVENANCE)
    assert store.fsck() == []
