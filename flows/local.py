"""The embedded loop: the same cycle without any server. Warm workers, a progress line, MLflow mirrored behind."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from flows.cycle import LEASE, Key, ReadyCell, plan_grid, ready, timed_stages
from flows.devices import default_workers, served_here
from flows.failures import patiently, release_quarantined, reproducer
from flows.home import Home
from flows.messages import Outcome
from flows.mirror import Mirror, lacking
from flows.notify import Notifier
from flows.pool import WorkerPool
from flows.progress import Progress
from flows.provenance import here, process_alive, provenance
from sparseforge_core.store.causes import POLICIES
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore

RunCell = Callable[[str, tuple[str, ...]], Outcome]

POLL_SECONDS = 1.0
FRESH_SECONDS, FRESH_READS = 1.0, 20.0
"""How old the states of a grid may be, in seconds and in readings of them."""


@dataclass
class Summary:
    """What a run of a grid did."""

    grid: str
    total: int = 0
    executed_cells: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    """Error by cell key, of cells in quarantine and of those given up now."""
    reproduce: dict[str, str] = field(default_factory=dict)
    """By cell key, one line that runs what failed by itself."""
    diverged: dict[str, str] = field(default_factory=dict)
    """Why, by cell key; these are done."""
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

    def as_json(self) -> dict[str, Any]:
        """For machines: counts first, then what went wrong by cell key."""
        counts = {"planned": self.total, "executed": self.executed, "not_done": self.blocked + len(self.failed)}
        ends = {"interrupted": self.interrupted, "complete": self.complete}
        return {
            "grid": self.grid, **counts, **ends, "unserved": self.unserved, "failed": self.failed,
            "diverged": self.diverged, "reproduce": self.reproduce,
        }  # fmt: skip


def open_grid(home: Home, name: str) -> tuple[ResultStore, list[StageState]]:
    """Plan a grid in its store, release what dead processes of this machine held, and say what is to do."""
    store = plan_grid(lambda: ResultStore(home.store_url), name)
    store.release_dead(here(), process_alive)
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
    retry_failed: bool = False,
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
        retry_failed: take the grid's cells out of quarantine first.
    """
    store, states = open_grid(home, name)
    if retry_failed and release_quarantined(store, name, provenance(flow_run_id=flow_run_id)):
        states = store.work(name)
    summary = Summary(name, total=len({s.cell_key for s in states}))
    behind, began = lacking(home, states), time.monotonic()
    to_run = any(s.status != "done" for s in states)
    with Notifier() as notifier:
        if behind or to_run:
            with Mirror(home, name, states) as mirror:
                mirror.put(behind)
                if to_run:
                    processes = WorkerPool(home, workers or _workers_of(pool), flow_run_id=flow_run_id)
                    run: RunCell = processes.execute
                    drive = _Drive(store, home, summary, mirror, wrap(run) if wrap else run, pool, quiet=quiet)
                    drive.notifier = notifier
                    drive.run_on(processes)
                if summary.interrupted:
                    mirror.drop()
        # In reverse, so that a cell's training, which comes first, has the last word.
        ended = reversed(patiently(lambda: store.work(name)))
        summary.diverged = {s.cell_key: s.error for s in ended if s.cause == "diverged" and s.status == "done"}
        if to_run:
            notifier.ended(summary.as_json(), seconds=time.monotonic() - began, pool=pool)
    store.close()
    return summary


def _workers_of(pool: str | None) -> int:
    """One worker a device, and one in all where a cell takes several devices."""
    return 1 if pool is not None and pool.removeprefix("gpu-") not in (pool, "1") else default_workers()


class _Drive:
    """One run of a grid: what runs, what was given up, and when to look again."""

    def __init__(
        self,
        store: ResultStore,
        home: Home,
        summary: Summary,
        mirror: Mirror,
        run: RunCell,
        pool: str | None,
        *,
        quiet: bool,
    ) -> None:
        self.store, self.home, self.summary, self.mirror, self.run, self.pool = store, home, summary, mirror, run, pool
        self._known: list[StageState] | None = None
        self._read_at, self._reading = 0.0, 0.0
        states = self.states()
        self.alone = timed_stages(store, states)
        self.labels = {s.cell_key: f"{s.model} {s.variant} s{s.seed}" for s in states}
        self.left = frozenset(self._not_ours(states))
        self.skip: set[Key] = set(self.left)
        self.later: dict[Key, float] = {}
        """When a stage may be tried again that met a store or a disk that was away."""
        self.tries: collections.Counter[Key] = collections.Counter()
        self.running: dict[Future[Outcome], ReadyCell] = {}
        self.notifier: Notifier | None = None
        costs = {s.cell_key: s.cost_hours for s in states if s.status != "done"}
        self.progress = Progress(summary.grid, summary.total, done=summary.total - len(costs), quiet=quiet)
        self.progress.costs = costs

    def states(self) -> list[StageState]:
        """As the store has them, read again when something else may have changed than what we saw end well.

        A large grid takes longer to read than a small cell to run, and reading is never more than a small part of the
        time. What is too old by then costs a claim that the store refuses.
        """
        now = time.monotonic()
        if self._known is None or now - self._read_at > max(FRESH_SECONDS, FRESH_READS * self._reading):
            self._known = patiently(lambda: self.store.work(self.summary.grid))
            self._read_at = time.monotonic()
            self._reading = self._read_at - now
        return self._known

    def _look_again(self) -> None:
        self._known = None

    def _saw_done(self, cell: ReadyCell) -> bool:
        """Enter the stages of a cell that has ended well; whether nothing of it is left."""
        known = self.states()
        mine = [place for place, state in enumerate(known) if state.cell_key == cell.key]
        for place in mine:
            if known[place].stage in cell.stages:
                known[place] = replace(known[place], status="done", error="")
        return all(known[place].status == "done" for place in mine)

    def run_on(self, pool: WorkerPool) -> None:
        """Submit what is ready, wait for something to end, repeat until nothing runs and nothing can start."""
        pool.on_step = self.progress.step
        try:
            with ThreadPoolExecutor(pool.size, thread_name_prefix="cell") as threads:
                try:
                    while self._submit(threads, pool.size) or self._some_come_later() or self._held_elsewhere():
                        self._wait()
                finally:
                    pool.stop()  # threads wait for their workers; without this, leaving the block would hang
        except KeyboardInterrupt:
            self.summary.interrupted = True
        finally:
            self.progress.close()
        self._look_again()
        states = self.states()
        self._report_quarantine(states)
        open_cells = {s.cell_key for s in states if s.status != "done"}
        self.summary.blocked = len(open_cells - set(self.summary.failed))

    def _submit(self, threads: ThreadPoolExecutor, workers: int) -> bool:
        """Fill the free workers; False if nothing runs afterwards."""
        if self.summary.interrupted:
            return bool(self.running)
        found = self._ready()
        if not found and not self.running:  # before this is believed, it must be fresh
            self._look_again()
            found = self._ready()
        for cell in found[: workers - len(self.running)]:
            self.progress.started(cell.key, self.labels[cell.key])
            self.running[threads.submit(self.run, cell.key, cell.stages)] = cell
        return bool(self.running)

    def _ready(self) -> list[ReadyCell]:
        busy = frozenset(cell.key for cell in self.running.values())
        now = time.monotonic()
        self.later = {key: moment for key, moment in self.later.items() if moment > now}
        return ready(self.states(), busy=busy, skip=frozenset(self.skip | self.later.keys()), alone=self.alone)

    def _some_come_later(self) -> bool:
        """Whether something is to be tried again after a while."""
        return bool(self.later.keys() - self.skip) and not self.summary.interrupted

    def _held_elsewhere(self) -> bool:
        """Whether other processes hold stages that cells of ours may wait for; forget those that died."""
        if self.pool is not None or self.summary.interrupted:
            return False
        patiently(lambda: self.store.release_dead(here(), process_alive))
        patiently(lambda: self.store.expire(LEASE))
        self._look_again()
        held = [s for s in self.states() if s.status == "running"]
        if held:
            self.progress.note(f"waiting for {len(held)} stages that other processes run")
        return bool(held) or bool(ready(self.states(), skip=frozenset(self.skip)))

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
        whole = outcome.status == "done" and self._saw_done(cell)
        if outcome.status != "done":
            self._look_again()
        self.progress.ended(cell.key, done=whole, note=note)

    def _missed(self, cell: ReadyCell, outcome: Outcome) -> None:
        """Have a stage that failed or lost its worker tried again as the policy of its class says, or give it up."""
        key, cause = (cell.key, outcome.stage), outcome.cause or "unknown"
        self._look_again()
        if outcome.status == "lost" and not self._released(cell.key, outcome.error):
            cause = "unknown"  # it died before it had anything to do with the cell
        self.tries[key] += 1
        policy = POLICIES[cause]
        if policy.wait:
            self.later[key] = time.monotonic() + policy.wait * 2 ** (self.tries[key] - 1)
        # What never came as far as an attempt in the store is counted here alone.
        state = next(s for s in self.states() if (s.cell_key, s.stage) == key)
        if state.quarantined or (policy.tries is not None and self.tries[key] >= policy.tries):
            self.skip.add(key)
            self._give_up(state, outcome.error)
            if self.notifier is not None:
                about = {"cell": cell.key, "label": self.labels[cell.key], "stage": outcome.stage}
                told = {"cause": cause, "error": outcome.error, "reproduce": self.summary.reproduce[cell.key]}
                self.notifier.cell_failed(self.summary.grid, **about, **told)

    def _released(self, cell: str, why: str) -> bool:
        """Whether a worker that died held a stage of this cell, which nobody holds any more then."""
        return patiently(lambda: self.store.release_dead(here(), process_alive, cell=cell, why=why)) > 0

    def _report_quarantine(self, states: list[StageState]) -> None:
        for state in states:
            if state.quarantined and (state.cell_key, state.stage) not in self.left:
                self._give_up(state, state.error)

    def _give_up(self, state: StageState, error: str) -> None:
        self.summary.failed.setdefault(state.cell_key, error)
        self.summary.reproduce.setdefault(state.cell_key, reproducer(self.home, state))

    def _not_ours(self, states: list[StageState]) -> set[Key]:
        """Stages of cells that are placed elsewhere; those that this machine cannot serve are counted."""
        wanted = {pool: pool == self.pool if self.pool else served_here(pool) for pool in {s.pool for s in states}}
        left = {(s.cell_key, s.stage): s.pool for s in states if s.status != "done" and not wanted[s.pool]}
        if self.pool is None:
            cells = {key: pool for (key, _), pool in left.items()}
            self.summary.unserved = dict(collections.Counter(cells.values()))
        return set(left)


__all__ = ["RunCell", "Summary", "default_workers", "open_grid", "run_grid", "served_here"]
