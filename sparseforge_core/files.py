"""Writing files so that a reader finds all of one or none: temporary name, fsync, rename, fsync of the folder.

Folders are taken away the same way: renamed first, so that a process killed while it deletes leaves nothing that looks
whole. A sealed JSON file carries the hash of its own content.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparseforge_core.errors import DataError, FolderHeld

SEAL = "sha256"
"""The name under which a sealed body holds its own hash."""


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, or leave it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # a full disk needs the room, and what is half written is of no use
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, body: Any) -> None:
    """Replace `path` by canonical, readable JSON."""
    write_text(path, json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises DataError naming a file that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def inside(folder: Path, name: str, field: str) -> Path:
    """`folder / name` for a name that came from a file. Raises DataError, by its field, if it is no plain name."""
    if not name or name in (".", "..") or Path(name).name != name or "\0" in name:
        raise DataError(f"{field}: {name!r} is no plain name; a path would lead out of {folder}")
    return folder / name


def seal(body: dict[str, Any]) -> dict[str, Any]:
    """The body with the hash of its content in it, under SEAL."""
    return {**body, SEAL: _digest(body)}


def seal_fits(body: dict[str, Any]) -> bool:
    """Whether a body that was read is to the letter what was sealed."""
    return body.get(SEAL) == _digest({name: value for name, value in body.items() if name != SEAL})


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`; the others wait here and then find it made.

    What writers of it left that were killed is removed: nobody else writes it now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(path)
        yield


@contextmanager
def held(path: Path, *, seconds: float, pause: float = 0.2) -> Iterator[None]:
    """Be the only process that writes `path` while the block runs; the lock goes with the process that holds it.

    A process that is stopped, or cut off from everything else, keeps the lock: who comes later cannot write beside it.
    Raises FolderHeld, saying who has it, where it is not free within so many seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.held").open("a+", encoding="utf-8") as lock:
        deadline = time.monotonic() + seconds
        while not _take(lock.fileno()):
            if time.monotonic() >= deadline:
                lock.seek(0)
                raise FolderHeld(
                    f"{path} is still being written by {lock.read().strip() or 'another process'}, which lost its "
                    "claim but has not ended: let it go on (kill -CONT) or end it (kill -KILL)"
                )
            time.sleep(pause)
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def ever_held(folder: Path) -> list[str]:
    """Names of the files in a folder for which some process has been inside `held`."""
    return [lock.name.removeprefix(".").removesuffix(".held") for lock in folder.glob(".*.held")]


def is_held(path: Path) -> bool:
    """Whether a process is inside `held` for `path` now."""
    lock = path.with_name(f".{path.name}.held")
    if not lock.is_file():
        return False
    with lock.open("r", encoding="utf-8") as file:
        return not _take(file.fileno(), fcntl.LOCK_SH)


def _take(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for inner in temporary.rglob("*"):
            sync(inner)
        sync(temporary)
        remove_folder(path)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder, if it is there: gone under its name at once, whenever this process may be killed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def remove_temporaries(folder: Path, *, below: bool = True) -> None:
    """Delete what killed writers left in a folder, and in those below it, that has one writer at a time."""
    for leftover in list(folder.rglob(".*.tmp") if below else folder.glob(".*.tmp")):
        _remove(leftover)


def remove_leftovers(path: Path) -> None:
    """Delete what killed writers left of a file that has one writer at a time."""
    for leftover in list(path.parent.glob(f".{path.name}.*.tmp")):
        _remove(leftover)


def _remove(leftover: Path) -> None:
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names, before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
