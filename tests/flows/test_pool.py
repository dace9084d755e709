"""Real worker processes, and what happens when they, or all of us, are killed in the middle of a cell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.home import Home
from flows.messages import Outcome, StepReport
from flows.mirror import lacking
from flows.pool import WorkerPool
from flows.provenance import process_alive
from sparseforge_core.store.rows import AttemptRecord
from sparseforge_core.store.store import ResultStore
from tests.flows.command import GRID, STEPS, register

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


class Run:
    """`sparseforge run` on a grid of some seconds, as a child in a process group of its own."""

    def __init__(self, root: Path, *arguments: str, **environment: str) -> None:
        self.home = Home(root, f"sqlite:///{root / 'store.db'}", f"sqlite:///{root / 'mlflow.db'}")
        command = [sys.executable, "-m", "tests.flows.command", "--home", str(root), "run", GRID, *arguments]
        handle, name = tempfile.mkstemp(dir=root.parent, prefix="output-")
        self.output = Path(name)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(handle)

    def wait_until_training(self) -> int:
        """Wait until a checkpoint is there; the process id of the worker that wrote it."""
        self.until(lambda: any((self.home.root / "cells").glob("*/train/checkpoints/step-*/manifest.json")))
        return next(a.provenance.pid for a in self.attempts() if a.status == "running")

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not true():
            assert time.monotonic() < deadline, "it never happened"
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def attempts(self) -> list[AttemptRecord]:
        store = ResultStore(self.home.store_url)
        cells = {s.cell_key for s in store.work(GRID)}
        found = [attempt for cell in sorted(cells) for attempt in store.attempts(cell)]
        store.close()
        return found

    def end(self) -> tuple[int, str]:
        code = self.process.wait(timeout=180)
        return code, self.output.read_text()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*arguments: str, **environment: str) -> Run:
        runs.append(Run(tmp_path / "home", *arguments, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def statuses(run: Run) -> list[str]:
    """How the tries at the pretraining ended, in order."""
    by_cell: dict[str, list[str]] = {}
    for attempt in run.attempts():
        if attempt.stage == "train":
            by_cell.setdefault(attempt.cell_key, []).append(attempt.status)
    return max(by_cell.values(), key=len)


def journal_steps(run: Run) -> list[int]:
    from sparseforge_core.tracking.tracker import read_journal

    files = [p for p in (run.home.root / "cells").glob("*/train/journal.jsonl") if p.stat().st_size]
    lines, _ = read_journal(files[0])
    return [line["step"] for line in lines if "scalars" in line]


def test_a_killed_worker_is_replaced_and_its_cell_goes_on(start: Callable[..., Run]) -> None:
    run = start("--workers", "1")
    os.kill(run.wait_until_training(), signal.SIGKILL)
    code, output = run.end()
    assert code == 0, output
    assert "killed by SIGKILL" in output
    assert statuses(run) == ["lost", "done"]
    assert "killed by SIGKILL" in next(a.error for a in run.attempts() if a.status == "lost")
    steps = journal_steps(run)
    assert steps == sorted(set(steps)), "the journal holds each step once"
    assert steps[-1] == STEPS


def test_a_store_that_is_gone_for_a_while_is_missed_and_nothing_is_made_in_its_place(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start("--workers", "1")
    run.wait_until_training()
    put_away = tmp_path / "away"
    put_away.mkdir()
    parts = ("store.db", "store.db-wal", "store.db-shm")
    for part in parts:
        os.rename(run.home.root / part, put_away / part)
    run.until(lambda: any((run.home.root / "cells").glob("*/train/measurements.json")))
    time.sleep(2.0)  # the worker asks again and again whether it can record it
    assert run.process.poll() is None, run.output.read_text()
    assert not [part for part in parts if (run.home.root / part).exists()], "a second store"
    for part in parts:
        os.rename(put_away / part, run.home.root / part)
    code, output = run.end()
    assert code == 0, output
    assert statuses(run) == ["done"]
    assert ResultStore(run.home.store_url).fsck() == []


def test_ctrl_c_saves_says_how_to_go_on_and_the_next_run_does(start: Callable[..., Run]) -> None:
    run = start("--workers", "2")
    run.wait_until_training()
    os.killpg(run.process.pid, signal.SIGINT)
    code, output = run.end()
    assert code == 130, output
    assert f"Go on with: sparseforge run {GRID}" in output
    assert "Traceback" not in output
    assert statuses(run) == ["interrupted"]
    again = start("--workers", "1")
    code, output = again.end()
    assert code == 0, output
    assert "2 cells executed now, 2 planned" in output
    assert journal_steps(again)[-1] == STEPS
    third = start()
    code, output = third.end()
    assert (code, output.splitlines()[0]) == (0, f"{GRID}: 0 cells executed now, 2 planned")
    assert {a.status for a in third.attempts()} == {"interrupted", "done"}


def test_when_everything_is_killed_the_next_run_goes_on_from_the_checkpoint(start: Callable[..., Run]) -> None:
    run = start("--workers", "1")
    worker = run.wait_until_training()
    os.kill(run.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while process_alive(worker):  # it dies with its parent, saving what it has
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert statuses(run) == ["interrupted"]
    second = start("--workers", "1")
    second.until(lambda: statuses(run)[-1] == "running")
    os.killpg(second.process.pid, signal.SIGKILL)
    third = start("--workers", "1")
    code, output = third.end()
    assert code == 0, output
    assert statuses(third) == ["interrupted", "lost", "done"]


def test_two_runs_of_one_grid_share_the_work(start: Callable[..., Run]) -> None:
    first = start("--workers", "1")
    worker = first.wait_until_training()
    # Held still, or a fast machine trains to the end before the second run has imported what it needs.
    os.kill(worker, signal.SIGSTOP)
    try:
        second = start("--workers", "1")
        second.until(lambda: "waiting for 1 stages that other processes run" in second.output.read_text())
    finally:
        os.kill(worker, signal.SIGCONT)
    (code, output), (other_code, other_output) = second.end(), first.end()
    assert (code, other_code) == (0, 0), output + other_output
    assert {a.status for a in first.attempts()} == {"done"}


def test_mlflow_that_is_away_costs_nothing_and_is_filled_in_later(start: Callable[..., Run]) -> None:
    run = start("--workers", "1", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    code, output = run.end()
    assert code == 0, output
    assert "the run goes on without it" in output
    states = ResultStore(run.home.store_url).work(GRID)
    assert {s.status for s in states} == {"done"}
    assert len(lacking(run.home, states)) == 2
    again = start()
    code, output = again.end()
    assert (code, output.splitlines()[0]) == (0, f"{GRID}: 0 cells executed now, 2 planned")
    assert lacking(run.home, states) == []


def planned_cell(home: Home) -> str:
    from flows.local import open_grid

    register()
    store, states = open_grid(home, GRID)
    store.close()
    return next(s.cell_key for s in states if not s.requires)


def test_a_pool_reports_steps_and_survives_what_a_cell_raises(tmp_path: Path) -> None:
    home = Home(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", f"sqlite:///{tmp_path / 'mlflow.db'}")
    cell = planned_cell(home)
    seen: list[Any] = []
    pool = WorkerPool(home, 1, seen.append)
    try:
        failed = pool.execute("0123456789ab-s0", ("train",))
        pids = pool.pids()
        assert pool.execute(cell, ("train",)) == Outcome("done")
        assert pool.pids() == pids, "one bad cell does not end the worker"
    finally:
        pool.stop()
    assert (failed.status, failed.stage) == ("failed", "train")
    assert "StoreError: no grid in the store plans" in failed.error
    assert StepReport(cell, "train").steps == 0
    reports = [r for r in seen if r.cell == cell]
    assert (reports[0].step, reports[-1].step, reports[-1].steps) == (0, STEPS, STEPS)
    assert not any(process_alive(pid) for pid in pids)
    assert pool.execute(cell, ("train",)).status == "interrupted", "nothing starts in a stopped pool"
