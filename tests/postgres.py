"""A private, real PostgreSQL for the tests: one server a session in a temporary folder, one database a test."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa

URL_VARIABLE = "SPARSEFORGE_TEST_POSTGRES_URL"
"""A server to use instead; its user must be allowed to create databases."""

SKIP_VARIABLE = "SPARSEFORGE_SKIP_POSTGRES"
"""Set to 1 to leave the PostgreSQL half of the tests out, knowingly."""

PR_SET_PDEATHSIG = 1

INSTALL = (
    "no PostgreSQL was found to test with (no `initdb` on PATH or under /usr/lib/postgresql). Install one, for example "
    f"`apt-get install postgresql`; or point {URL_VARIABLE} at a server; or set {SKIP_VARIABLE}=1 to leave these "
    "tests out"
)

SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
    "listen_addresses": "127.0.0.1",
}
"""Fast and small: nothing in it outlives the session."""


class NoPostgres(Exception):
    """There is no PostgreSQL to test with."""


def find_programs() -> Path:
    """The folder of `initdb` and `postgres`, the newest if there are several. Raises NoPostgres."""
    found = [Path(p).resolve().parent for p in [shutil.which("initdb")] if p]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise NoPostgres(INSTALL)


@contextlib.contextmanager
def server() -> Iterator[sa.URL]:
    """A running server's administration URL; stopped, and its files deleted, when the block ends."""
    if given := os.environ.get(URL_VARIABLE):
        yield sa.make_url(given).set(drivername="postgresql+psycopg")
        return
    programs = find_programs()
    become, owner = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="sf-pg-"))
    try:
        if owner is not None:
            os.chown(folder, *owner)
        data, port = folder / "data", _free_port()
        arguments = ["-D", str(data), "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        _run([str(programs / "initdb"), *arguments], folder, become)
        options = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), *options]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, preexec_fn=become, start_new_session=True
            )
        try:
            url = sa.URL.create("postgresql+psycopg", "tester", host="127.0.0.1", port=port, database="postgres")
            _wait(url, process, folder / "log")
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown; SIGTERM would wait for clients
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def database(administration: sa.URL) -> Iterator[str]:
    """The URL of a new, empty database, dropped when the block ends."""
    name = f"sf_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(administration, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE template0")
        # without the driver's name: the form in which people write it
        yield administration.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        engine.dispose()


def _unprivileged() -> tuple[Callable[[], None], tuple[int, int] | None]:
    """What a child does before it starts: PostgreSQL refuses to run as root, so a child of root becomes somebody else.

    Also who that is. The child ends with this process, however that ends.
    """
    end_with_parent = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def stay() -> None:
        if end_with_parent is not None:
            end_with_parent(PR_SET_PDEATHSIG, signal.SIGINT)

    if os.geteuid() != 0:
        return stay, None
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names.get("nobody")
    if entry is None:
        raise NoPostgres("PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it as")
    user, group = entry.pw_uid, entry.pw_gid

    def become() -> None:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        stay()  # last: changing the user forgets it

    return become, (user, group)


def _run(command: list[str], folder: Path, become: Callable[[], None]) -> None:
    environment = {**os.environ, "LC_ALL": "C", "HOME": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, preexec_fn=become, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: sa.URL, process: subprocess.Popen[bytes], log: Path, seconds: float = 30.0) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    deadline = time.monotonic() + seconds
    while True:
        try:
            with engine.connect():
                return
        except sa.exc.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {error}\n{log.read_text()}") from error
            time.sleep(0.05)
