"""Connecting: engines that behave alike on SQLite and PostgreSQL, and a sentence for everything that can be wrong."""

from __future__ import annotations

import contextlib
import datetime
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from sparseforge_core.errors import StoreError
from sparseforge_core.store import presence

LOCK_SECONDS = 30.0
"""How long a transaction waits for another one before it gives up."""

CONNECT_SECONDS = 10
"""How long a server may take to answer."""

HINTS = (
    ("is locked", "another process has held it for too long; wait for it or end it"),
    ("lock timeout", "another transaction has held it for too long; wait for it or end it"),
    ("read-only", "it cannot be written; give write permission or name another store with --db"),
    ("readonly", "the file or its folder is read-only; give write permission or name another store with --db"),
    ("unable to open", "the folder is missing or may not be read; name another store with --db"),
    ("full", "the disk is full; free some space and run the same command again, nothing recorded is lost"),
    ("no space", "the disk is full; free some space and run the same command again, nothing recorded is lost"),
    ("permission denied", "this database user may not do that; grant it the database, or name another store with --db"),
    ("not a database", "this file is damaged or no SQLite database; name another store with --db"),
    ("malformed", "this file is damaged; restore a copy or name another store with --db"),
    ("connect", "is the server running, and are host, port, database, user and password right?"),
)
"""What to do, by a word of what the database says; the first that fits counts."""


def make_engine(url: str, *, writable: bool = True, lock_seconds: float = LOCK_SECONDS) -> sa.Engine:
    """An engine for a SQLite file or a PostgreSQL database. Raises StoreError for any other URL.

    Transactions that write take SQLite's write lock when they begin: the driver's own habit of taking it at the first
    write loses updates between processes without an error. None makes a SQLite file (`migrate.upgrade` does), and one
    that is not writable changes nothing.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "postgresql":
        return _postgresql(parsed, lock_seconds)
    if not writable:
        parsed = _read_only_file(parsed)
    engine = sa.create_engine(parsed, connect_args={"timeout": lock_seconds})

    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours to say
        for pragma in (f"busy_timeout={int(lock_seconds * 1000)}", "foreign_keys=ON", "synchronous=NORMAL"):
            connection.execute(f"PRAGMA {pragma}")

    def begin(connection: sa.Connection) -> None:
        reading = not writable or connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    if writable:
        presence.watch(engine)
    return engine


@contextlib.contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that sees one state of the store in all its statements and holds up no writer."""
    options: dict[str, Any] = {"reading": True}
    if engine.dialect.name == "postgresql":
        options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with readable_errors(engine), engine.connect().execution_options(**options) as connection:
        yield connection


@contextlib.contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that is committed when the block ends well and leaves nothing otherwise."""
    with readable_errors(engine), engine.begin() as connection:
        yield connection


@contextlib.contextmanager
def readable_errors(engine: sa.Engine) -> Iterator[None]:
    """Turn what the database says about itself into a StoreError; broken constraints and our own bugs pass."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DBAPIError as error:
        reason = (str(error.orig).strip().splitlines() or [type(error.orig).__name__])[0]
        hint = next((text for word, text in HINTS if word in reason.lower()), None)
        if hint is None and not isinstance(error, (sa.exc.OperationalError, sa.exc.InternalError)):
            raise
        raise StoreError(f"store {where(engine)}: {reason}; {hint or 'see the log of the database'}") from error


def clock(connection: sa.Connection) -> datetime.datetime:
    """The present moment by the one clock that all who use a store share: the server's, or that of the file's machine.

    A lease is over by the same clock that its heartbeats were told by, however wrong those of the workers' machines go.
    """
    if connection.dialect.name == "postgresql":
        found: datetime.datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return found.astimezone(datetime.UTC)
    return datetime.datetime.now(datetime.UTC)


def where(engine: sa.Engine) -> str:
    """The store's URL as it may be shown: without the password."""
    return engine.url.render_as_string(hide_password=True)


def _parse(url: str) -> sa.URL:
    examples = "sqlite:///runs/store.db, postgresql://user@host/sparseforge"
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise StoreError(f"{url!r} is no database URL ({error}); examples: {examples}") from error
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise StoreError(f"database {backend!r} is not supported; use SQLite or PostgreSQL, for example {examples}")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError(f"{url!r} is in memory, where results would be lost; name a file, for example {examples}")
    return parsed


def _postgresql(url: sa.URL, lock_seconds: float) -> sa.Engine:
    arguments = {"connect_timeout": CONNECT_SECONDS, "application_name": "sparseforge"}
    settings = {name: value for name, value in arguments.items() if name not in url.query}
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, connect_args=settings)

    def prepare(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {int(lock_seconds * 1000)}")
        connection.commit()

    event.listen(engine, "connect", prepare)
    return engine


def _read_only_file(url: sa.URL) -> sa.URL:
    """The URL that opens an existing file for reading only. Raises StoreError if there is none."""
    file = Path(str(url.database))
    if not file.is_file():
        if presence.is_marked(file):
            raise presence.away(file)
        raise StoreError(
            f"there is no store at {file}; make one with `make demo` or `sparseforge run demo`, or use --db"
        )
    begun = Path(f"{file}-journal")
    if begun.exists() and begun.stat().st_size:
        raise StoreError(
            f"store {file}: a process is making or upgrading it, or was killed while it did ({begun.name} is there); "
            "wait for it, or run `sparseforge run GRID` once, which puts the store in order"
        )
    options = {"mode": "ro", "uri": "true"}
    log = Path(f"{file}-wal")
    if not os.access(file.parent, os.W_OK, effective_ids=True) and not (log.exists() and log.stat().st_size):
        # SQLite cannot share a file without writing beside it; where nobody can write, nobody need be watched for.
        options["immutable"] = "1"
    return url.set(database=f"file:{urllib.parse.quote(str(file))}", query=options)
