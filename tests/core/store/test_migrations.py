"""The schema: one history, the same on both databases, created once however many ask, and never guessed at."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import event

from sparseforge_core.errors import StoreError
from sparseforge_core.store import migrate
from sparseforge_core.store.engine import make_engine, writing
from sparseforge_core.store.migrate import alembic_config, upgrade
from sparseforge_core.store.results import Results
from sparseforge_core.store.schema import REVISIONS, metadata
from sparseforge_core.store.store import ResultStore
from tests.stores import plan, planned_cell


def open_store(url: str) -> int:
    """Open a store in a process of its own; how many stages it has planned."""
    store = ResultStore(url)
    plan(store, [planned_cell("wanda")])
    count = len(store.work("g"))
    store.close()
    return count


def tables(engine: sa.Engine) -> set[str]:
    with engine.connect() as connection:
        return set(sa.inspect(connection).get_table_names())


def set_revision(url: str, revision: str) -> None:
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
    engine.dispose()


def test_the_history_has_one_head_and_the_code_knows_all_of_it() -> None:
    scripts = ScriptDirectory.from_config(alembic_config())
    assert scripts.get_heads() == [REVISIONS[-1]]
    assert [s.revision for s in scripts.walk_revisions()][::-1] == list(REVISIONS)


def test_migrations_make_the_declared_tables_and_can_be_undone(store_url: str) -> None:
    engine = make_engine(store_url)
    upgrade(engine)
    assert tables(engine) == {*metadata.tables, "alembic_version"}
    with writing(engine) as connection:
        command.check(alembic_config(connection))
    with writing(engine) as connection:
        command.downgrade(alembic_config(connection), "base")
    assert tables(engine) == {"alembic_version"}
    upgrade(engine)
    assert open_store(store_url) == 3
    engine.dispose()


def test_the_index_of_live_attempts_is_unique_and_partial(store_url: str) -> None:
    store = ResultStore(store_url)
    with store.engine.connect() as connection:
        (index,) = [i for i in sa.inspect(connection).get_indexes("attempt") if i["name"] == "one_live_attempt"]
    assert index["unique"]
    assert index["column_names"] == ["cell_key", "stage"]
    (condition,) = [str(v) for name, v in index["dialect_options"].items() if name.endswith("_where")]
    assert "running" in condition
    assert "done" in condition
    store.close()


def test_many_processes_may_open_a_new_store(store_url: str) -> None:
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as processes:
        assert list(processes.map(open_store, [store_url] * 6)) == [3] * 6


def test_a_new_store_is_created_once_by_eight_that_ask_at_the_same_moment(store_url: str) -> None:
    together = threading.Barrier(8)

    def create(_: int) -> int:
        together.wait()
        return open_store(store_url)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(create, range(8))) == [3] * 8


def test_a_migration_that_fails_midway_leaves_an_empty_database(store_url: str) -> None:
    engine = make_engine(store_url)

    def fail(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "CREATE TABLE measurement" in statement:
            raise ConnectionResetError("the server went away")

    event.listen(engine, "before_cursor_execute", fail)
    with pytest.raises(ConnectionResetError):
        upgrade(engine)
    event.remove(engine, "before_cursor_execute", fail)
    assert tables(engine) == set()
    engine.dispose()
    assert open_store(store_url) == 3


@pytest.mark.parametrize("side", [ResultStore, Results])
def test_a_newer_schema_is_refused_by_both_sides(store_url: str, side: type) -> None:
    ResultStore(store_url).close()
    set_revision(store_url, "9999")
    with pytest.raises(
        StoreError, match=f"schema 9999, this code knows up to {REVISIONS[-1]}; use the newer SparseForge"
    ):
        side(store_url)


def test_an_older_schema_is_named_by_readers(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ResultStore(store_url).close()
    monkeypatch.setattr(migrate, "REVISIONS", (*REVISIONS, "next"))
    with pytest.raises(
        StoreError, match=f"older schema {REVISIONS[-1]}, this code reads next; any command .* upgrades it"
    ):
        Results(store_url)


@pytest.mark.parametrize("side", [ResultStore, Results])
@pytest.mark.parametrize("with_alembic", [False, True])
def test_another_programs_database_is_left_alone(store_url: str, side: type, with_alembic: bool) -> None:
    engine = make_engine(store_url)
    if engine.dialect.name == "sqlite":
        Path(str(engine.url.database)).touch()
    with writing(engine) as connection:
        connection.exec_driver_sql("CREATE TABLE experiments (id INTEGER)")
        if with_alembic:
            connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('0001')")
    before = tables(engine)
    with pytest.raises(StoreError, match=r"is another program's database \(experiments\)"):
        side(store_url)
    assert tables(engine) == before
    engine.dispose()


def test_write_ahead_logging_is_on(sqlite_url: str, tmp_path: Path) -> None:
    store = ResultStore(sqlite_url)
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    store.close()


def test_a_store_whose_grids_had_no_names_of_their_own_takes_those_of_its_recipes(store_url: str) -> None:
    store = ResultStore(store_url)
    plan(store, [planned_cell("wanda"), planned_cell("dense")])
    store.close()
    engine = make_engine(store_url)
    with writing(engine) as connection:
        command.downgrade(alembic_config(connection), "0002")
    with engine.connect() as connection:
        assert "variant" not in {column["name"] for column in sa.inspect(connection).get_columns("stage")}
    engine.dispose()
    store = ResultStore(store_url)
    assert [state.variant for state in store.work("g")] == ["wanda"] * 3 + ["dense"] * 3
    store.close()
