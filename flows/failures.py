"""What the cycle does about failures: memory that runs out, a store that is away, quarantine and how to reproduce it.

The classes and their policies are one table, in `sparseforge_core/store/causes.py`.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from flows.devices import MICRO_BATCH
from flows.home import Home
from sparseforge_core.errors import StoreError
from sparseforge_core.store.rows import AttemptRecord, Provenance, StageState
from sparseforge_core.store.store import ResultStore

T = TypeVar("T")

log = logging.getLogger(__name__)

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between tries at a store that is away, besides what the store itself waits for a lock."""

SCARCE = (
    "out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""In the text of errors that libraries raise when memory ends, besides those of MemoryError's kind."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device had no memory left, whoever says so and in what class (torch is not asked)."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError", "OutOfMemory"}:
        return True
    return bool(names & {"RuntimeError", "OSError", "AcceleratorError"}) and any(text in str(error) for text in SCARCE)


def halvings(attempts: Sequence[AttemptRecord], stage: str) -> int:
    """How often this stage ran out of memory since it was last released: so often is what runs at once halved."""
    count = 0
    for attempt in attempts:
        if attempt.stage == stage:
            count = 0 if attempt.is_mark else count + (attempt.cause == "out of memory")
    return count


def patiently(what: Callable[[], T], away: tuple[type[Exception], ...] = (StoreError,)) -> T:
    """What a call to the store, or to what else is away by these errors, gives; asked again some times, then raised."""
    for wait in WAITS:
        try:
            return what()
        except away as error:
            log.warning("%s; asking again in %.0f s", error, wait)
        time.sleep(wait)
    return what()


def release_quarantined(store: ResultStore, grid: str, origin: Provenance) -> int:
    """Let every quarantined stage of a grid be tried anew; returns how many there were."""
    return store.release([(s.cell_key, s.stage) for s in store.work(grid) if s.quarantined], origin)


def inputs_of(home: Home, key: str, stage: str) -> list[Path]:
    """The files that it takes to run a stage without the store: the cell's, and the suite's."""
    return [home.cell(key) / name for name in ("cell.json", *([] if stage == "train" else [f"{stage}.json"]))]


def reproducer(home: Home, state: StageState) -> str:
    """One line that runs a stage again by itself, in a folder of its own and with as much at once as it had last."""
    target = home.root / "reproduced" / state.cell_key / state.stage
    words = ["python", "-m", "sparseforge_core.run", "--home", str(home.root)]
    if state.stage == "train":
        size = 1 if state.error.startswith("DoesNotFit:") else MICRO_BATCH.get(state.pool)
        words += ["train", *([] if size is None else ["--micro-batch", str(size)])]
    else:
        words.append("evaluate")
    return shlex.join([*words, *map(str, inputs_of(home, state.cell_key, state.stage)), str(target)])
