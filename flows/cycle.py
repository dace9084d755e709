"""The cycle as plain functions: plan a grid, see what is ready, execute a cell's stages, record what they measured.

Nothing here knows Prefect, processes or terminals; the embedded loop and the flows call the same functions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.home import Home
from sparseforge_core.errors import CellTaken, CheckpointMismatch, Interrupted, SparseForgeError
from sparseforge_core.store.rows import Attempt, Measurement, Provenance, StageState
from sparseforge_core.store.store import ResultStore

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
HEARTBEAT_SECONDS = 15.0


@dataclass(frozen=True)
class ReadyCell:
    """A cell with something to do now."""

    key: str
    stages: tuple[str, ...]
    """Stages that are not done, in order."""
    cost_hours: float
    wanted: int
    """How many unfinished cells wait for this one."""


def plan_grid(store: ResultStore, name: str) -> None:
    """Expand a grid and record it. Raises RecipeError for an unknown name, RecipeDrift for changed defaults."""
    from flows.grids import grid_named
    from flows.grids.planned import expand
    from flows.grids.published import PUBLISHED

    grid = grid_named(name)
    plan = expand(grid)
    published = PUBLISHED if grid.published else ()
    store.plan(grid.name, grid.title, plan.cells, plan.suites, plan.slots, plan.stages, published=published)


def ready(
    states: Sequence[StageState],
    *,
    busy: frozenset[str] = frozenset(),
    skip: frozenset[str] = frozenset(),
    alone: frozenset[str] = frozenset(),
) -> list[ReadyCell]:
    """Cells that may run now: something is not done, nothing gave up, and every required cell is trained.

    `busy` cells run already, `skip` ones are given up. Cells that others wait for come first, then the costly ones, so that the last minutes are not one long cell.
    Stages in `alone` measure time: they run one by one, when nothing else is left to run.
    """
    shared = _ready([state for state in states if state.stage not in alone or state.status == "done"], busy | skip)
    if shared or busy:
        return shared
    return _ready(states, skip)[:1]


def _ready(states: Sequence[StageState], busy: frozenset[str]) -> list[ReadyCell]:
    trained = {s.cell_key for s in states if s.stage == "train" and s.status == "done"}
    open_stages: dict[str, list[StageState]] = {}
    for state in states:
        if state.status != "done":
            open_stages.setdefault(state.cell_key, []).append(state)
    waiting: dict[str, int] = {}
    for unfinished in open_stages.values():
        for required in unfinished[0].requires:
            waiting[required] = waiting.get(required, 0) + 1
    cells = [
        ReadyCell(key, tuple(s.stage for s in unfinished), unfinished[0].cost_hours, waiting.get(key, 0))
        for key, unfinished in open_stages.items()
        if key not in busy
        and all(s.attempts < MAX_ATTEMPTS and s.status != "running" for s in unfinished)
        and all(required in trained for required in unfinished[0].requires)
    ]
    return sorted(cells, key=lambda cell: (-cell.wanted, -cell.cost_hours, cell.key))


def timed_stages(store: ResultStore, states: Sequence[StageState]) -> frozenset[str]:
    """Stages whose suite measures time, and which therefore must have the machine to themselves."""
    suites = {state.stage for state in states if state.stage != "train"}
    return frozenset(key for key in suites if json.loads(store.suite_spec(key))["kind"] == "throughput")


def execute_cell(
    store: ResultStore,
    home: Home,
    key: str,
    stages: Sequence[str],
    provenance: Provenance,
    *,
    on_step: Callable[[Any], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Run the stages of a cell in this process, one after the other, and record each.

    Raises what a stage raised, after recording it; a stage that somebody else finished meanwhile is passed over.
    """
    for stage in stages:
        if should_stop is not None and should_stop():
            raise Interrupted(f"stopped before stage {stage} of cell {key}")
        try:
            attempt = store.claim(key, stage, provenance)
        except CellTaken:
            log.info("stage %s of cell %s is taken or done", stage, key)
            continue
        with _recorded(store, attempt), _beating(store, attempt):
            path = _run_stage(store, home, key, stage, on_step, should_stop)
            body = json.loads(path.read_text())
            _check_file(body, key, stage, path)
            measurements = [Measurement(**row) for row in body["measurements"]]
            store.finish(attempt, measurements, body["context"], body["items_sha256"])


def _run_stage(
    store: ResultStore,
    home: Home,
    key: str,
    stage: str,
    on_step: Callable[[Any], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Path:
    from sparseforge_core import run, specs
    from sparseforge_core.evaluate.suites import Suite
    from sparseforge_core.identity import loads

    cell = loads(store.cell_body(key))
    directory = home.cell(key) / stage
    if stage == "train":
        try:
            return run.train_cell(cell, directory, home.root, on_step=on_step, should_stop=should_stop)
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{error}; or delete {directory} to train this cell anew") from error
    suite = specs.decode(json.loads(store.suite_spec(stage)), Suite, "suite")
    return run.evaluate_cell(cell, suite, directory, home.root)


def _check_file(body: dict[str, Any], key: str, stage: str, path: Path) -> None:
    if body.get("cell") != key or body.get("stage") != stage:
        raise CheckpointMismatch(f"{path} is of cell {body.get('cell')}, stage {body.get('stage')}; wanted {key}, {stage}")


@contextlib.contextmanager
def _recorded(store: ResultStore, attempt: Attempt) -> Iterator[None]:
    """Whatever ends the block is recorded on the attempt, and then goes on its way."""
    try:
        yield
    except Interrupted as error:
        store.fail(attempt, str(error), status="interrupted")
        raise
    except BaseException as error:
        store.fail(attempt, f"{type(error).__name__}: {error}")
        raise


@contextlib.contextmanager
def _beating(store: ResultStore, attempt: Attempt) -> Iterator[None]:
    """Say every few seconds that the attempt is alive, from a thread that ends with the block."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            try:
                if not store.heartbeat(attempt):
                    log.warning("attempt %d of %s is no longer the live one", attempt.id, attempt.cell_key)
                    return
            except SparseForgeError as error:  # a store that is away for a while must not end the training
                log.warning("heartbeat not recorded: %s", error)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
