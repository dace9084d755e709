"""A home of the soak's grid: draining it, breaking it, and saying whether it is what it must be.

The soak forks processes that have imported torch. A process that holds an SQLite file open must not fork: everything
here that opens the store closes it again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from analysis.make_tables import make_tables
from flows import cycle
from flows.cycle import execute_stage
from flows.home import Home
from flows.local import open_grid
from flows.provenance import provenance
from sparseforge_core import run
from sparseforge_core.checkpoint import Checkpoints
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store import schema
from sparseforge_core.store.engine import make_engine, reading
from sparseforge_core.store.health import problems
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore
from tests.soak.grid import GRID

MACHINE = ("train_seconds", "tokens_per_second")
"""Measurements that say something of the machine."""

DONE, REFUSED, CRASHED = 0, 3, 4
"""How a forked process ends: everything done; an error of ours or of the system, in a sentence; anything else."""

Content = dict[tuple[str, ...], Any]


@dataclass
class World:
    """One home, its store, and what has been seen in it so far."""

    root: Path
    url: str = ""
    seen: Content = field(default_factory=dict)

    @property
    def home(self) -> Home:
        return Home(
            self.root, self.url or f"sqlite:///{self.root / 'store.db'}", f"sqlite:///{self.root / 'mlflow.db'}"
        )

    def copy(self, root: Path) -> World:
        """The same world in another folder."""
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.root, root)
        return World(root, seen=dict(self.seen))

    def drain(self, until: Callable[[str, str], bool] = lambda cell, stage: False, **options: Any) -> None:
        """Plan, take over from the dead, and execute what is not done, in this process. Stops before `until`."""
        store, states = open_grid(self.home, GRID)
        try:
            origin = replace(provenance(), pid=os.getpid())
            for state in _in_order(states):
                if until(state.cell_key, state.stage):
                    return
                execute_stage(store, self.home, state.cell_key, state.stage, origin, **options)
        finally:
            store.close()

    def finish(self, tries: int = 6) -> None:
        """Drain to the end, whatever the first tries meet. Raises the last error."""
        for left in reversed(range(tries)):
            try:
                self.drain()
            except (SparseForgeError, OSError):
                if not left:
                    raise
            else:
                return

    def release_everything(self) -> int:
        """As if every lease were over; how many attempts were lost."""
        import datetime

        store = ResultStore(self.home.store_url)
        try:
            return store.expire(datetime.timedelta(seconds=-60))
        finally:
            store.close()

    def content(self) -> Content:
        """Every recorded result, without what it says of the machine."""
        found: Content = {}
        engine = make_engine(self.home.store_url)
        try:
            with reading(engine) as connection:
                for row in connection.execute(sa.select(schema.measurement)):
                    if row.metric not in MACHINE:
                        found["m", row.cell_key, row.stage, row.metric] = (row.value, row.stderr, row.n)
                for row in connection.execute(sa.select(schema.outcome)):
                    found["o", row.cell_key, row.stage, row.metric] = (row.identity, row.body)
                for row in connection.execute(sa.select(schema.curve)):
                    found["c", row.cell_key, row.name] = row.body
        finally:
            engine.dispose()
        return found

    def check(self, counts: Counts) -> None:
        """Count every broken promise: contradictions, results that went or changed, stages done or held twice."""
        if self.url == "" and not (self.root / "store.db").is_file():
            return
        engine = make_engine(self.home.store_url)
        a = schema.attempt
        live = sa.select(a.c.cell_key, a.c.stage).where(a.c.status.in_(("done", "running")))
        twice = live.group_by(a.c.cell_key, a.c.stage).having(sa.func.count() > 1)
        try:
            with reading(engine) as connection:
                if not sa.inspect(connection).has_table("ledger"):
                    return  # killed while it was made
                counts.double_commits += len(connection.execute(twice).all())
                found = problems(connection)
        finally:
            engine.dispose()
        counts.broken(found)
        now = self.content()
        changed = [key for key, value in self.seen.items() if now.get(key) != value]
        counts.lost_results += len(changed)
        self.seen = now

    def tables(self) -> dict[str, bytes]:
        """The written tables, by file name."""
        results = Results(self.home.store_url)
        try:
            report = make_tables(results, GRID, self.root / "exhibits", ["table-2"])
        finally:
            results.close()
        return {path.name: path.read_bytes() for path in report.files}


def _in_order(states: list[Any]) -> list[Any]:
    """Stages so that each comes after what it needs; those of one cell together."""
    order = {key: number for number, key in enumerate(dict.fromkeys(s.cell_key for s in states if not s.requires))}
    left = [s for s in states if s.status != "done"]
    return sorted(left, key=lambda s: (s.cell_key not in order, s.cell_key, s.stage != "train"))


@dataclass
class Counts:
    """What the soak did and found; the last three must stay 0."""

    kills: dict[str, int] = field(default_factory=dict)
    corruptions: dict[str, int] = field(default_factory=dict)
    racing: dict[str, int] = field(default_factory=dict)
    mutated_configs: int = 0
    resumes_checked: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    worlds_compared: int = 0
    lost_results: int = 0
    double_commits: int = 0
    tracebacks: int = 0
    sentences: list[str] = field(default_factory=list)
    """What went wrong, for the log."""

    def add(self, where: dict[str, int], name: str, number: int = 1) -> None:
        where[name] = where.get(name, 0) + number

    def broken(self, sentences: list[str]) -> None:
        """A store that contradicts itself has lost a result."""
        self.lost_results += len(sentences)
        self.say(*sentences)

    def say(self, *sentences: str) -> None:
        self.sentences += sentences
        for sentence in sentences:
            print(f"BROKEN: {sentence}", file=sys.stderr, flush=True)

    def compare(self, world: World, reference: Reference) -> None:
        """A finished world must hold the undisturbed run's results, tables and files, and nothing left over."""
        self.worlds_compared += 1
        world.check(self)
        content = world.content()
        wrong = sorted(k for k in {*content, *reference.content} if content.get(k) != reference.content.get(k))
        self.lost_results += len(wrong)
        self.say(*(f"{world.root}: {key}: {str(content.get(key))[:60]}" for key in wrong[:2]))
        if world.tables() != reference.tables:
            self.lost_results += 1
            self.say(f"{world.root}: its tables differ")
        left = list((world.root / "cells").rglob(".*.tmp"))
        if left:
            self.lost_results += 1
            self.say(f"{world.root}: left over: {left[:3]}")


@dataclass
class Reference:
    """What the undisturbed run gives."""

    world: World
    content: Content
    tables: dict[str, bytes]
    seconds: float


def undisturbed(root: Path) -> Reference:
    """Run the grid once, in this process; twice, so that the time is that of a warm one."""
    World(root / "cold").drain()
    world = World(root / "reference")
    began = time.perf_counter()
    world.drain()
    seconds = time.perf_counter() - began
    reference = Reference(world, world.content(), world.tables(), seconds)
    if World(root / "cold").content() != reference.content:
        raise AssertionError("two undisturbed runs differ: nothing can be tested on this machine")
    return reference


# -------------------------------------------------------------------------------------------------- forked processes


def fork(work: Callable[[], None], log: Path) -> int:
    """Run something in a forked process; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = CRASHED
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = DONE
    except (SparseForgeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = REFUSED
    except Exception as error:
        # A library's own error for a full disk and the like has a sentence too; only its type is not ours.
        if any(said in str(error) for said in ("No space left", "File too large", "No such file")):
            code = REFUSED
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(pid: int, seconds: float = 120.0) -> int:
    """Wait for a forked process; its exit code, negative for a signal. Kills one that does not end."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"process {pid} did not end within {seconds} s")
        time.sleep(0.002)


ROLES = ("scheduler", "trainer", "checkpoint", "evaluator", "recorder")


@contextlib.contextmanager
def announced(tell: Callable[[str], None]) -> Iterator[None]:
    """Have the real functions of each role say when they begin; to be used in a forked process."""
    places: tuple[tuple[str, Any, str], ...] = (
        ("trainer", run, "train_cell"),
        ("checkpoint", Checkpoints, "save"),
        ("evaluator", run, "evaluate_cell"),
        ("recorder", cycle, "record"),
    )

    def telling(role: str, function: Any) -> Any:
        def told(*arguments: Any, **options: Any) -> Any:
            tell(role)
            return function(*arguments, **options)

        return told

    kept = [(owner, name, getattr(owner, name)) for _, owner, name in places]
    for role, owner, name in places:
        setattr(owner, name, telling(role, getattr(owner, name)))
    tell("scheduler")
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
