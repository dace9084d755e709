"""The Prefect flows: thin shells around the cycle.

`sparseforge` runs a grid: *here*, on warm workers of its own process, or on *pools*, by asking the workers of each
Prefect work pool to drain the store. `sparseforge-cell` is what such a worker runs. Both show each stage of a cell as
a task run. Prefect's records are for looking; what is done is decided by the store alone.
"""

from __future__ import annotations

import contextvars
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import httpx
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Failed, State

from flows.artifacts import LiveGrid
from flows.cycle import LEASE, ready
from flows.devices import gpus, reserved
from flows.failures import patiently
from flows.grids.shrunken import shrunk_name
from flows.home import Home
from flows.local import RunCell, Summary, open_grid, run_grid
from flows.messages import Outcome
from flows.notify import Notifier
from flows.provenance import here, process_alive
from flows.server import prefect_api
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore

POLL_SECONDS = 3.0
MAX_DRAINS = 3
"""Drains of one pool that may fail one after the other without finishing a stage."""
DRAIN = "drain of"
"""How the name begins of what a grid starts: it may queue, and `infra/automations.yaml` spares it."""
RECORD_SECONDS = 15.0
"""How long to wait until Prefect has written the task runs, which it does behind their backs."""


T = TypeVar("T")
Report = dict[str, Any]
"""What a flow run returns: the grid, its cells, how many were executed now, and in which process."""


class GridIncomplete(SparseForgeError):
    """A grid cannot go on: nobody polls a pool that it needs, its drains fail again and again, or Prefect is away."""


@flow(name="sparseforge", flow_run_name="{grid}")
def sparseforge(
    grid: str = "full",
    workers: int | None = None,
    dispatch: Literal["here", "pools"] = "pools",
    shrink: int | None = None,
) -> Report | State:
    """Run what is not done of a grid; the flow run fails, with the causes, if something could not be done.

    `dispatch="here"` runs the cells on this machine; "pools" asks the workers of the pools where the cells are placed.
    `workers` is the number of processes of a run here, and of each CPU drain. `shrink` runs the grid in miniature, with
    so many rows an exhibit: to try the stack.
    """
    home = Home.of()
    grid = grid if shrink is None else shrunk_name(grid, shrink)
    if dispatch == "here":
        return _reported(lambda: _run_here(home, grid, workers, quiet=True))
    return _reported(lambda: _told(lambda: _run_on_pools(home, grid, workers)))


@flow(name="sparseforge-cell", flow_run_name="{grid} on {pool}")
def sparseforge_cell(grid: str, pool: str, workers: int | None = None) -> Report | State:
    """Drain the ready cells of one pool from the store: one at a time on GPUs, `workers` at a time on the CPU.

    The GPUs that this worker sees are held until the end, so that no other drain of this machine computes on them.
    """
    home, devices = Home.of(), [] if pool == "cpu" else gpus()
    say = get_run_logger()
    with reserved(home.root / "devices", devices, lambda name: say.info("waiting for GPU %s, which works", name)):
        processes = workers if pool == "cpu" else 1
        return _reported(lambda: _run_here(home, grid, processes, quiet=True, pool=pool), partial=True)


def run_embedded(
    home: Home, grid: str, *, workers: int | None = None, quiet: bool = False, retry_failed: bool = False
) -> Summary:
    """Run a grid in this process as a flow run, under a Prefect server that needs no starting by hand.

    Raises ServerError if Prefect cannot be had. Failing cells are in the summary, as they are in the store.
    """
    found: list[Summary] = []

    def body() -> Report | State:
        found.append(_run_here(home, grid, workers, quiet=quiet, retry_failed=retry_failed))
        return _report(found[0])

    logging.getLogger("prefect").setLevel(logging.CRITICAL)  # what failed is in the summary; once is enough
    embedded = flow(name="sparseforge", flow_run_name=f"{grid}, embedded")(body)
    with prefect_api(home) as api, temporary_settings({PREFECT_API_URL: api}):
        state = embedded(return_state=True)
        if not found:
            state.result()  # raises what kept the grid from running
        if not found[0].interrupted:
            _wait_until_recorded(str(state.state_details.flow_run_id))
    return found[0]


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{label}: {stage}")
def run_stage(run: RunCell, key: str, stage: str, label: str) -> State:
    """One stage of a cell in a warm worker; one that fails, fails its task run and only that."""
    outcome = run(key, (stage,))
    if outcome.status == "done":
        return Completed(message=f"cell {key}, stage {stage}")
    said = f"cell {key} ({label}), stage {stage} {outcome.status}: {outcome.error}"
    return Failed(message=said) if outcome.status in ("failed", "lost") else Cancelled(message=said)


def _run_here(
    home: Home, grid: str, workers: int | None, *, quiet: bool, pool: str | None = None, retry_failed: bool = False
) -> Summary:
    flow_context = contextvars.copy_context()
    live = LiveGrid(home, grid) if pool is None else None  # a drain's cells are in the table of the grid's run

    def wrap(run: RunCell) -> RunCell:
        states = patiently(lambda: _states(home, grid))
        labels = {s.cell_key: f"{s.model} {s.variant} s{s.seed}" for s in states}
        if live is not None:
            live.show(lambda: states, now=True)

        def as_task_runs(key: str, stages: tuple[str, ...]) -> Outcome:
            outcomes = [Outcome("failed", "Prefect did not start the task")]

            def remembered(key: str, stages: tuple[str, ...]) -> Outcome:
                outcomes.append(run(key, stages))
                return outcomes[-1]

            for stage in stages:
                # Cells run in threads of the pool; each gets its own copy of the flow's context.
                flow_context.copy().run(run_stage, remembered, key, stage, labels[key], return_state=True)
                if outcomes[-1].status != "done":
                    break
            if live is not None:
                live.show(lambda: _states(home, grid))
            return outcomes[-1]

        return as_task_runs

    run_id = str(flow_run.id or "")
    summary = run_grid(
        home, grid, workers=workers, quiet=quiet, wrap=wrap, pool=pool, flow_run_id=run_id, retry_failed=retry_failed
    )
    if live is not None and not summary.interrupted:
        live.show(lambda: _states(home, grid), now=True)
    return summary


def _states(home: Home, grid: str) -> list[StageState]:
    """The state of a grid through a store of our own, in whatever thread this is."""
    store = ResultStore(home.store_url, create=False)
    try:
        return store.work(grid)
    finally:
        store.close()


@dataclass
class _Pool:
    """What was asked of the workers of one pool."""

    active: list[Any] = field(default_factory=list)
    failures: int = 0
    """Drains that failed one after the other."""


def _run_on_pools(home: Home, grid: str, workers: int | None) -> Summary:
    """Keep one drain in flight for each polling worker of each pool that has ready cells, until nothing is left.

    A stage that is running is waited for, whosever it is: its drain may be gone, with a server that was killed, and the
    cells that need it come when it is done, or when nobody has heard of it for the time of a lease.
    """
    store, states = open_grid(home, grid)
    pools: dict[str, _Pool] = {}
    live = LiveGrid(home, grid)
    before = -1
    while True:
        live.show(lambda states=states: states)  # type: ignore[misc]
        done = sum(s.status == "done" for s in states)
        if done != before:
            for pool in pools.values():
                pool.failures = 0
            before = done
        waiting = {cell.key for cell in ready(states)}
        wanted = sorted({s.pool for s in states if s.cell_key in waiting})
        for name, pool in pools.items():
            _settle_drains(name, pool)
        for name in wanted:
            pool = pools.setdefault(name, _Pool())
            for _ in range(_polling_workers(name) - len(pool.active)):
                pool.active.append(_start_drain(grid, name, workers))
        running = any(s.status == "running" for s in states)
        if not wanted and not running and not any(pool.active for pool in pools.values()):
            live.show(lambda states=states: states, now=True)  # type: ignore[misc]
            return _summary(grid, states)
        time.sleep(POLL_SECONDS)
        patiently(lambda: store.release_dead(here(), process_alive))
        patiently(lambda: store.expire(LEASE))
        states = patiently(lambda: store.work(grid))


def _told(run: Callable[[], Summary]) -> Summary:
    """Run, then tell the user's command that the grid has ended; cells that failed were told by their drains."""
    began = time.monotonic()
    with Notifier() as notifier:
        summary = run()
        notifier.ended(summary.as_json(), seconds=time.monotonic() - began)
    return summary


def _asked(what: Callable[[Any], T]) -> T:
    """What Prefect's server answers, asked through a client. Raises GridIncomplete where it stays away.

    A server that is started again takes a moment, and a grid waits for hours: that is no reason to give it up. A drain
    asked for twice, since the first answer was lost, finds nothing to do.
    """

    def ask() -> T:
        with get_client(sync_client=True) as client:
            return what(client)

    try:
        return patiently(ask, (httpx.TransportError,))
    except httpx.TransportError as error:
        raise GridIncomplete(
            f"the Prefect server at {PREFECT_API_URL.value()} does not answer ({type(error).__name__}); what runs goes "
            "on and is recorded. Once the server is back, run the same again"
        ) from error


def _settle_drains(name: str, pool: _Pool) -> None:
    """Forget drains that ended. Raises GridIncomplete when they fail again and again without finishing a stage."""
    runs = _asked(lambda client: [client.read_flow_run(run.id) for run in pool.active])
    pool.active = [run for run in runs if run.state is None or not run.state.is_final()]
    failed = [run for run in runs if run.state is not None and run.state.is_final() and not run.state.is_completed()]
    pool.failures += len(failed)
    if pool.failures >= MAX_DRAINS:
        raise GridIncomplete(
            f"{pool.failures} runs of sparseforge-cell/{name} failed without finishing a stage; the last, "
            f"{failed[-1].name!r}: {failed[-1].state.message}"
        )


def _summary(grid: str, states: Sequence[StageState]) -> Summary:
    summary = Summary(grid, total=len({s.cell_key for s in states}))
    summary.failed = {s.cell_key: s.error for s in states if s.status in ("failed", "lost")}
    summary.blocked = len({s.cell_key for s in states if s.status != "done"} - set(summary.failed))
    return summary


def _start_drain(grid: str, pool: str, workers: int | None) -> Any:
    parameters = {"grid": grid, "pool": pool, "workers": workers}
    name = f"{DRAIN} {grid} on {pool}"
    return _asked(
        lambda _: run_deployment(f"sparseforge-cell/{pool}", flow_run_name=name, parameters=parameters, timeout=0)
    )


def _polling_workers(pool: str) -> int:
    """Workers of a pool that are online. Raises GridIncomplete, with the command to start one, if there is none."""
    try:
        workers = _asked(lambda client: client.read_workers_for_work_pool(pool))
    except ObjectNotFound as error:
        raise GridIncomplete(f"the server has no work pool {pool!r}; make the pools with: infra/register.sh") from error
    online = sum(worker.status is not None and worker.status.value == "ONLINE" for worker in workers)
    if not online:
        raise GridIncomplete(f"no worker polls the work pool {pool!r}; start one with: infra/worker.sh {pool}")
    return online


def _reported(run: Callable[[], Summary], *, partial: bool = False) -> Report | State:
    """The report of a run; an error meant for a person fails the flow run with its sentence, without a traceback."""
    try:
        return _report(run(), partial=partial)
    except SparseForgeError as error:
        return Failed(message=f"{type(error).__name__}: {error}")


def _report(summary: Summary, *, partial: bool = False) -> Report | State:
    """What the flow run returns: a failed state if something failed or (for a whole grid) is not done."""
    if summary.failed:
        causes = "; ".join(f"{key}: {error}" for key, error in list(summary.failed.items())[:3])
        return Failed(message=f"{len(summary.failed)} cells of {summary.grid} failed: {causes}")
    if summary.interrupted:
        return Cancelled(message=f"{summary.grid} was stopped; nothing is lost, running it again goes on")
    if summary.blocked and not partial:
        what = f"{summary.blocked} cells of {summary.grid} are not done"
        return Failed(message=f"{what}: `sparseforge status {summary.grid}` says why")
    return {"grid": summary.grid, "cells": summary.total, "executed": summary.executed, "pid": os.getpid()}


def _wait_until_recorded(flow_run_id: str) -> None:
    """Let Prefect write the task runs of a flow run that has ended: a server that stops now would lose some."""
    unfinished = {
        "flow_runs": {"id": {"any_": [flow_run_id]}},
        "task_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "SCHEDULED"]}}},
    }
    deadline = time.monotonic() + RECORD_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            time.sleep(1.0)
            if client.request("POST", "/task_runs/count", json=unfinished).json() == 0:
                return
