"""Connecting: engines that behave, migrations that run once, and a sentence for everything that can be wrong."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event

from alembic import command
from sparseforge_core.errors import StoreError

LOCK_SECONDS = 30
ADVISORY_LOCK = 5_206_402
"""PostgreSQL advisory lock held while migrating."""
FILL = "`make demo` or `sparseforge run GRID`"


def make_engine(url: str, *, writable: bool = True) -> sa.Engine:
    """An engine for a SQLite or PostgreSQL URL. Raises StoreError for any other.

    A read-only SQLite engine never creates a file and takes no write lock.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise StoreError(f"{url!r} is no database URL; examples: sqlite:///runs/store.db, postgresql://user@host/sparseforge") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(f"database {parsed.get_backend_name()!r} is not supported; use a sqlite:/// or postgresql:// URL")
    if parsed.get_backend_name() == "postgresql":
        return sa.create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    if not writable:
        if not parsed.database or not Path(parsed.database).is_file():
            raise StoreError(f"there is no store at {url}; {FILL} makes one, --db names another")
        return sa.create_engine(parsed.set(database=f"file:{parsed.database}", query={"mode": "ro", "uri": "true"}))
    engine = sa.create_engine(parsed, connect_args={"timeout": LOCK_SECONDS})
    event.listen(engine, "connect", _sqlite_pragmas)
    # The driver's default defers BEGIN, which loses updates between processes without an error.
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    for pragma in (f"busy_timeout={LOCK_SECONDS * 1000}", "foreign_keys=ON", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}")


@contextlib.contextmanager
def readable_errors(engine: sa.Engine) -> Iterator[None]:
    """Turn what the database says into a StoreError: unreachable, locked, read-only, full."""
    where = engine.url.render_as_string(hide_password=True)
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InternalError) as error:
        reason = str(error.orig).strip().splitlines()[0]
        hints = {
            "locked": f"another process has held it for over {LOCK_SECONDS} s; wait for it or end it",
            "readonly": "the file or its folder is read-only; give write permission or name another store with --db",
            "read-only": "the server or the file is read-only; name another store with --db",
            "unable to open": "the folder is missing or may not be read; name another store with --db",
            "full": "the disk is full; free some space and run the same command again, nothing recorded is lost",
            "connect": "is the server running, and are host, port, user and password right?",
        }
        hint = next((text for word, text in hints.items() if word in reason.lower()), "see the database's own log")
        raise StoreError(f"store {where}: {reason}; {hint}") from error
    except sa.exc.DatabaseError as error:
        if "not a database" in str(error.orig) or "malformed" in str(error.orig):
            raise StoreError(f"store {where}: {error.orig}; this file is damaged or no SQLite database") from error
        raise


def _config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def newest_revision() -> str:
    """The schema revision that this code writes."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    head = ScriptDirectory.from_config(config).get_current_head()
    assert head is not None
    return head


def check_revision(engine: sa.Engine, *, writable: bool) -> str | None:
    """The store's revision, or None for an empty database.

    Raises StoreError for one of a newer schema, or a database that holds something else.
    """
    where = engine.url.render_as_string(hide_password=True)
    with readable_errors(engine), engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        tables = set(sa.inspect(connection).get_table_names()) - {"alembic_version"}
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is None and tables:
        raise StoreError(f"store {where} is another program's database (tables {', '.join(sorted(tables)[:3])}); name another with --db")
    if current is not None and current not in known:
        raise StoreError(
            f"store {where} has schema {current}, this code knows up to {newest_revision()}; use the newer SparseForge "
            "that wrote it, or another store with --db"
        )
    if not writable and current != newest_revision():
        state = "is empty" if current is None else f"has the older schema {current}"
        raise StoreError(f"store {where} {state}; fill or upgrade it with {FILL}")
    return current


def upgrade(engine: sa.Engine) -> None:
    """Bring the store to the newest schema, once, however many processes ask at the same time."""
    with _creation_lock(engine):
        if check_revision(engine, writable=True) == newest_revision():
            return
        with readable_errors(engine):
            if engine.dialect.name == "sqlite":
                with engine.connect() as connection:
                    # Persistent, and the reason that readers never wait for a writer.
                    connection.connection.execute("PRAGMA journal_mode=WAL")  # type: ignore[attr-defined]
            with engine.begin() as connection:
                command.upgrade(_config(connection), "head")


@contextlib.contextmanager
def _creation_lock(engine: sa.Engine) -> Iterator[None]:
    if engine.dialect.name == "postgresql":
        with readable_errors(engine), engine.connect() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_lock(ADVISORY_LOCK)))
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(ADVISORY_LOCK)))
        return
    file = engine.url.database
    if not file or file == ":memory:":
        yield
        return
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{file}.lock").open("w")
    except OSError as error:
        raise StoreError(f"store {engine.url}: its folder cannot be written ({error}); name another store with --db") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
