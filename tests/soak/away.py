"""A SQLite store, or the whole home, that goes away for a while and comes back; a disk that refuses every write."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from sparseforge_core.store.presence import is_marked
from tests.soak.faults import finish
from tests.soak.world import CRASHED, Counts, Reference, World, end_of, fork

PARTS = ("store.db", "store.db-wal", "store.db-shm")
LONGEST = 2.0
"""Seconds that something is away, at most."""


def gone_and_back(reference: Reference, scratch: Path, chance: random.Random, wanted: int, counts: Counts) -> None:
    """Take the store's files away, or the home with its disk, while a process drains; then bring them back."""
    for number in range(wanted):
        world = World(scratch / f"away-{number}")
        what = ("store file", "home")[number % 2]
        log = world.root.with_suffix(".log")
        drainer = fork(world.drain, log)
        _until_made(world.root / "store.db")
        time.sleep(chance.uniform(0.0, reference.seconds))
        world.check(counts)
        back = _take_store(world, counts) if what == "store file" else _take_home(world)
        time.sleep(chance.uniform(0.1, LONGEST))
        back()
        if end_of(drainer) == CRASHED:
            counts.tracebacks += 1
            counts.say(f"{what} gone: {log.read_text()[-600:]}")
        counts.add(counts.faults, f"{what} gone and back")
        world.check(counts)
        world.release_everything()
        finish(world, f"{what} gone", reference, counts)


def _until_made(store: Path) -> None:
    deadline = time.monotonic() + 60
    while not is_marked(store):
        if time.monotonic() > deadline:
            raise AssertionError(f"no store was made at {store}")
        time.sleep(0.002)


def _take_store(world: World, counts: Counts) -> Callable[[], None]:
    aside = world.root.with_name(f"{world.root.name}-store")
    aside.mkdir()
    for part in PARTS:
        with contextlib.suppress(FileNotFoundError):
            os.rename(world.root / part, aside / part)

    def back() -> None:
        made = [part for part in PARTS if (world.root / part).exists()]
        if made:
            counts.lost_results += 1
            counts.say(f"{world.root}: {made} made in place of the store that was away")
        for part in aside.iterdir():
            os.rename(part, world.root / part.name)

    return back


def _take_home(world: World) -> Callable[[], None]:
    aside, hidden = (world.root.with_name(f"{world.root.name}-{name}") for name in ("disk", "hidden"))
    os.rename(world.root, aside)

    def back() -> None:
        """As a mount does: what was written under its name meanwhile is hidden."""
        while True:
            shutil.rmtree(hidden, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(world.root, hidden)
            with contextlib.suppress(OSError):  # something was written between the two
                os.rename(aside, world.root)
                return

    return back


def refused(
    start: World, reference: Reference, scratch: Path, chance: random.Random, wanted: int, counts: Counts
) -> None:
    """Let no write of a draining process through for a while, as on a disk that has turned read-only under it."""
    for number in range(wanted):
        world = start.copy(scratch / "refused")
        # A log would be refused too, and a process that cannot say how it ends would go on as another soak.
        drainer = fork(world.drain, Path("/dev/null"))
        time.sleep(chance.uniform(0.05, reference.seconds * 0.7))
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(drainer, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            time.sleep(chance.uniform(0.1, LONGEST))
            resource.prlimit(drainer, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if end_of(drainer) == CRASHED:
            counts.tracebacks += 1
            counts.say(f"every write refused, number {number}: a traceback")
        counts.add(counts.faults, "every write refused for a while")
        world.check(counts)
        world.release_everything()
        finish(world, "every write refused", reference, counts)
