"""Warm worker processes: torch is imported once in each, then cell after cell is executed in it.

A worker dies with its parent, saves a checkpoint when asked to stop, and writes to a log file of its own. A cell
whose worker dies is reported to the caller; the worker is replaced. So is one in which memory ran out, and the cell's
next try has a fresh process beside idle ones that have given their memory back.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flows.home import Home
from flows.messages import Outcome, StepReport
from flows.worker import work

__all__ = ["Outcome", "StepReport", "WorkerPool"]

STOP_SECONDS = 60.0
"""How long a worker may take to save its checkpoint before it is killed."""
RETIRE_SECONDS = 10.0
"""How long an idle worker may take to end."""
VMSTAT = Path("/proc/vmstat")


Report = Callable[[StepReport], None]


class WorkerPool:
    """`workers` processes; `execute` runs a cell in a free one and may be called from as many threads."""

    def __init__(self, home: Home, workers: int, on_step: Report | None = None, *, flow_run_id: str = "") -> None:
        self.home, self.on_step = home, on_step
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the last one used is the warmest
        self._all = [_Worker(home, index, workers, flow_run_id) for index in range(workers)]
        self.stopping = False
        self._isolated: set[str] = set()
        """Cells that ran out of memory."""
        for worker in reversed(self._all):
            self._free.put(worker)

    def execute(self, key: str, stages: Sequence[str]) -> Outcome:
        """Run the stages of a cell and wait for the end; the first that does not get done ends it."""
        worker = self._free.get()
        try:
            if key in self._isolated:
                worker.retire()
                self._retire_idle()
            outcome = worker.execute(key, stages, self.on_step or (lambda _report: None))
            if outcome.cause == "out of memory":
                self._isolated.add(key)
            if outcome.cause == "out of memory" or "CUDA error" in outcome.error:
                worker.retire()  # what it holds, or a context that is lost, must not meet the next cell
        finally:
            self._free.put(worker)
        if outcome.status == "lost" and self.stopping:
            return Outcome("interrupted", "its worker was stopped", stage=outcome.stage)
        return outcome

    def _retire_idle(self) -> None:
        """End the processes that have nothing to do, for the memory that they hold."""
        idle: list[_Worker] = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._free.get_nowait())
        for worker in reversed(idle):
            worker.retire()
            self._free.put(worker)

    @property
    def size(self) -> int:
        """How many cells run at once."""
        return len(self._all)

    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.process.pid for worker in self._all if worker.process and worker.process.pid]

    def stop(self) -> None:
        """Ask every worker to save and end, wait, then kill what is left. Nothing runs in this pool afterwards."""
        self.stopping = True
        for worker in self._all:
            worker.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        try:
            for worker in self._all:
                worker.wait(deadline - time.monotonic())
        finally:  # the time is over, or the user is out of patience
            for worker in self._all:
                worker.kill()


class _Worker:
    """The parent's side of one worker process, started at its first cell."""

    def __init__(self, home: Home, index: int, of: int, flow_run_id: str) -> None:
        self.home, self.index, self.of, self.flow_run_id = home, index, of, flow_run_id
        self.process: Any = None
        self.connection: Connection | None = None
        self.stopped = False
        self.lock = threading.Lock()
        """Between starting a process and asking it to stop."""

    def execute(self, key: str, stages: Sequence[str], report: Report) -> Outcome:
        with self.lock:
            if self.stopped:
                return Outcome("interrupted", "the pool has stopped", stage=stages[0])
            if self.process is None or not self.process.is_alive():
                self._start()
        assert self.connection is not None
        stage, killed_before = stages[0], kernel_kills()
        try:
            self.connection.send((key, tuple(stages)))
            while True:
                message = self.connection.recv()
                if isinstance(message, Outcome):
                    return message
                stage = message.stage
                report(message)
        except (EOFError, OSError):
            self.process.join()
            why = "; the kernel killed a process for want of memory meanwhile" if kernel_kills() > killed_before else ""
            error = f"{self._end()}{why}; its log is {self._log()}"
            return Outcome("lost", error, cause="lost worker", stage=stage)

    def ask_to_stop(self) -> None:
        with self.lock:
            self.stopped = True
            if self.process is not None and self.process.is_alive():
                self.process.terminate()

    def retire(self) -> None:
        """End the process, which has nothing to do; the next cell starts another."""
        with self.lock:
            process, self.process = self.process, None
        if process is not None and process.is_alive():
            process.terminate()
            process.join(RETIRE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def wait(self, seconds: float) -> None:
        if self.process is not None:
            self.process.join(max(0.1, seconds))

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _end(self) -> str:
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its worker was killed by {signal.Signals(-code).name}"
        return f"its worker ended with code {code}"

    def _log(self) -> Path:
        return self.home.root / "logs" / f"worker-{self.index}.log"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._log().parent.mkdir(parents=True, exist_ok=True)
        arguments = (other, self.home, self.index, self.of, str(self._log()), os.getpid(), self.flow_run_id)
        self.process = context.Process(target=work, args=arguments, daemon=True, name=f"worker-{self.index}")
        with _signals_held_back():
            self.process.start()
        other.close()


def kernel_kills() -> int:
    """Processes that this machine's kernel has killed because memory ran out, as far as it tells."""
    if not VMSTAT.is_file():
        return 0
    counts = dict(line.split() for line in VMSTAT.read_text().splitlines())
    return int(counts.get("oom_kill", 0))


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Start a process with stop signals blocked: it lets them in when it is able to handle them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
