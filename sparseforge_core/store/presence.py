"""A SQLite store's file: made once, missed when it is away, and not mistaken for another one that came in its place.

SQLite makes an empty file where it finds none, and goes on writing into one that was moved or whose disk was taken
away. Either would split a store in two without a word. So a file is made by `create` alone, every connection opens what
is there, and a connection whose file is no longer the one under the store's name is given up.
"""

from __future__ import annotations

import os
import secrets
import urllib.parse
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from sparseforge_core.errors import StoreError

MARK = "A results store was made here. While it is away, none is made in its place; delete this file to begin anew."
"""What the lock file beside a store says from then on."""


def lock_of(file: Path) -> Path:
    """The file that is locked while the store beside it is made or upgraded."""
    return Path(f"{file}.lock")


def is_marked(file: Path) -> bool:
    """Whether a store was ever made under this name, as far as the folder remembers."""
    lock = lock_of(file)
    return lock.is_file() and lock.stat().st_size > 0


def away(file: Path) -> StoreError:
    """The error for a store that was there and is not."""
    return StoreError(
        f"store {file} is away: a store was made there and the file is gone. Put it back, or mount its disk, and run "
        f"the same command again: nothing recorded is lost. To begin a new store instead, delete {lock_of(file)}"
    )


def create(file: Path, *, may_make: bool) -> None:
    """Make the empty file of a store that never was; to be called by the holder of the lock file.

    Raises StoreError for one that was there and is away, and for any that is not there unless `may_make`.
    """
    if file.exists():
        return
    if is_marked(file) or not may_make:
        raise away(file)
    try:
        file.touch()
    except OSError as error:
        raise StoreError(f"store {file} cannot be made ({error.strerror}); name another store with --db") from error


def mark(file: Path) -> None:
    """Let the folder remember that a store is there."""
    if not is_marked(file):
        lock_of(file).write_text(MARK + "\n", encoding="utf-8")


def new_number() -> int:
    """A number for a new store, kept in its header (`PRAGMA user_version`), that tells it from all others."""
    return 1 + secrets.randbelow(2**31 - 1)


def watch(engine: sa.Engine) -> None:
    """Have every connection of an engine open the file that is there, and leave it when another one is in its place.

    What is asked of the engine then raises StoreError where the file is away or is another store.
    """
    file = Path(os.path.abspath(str(engine.url.database)))
    known: set[int] = set()

    def connect(dialect: Any, record: Any, _arguments: Any, options: dict[str, Any]) -> Any:
        place = _place(file)
        if place is None:
            raise away(file)
        opened = dialect.connect(f"file:{urllib.parse.quote(str(file))}?mode=rw", **{**options, "uri": True})
        number = _number(opened)
        if number and known and number not in known:
            opened.close()
            raise StoreError(
                f"store {file} is another one than this process began with; put the file back that was there, or end "
                "this process and start it again to go on with the new one"
            )
        known.update({number} - {0})
        record.info["place"] = place
        return opened

    def checkout(_connection: Any, record: Any, _proxy: Any) -> None:
        if record.info["place"] != _place(file):
            raise sa.exc.DisconnectionError(f"{file} is no longer the file that was opened")

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "checkout", checkout)


def _place(file: Path) -> tuple[int, int] | None:
    """Device and inode of what is under a name now."""
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _number(connection: Any) -> int:
    """The number of the store that a connection has opened; 0 before it has one."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
