"""The embedded loop: the same cycle without any server. Warm workers, a progress line, MLflow mirrored behind."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from flows.cycle import MAX_ATTEMPTS, ReadyCell, plan_grid, ready, timed_stages
from flows.home import Home
from flows.pool import Outcome, StepReport, WorkerPool
from flows.progress import Progress
from flows.provenance import process_alive
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore

log = logging.getLogger(__name__)

RunCell = Callable[[str, tuple[str, ...]], Outcome]


@dataclass
class Summary:
    """What a run of a grid did."""

    grid: str
    total: int = 0
    executed_cells: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    blocked: int = 0
    interrupted: bool = False

    @property
    def executed(self) -> int:
        """Cells of which something was executed."""
        return len(self.executed_cells)

    @property
    def complete(self) -> bool:
        """Whether everything planned is done."""
        return not (self.failed or self.blocked or self.interrupted)


def default_workers() -> int:
    """One worker a GPU, else one a core, at most four."""
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return len(devices) or max(1, min(4, os.cpu_count() or 1))


def open_grid(home: Home, name: str) -> tuple[ResultStore, list[StageState]]:
    """Plan a grid in its store, release what dead processes of this machine held, and say what is to do."""
    store = ResultStore(home.store_url)
    plan_grid(store, name)
    store.release_dead(socket.gethostname(), process_alive)
    return store, store.work(name)


def run_grid(
    home: Home,
    name: str,
    *,
    workers: int | None = None,
    quiet: bool = False,
    wrap: Callable[[RunCell], RunCell] | None = None,
    pool: str | None = None,
    flow_run_id: str = "",
) -> Summary:
    """Run what is not done of a grid, on warm workers of this machine, until nothing more can be.

    `wrap` may put something around the execution of each cell (Prefect: a task run); `pool` limits the run to the
    cells placed there. Never raises for a failing
    cell: it is in the summary, as it is in the store. On Ctrl-C workers save checkpoints, and the summary says so.
    """
    store, states = open_grid(home, name)
    summary = Summary(name, total=len({s.cell_key for s in states}))
    if all(s.status == "done" for s in states):
        return summary
    labels = {s.cell_key: f"{s.model} {s.variant} s{s.seed}" for s in states}
    costs = {s.cell_key: s.cost_hours for s in states}
    to_do = {s.cell_key for s in states if s.status != "done"}
    progress = Progress(name, summary.total, quiet=quiet)
    progress.done = summary.total - len(to_do)
    progress.cost_total = sum(costs[key] for key in to_do)
    processes = WorkerPool(home, workers or default_workers(), progress.step, flow_run_id=flow_run_id)
    with _mirroring(home, name, states) as mirror:
        try:
            around = wrap or (lambda run: run)
            _drive(store, processes, _Drive(summary, progress, labels, costs, mirror, around, pool))
        except KeyboardInterrupt:
            summary.interrupted = True
        finally:
            processes.stop()
            progress.close()
    return summary


@dataclass
class _Drive:
    summary: Summary
    progress: Progress
    labels: dict[str, str]
    costs: dict[str, float]
    mirror: Callable[[str], None]
    wrap: Callable[[RunCell], RunCell]
    pool: str | None


def _drive(store: ResultStore, pool: WorkerPool, drive: _Drive) -> None:
    """Submit what is ready, wait for something to end, repeat until nothing runs and nothing is ready."""
    run = drive.wrap(lambda key, stages: pool.execute(key, stages))
    running: dict[Future[Outcome], ReadyCell] = {}
    gave_up: set[str] = set()
    alone = timed_stages(store, store.work(drive.summary.grid))
    workers = pool.size
    with ThreadPoolExecutor(workers, thread_name_prefix="cell") as threads:
        try:
            while True:
                busy = frozenset(cell.key for cell in running.values())
                states = store.work(drive.summary.grid)
                elsewhere = {s.cell_key for s in states if drive.pool is not None and s.pool != drive.pool}
                offered = ready(states, busy=busy, skip=frozenset(gave_up | elsewhere), alone=alone)
                for cell in offered[: workers - len(running)]:
                    if cell.key in drive.summary.executed_cells:
                        drive.progress.done -= 1  # it comes back for the stages that need the machine to themselves
                    drive.progress.started(cell.key, drive.labels[cell.key])
                    running[threads.submit(run, cell.key, cell.stages)] = cell
                if not running:
                    break
                finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                drive.progress.show()
                for future in finished:
                    _settle(store, drive, running.pop(future), future.result(), gave_up)
        except BaseException:
            pool.stop()  # threads wait for their workers; without this, leaving the block would hang
            raise
    drive.summary.blocked = len({s.cell_key for s in store.work(drive.summary.grid) if s.status != "done"} - gave_up)


def _settle(store: ResultStore, drive: _Drive, cell: ReadyCell, outcome: Outcome, gave_up: set[str]) -> None:
    if outcome.status == "lost":
        store.release_dead(socket.gethostname(), process_alive)
    note = "" if outcome.status == "done" else f"{outcome.status}: {outcome.error}"
    drive.progress.ended(cell.key, drive.costs[cell.key], note=note)
    if outcome.status == "done":
        drive.summary.executed_cells.add(cell.key)
        drive.mirror(cell.key)
    elif outcome.status == "interrupted":
        drive.summary.interrupted = True
        gave_up.add(cell.key)
    else:
        tries = max((s.attempts for s in store.work(drive.summary.grid) if s.cell_key == cell.key), default=0)
        if outcome.permanent or tries >= MAX_ATTEMPTS:
            gave_up.add(cell.key)
            drive.summary.failed[cell.key] = outcome.error
        else:
            drive.progress.done -= 1


@contextlib.contextmanager
def _mirroring(home: Home, grid: str, states: list[StageState]) -> Iterator[Callable[[str], None]]:
    """Copy finished cells into MLflow from a thread; its failures are warnings, the journals stay for another time."""
    waiting: queue.Queue[str | None] = queue.Queue()
    about = {s.cell_key: s for s in states}

    def work() -> None:
        from sparseforge_core.tracking.mlflow_tracker import MirrorError, mirror_cell

        while (key := waiting.get()) is not None:
            try:
                mirror_cell(home.mlflow_uri, home.root, home.cell(key), grid, about[key])
            except MirrorError as error:
                log.warning("cell %s is not in MLflow yet: %s", key, error)

    thread = threading.Thread(target=work, name="mlflow", daemon=True)
    thread.start()
    try:
        yield waiting.put
    finally:
        waiting.put(None)
        thread.join()


__all__ = ["StepReport", "Summary", "default_workers", "open_grid", "run_grid"]
