"""The embedded loop: the same cycle without any server. Warm workers, a progress line, MLflow mirrored behind."""

from __future__ import annotations

import collections
import socket
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from flows.cycle import LEASE, MAX_ATTEMPTS, Key, ReadyCell, attempts_so_far, plan_grid, ready, timed_stages
from flows.devices import default_workers, gpus
from flows.home import Home
from flows.messages import Outcome
from flows.mirror import Mirror, lacking
from flows.pool import WorkerPool
from flows.progress import Progress
from flows.provenance import process_alive
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore

RunCell = Callable[[str, tuple[str, ...]], Outcome]

POLL_SECONDS = 1.0


@dataclass
class Summary:
    """What a run of a grid did."""

    grid: str
    total: int = 0
    executed_cells: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    """Cause by cell key."""
    unserved: dict[str, int] = field(default_factory=dict)
    """Cells left alone because they are placed on devices that this machine lacks, by pool."""
    blocked: int = 0
    """Cells that are not done and did not fail: those left alone, those that wait for others, those held elsewhere."""
    interrupted: bool = False

    @property
    def executed(self) -> int:
        """Cells of which something was executed."""
        return len(self.executed_cells)

    @property
    def complete(self) -> bool:
        """Whether everything planned is done."""
        return not (self.failed or self.blocked or self.interrupted)


def open_grid(home: Home, name: str) -> tuple[ResultStore, list[StageState]]:
    """Plan a grid in its store, release what dead processes of this machine held, and say what is to do."""
    store = plan_grid(lambda: ResultStore(home.store_url), name)
    store.release_dead(socket.gethostname(), process_alive)
    store.expire(LEASE)
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

    Cells whose placement this machine cannot serve are left alone and counted. Never raises for a failing cell: it is
    in the summary, as it is in the store. On Ctrl-C workers save checkpoints, and the summary says so.

    Args:
        home: where everything is.
        name: the grid.
        workers: processes; by default one a GPU, else one a core.
        quiet: no progress.
        wrap: puts something around the execution of each cell (Prefect: a task run).
        pool: only the cells placed there, whatever this machine has.
        flow_run_id: recorded with each attempt.
    """
    store, states = open_grid(home, name)
    summary = Summary(name, total=len({s.cell_key for s in states}))
    behind = lacking(home, states)
    if behind or any(s.status != "done" for s in states):
        with Mirror(home, name, states) as mirror:
            mirror.put(behind)
            if any(s.status != "done" for s in states):
                processes = WorkerPool(home, workers or _workers_of(pool), flow_run_id=flow_run_id)
                run: RunCell = processes.execute
                drive = _Drive(store, summary, mirror, wrap(run) if wrap else run, pool, quiet=quiet)
                drive.run_on(processes)
            if summary.interrupted:
                mirror.drop()
    store.close()
    return summary


def served_here(pool: str) -> bool:
    """Whether a run that names no pool serves this one: `gpu-1` where there is a GPU, anything without one always.

    Cells that need several GPUs at once (`gpu-8`) are left to runs and workers of that pool: here, each worker has one.
    """
    count = pool.removeprefix("gpu-")
    return count == pool or (count == "1" and bool(gpus()))


def _workers_of(pool: str | None) -> int:
    """One worker a device, and one in all where a cell takes several devices."""
    return 1 if pool is not None and pool.removeprefix("gpu-") not in (pool, "1") else default_workers()


class _Drive:
    """One run of a grid: what runs, what was given up, and when to look again."""

    def __init__(
        self, store: ResultStore, summary: Summary, mirror: Mirror, run: RunCell, pool: str | None, *, quiet: bool
    ) -> None:
        self.store, self.summary, self.mirror, self.run, self.pool = store, summary, mirror, run, pool
        states = self.states()
        self.earlier = attempts_so_far(states)
        self.alone = timed_stages(store, states)
        self.labels = {s.cell_key: f"{s.model} {s.variant} s{s.seed}" for s in states}
        self.skip = self._not_ours(states)
        self.tries: collections.Counter[Key] = collections.Counter()
        self.running: dict[Future[Outcome], ReadyCell] = {}
        costs = {s.cell_key: s.cost_hours for s in states if s.status != "done"}
        self.progress = Progress(summary.grid, summary.total, done=summary.total - len(costs), quiet=quiet)
        self.progress.costs = costs

    def states(self) -> list[StageState]:
        return self.store.work(self.summary.grid)

    def run_on(self, pool: WorkerPool) -> None:
        """Submit what is ready, wait for something to end, repeat until nothing runs and nothing can start."""
        pool.on_step = self.progress.step
        try:
            with ThreadPoolExecutor(pool.size, thread_name_prefix="cell") as threads:
                try:
                    while self._submit(threads, pool.size) or self._held_elsewhere():
                        self._wait()
                finally:
                    pool.stop()  # threads wait for their workers; without this, leaving the block would hang
        except KeyboardInterrupt:
            self.summary.interrupted = True
        finally:
            self.progress.close()
        open_cells = {s.cell_key for s in self.states() if s.status != "done"}
        self.summary.blocked = len(open_cells - set(self.summary.failed))

    def _submit(self, threads: ThreadPoolExecutor, workers: int) -> bool:
        """Fill the free workers; False if nothing runs afterwards."""
        if self.summary.interrupted:
            return bool(self.running)
        busy = frozenset(cell.key for cell in self.running.values())
        found = ready(self.states(), busy=busy, skip=frozenset(self.skip), alone=self.alone, earlier=self.earlier)
        for cell in found[: workers - len(self.running)]:
            self.progress.started(cell.key, self.labels[cell.key])
            self.running[threads.submit(self.run, cell.key, cell.stages)] = cell
        return bool(self.running)

    def _held_elsewhere(self) -> bool:
        """Whether other processes hold stages that cells of ours may wait for; forget those that died."""
        if self.pool is not None or self.summary.interrupted:
            return False
        self.store.release_dead(socket.gethostname(), process_alive)
        self.store.expire(LEASE)
        held = [s for s in self.states() if s.status == "running"]
        if held:
            self.progress.note(f"waiting for {len(held)} stages that other processes run")
        return bool(held) or bool(ready(self.states(), skip=frozenset(self.skip), earlier=self.earlier))

    def _wait(self) -> None:
        """Until a cell has ended, or, where none of ours runs, a moment."""
        if not self.running:
            time.sleep(POLL_SECONDS)
            return
        finished: set[Future[Outcome]] = set()
        while not finished:
            finished, _ = wait(self.running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            self.progress.show()
        for future in finished:
            self._settle(self.running.pop(future), future.result())

    def _settle(self, cell: ReadyCell, outcome: Outcome) -> None:
        if outcome.status == "done":
            self.summary.executed_cells.add(cell.key)
            self.mirror.put([cell.key])
        elif outcome.status == "interrupted":
            self.summary.interrupted = True
        elif outcome.status in ("failed", "lost"):
            self._missed(cell, outcome)
        note = "" if outcome.status in ("done", "taken") else f"{outcome.stage} {outcome.status}: {outcome.error}"
        whole = outcome.status == "done" and all(s.status == "done" for s in self.states() if s.cell_key == cell.key)
        self.progress.ended(cell.key, done=whole, note=note)

    def _missed(self, cell: ReadyCell, outcome: Outcome) -> None:
        """Count a stage that failed or lost its worker, and give it up when it never will or was tried enough."""
        if outcome.status == "lost":
            self.store.release_dead(socket.gethostname(), process_alive)
        key = (cell.key, outcome.stage)
        self.tries[key] += 1
        if outcome.permanent or self.tries[key] >= MAX_ATTEMPTS:
            self.skip.add(key)
            self.summary.failed.setdefault(cell.key, outcome.error)

    def _not_ours(self, states: list[StageState]) -> set[Key]:
        """Stages of cells that are placed elsewhere; those that this machine cannot serve are counted."""
        wanted = {pool: pool == self.pool if self.pool else served_here(pool) for pool in {s.pool for s in states}}
        left = {(s.cell_key, s.stage): s.pool for s in states if s.status != "done" and not wanted[s.pool]}
        if self.pool is None:
            cells = {key: pool for (key, _), pool in left.items()}
            self.summary.unserved = dict(collections.Counter(cells.values()))
        return set(left)


__all__ = ["RunCell", "Summary", "default_workers", "open_grid", "run_grid", "served_here"]
