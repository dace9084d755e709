"""The Prefect flows: thin shells around the cycle. The only door to prefect.

`sparseforge` runs a grid: *here*, on warm workers of its own process, or on *pools*, by asking the workers of each
Prefect work pool to drain the store. `sparseforge-cell` is what such a worker runs. Both show each cell as a task
run. Prefect's records are for looking; what is done is decided by the store alone.
"""

from __future__ import annotations

import contextvars
import os
import time
from typing import Any, Literal

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.runtime import flow_run

from flows.cycle import ready
from flows.home import Home
from flows.local import RunCell, Summary, open_grid, run_grid
from flows.pool import Outcome
from sparseforge_core.errors import SparseForgeError

POLL_SECONDS = 2.0


class GridIncomplete(SparseForgeError):
    """Cells of the grid failed or could not start; the store has the causes."""


def run_embedded(home: Home, grid: str, *, workers: int | None = None, quiet: bool = False) -> Summary:
    """Run a grid in this process under Prefect's own temporary server, without one to start by hand."""
    found: list[Summary] = []
    embedded = flow(name="sparseforge", flow_run_name=f"{grid}-embedded", validate_parameters=False)(
        lambda: found.append(_run_here(home, grid, workers, quiet=quiet))
    )
    embedded()
    return found[0]


@flow(name="sparseforge", flow_run_name="{grid}")
def sparseforge(
    grid: str = "full", workers: int | None = None, dispatch: Literal["here", "pools"] = "pools"
) -> dict[str, Any]:
    """Run what is not done of a grid; the flow run fails, with the causes, if something could not be done."""
    home = Home.of()
    if dispatch == "here":
        summary = _run_here(home, grid, workers, quiet=True)
        return _report(summary)
    return _report(_run_on_pools(home, grid))


@flow(name="sparseforge-cell", flow_run_name="{grid}-{pool}")
def sparseforge_cell(grid: str, pool: str) -> dict[str, Any]:
    """Drain the ready cells of one pool from the store, one after the other, in one warm process."""
    return _report(_run_here(Home.of(), grid, 1, quiet=True, pool=pool), partial=True)


@task(cache_policy=NO_CACHE, task_run_name="{key}", persist_result=False)
def cell(run: RunCell, key: str, stages: tuple[str, ...]) -> Outcome:
    """One cell; a failed one fails its task run, and only that."""
    outcome = run(key, stages)
    if outcome.status == "failed":
        raise GridIncomplete(f"cell {key}: {outcome.error}")
    return outcome


def _run_here(home: Home, grid: str, workers: int | None, *, quiet: bool, pool: str | None = None) -> Summary:
    flow_context = contextvars.copy_context()

    def wrap(run: RunCell) -> RunCell:
        def as_task(key: str, stages: tuple[str, ...]) -> Outcome:
            outcomes: list[Outcome] = []

            def remembered(key: str, stages: tuple[str, ...]) -> Outcome:
                outcomes.append(run(key, stages))
                return outcomes[-1]

            # Cells run in threads of the pool; each gets its own copy of the flow's context.
            flow_context.copy().run(cell, remembered, key, stages, return_state=True)
            return outcomes[0] if outcomes else Outcome("failed", "Prefect did not start the task")

        return as_task

    return run_grid(home, grid, workers=workers, quiet=quiet, wrap=wrap, pool=pool, flow_run_id=_flow_run_id())


def _flow_run_id() -> str:
    return str(flow_run.id or "")


def _run_on_pools(home: Home, grid: str) -> Summary:
    """Keep one drain in flight for each polling worker of each pool that has ready cells, until nothing is left."""
    store, states = open_grid(home, grid)
    summary = Summary(grid, total=len({s.cell_key for s in states}))
    drains: dict[str, list[Any]] = {}
    while any(s.status != "done" for s in states):
        waiting = {cell.key for cell in ready(states)}
        pools = sorted({s.pool for s in states if s.cell_key in waiting})
        for name in pools:
            workers = _polling_workers(name)
            active = [run for run in drains.get(name, []) if not _is_final(run)]
            drains[name] = active + [_start_drain(grid, name) for _ in range(max(0, workers - len(active)))]
        if not pools and all(_is_final(run) for runs in drains.values() for run in runs):
            break  # nothing runs and nothing can start
        _show(grid, states)
        time.sleep(POLL_SECONDS)
        states = store.work(grid)
    for state in states:
        if state.status in ("failed", "lost"):
            summary.failed[state.cell_key] = state.error
    summary.blocked = len({s.cell_key for s in states if s.status != "done"} - set(summary.failed))
    _show(grid, states)
    return summary


def _start_drain(grid: str, pool: str) -> Any:
    return run_deployment(f"sparseforge-cell/{pool}", parameters={"grid": grid, "pool": pool}, timeout=0)


def _is_final(run: Any) -> bool:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.id).state
    return state is not None and state.is_final()


def _polling_workers(pool: str) -> int:
    """Workers of a pool that are online. Raises GridIncomplete, with the command to start one, if there is none."""
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": pool}, json={})
    online = [worker for worker in found.json() if worker["status"] == "ONLINE"]
    if not online:
        raise GridIncomplete(f"no worker polls the work pool {pool!r}; start one with: infra/worker.sh {pool}")
    return len(online)


def _show(grid: str, states: list[Any]) -> None:
    """The grid as a table artifact of the flow run."""
    cells: dict[str, dict[str, Any]] = {}
    for state in states:
        row = cells.setdefault(
            state.cell_key,
            {"cell": state.cell_key, "model": state.model, "variant": state.variant, "seed": state.seed, "done": 0, "stages": 0},
        )
        row["stages"] += 1
        row["done"] += state.status == "done"
    create_table_artifact(table=list(cells.values()), key=f"grid-{grid}", description=f"Cells of the grid {grid}")


def _report(summary: Summary, *, partial: bool = False) -> dict[str, Any]:
    """What the flow run returns. Raises GridIncomplete if something failed or (for a whole grid) is not done."""
    if summary.failed:
        causes = "; ".join(f"{key}: {error}" for key, error in list(summary.failed.items())[:3])
        raise GridIncomplete(f"{len(summary.failed)} cells of {summary.grid} failed: {causes}")
    if summary.blocked and not partial:
        raise GridIncomplete(f"{summary.blocked} cells of {summary.grid} are not done: sparseforge status {summary.grid}")
    return {"grid": summary.grid, "cells": summary.total, "executed": summary.executed, "pid": os.getpid()}
