"""PostgreSQL without a container: what its image does at a first start, done with the programs that the system has.

A cluster in the stack's home, the user and password of the compose file, logins by password even from this machine,
and init.sql once. PostgreSQL refuses to run as root: then it runs as the system's user `postgres` (or `nobody`).
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from native import ROOT, StackError

INIT = ROOT / "infra" / "postgres" / "init.sql"
INSTALL = (
    "no PostgreSQL server was found (no `initdb` on PATH or under /usr/lib/postgresql); install one, for example "
    "`apt-get install postgresql`"
)


def programs() -> Path:
    """The folder of the newest server's programs. Raises StackError, with what to install."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    for folder in [*found, *([Path(on_path).resolve().parent] if on_path else [])]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise StackError(INSTALL)


def owner(data: Path) -> pwd.struct_passwd | None:
    """Whom the server runs as where we are root, else None. Raises StackError if that user cannot reach the folder."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names.get("nobody")
    if entry is None:
        raise StackError("PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it as")
    closed = [folder for folder in data.parents if not folder.stat().st_mode & 0o001]
    if closed:
        raise StackError(
            f"PostgreSQL does not run as root, and its user {entry.pw_name} cannot enter {closed[-1]}; "
            "use --home in an open folder, or start the stack as an ordinary user"
        )
    return entry


def become(entry: pwd.struct_passwd | None) -> Callable[[], None]:
    """What a child of ours does to be that user."""

    def change() -> None:
        if entry is not None:
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)

    return change


def make_cluster(data: Path, user: str, password: str) -> None:
    """The cluster, unless it is there. Raises StackError with what `initdb` said."""
    entry = owner(data)
    if (data / "PG_VERSION").is_file():
        return
    data.mkdir(parents=True, exist_ok=True)
    data.chmod(0o700)
    with tempfile.NamedTemporaryFile("w", prefix="sf-pg-") as secret:
        secret.write(password)
        secret.flush()
        for path in (str(data), secret.name):
            if entry is not None:
                os.chown(path, entry.pw_uid, entry.pw_gid)
        arguments = ["-D", str(data), "-U", user, f"--pwfile={secret.name}", "-A", "scram-sha-256", "-E", "UTF8"]
        _run([str(programs() / "initdb"), *arguments, "--locale=C"], become(entry))


def answers(port: str) -> bool:
    """Whether a server takes connections on this port of loopback."""
    asked = [str(programs() / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", port]
    return subprocess.run(asked, check=False).returncode == 0


def make_databases(port: str, user: str, password: str) -> None:
    """What init.sql makes, once the server answers; a cluster that has it already is left alone."""
    psql = [str(programs() / "psql"), "-h", "127.0.0.1", "-p", port, "-U", user, "-d", "postgres", "-qAt"]
    secret = {"PGPASSWORD": password}
    there = "SELECT count(*) FROM pg_database WHERE datname = 'sparseforge'"
    if _run([*psql, "-c", there], **secret).strip() == "0":
        _run([*psql, "-v", "ON_ERROR_STOP=1", "-f", str(INIT)], **secret)


def command(asked: tuple[str, ...], data: Path, port: str) -> tuple[str, ...]:
    """The image's command, `postgres …`, for this cluster, on loopback alone and without a socket file."""
    here = ("-D", str(data), "-p", port, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
    return (str(programs() / "postgres"), *asked[1:], *here)


def _run(command: list[str], change: Callable[[], None] | None = None, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd="/",
        env={**os.environ, "LC_ALL": "C", **environment},
        preexec_fn=change,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StackError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
