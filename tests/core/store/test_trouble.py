"""Every way in which a database can be away, locked, read-only or wrong gets a sentence, and loses nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from sparseforge_core.errors import StoreError
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore
from tests.stores import plan, planned_cell, planned_slot

NOBODY = 65534


@contextlib.contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """File permissions mean nothing to root, so root becomes somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="sf-store-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("runs/store.db", "is no database URL .*; examples: sqlite:///runs/store.db"),
        ("", "is no database URL"),
        ("postgresql://host:port/name", "is no database URL"),
        ("mysql://host/name", "database 'mysql' is not supported; use SQLite or PostgreSQL"),
        ("sqlite://", "is in memory, where results would be lost"),
        ("sqlite:///:memory:", "is in memory, where results would be lost"),
    ],
)
@pytest.mark.parametrize("side", [ResultStore, Results])
def test_a_url_that_cannot_be_a_store(url: str, sentence: str, side: type) -> None:
    with pytest.raises(StoreError, match=sentence):
        side(url)


@pytest.mark.parametrize("side", [ResultStore, Results])
def test_a_server_that_is_not_there(side: type) -> None:
    with pytest.raises(StoreError, match="is the server running, and are host, port, database, user") as caught:
        side("postgresql://someone:hunter2@127.0.0.1:1/sparseforge")
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1:1/sparseforge" in str(caught.value)


@pytest.mark.parametrize("side", [ResultStore, Results])
def test_a_database_that_the_server_does_not_have(postgres_server: sa.URL, side: type) -> None:
    with pytest.raises(StoreError, match=r'database "nothing" does not exist.*; is the server running'):
        side(postgres_server.set(database="nothing").render_as_string(hide_password=False))


def test_reading_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"there is no store at .*store\.db; make one with `make demo` or `sparseforge run"
    ):
        Results(f"sqlite:///{tmp_path / 'runs' / 'store.db'}")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_database_is_not_filled_by_reading(store_url: str, tmp_path: Path) -> None:
    if store_url.startswith("sqlite"):
        (tmp_path / "store.db").touch()
    with pytest.raises(StoreError, match="is empty; fill it with `make demo` or `sparseforge run demo`"):
        Results(store_url)
    ResultStore(store_url).close()
    with pytest.raises(StoreError, match="the store holds no grid yet; fill it with `make demo`"):
        Results(store_url).grid(None)


def test_writing_makes_the_folder(tmp_path: Path) -> None:
    ResultStore(f"sqlite:///{tmp_path / 'a' / 'b c' / 'store.db'}").close()
    assert Results(f"sqlite:///{tmp_path / 'a' / 'b c' / 'store.db'}").grids() == []


@pytest.mark.parametrize("name", ["100% new.db", "a#b&c.db", "st\u00f6re.db"])
def test_odd_names_of_files(tmp_path: Path, name: str) -> None:
    url = sa.URL.create("sqlite", database=str(tmp_path / name)).render_as_string()
    store = ResultStore(url)
    plan(store, [planned_cell("wanda")])
    assert Results(url).grids() == ["g"]
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize("side", [ResultStore, Results])
def test_a_file_that_is_no_database(tmp_path: Path, side: type) -> None:
    (tmp_path / "store.db").write_text("Dear diary, this is no database, however long I may go on about it. " * 20)
    with pytest.raises(StoreError, match="file is not a database; this file is damaged or no SQLite database"):
        side(f"sqlite:///{tmp_path / 'store.db'}")


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "store.db").mkdir()
    with pytest.raises(StoreError, match="unable to open database file; the folder is missing or may not be read"):
        ResultStore(f"sqlite:///{tmp_path / 'store.db'}")


def test_a_store_that_is_locked_for_too_long(sqlite_url: str, tmp_path: Path) -> None:
    store = ResultStore(sqlite_url, lock_seconds=0.2)
    plan(store, [planned_cell("wanda")])
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="database is locked; another process has held it for too long"):
        plan(store, [planned_cell("another")])
    assert len(store.work("g")) == 3
    assert Results(sqlite_url).grids() == ["g"]
    other.execute("ROLLBACK")
    plan(store, [planned_cell("another")])
    store.close()


def test_a_store_whose_maker_was_killed_is_put_in_order_by_the_next_writer(sqlite_url: str, tmp_path: Path) -> None:
    store = ResultStore(sqlite_url)
    plan(store, [planned_cell("wanda")])
    store.close()
    maker = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    maker.execute("PRAGMA journal_mode=DELETE")
    maker.execute("PRAGMA cache_size=1")  # so that changes reach the file before the end of the transaction
    maker.execute("BEGIN IMMEDIATE")
    maker.execute(
        "CREATE TABLE half AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 9999) SELECT i FROM n"
    )
    (tmp_path / "killed").mkdir()
    for name in ("store.db", "store.db-journal"):
        shutil.copy(tmp_path / name, tmp_path / "killed" / name)
    maker.close()
    url = f"sqlite:///{tmp_path / 'killed' / 'store.db'}"
    with pytest.raises(
        StoreError, match=r"was killed while it did \(store\.db-journal is there\); .*sparseforge run GRID"
    ):
        Results(url)
    ResultStore(url).close()
    assert Results(url).grids() == ["g"]


def test_a_table_that_is_locked_for_too_long(postgres_url: str) -> None:
    store = ResultStore(postgres_url, lock_seconds=0.2)
    other = sa.create_engine(postgres_url)
    with other.connect() as connection:
        connection.exec_driver_sql("LOCK TABLE grid IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreError, match="lock timeout; another transaction has held it for too long"):
            plan(store, [planned_cell("wanda")])
    plan(store, [planned_cell("wanda")])
    store.close()
    other.dispose()


def test_a_store_that_another_process_keeps_migrating(sqlite_url: str, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "store.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"has been creating or upgrading it for over 0\.1 s"):
            ResultStore(sqlite_url, lock_seconds=0.1)


def test_a_connection_that_the_server_cuts_is_made_anew(postgres_url: str, postgres_server: sa.URL) -> None:
    store = ResultStore(postgres_url)
    plan(store, [planned_cell("wanda")])
    admin = sa.create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        name = sa.make_url(postgres_url).database
        connection.execute(
            sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n"), {"n": name}
        )
    assert len(store.work("g")) == 3
    store.close()
    admin.dispose()


def test_a_server_that_only_reads(postgres_url: str) -> None:
    store = ResultStore(postgres_url)
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = sa.make_url(postgres_url).database
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    store.close()
    with pytest.raises(StoreError, match="read-only transaction; it cannot be written; give write permission"):
        plan(store, [planned_cell("wanda")])
    assert Results(postgres_url).grids() == []
    store.close()


def test_a_user_without_permission(postgres_url: str, postgres_server: sa.URL) -> None:
    store = ResultStore(postgres_url)
    role = f"guest_{os.getpid()}"
    with store.engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
    guest = sa.make_url(postgres_url).set(username=role).render_as_string(hide_password=False)
    with pytest.raises(StoreError, match=r"permission denied .*; this database user may not do that; grant it"):
        ResultStore(guest)
    with store.engine.begin() as connection:
        connection.exec_driver_sql(f"DROP ROLE {role}")
    store.close()


def test_a_read_only_file_can_be_read_and_says_so_when_written(open_folder: Path) -> None:
    url = f"sqlite:///{open_folder / 'store.db'}"
    store = ResultStore(url)
    cell = planned_cell("wanda")
    plan(store, [cell], [planned_slot(cell)])
    store.close()
    for file in open_folder.iterdir():
        file.chmod(0o444)
    open_folder.chmod(0o555)
    with as_an_ordinary_user():
        assert [slot.row for slot in Results(url).slots("g")] == ["wanda"]
        with pytest.raises(StoreError, match=rf"the folder {open_folder} cannot be written \(Permission denied\)"):
            ResultStore(url)
    assert sorted(file.name for file in open_folder.iterdir()) == ["store.db", "store.db.lock"]


def test_a_read_only_file_in_a_folder_that_can_be_written(open_folder: Path) -> None:
    url = f"sqlite:///{open_folder / 'store.db'}"
    ResultStore(url).close()
    (open_folder / "store.db").chmod(0o444)
    for path in (open_folder, open_folder / "store.db.lock"):
        path.chmod(0o777)
    with as_an_ordinary_user():
        assert Results(url).grids() == []
        store = ResultStore(url)
        with pytest.raises(
            StoreError, match=r"store\.db: attempt to write a readonly database; the file or its folder"
        ):
            plan(store, [planned_cell("wanda")])
        store.close()
