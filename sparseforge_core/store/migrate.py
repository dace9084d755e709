"""The schema's revision: found, refused or brought up to date, once, however many processes ask at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from sparseforge_core.errors import StoreError
from sparseforge_core.store import presence
from sparseforge_core.store.engine import LOCK_SECONDS, readable_errors, reading, where, writing
from sparseforge_core.store.ledger import adopt
from sparseforge_core.store.schema import REVISIONS

if TYPE_CHECKING:
    from alembic.config import Config

log = logging.getLogger(__name__)

ADVISORY_LOCK = 5_206_402
"""Number of the PostgreSQL advisory lock that is held while migrating."""

BEFORE_LEDGER = ("0001",)
"""Revisions whose results were not logged yet; what they hold enters the log when they are upgraded."""

OURS = {"recipe", "cell", "attempt", "measurement"}
"""Tables that every schema of ours has had: they tell a newer store from another program's database."""


def revision(engine: sa.Engine) -> str | None:
    """The store's schema revision, None for an empty database.

    Raises StoreError for a revision that this code does not know, and for a database that holds something else.
    """
    with reading(engine) as connection:
        tables = set(sa.inspect(connection).get_table_names())
        found = None
        if "alembic_version" in tables:
            found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    others = tables - {"alembic_version"}
    if not others and found is None:
        return None
    if not others >= OURS or found is None:
        names = ", ".join(sorted(others - OURS)[:3]) or "no schema revision"
        raise StoreError(f"store {where(engine)} is another program's database ({names}); name another with --db")
    if found not in REVISIONS:
        raise StoreError(
            f"store {where(engine)} has schema {found}, this code knows up to {REVISIONS[-1]}; "
            "use the newer SparseForge that wrote it, or another store with --db"
        )
    return str(found)


def require_newest(engine: sa.Engine) -> None:
    """Raise StoreError unless the store has the schema that this code reads; changes nothing."""
    found = revision(engine)
    if found is None:
        raise StoreError(f"store {where(engine)} is empty; fill it with `make demo` or `sparseforge run demo`")
    if found != REVISIONS[-1]:
        raise StoreError(
            f"store {where(engine)} has the older schema {found}, this code reads {REVISIONS[-1]}; "
            "any command that runs a grid upgrades it, for example `sparseforge run demo`"
        )


def upgrade(engine: sa.Engine, *, lock_seconds: float = LOCK_SECONDS, create: bool = True) -> None:
    """Create or upgrade the schema to the newest revision.

    Raises StoreError if that is not ours to do, and where a SQLite file that was there is away. `create=False` says
    that it was there: then neither the file nor its folder is made.
    """
    with _only_one(engine, lock_seconds, create=create):
        found = revision(engine)
        if found != REVISIONS[-1]:
            _bring_up(engine, found, lock_seconds)
        if engine.dialect.name == "sqlite":
            _remember(engine)


def _bring_up(engine: sa.Engine, found: str | None, lock_seconds: float) -> None:
    log.info("bringing store %s from schema %s to %s", where(engine), found or "(none)", REVISIONS[-1])
    if engine.dialect.name == "sqlite":
        _write_ahead(engine, lock_seconds)
    from alembic import command  # 0.2 s that only a migration should pay

    with writing(engine) as connection:
        command.upgrade(alembic_config(connection), "head")
        if found in BEFORE_LEDGER:
            adopt(connection)


def _remember(engine: sa.Engine) -> None:
    """See that a SQLite store has its number, and that its folder knows that it is there."""
    with reading(engine) as connection:
        number = connection.exec_driver_sql("PRAGMA user_version").scalar()
    if not number:
        with writing(engine) as connection:
            connection.exec_driver_sql(f"PRAGMA user_version = {presence.new_number()}")
        engine.dispose()  # connections learn the number when they are opened
        revision(engine)
    presence.mark(_file(engine))


def _file(engine: sa.Engine) -> Path:
    return Path(str(engine.url.database))


def alembic_config(connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration for the migrations in this package; there is no alembic.ini."""
    from alembic.config import Config

    config = Config(stdout=sys.stdout)  # alembic's default is the stream of the moment when it was imported
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _write_ahead(engine: sa.Engine, lock_seconds: float) -> None:
    """Switch a SQLite file to write-ahead logging: it stays so, and readers never wait for a writer."""
    deadline = time.monotonic() + lock_seconds
    while True:
        try:
            with contextlib.closing(engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA journal_mode=WAL")
                return
        except engine.dialect.loaded_dbapi.OperationalError as error:
            # SQLite does not wait here by itself when a reader has the file open.
            if "locked" not in str(error) or time.monotonic() > deadline:
                reason = f"{error}; see that the file and its folder can be written"
                raise StoreError(f"store {where(engine)}: {reason}") from error
            time.sleep(0.05)


@contextlib.contextmanager
def _only_one(engine: sa.Engine, lock_seconds: float, *, create: bool) -> Iterator[None]:
    """Hold the right to migrate: a lock file beside a SQLite file, an advisory lock in PostgreSQL."""
    if engine.dialect.name == "postgresql":
        with readable_errors(engine), engine.connect() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_lock(ADVISORY_LOCK)))
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(ADVISORY_LOCK)))
        return
    file = _file(engine)
    if not create and not file.exists():
        raise presence.away(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = presence.lock_of(file).open("a")
    except OSError as error:
        raise StoreError(
            f"store {where(engine)}: the folder {file.parent} cannot be written ({error.strerror}); "
            "give write permission or name another store with --db"
        ) from error
    with lock:
        deadline = time.monotonic() + lock_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"store {where(engine)}: another process has been creating or upgrading it for over "
                        f"{lock_seconds:g} s; wait for it or end it"
                    ) from error
                time.sleep(0.05)
        presence.create(file, may_make=create)
        yield
