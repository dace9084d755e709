"""kill -9 at random instants: of forked processes in the middle of a role, of pool workers, of whole process trees."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.pool import WorkerPool
from sparseforge_core.store.engine import make_engine, reading
from sparseforge_core.store.states import stage_states
from tests.soak.grid import GRID
from tests.soak.world import DONE, ROLES, Counts, Reference, World, announced, end_of, fork

ROOT = Path(__file__).resolve().parents[2]

SHARES = {
    "scheduler": 0.05,
    "trainer": 0.2,
    "checkpoint": 0.02,
    "evaluator": 0.05,
    "recorder": 0.02,
    "any": 0.4,
    "worker": 0.3,
}
"""How long after a role has begun it may be killed, as a share of the pace: at first the undisturbed run's time."""

FEWEST, MOST = 15, 40
"""Kills of one grid, about."""

QUIET_SECONDS = 60.0


def forked_kills(reference: Reference, scratch: Path, chance: random.Random, wanted: int, counts: Counts) -> None:
    """Kill forked processes that drain the grid, in a role drawn at random, until so many were killed."""
    number, begun = 0, sum(counts.kills.values())
    started, pace = time.monotonic(), reference.seconds
    while sum(counts.kills.values()) - begun < wanted:
        number += 1
        world = World(scratch / f"killed-{number}")
        finished, before = False, sum(counts.kills.values())
        while not finished:
            role = chance.choice((*ROLES, "worker", "any"))
            if sum(counts.kills.values()) - begun >= wanted:
                world.finish()
                break
            if role == "worker":
                finished = _kill_worker(world, chance, pace, counts)
            else:
                finished = _kill_in(role, world, chance, pace, counts)
            world.check(counts)
        counts.compare(world, reference)
        done = sum(counts.kills.values()) - begun
        # However fast the machine is at the moment, a grid shall be killed many times, and still come to its end.
        died = sum(counts.kills.values()) - before
        pace *= 0.7 if died < FEWEST else 1.4 if died > MOST else 1.0
        if number % 10 == 0:
            print(f"{done} kills in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _kill_in(role: str, world: World, chance: random.Random, seconds: float, counts: Counts) -> bool:
    """Start a process and kill it in a role, at the instant that chance says; whether it was finished before."""
    reader, writer = os.pipe()

    def work() -> None:
        os.close(reader)
        with announced(lambda name: _tell(writer, name)):
            world.drain()

    log = world.root.with_suffix(".log")
    pid = fork(work, log)
    os.close(writer)
    if role == "any":
        time.sleep(chance.uniform(0, seconds * SHARES["any"]))
    else:
        _wait_for(reader, role[:1].encode(), chance.randrange(2) if role != "scheduler" else 0)
        time.sleep(chance.uniform(0, seconds * SHARES[role]))
    os.kill(pid, signal.SIGKILL)
    os.close(reader)
    code = end_of(pid)
    if code == -signal.SIGKILL:
        counts.add(counts.kills, role)
    elif code != DONE:
        counts.tracebacks += 1
        counts.say(f"{role}: a process ended with {code}; {log}: {log.read_text()[-400:]}")
    return code == DONE


def _tell(writer: int, role: str) -> None:
    os.write(writer, role[:1].encode())


def _wait_for(reader: int, letter: bytes, skipped: int) -> None:
    """Until a role was announced, some announcements of it left out, or the process ended."""
    while said := os.read(reader, 1):
        if said == letter:
            if not skipped:
                return
            skipped -= 1


@contextmanager
def warm_workers() -> Iterator[None]:
    """Let pool workers be forked from this process, which has imported everything, instead of started anew."""
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda *_: get_context("fork")  # type: ignore[assignment,return-value,misc]
    try:
        yield
    finally:
        multiprocessing.get_context = get_context


def _kill_worker(world: World, chance: random.Random, seconds: float, counts: Counts) -> bool:
    """Give a cell to a real pool worker and kill that at some instant; whether nothing was left to do."""
    key, stages = _next(world)
    if not stages:
        world.finish()  # plans it, where it was killed before that
        return not _next(world)[1]
    with warm_workers():

        def begin(_report: Any) -> None:
            """The clock starts when the worker says that it has begun, in some of its stages."""
            if signal.getitimer(signal.ITIMER_REAL)[0] == 0 and chance.random() < 0.7:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, seconds * SHARES["worker"]))

        pool = WorkerPool(world.home, 1, begin)

        def kill(*_: Any) -> None:
            for pid in pool.pids():
                os.kill(pid, signal.SIGKILL)

        before = signal.signal(signal.SIGALRM, kill)
        try:
            outcome = pool.execute(key, stages)
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)
            pool.stop()
    if outcome.status == "lost":
        counts.add(counts.kills, "worker")
    elif outcome.status == "failed":
        counts.tracebacks += 1
        counts.say(f"worker: {outcome.stage} of {key} failed: {outcome.error}")
    return False


def _next(world: World) -> tuple[str, tuple[str, ...]]:
    """A cell that can run, with its stages that are not done."""
    if not (world.root / "store.db").is_file():
        return "", ()
    from sqlalchemy import inspect

    engine = make_engine(world.home.store_url)
    try:
        with reading(engine) as connection:
            states = stage_states(connection, GRID) if inspect(connection).has_table("ledger") else []
    finally:
        engine.dispose()
    trained = {s.cell_key for s in states if (s.stage, s.status) == ("train", "done")}
    for state in states:
        if state.status != "done" and all(required in trained for required in state.requires):
            left = [s for s in states if s.cell_key == state.cell_key and s.status != "done"]
            _release(world)
            return state.cell_key, tuple(s.stage for s in sorted(left, key=lambda s: s.stage != "train"))
    return "", ()


def _release(world: World) -> None:
    from flows.provenance import here, process_alive
    from sparseforge_core.store.store import ResultStore

    store = ResultStore(world.home.store_url)
    store.release_dead(here(), process_alive)
    store.close()


# --------------------------------------------------------------------------------------------------- process trees


class Tree:
    """`sparseforge run` on the soak's grid, in a session of its own."""

    def __init__(self, world: World, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "tests.soak.command", "--home", str(world.root), "run", GRID, "--quiet"]
        self.log = world.root.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def members(self) -> dict[int, int]:
        """Parents of all its living processes by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found[int(entry.name)] = int(fields[1])
        return found

    def ended(self, seconds: float) -> int | None:
        """Wait so long for the end; the exit code, or None."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def gone(self) -> None:
        """Wait until no process of it is left: workers end with their parent."""
        deadline = time.monotonic() + QUIET_SECONDS
        while self.members():
            if time.monotonic() > deadline:
                raise AssertionError(f"processes outlived their parent: {self.members()}; {self.log}")
            time.sleep(0.02)

    def kill(self, victim: str) -> bool:
        """Kill the parent, the workers or everything; whether there was something to kill."""
        pids = list(self.members())
        workers = [pid for pid in pids if pid != self.process.pid]
        chosen = {"scheduler": [self.process.pid], "worker": workers, "tree": pids}[victim]
        for pid in chosen:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                chosen = [p for p in chosen if p != pid]
        return bool(chosen)


def tree_kills(
    reference: Reference,
    scratch: Path,
    chance: random.Random,
    wanted: int,
    counts: Counts,
    made: Callable[[Path], World],
) -> None:
    """Kill parts of real `sparseforge run` process trees at random instants until so many were killed."""
    killed, number, longest = 0, 0, 0.0
    while killed < wanted:
        number += 1
        world = made(scratch / f"tree-{number}")
        while True:
            began = time.monotonic()
            tree = Tree(world, "--workers", "1")
            victim = chance.choice(("scheduler", "worker", "tree"))
            code = tree.ended(chance.uniform(0.3, max(longest, 10.0))) if killed < wanted else tree.ended(300)
            if code is None:
                if tree.kill(victim):
                    killed += 1
                    counts.add(counts.kills, f"tree: {victim}")
                code = tree.ended(300) if victim == "worker" else tree.process.wait()
            tree.gone()
            world.check(counts)
            if code == 0:
                longest = max(longest, time.monotonic() - began)
                break
            if code not in (-signal.SIGKILL, 1):
                counts.tracebacks += 1
                counts.say(f"sparseforge run ended with {code}: {tree.log.read_text()[-400:]}")
                break
        if "Traceback" in tree.log.read_text():
            counts.tracebacks += 1
            counts.say(f"a traceback in {tree.log}: {tree.log.read_text()[-400:]}")
        counts.compare(world, reference)
