"""What a grid's flow run shows in Prefect: a table of its cells, kept up to date in place, and the way to MLflow.

Prefect looks on: when its server or the store is away, a warning is written and the grid goes on.
"""

from __future__ import annotations

import collections
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException

from flows.home import Home
from sparseforge_core.errors import StoreError
from sparseforge_core.store.rows import StageState
from sparseforge_core.tracking.mlflow_tracker import run_place

log = logging.getLogger(__name__)

REFRESH_SECONDS = 5.0
MAX_ROWS = 500
"""Of the table; what runs and what failed comes first."""
ORDER = ("running", "failed", "waiting", "done")
FAILED = ("failed", "lost")

States = Callable[[], Sequence[StageState]]


class LiveGrid:
    """The artifacts `grid-NAME` (table) and `mlflow-NAME` (link) of one flow run; made and used inside of it."""

    def __init__(self, home: Home, grid: str) -> None:
        self.home, self.grid = home, grid
        self.shown = 0.0
        self._id: UUID | None = None
        self._lock = threading.Lock()

    def show(self, states: States, *, now: bool = False) -> None:
        """Bring the table up to date, unless that was done a moment ago; `states` is asked only then."""
        with self._lock:
            if not now and time.monotonic() - self.shown < REFRESH_SECONDS:
                return
            self.shown = time.monotonic()
            try:
                self._show(states())
            except (httpx.HTTPError, PrefectException) as error:
                log.warning("Prefect did not take the grid's table (%s); the grid goes on", error)
            except StoreError as error:
                log.warning("the grid's table stays as it is for now (%s); the grid goes on", error)

    def _show(self, states: Sequence[StageState]) -> None:
        rows, said = table(self.home, states), summary_line(self.grid, states)
        if self._id is not None:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._id, ArtifactUpdate(data=json.dumps(rows), description=said))
            return
        self._id = create_table_artifact(table=rows, key=key("grid", self.grid), description=said)
        ui = self.home.mlflow_ui
        if ui:
            create_link_artifact(ui, f"{self.grid} in MLflow", key=key("mlflow", self.grid), description=ui)


def key(what: str, grid: str) -> str:
    """An artifact's key, of what Prefect allows in one."""
    return re.sub(r"[^a-z0-9]+", "-", f"{what}-{grid}".lower()).strip("-")


def table(home: Home, states: Sequence[StageState]) -> list[dict[str, Any]]:
    """A row for each cell: what runs first, then what failed, what waits, what is done; at most MAX_ROWS."""
    cells: dict[str, list[StageState]] = {}
    for state in states:
        cells.setdefault(state.cell_key, []).append(state)
    order = sorted(cells, key=lambda cell: ORDER.index(_status(cells[cell])))
    rows = []
    for cell in order[:MAX_ROWS]:
        first, stages = cells[cell][0], cells[cell]
        rows.append(
            {
                "cell": cell,
                "model": first.model,
                "variant": first.variant,
                "seed": first.seed,
                "state": _status(stages),
                "stages": f"{sum(s.status == 'done' for s in stages)} of {len(stages)}",
                "cause": next((s.error.splitlines()[0][:200] for s in stages if s.status in FAILED and s.error), ""),
                "MLflow": _link(home, cell),
            }
        )
    return rows


def summary_line(grid: str, states: Sequence[StageState]) -> str:
    """One line over the table: how many cells of a grid are in which state."""
    cells: dict[str, list[StageState]] = {}
    for state in states:
        cells.setdefault(state.cell_key, []).append(state)
    counts = collections.Counter(map(_status, cells.values()))
    said = ", ".join(f"{counts[name]} {name}" for name in ORDER if counts[name])
    more = f"; the first {MAX_ROWS} are shown" if len(cells) > MAX_ROWS else ""
    return f"{len(cells)} cells of {grid}: {said}{more}"


def _status(stages: Sequence[StageState]) -> str:
    statuses = {stage.status for stage in stages}
    if "running" in statuses:
        return "running"
    if statuses & set(FAILED):
        return "failed"
    return "done" if statuses == {"done"} else "waiting"


def _link(home: Home, cell: str) -> str:
    """Where a browser finds the cell's run; empty before it was copied there, or where MLflow is a local file."""
    place = run_place(home.cell(cell))
    return f"{home.mlflow_ui}/#/experiments/{place[0]}/runs/{place[1]}" if home.mlflow_ui and place else ""
