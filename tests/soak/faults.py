"""Faults of the machine: a process stopped past its lease, a full disk, a database locked, read-only, gone and back.

What goes away with a file or a folder is in `away.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa

from flows import cycle, failures
from flows.provenance import process_alive
from sparseforge_core.errors import StoreError
from sparseforge_core.store.store import ResultStore
from tests import postgres
from tests.soak.world import CRASHED, DONE, Counts, Reference, World, end_of, fork

PATIENCE = 0.5
"""Seconds that a process here waits for a lock, so that the soak need not wait for half a minute."""


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Processes forked meanwhile give up soon on a store that is locked or full, and on a folder that is still held."""
    defaults = ResultStore.__init__.__kwdefaults__
    before, folder, waits = dict(defaults), cycle.FOLDER_SECONDS, failures.WAITS
    defaults["lock_seconds"] = cycle.FOLDER_SECONDS = PATIENCE
    failures.WAITS = (PATIENCE,)  # type: ignore[assignment]
    try:
        yield
    finally:
        defaults.update(before)
        cycle.FOLDER_SECONDS, failures.WAITS = folder, waits


def begun(scratch: Path) -> World:
    """A world whose pretraining is done."""
    world = World(scratch / "begun")
    first: list[str] = []

    def until(cell: str, stage: str) -> bool:
        first.append(cell)
        return cell != first[0]

    world.drain(until=until)
    return world


def finish(world: World, what: str, reference: Reference, counts: Counts) -> None:
    """Go on until everything is done, and compare."""
    log = world.root.with_suffix(".log")
    code = CRASHED
    for _ in range(8):
        code = end_of(fork(world.drain, log))
        if code == DONE:
            break
        world.release_everything()
    if code != DONE:
        counts.lost_results += 1
        counts.say(f"{what}: it cannot be finished: {log.read_text()[-400:]}")
        return
    counts.compare(world, reference)


# ------------------------------------------------------------------------------------------------------------ SIGSTOP


def paused(
    start: World, reference: Reference, scratch: Path, chance: random.Random, wanted: int, counts: Counts
) -> None:
    """Stop a process at a random instant, let its lease end and another one take over, then let it go on."""
    for number in range(wanted):
        world = start.copy(scratch / "paused")
        with impatient():
            stale = fork(world.drain, world.root.with_suffix(".stale.log"))
            time.sleep(chance.uniform(0.05, reference.seconds * 0.7))
            os.kill(stale, signal.SIGSTOP)
            try:
                world.release_everything()
            except StoreError as error:
                # Stopped in the middle of a transaction, it holds SQLite's one write lock: nobody can take over, and
                # the sentence says so. Nothing is lost when it goes on.
                os.kill(stale, signal.SIGCONT)
                end_of(stale)
                if "is locked; another process has held it for too long" not in str(error):
                    raise
                counts.add(counts.faults, "stopped while it held the store")
                finish(world, f"stopped process {number}", reference, counts)
                continue
            fresh = fork(world.drain, world.root.with_suffix(".fresh.log"))
            if number % 2:
                time.sleep(chance.uniform(0.0, reference.seconds * 0.7))
                os.kill(stale, signal.SIGCONT)
                end_of(fresh)
            else:
                end_of(fresh)
                os.kill(stale, signal.SIGCONT)
            end_of(stale)
            counts.add(counts.faults, "stopped past the lease")
            finish(world, f"stopped process {number}", reference, counts)


# ---------------------------------------------------------------------------------------------------------- full disk


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int | None, bool], None] | None]:
    """A file system of its own that can be given a size in bytes, and be made read-only; None: not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "soak", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        yield None
        return

    def remount(size: int | None, read_only: bool) -> None:
        options = f"remount,{'ro' if read_only else 'rw'},size={size or 64 * 2**20}"
        subprocess.run(["mount", "-o", options, folder], check=True, capture_output=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def full_disk(start: World, reference: Reference, scratch: Path, wanted: int, counts: Counts) -> None:
    """Run out of space at each of so many points between too little and just enough, then get the space and go on.

    A real file system of that size where mounting is permitted; else the largest file that may be written is limited
    (RLIMIT_FSIZE), which fails the same writes with another number.
    """
    with small_disk(scratch / "disk") as resize:
        world = start.copy(scratch / "disk" / "home" if resize else scratch / "full")
        used = _used(world.root)
        # In a process of its own: files that this one still maps would take room after they are deleted.
        if end_of(fork(world.drain, scratch / "full.log")) != DONE:
            raise AssertionError(f"it cannot be done with room either: {(scratch / 'full.log').read_text()[-400:]}")
        needed = _used(world.root) - used
        for number in range(wanted):
            world = start.copy(world.root)
            world.seen = {}
            room = int(needed * number / wanted)
            log = scratch / "full.log"
            if resize:
                resize(_used(scratch / "disk") + room, False)
                with impatient():
                    code = end_of(fork(world.drain, log))
                resize(None, False)
                counts.add(counts.faults, "disk full (tmpfs, ENOSPC)")
            else:
                with impatient():
                    code = end_of(fork(lambda: _limited(world, 1024 + 40_000 * number // wanted), log))  # noqa: B023
                counts.add(counts.faults, "disk full (RLIMIT_FSIZE, EFBIG)")
            if code == CRASHED:
                counts.tracebacks += 1
                counts.say(f"full disk, room for {room} bytes: {log.read_text()[-600:]}")
            world.check(counts)
            world.release_everything()
            finish(world, f"full disk, room for {room} bytes", reference, counts)


def _limited(world: World, size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    world.drain()


def _used(folder: Path) -> int:
    """Bytes in whole pages, as a tmpfs counts them."""
    return sum(-(-p.lstat().st_size // 4096) * 4096 + 0 for p in folder.rglob("*") if p.is_file())


# ----------------------------------------------------------------------------------------------------------- database


def locked(
    start: World, reference: Reference, scratch: Path, chance: random.Random, wanted: int, counts: Counts
) -> None:
    """Another process holds the write lock, for less or for more than anybody waits."""
    for number in range(wanted):
        world = start.copy(scratch / "locked")
        with impatient():
            drainer = fork(world.drain, world.root.with_suffix(".log"))
            time.sleep(chance.uniform(0.0, reference.seconds * 0.5))
            held = PATIENCE * (0.5 if number % 2 else 2.0)
            holder = fork(lambda: _hold(world, held), scratch / "holder.log")  # noqa: B023
            end_of(holder)
            code = end_of(drainer)
            if code == CRASHED:
                counts.tracebacks += 1
                counts.say(f"locked store: {world.root.with_suffix('.log').read_text()[-400:]}")
            counts.add(counts.faults, "store locked")
            world.check(counts)
            world.release_everything()
            finish(world, "locked store", reference, counts)


def _hold(world: World, seconds: float) -> None:
    import sqlite3

    connection = sqlite3.connect(world.root / "store.db", isolation_level=None, timeout=30)
    connection.execute("BEGIN IMMEDIATE")
    time.sleep(seconds)
    connection.execute("ROLLBACK")


def read_only(start: World, reference: Reference, scratch: Path, counts: Counts) -> bool:
    """The whole file system turns read-only while nothing runs, then back; False where mounting is not permitted."""
    with small_disk(scratch / "read-only") as remount:
        if remount is None:
            return False
        world = start.copy(scratch / "read-only" / "home")
        remount(None, True)
        log = scratch / "read-only.log"
        code = end_of(fork(world.drain, log))
        remount(None, False)
        if code in (DONE, CRASHED):
            counts.tracebacks += 1
            counts.say(f"read-only: ended with {code}: {log.read_text()[-400:]}")
        counts.add(counts.faults, "read-only")
        finish(world, "read-only", reference, counts)
    return True


def gone_and_back(reference: Reference, scratch: Path, chance: random.Random, wanted: int, counts: Counts) -> None:
    """PostgreSQL ends at a random instant, as by a power cut, and comes back."""
    with postgres.server() as admin:
        engine = sa.create_engine(admin)
        with engine.connect() as connection:
            data = Path(str(connection.execute(sa.text("SHOW data_directory")).scalar()))
        engine.dispose()
        server = _Server(data, int(str(admin.port)))
        try:
            with postgres.database(admin) as url:
                for number in range(wanted):
                    world = World(scratch / f"postgres-{number}", url=url)
                    _empty(url)
                    _cut_once(world, server, reference, chance, counts)
        finally:
            server.cut()


def _cut_once(world: World, server: _Server, reference: Reference, chance: random.Random, counts: Counts) -> None:
    drainer = fork(world.drain, world.root.with_suffix(".log"))
    time.sleep(chance.uniform(0.1, reference.seconds))
    server.cut()
    time.sleep(chance.uniform(0.0, 0.5))
    server.start()
    if end_of(drainer) == CRASHED:
        counts.tracebacks += 1
        counts.say(f"server gone: {world.root.with_suffix('.log').read_text()[-600:]}")
    counts.add(counts.faults, "PostgreSQL killed and back")
    world.check(counts)
    world.release_everything()
    finish(world, "server gone", reference, counts)


def _empty(url: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()


class _Server:
    """A PostgreSQL that is killed and started again on the same files."""

    def __init__(self, data: Path, port: int) -> None:
        self.data, self.port = data, port
        pid = self._pid()
        self.command = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0")[:-1]
        self.command += ["-c", "fsync=on", "-c", "synchronous_commit=on", "-c", "full_page_writes=on"]
        self.owner = (self.data.stat().st_uid, self.data.stat().st_gid)
        self.process: subprocess.Popen[bytes] | None = None

    def _pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def cut(self) -> None:
        """Immediate shutdown: no checkpoint, recovery at the next start."""
        pid = self._pid()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)
        if self.process is not None:
            self.process.wait(30)
        deadline = time.monotonic() + 30
        while process_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def start(self) -> None:
        uid, gid = self.owner
        same = uid == os.getuid()
        self.process = subprocess.Popen(
            self.command,
            cwd=self.data.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=None if same else uid,
            group=None if same else gid,
            extra_groups=None if same else [],
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                engine = sa.create_engine(
                    sa.URL.create("postgresql+psycopg", "tester", host="127.0.0.1", port=self.port, database="postgres")
                )
                with contextlib.suppress(sa.exc.OperationalError), engine.connect():
                    engine.dispose()
                    return
            time.sleep(0.05)
        raise AssertionError("PostgreSQL does not come back")
