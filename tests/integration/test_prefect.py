"""Grids under a Prefect server of their own, which nobody starts by hand and which is gone when the run is over."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flows.provenance import process_alive
from sparseforge_core.store.store import ResultStore
from tests.processes import end_with_parent, processes_of, wait_until

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def _environment(home: Path, **more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "SPARSEFORGE"))}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**plain, **offline, "SPARSEFORGE_HOME": str(home), **more}


def test_the_embedded_run_needs_no_server_and_records_every_stage(tmp_path: Path) -> None:
    home = tmp_path / "runs"
    done = _embedded(home).communicate(timeout=300)
    states = ResultStore(f"sqlite:///{home / 'store.db'}").work("tiny-smoke")
    assert {state.status for state in states} == {"done"}, done
    flows, tasks = _records(home)
    assert flows == [("tiny-smoke, embedded", "COMPLETED")]
    assert len(tasks) == len(states), "a task run a stage, none lost when the server ended"
    assert {state for _, state in tasks} == {"COMPLETED"}
    assert processes_of(home) == []


def test_killing_or_stopping_an_embedded_run_leaves_no_server_and_loses_nothing(tmp_path: Path) -> None:
    home = tmp_path / "runs"
    for sent in (signal.SIGKILL, signal.SIGINT):
        process = _embedded(home)
        wait_until(lambda: _is_running(home), 120)
        process.send_signal(sent)
        said = process.communicate(timeout=90)[1]
        # On a busy machine the last small cell may end before the signal arrives; then, and only then, the code is 0.
        states = ResultStore(f"sqlite:///{home / 'store.db'}").work("tiny-smoke")
        finished = all(state.status == "done" for state in states)
        stopped = -sent if sent == signal.SIGKILL else 130
        assert process.returncode == stopped or (finished and process.returncode == 0), said
        assert "Traceback" not in said
        wait_until(lambda: not processes_of(home), 30)
        assert processes_of(home) == []
    assert _embedded(home).wait(300) == 0


def test_a_server_that_does_not_answer_gets_a_sentence(tmp_path: Path) -> None:
    process = _embedded(tmp_path / "runs", PREFECT_API_URL="http://127.0.0.1:1/api")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2, said
    assert "PREFECT_API_URL=http://127.0.0.1:1/api does not answer" in said
    assert "Traceback" not in said


def _embedded(home: Path, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.cli", "run", "tiny-smoke", "--prefect", "--quiet", "--workers", "1"]
    return subprocess.Popen(
        command,
        env=_environment(home, **more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,
    )


def _is_running(home: Path) -> bool:
    """Whether a process that is alive holds a stage; what a killed run left behind does not count."""
    if not (home / "logs" / "worker-0.log").is_file():  # before the first worker the store may have no tables
        return False
    with sqlite3.connect(f"file:{home / 'store.db'}?mode=ro", uri=True) as database:
        running = database.execute("SELECT pid FROM attempt WHERE status = 'running'").fetchall()
    return any(process_alive(pid) for (pid,) in running)


def _records(home: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, state) of every flow run and every task run that Prefect has written."""
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        flows, tasks = (
            database.execute(f"SELECT name, state_type FROM {table}").fetchall() for table in ("flow_run", "task_run")
        )
    return flows, tasks
