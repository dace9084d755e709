"""The inside of a worker process: receive cells, execute their stages, answer; until the parent goes or says stop."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from flows.devices import cores, gpus
from flows.home import Home, be_quiet
from flows.messages import Outcome, StepReport
from sparseforge_core.store.causes import cause_of

PR_SET_PDEATHSIG = 1
REPORT_SECONDS = 0.5
BEGINS = "begins: cell %s, stage %s"
"""In a worker's log, before the lines of each stage."""

log = logging.getLogger(__name__)


def work(connection: Connection, home: Home, index: int, of: int, log_file: str, parent: int, flow_run_id: str) -> None:
    """Main function of worker `index` of `of`; everything it prints goes to the log file."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    _redirect(log_file)
    share_machine(index, of)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from flows.cycle import execute_stage
    from flows.failures import patiently
    from flows.provenance import provenance
    from sparseforge_core.execution import default_device
    from sparseforge_core.store.store import ResultStore

    store = patiently(lambda: ResultStore(home.store_url, create=False))  # the parent has it open
    origin = provenance(str(default_device()), flow_run_id)

    def execute(key: str, stage: str, reporter: _Reporter) -> None:
        execute_stage(store, home, key, stage, origin, on_step=reporter, should_stop=lambda: stop.asked)

    with suppress(EOFError, BrokenPipeError):
        while not stop.asked:
            if connection.poll(0.2):
                key, stages = connection.recv()
                connection.send(_run_cell(connection, key, stages, stop, execute))


class _Stop:
    """The stop signal: a training loop sees it at its next step and saves, anything else is broken off at once."""

    def __init__(self) -> None:
        self.asked = False
        self.breakable = False

    def __call__(self, *_: Any) -> None:
        self.asked = True
        if self.breakable:
            self.breakable = False
            raise KeyboardInterrupt


class _Reporter:
    """Tells the parent where a stage is: when it begins, and then at most twice a second."""

    def __init__(self, connection: Connection, cell: str, stage: str, stop: _Stop) -> None:
        self.connection, self.cell, self.stage, self.stop = connection, cell, stage, stop
        self.last = 0.0
        self._send(StepReport(cell, stage))

    def __call__(self, progress: Any) -> None:
        self.stop.breakable = False
        now = time.monotonic()
        if now - self.last >= REPORT_SECONDS or progress.step == progress.steps:
            self.last = now
            self._send(StepReport(self.cell, self.stage, progress.step, progress.steps, progress.loss))

    def _send(self, report: StepReport) -> None:
        with suppress(BrokenPipeError):  # the parent is gone, and the signal that says so is on its way
            self.connection.send(report)


def _run_cell(
    connection: Connection,
    key: str,
    stages: Sequence[str],
    stop: _Stop,
    execute: Callable[[str, str, _Reporter], None],
) -> Outcome:
    for stage in stages:
        log.info(BEGINS, key, stage)  # by which the lines of a cell are found again in this file
        reporter = _Reporter(connection, key, stage, stop)
        outcome = _outcome(stage, stop, lambda s=stage, r=reporter: execute(key, s, r))  # type: ignore[misc]
        if outcome.status != "done":
            return outcome
    return Outcome("done")


def _outcome(stage: str, stop: _Stop, run: Callable[[], None]) -> Outcome:
    from sparseforge_core.errors import CellTaken, Interrupted, SparseForgeError, described

    try:
        stop.breakable = True
        if stop.asked:
            return Outcome("interrupted", "stopped before it began", cause="interrupted", stage=stage)
        run()
    except (Interrupted, KeyboardInterrupt) as error:
        return Outcome("interrupted", str(error) or "stopped", cause="interrupted", stage=stage)
    except CellTaken as error:
        return Outcome("taken", str(error), stage=stage)
    except Exception as error:
        # The attempt is recorded and the text goes to the parent: one bad cell must not end the worker.
        if not isinstance(error, SparseForgeError):
            log.exception("stage %s failed", stage)
        text = described(error)
        return Outcome("failed", text, cause=cause_of("failed", text), stage=stage)
    finally:
        stop.breakable = False
    return Outcome("done")


def _redirect(log_file: str) -> None:
    handle = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def share_machine(index: int, of: int) -> None:
    """Share the cores and the GPUs, of which each of several workers gets one; must come before torch is imported."""
    be_quiet()
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // of))
    devices = gpus()
    if devices and of > 1:  # a worker by itself sees all: a cell may need them at once
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
