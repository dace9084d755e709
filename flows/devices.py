"""What this machine can compute on, found without importing torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MICRO_BATCH = {"cpu": None, "gpu-1": 4, "gpu-8": 1}
"""Sequences of one forward on the devices of each pool, before memory has run out; None takes the whole batch."""
CPU_WORKERS = 4
"""Most worker processes that a run starts by itself on a machine without GPUs."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """Names of the visible GPUs as $CUDA_VISIBLE_DEVICES takes them: what it says, else all that the driver shows."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # CUDA stops reading at the first entry that names no device; "-1" is how people say none.
        names = [name.strip() for name in chosen.split(",")]
        bad = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return names[:bad]
    found = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    return [str(index) for index in range(len(found))]


def default_workers() -> int:
    """One worker a GPU, else one a core, at most four."""
    return len(gpus()) or min(CPU_WORKERS, cores())


@contextlib.contextmanager
def reserved(folder: Path, names: Sequence[str], waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold these devices of this machine for the block; `waiting` is told, once, of the first that somebody else holds.

    A drain of eight GPUs and drains of one each may be workers of one machine: whoever is first computes, the others
    wait. Taken in order, so that two sets that overlap never wait for each other; a holder that is killed lets go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        for name in sorted(set(names)):
            lock = held.enter_context((folder / f"{socket.gethostname()}-{name.replace('/', '-')}.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting(name)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def served_here(pool: str) -> bool:
    """Whether a run that names no pool serves this one: `gpu-1` where there is a GPU, anything without one always.

    Cells that need several GPUs at once (`gpu-8`) are left to runs and workers of that pool: here, each worker has one.
    """
    count = pool.removeprefix("gpu-")
    return count == pool or (count == "1" and bool(gpus()))
