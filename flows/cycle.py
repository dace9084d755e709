"""The cycle as plain functions: plan a grid, see what is ready, execute a stage, record what it measured.

Nothing here knows Prefect, processes or terminals; the embedded loop and the flows call the same functions.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.failures import patiently
from flows.home import Home
from flows.stages import TRAIN, finished, run_stage
from sparseforge_core import files, measured
from sparseforge_core.errors import (
    CellTaken,
    CheckpointMismatch,
    Diverged,
    Interrupted,
    SparseForgeError,
    StoreError,
    described,
)
from sparseforge_core.store.curves import curves_of
from sparseforge_core.store.outcomes import outcomes_of
from sparseforge_core.store.rows import Attempt, Measurement, Provenance, StageState
from sparseforge_core.store.store import ResultStore
from sparseforge_core.tracking.tracker import read_journal

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
LEASE = datetime.timedelta(minutes=5)
"""A running attempt that was not heard of for so long is lost, on whatever machine it was."""
FOLDER_SECONDS = 60.0
"""How long to wait for a process that lost its claim to leave the stage's folder."""

Key = tuple[str, str]
"""A stage: cell key and stage name."""


@dataclass(frozen=True)
class ReadyCell:
    """A cell with something to do now."""

    key: str
    stages: tuple[str, ...]
    """Stages to do, in order: training first, then the suites, those that failed before last."""
    cost_hours: float
    wanted: int
    """How many unfinished cells wait for this one."""


def plan_grid(store: ResultStore | Callable[[], ResultStore], name: str) -> ResultStore:
    """Expand a grid and record it; `store` may be how to open it, so that a wrong name opens none.

    Raises RecipeError for an unknown name, RecipeDrift for changed defaults.
    """
    from flows.grids import grid_named
    from flows.grids.planned import expand
    from flows.grids.published import PUBLISHED

    grid = grid_named(name)
    plan = expand(grid)
    published = PUBLISHED if grid.published else ()
    opened = store if isinstance(store, ResultStore) else store()
    opened.plan(grid.name, grid.title, plan.cells, plan.suites, plan.slots, plan.stages, published=published)
    return opened


def ready(
    states: Sequence[StageState],
    *,
    busy: frozenset[str] = frozenset(),
    skip: frozenset[Key] = frozenset(),
    alone: frozenset[str] = frozenset(),
) -> list[ReadyCell]:
    """Cells that may run now, best first: trained requirements, nothing of them running, not in quarantine.

    Cells that others wait for come first, then the costly ones, so that the last minutes are not one long cell.

    Args:
        busy: cells that run already.
        skip: stages that were given up or belong to somebody else.
        alone: suites that measure time; they run one by one, when nothing else is left to run, and so does what ran
            out of memory before.
    """
    left = skip | {(s.cell_key, s.stage) for s in states if s.quarantined}
    shared = _ready(states, busy, left, {(s.cell_key, s.stage) for s in states if s.stage in alone or s.alone})
    if shared or busy:
        return shared
    return _ready(states, busy, left, set())[:1]


def _ready(
    states: Sequence[StageState], busy: frozenset[str], skip: frozenset[Key] | set[Key], later: set[Key]
) -> list[ReadyCell]:
    trained = {s.cell_key for s in states if s.stage == TRAIN and s.status == "done"}
    taken = busy | {s.cell_key for s in states if s.status == "running"}
    unfinished: dict[str, list[StageState]] = {}
    waiting: dict[str, int] = {}
    for state in states:
        place = state.cell_key, state.stage
        if state.status != "done" and place not in skip and place not in later:
            unfinished.setdefault(state.cell_key, []).append(state)
    for stages in unfinished.values():
        for required in stages[0].requires:
            waiting[required] = waiting.get(required, 0) + 1
    cells = []
    for key, stages in unfinished.items():
        trainable = key in trained or any(s.stage == TRAIN for s in stages)
        if key not in taken and trainable and all(required in trained for required in stages[0].requires):
            stages.sort(key=lambda s: (s.stage != TRAIN, s.attempts))
            names = tuple(s.stage for s in stages)
            cells.append(ReadyCell(key, names, stages[0].cost_hours, waiting.get(key, 0)))
    return sorted(cells, key=lambda cell: (-cell.wanted, -cell.cost_hours, cell.key))


def timed_stages(store: ResultStore, states: Sequence[StageState]) -> frozenset[str]:
    """Stages whose suite measures time, and which therefore must have the machine to themselves."""
    suites = {state.stage for state in states if state.stage != TRAIN}
    return frozenset(key for key in suites if json.loads(store.suite_spec(key))["kind"] == "throughput")


def execute_stage(
    store: ResultStore,
    home: Home,
    key: str,
    stage: str,
    provenance: Provenance,
    *,
    on_step: Callable[[Any], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Claim a stage, run it in this process, record what it measured. One that is done already is passed over.

    What an earlier process finished on disk and could not record any more is verified and recorded, not run again.
    Raises CellTaken if another process holds the stage, FolderHeld if one that lost it is still writing, OutOfMemory
    if memory ran out, else what the stage raised; each after recording that.
    """
    try:
        attempt = store.claim(key, stage, provenance)
    except CellTaken:
        if any(a.stage == stage and a.status == "done" for a in store.attempts(key)):
            return
        raise
    with (
        recorded(store, attempt),
        beating(store, attempt) as lost,
        files.held(home.cell(key) / stage, seconds=FOLDER_SECONDS),
    ):

        def stop() -> bool:
            return lost.is_set() or (should_stop is not None and should_stop())

        path = finished(store, home, key, stage) or run_stage(store, home, key, stage, on_step, stop)
        patiently(lambda: record(store, attempt, path))


def record(store: ResultStore, attempt: Attempt, path: Path) -> None:
    """Commit a measurements file, with its items' outcomes and the journal beside it.

    Raises CheckpointMismatch if it is of another stage, or if it or what it was made of was altered.
    """
    body = measured.read(path)
    found = (body.get("cell"), body.get("stage"))
    if found != (attempt.cell_key, attempt.stage):
        wanted = f"cell {attempt.cell_key}, stage {attempt.stage}"
        raise CheckpointMismatch(f"{path} is of cell {found[0]}, stage {found[1]}; wanted {wanted}")
    items, digest = path.with_name(measured.ITEMS), body["items_sha256"]
    measurements = [Measurement(**row) for row in body["measurements"]]
    outcomes = outcomes_of(json.loads(line) for line in items.read_text().splitlines()) if digest is not None else ()
    curves = curves_of(read_journal(path.with_name(measured.JOURNAL))[0])
    why = body.get("diverged")
    error = "" if why is None else described(Diverged(why))
    store.finish(attempt, measurements, body["context"], digest, outcomes=outcomes, curves=curves, error=error)


@contextlib.contextmanager
def recorded(store: ResultStore, attempt: Attempt) -> Iterator[None]:
    """Whatever ends the block is recorded on the attempt, and then goes on its way."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:  # whoever asked to stop gives little time
        said = str(error) or "stopped"
        _try_to_record(attempt, lambda: store.fail(attempt, said, status="interrupted"))
        raise
    except BaseException as error:
        text = described(error)
        _try_to_record(attempt, lambda: patiently(lambda: store.fail(attempt, text)))
        raise


def _try_to_record(attempt: Attempt, end: Callable[[], None]) -> None:
    """Record how an attempt ended. Where the store is away, what ended it is still what everybody must hear of."""
    try:
        end()
    except StoreError as away:
        log.warning("the end of attempt %d was not recorded: %s", attempt.id, away)


@contextlib.contextmanager
def beating(store: ResultStore, attempt: Attempt) -> Iterator[threading.Event]:
    """Say every few seconds that the attempt is alive, from a thread that ends with the block.

    Gives an event that is set when the store says that it is not ours any more. Then training stops at a checkpoint,
    and that is CellTaken, not a wish of the user.
    """
    ended, lost = threading.Event(), threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            try:
                if not store.heartbeat(attempt):
                    lost.set()
                    return
            except SparseForgeError as error:  # a store that is away for a while must not end the training
                log.warning("heartbeat not recorded: %s", error)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield lost
    except Interrupted as error:
        if not lost.is_set():
            raise
        raise CellTaken(f"attempt {attempt.id} of cell {attempt.cell_key} was given to another process") from error
    finally:
        ended.set()
        thread.join()
