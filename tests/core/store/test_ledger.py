"""The results log: every finished stage is in it, and whatever is changed later is found and named."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command

from sparseforge_core.store import schema
from sparseforge_core.store.engine import make_engine, writing
from sparseforge_core.store.ledger import FIRST, canonical, link
from sparseforge_core.store.migrate import alembic_config
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import Curve, Outcomes
from sparseforge_core.store.store import ResultStore
from tests.stores import PERPLEXITY, PROVENANCE, plan, planned_cell, value

CELLS = [planned_cell("wanda", seed) for seed in range(3)]
DEMO = Path(__file__).resolve().parents[3] / "results" / "demo" / "store.db"


@pytest.fixture
def store(store_url: str) -> Iterator[ResultStore]:
    opened = ResultStore(store_url)
    plan(opened, CELLS)
    for number, cell in enumerate(CELLS):
        items = Outcomes(metric="nll", identity="i" * 64, values=(1.0, 2.5, None))
        curve = Curve(name="loss", steps=(1, 2), values=(3.0, 2.0))
        attempt = opened.claim(cell.key, PERPLEXITY.key, PROVENANCE)
        measured = [value("perplexity", 20.0 + number / 3, 1e22, 3, small=1e-7, whole=2.0)]
        opened.finish(attempt, measured, {"seconds": 1e22}, "ab", outcomes=[items], curves=[curve])
    yield opened
    opened.close()


def broken(store: ResultStore) -> str:
    return "\n".join(store.fsck())


def change(store: ResultStore, statement: sa.sql.expression.UpdateBase) -> None:
    with store.engine.begin() as connection:
        connection.execute(statement)


def test_every_finished_stage_is_one_entry_and_follows_the_one_before(store: ResultStore) -> None:
    with store.engine.connect() as connection:
        entries = connection.execute(sa.select(schema.ledger).order_by(schema.ledger.c.id)).all()
    assert len(entries) == 3
    assert entries[0].previous == FIRST
    for before, after in itertools.pairwise(entries):
        assert after.previous == before.digest
    assert all(link(entry.previous, entry.body) == entry.digest for entry in entries)
    assert store.fsck() == []


def test_a_changed_number_is_named_with_what_it_was(store: ResultStore) -> None:
    table = schema.measurement
    change(store, sa.update(table).where(table.c.cell_key == CELLS[1].key).values(value=3.5))
    (sentence,) = store.fsck()
    assert "measurement perplexity" in sentence
    assert "20.333" in sentence
    assert "3.5" in sentence
    assert CELLS[1].key in sentence


@pytest.mark.parametrize(
    ("table", "values", "named"),
    [
        (schema.outcome, {"body": b"bxx"}, "outcomes nll"),
        (schema.outcome, {"identity": "j" * 64}, "outcomes nll"),
        (schema.curve, {"body": "{}"}, "curve loss"),
        (schema.attempt, {"git_sha": "other"}, "origin"),
        (schema.attempt, {"items_sha256": "cd"}, "items_sha256"),
        (schema.ledger, {"body": "{}"}, "was altered: its text does not give its hash"),
        (schema.ledger, {"digest": "e" * 64}, "was altered"),
    ],
)
def test_whatever_is_changed_is_named(
    store: ResultStore, table: sa.Table, values: dict[str, object], named: str
) -> None:
    key = table.c.attempt_id if "attempt_id" in table.c else table.c.id
    change(store, sa.update(table).where(key == 2).values(**values))
    assert named in broken(store)


def test_an_entry_that_was_taken_out_is_missed_by_its_stage_and_by_its_successor(store: ResultStore) -> None:
    change(store, sa.delete(schema.ledger).where(schema.ledger.c.attempt_id == 2))
    assert "does not follow the entry before it" in broken(store)
    assert f"cell {CELLS[1].key} is done and has no entry" in broken(store)


def test_results_that_were_taken_out_with_their_attempt_are_missed(store: ResultStore) -> None:
    change(store, sa.update(schema.attempt).where(schema.attempt.c.id == 3).values(status="lost"))
    assert f"cell {CELLS[2].key} is in the results log and no longer done" in broken(store)


def test_writers_at_the_same_moment_make_one_chain(store_url: str) -> None:
    store = ResultStore(store_url)
    cells = [planned_cell("wanda", seed) for seed in range(6)]
    plan(store, cells)
    attempts = [store.claim(cell.key, "train", PROVENANCE) for cell in cells]
    together = threading.Barrier(6)

    def finish(number: int) -> None:
        together.wait()
        store.finish(attempts[number], [value("loss", 1.0)], {})

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(finish, range(6)))
    assert store.fsck() == []
    store.close()
    results = Results(store_url)
    assert results.log_head()[0] == 6
    results.close()


def test_a_store_from_before_the_log_is_taken_into_it(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    shutil.copy(DEMO, path)
    engine = make_engine(f"sqlite:///{path}")
    with writing(engine) as connection:
        done = connection.scalar(sa.select(sa.func.count()).where(schema.attempt.c.status == "done"))
        command.downgrade(alembic_config(connection), "0001")
    engine.dispose()
    store = ResultStore(f"sqlite:///{path}")
    assert store.fsck() == []
    results = Results(f"sqlite:///{path}")
    assert results.log_head()[0] == done
    assert results.outcomes("demo") == {}
    change(store, sa.update(schema.measurement).where(schema.measurement.c.metric == "mean/acc").values(value=0.99))
    assert "measurement mean/acc" in broken(store)
    results.close()
    store.close()


def test_one_meaning_is_one_text() -> None:
    assert canonical({"b": [1.0, 1e22], "a": None}) == canonical({"a": None, "b": [1, 10**22]})
