"""Warm worker processes: torch is imported once in each, then cell after cell is executed in it.

A worker dies with its parent, saves a checkpoint when asked to stop, and writes to a log file of its own. A cell
whose worker dies is reported to the caller; the worker is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from flows.home import Home, be_quiet

STOP_SECONDS = 60.0
"""How long a worker may take to save its checkpoint before it is killed."""

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a cell ended in a worker."""

    status: Literal["done", "failed", "interrupted", "lost"]
    error: str = ""
    permanent: bool = False
    """Whether trying again would fail in the same way (a recipe or data error)."""


@dataclass(frozen=True)
class StepReport:
    """Where a running cell is."""

    cell: str
    stage: str
    step: int
    steps: int
    loss: float


class WorkerPool:
    """`workers` processes; `execute` runs a cell in a free one and may be called from as many threads."""

    def __init__(
        self,
        home: Home,
        workers: int,
        on_step: Callable[[StepReport], None] | None = None,
        *,
        flow_run_id: str = "",
    ) -> None:
        self.home, self.on_step = home, on_step
        self._free: queue.Queue[_Worker] = queue.Queue()
        self._all = [_Worker(home, index, workers, flow_run_id) for index in range(workers)]
        self._lock = threading.Lock()
        self.stopping = False
        for worker in self._all:
            self._free.put(worker)

    def execute(self, key: str, stages: Sequence[str]) -> Outcome:
        """Run the stages of a cell and wait for the end."""
        worker = self._free.get()
        try:
            if self.stopping:
                return Outcome("interrupted", "the pool is stopping")
            return worker.execute(key, stages, self._report)
        finally:
            self._free.put(worker)

    @property
    def size(self) -> int:
        """How many cells run at once."""
        return len(self._all)

    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.process.pid for worker in self._all if worker.process and worker.process.pid]

    def stop(self) -> None:
        """Ask every worker to save and end, wait, then kill what is left."""
        self.stopping = True
        for worker in self._all:
            worker.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._all:
            worker.wait(max(0.1, deadline - time.monotonic()))

    def _report(self, report: StepReport) -> None:
        if self.on_step is not None:
            with self._lock:
                self.on_step(report)


class _Worker:
    """The parent's side of one worker process, started at its first cell."""

    def __init__(self, home: Home, index: int, of: int, flow_run_id: str) -> None:
        self.home, self.index, self.of, self.flow_run_id = home, index, of, flow_run_id
        self.process: Any = None
        self.connection: Connection | None = None

    def execute(self, key: str, stages: Sequence[str], report: Callable[[StepReport], None]) -> Outcome:
        if self.process is None or not self.process.is_alive():
            self._start()
        assert self.connection is not None
        try:
            self.connection.send((key, tuple(stages)))
            while True:
                message = self.connection.recv()
                if isinstance(message, Outcome):
                    return message
                report(message)
        except (EOFError, OSError):
            self.process.join()
            return Outcome("lost", f"its worker process ended with code {self.process.exitcode}; see {self._log()}")

    def ask_to_stop(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.terminate()

    def wait(self, seconds: float) -> None:
        if self.process is not None:
            self.process.join(seconds)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()

    def _log(self) -> Path:
        return self.home.root / "logs" / f"worker-{self.index}.log"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._log().parent.mkdir(parents=True, exist_ok=True)
        arguments = (other, self.home, self.index, self.of, str(self._log()), os.getpid(), self.flow_run_id)
        self.process = context.Process(target=_work, args=arguments, daemon=True, name=f"worker-{self.index}")
        self.process.start()
        other.close()


def _work(
    connection: Connection, home: Home, index: int, of: int, log_file: str, parent: int, flow_run_id: str
) -> None:
    """The worker's side: receive cells, execute, answer; until the parent closes the pipe or asks to stop."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _redirect(log_file)
    _environment(index, of)
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from flows.cycle import execute_cell
    from flows.provenance import provenance
    from sparseforge_core.run import default_device
    from sparseforge_core.store.store import ResultStore

    store = ResultStore(home.store_url)
    origin = provenance(str(default_device()), flow_run_id)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while not stopping.is_set():
            if not connection.poll(0.2):
                continue
            key, stages = connection.recv()
            reporter = _Reporter(connection, key)
            connection.send(
                _outcome(
                    lambda k=key, s=stages, r=reporter: execute_cell(  # type: ignore[misc]
                        store, home, k, s, origin, on_step=r, should_stop=stopping.is_set
                    )
                )
            )


def _outcome(run: Callable[[], None]) -> Outcome:
    import logging

    from sparseforge_core.errors import Interrupted, SparseForgeError, StoreError

    try:
        run()
    except Interrupted as error:
        return Outcome("interrupted", str(error))
    except StoreError as error:
        return Outcome("failed", f"StoreError: {error}")
    except SparseForgeError as error:
        return Outcome("failed", f"{type(error).__name__}: {error}", permanent=True)
    except Exception as error:
        # The attempt is recorded and the text goes to the parent: one bad cell must not end the worker.
        logging.getLogger(__name__).exception("cell failed")
        return Outcome("failed", f"{type(error).__name__}: {error}")
    return Outcome("done")


class _Reporter:
    """Sends a step at most twice a second."""

    def __init__(self, connection: Connection, cell: str) -> None:
        self.connection, self.cell, self.last = connection, cell, 0.0

    def __call__(self, progress: Any) -> None:
        now = time.monotonic()
        if now - self.last >= 0.5 or progress.step == progress.steps:
            self.last = now
            self.connection.send(StepReport(self.cell, "train", progress.step, progress.steps, progress.loss))


def _redirect(log_file: str) -> None:
    handle = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _environment(index: int, of: int) -> None:
    """Share the cores, or give each worker a GPU; must come before torch is imported."""
    be_quiet()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // of))
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
