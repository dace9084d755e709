"""`prefect deployment run sparseforge/full-grid` on a real server with real process workers; and embedded, without one.

The stack is the one that people start with `infra/stack.py`; every process of it is gone when the tests are over.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.provenance import process_alive
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Stack:
    """A running stack: server, deployments, and workers of the pools `grids` and `cpu`."""

    home: Path
    environment: dict[str, str]

    def deployment_run(self, *parameters: str) -> subprocess.CompletedProcess[str]:
        """The documented command, with parameters."""
        given = [part for parameter in parameters for part in ("-p", parameter)]
        command = ["deployment", "run", "sparseforge/full-grid", *given, "--watch", "--watch-timeout", "280"]
        return self.prefect(*command)

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The prefect command against this server."""
        command = [sys.executable, "-m", "prefect", *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )

    def logs(self) -> str:
        """The end of every log, for a failing test."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.home.glob("logs/*.log"))


def _environment(home: Path, **more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "SPARSEFORGE"))}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**plain, **offline, "SPARSEFORGE_HOME": str(home), **more}


def _with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _processes_of(folder: Path) -> list[str]:
    """Command lines of all processes whose environment names this folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and str(folder).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("stack")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = _environment(home, PREFECT_WORKER_QUERY_SECONDS="1")
    command = [sys.executable, "infra/stack.py", "--port", str(port), "--home", str(home), "--pools", "grids", "cpu"]
    log = (home / "stack.txt").open("w")
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log, preexec_fn=_with_parent)
    try:
        _wait_until(lambda: "ready:" in (home / "stack.txt").read_text() or process.poll() is not None, 180)
        assert process.poll() is None, (home / "stack.txt").read_text()
        api = f"http://127.0.0.1:{port}/api"
        yield Stack(home, {**environment, "PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": api})
    finally:
        process.terminate()
        process.wait(120)
        log.close()
    _wait_until(lambda: not _processes_of(home), 15)
    assert _processes_of(home) == [], "the stack left processes behind"


def _wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.2)


def test_deployment_run_fills_the_store_and_a_second_one_executes_nothing(stack: Stack) -> None:
    for _ in range(2):
        done = stack.deployment_run("grid=tiny-smoke")
        assert done.returncode == 0, done.stdout + stack.logs()
    url = f"sqlite:///{stack.home / 'store.db'}"
    states = ResultStore(url).work("tiny-smoke")
    assert {state.status for state in states} == {"done"}
    assert all(state.attempts == 1 for state in states)
    assert Results(url).missing("tiny-smoke").empty
    flows, _ = _records(stack.home)
    assert flows.count(("tiny-smoke", "COMPLETED")) == 2
    assert ("tiny-smoke on cpu", "COMPLETED") in flows, "the cells ran on the pool, not in the flow that dispatches"


def test_without_a_worker_for_its_cells_a_run_fails_at_once_and_names_the_command(stack: Stack) -> None:
    done = stack.deployment_run("grid=table-1")
    assert done.returncode == 1, done.stdout + stack.logs()
    log = (stack.home / "logs" / "stack-grids.log").read_text()
    assert "start one with: infra/worker.sh gpu-" in log, log[-3000:]


def test_an_unknown_grid_fails_with_the_nearest_name(stack: Stack) -> None:
    done = stack.deployment_run("grid=tiny-smok")
    assert done.returncode == 1, done.stdout
    assert "Did you mean 'tiny-smoke'?" in (stack.home / "logs" / "stack-grids.log").read_text()


def test_registering_again_changes_nothing(stack: Stack) -> None:
    environment = {**stack.environment, "PREFECT": f"{sys.executable} -m prefect"}
    listing = ("deployment", "ls")
    before = stack.prefect(*listing).stdout
    assert stack.prefect("work-pool", "pause", "gpu-8").returncode == 0
    again = subprocess.run(
        ["bash", "infra/register.sh"], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert stack.prefect(*listing).stdout == before
    assert "is_paused=True" in stack.prefect("work-pool", "inspect", "gpu-8").stdout, "a paused pool stays paused"


def test_the_embedded_run_needs_no_server_and_records_every_stage(tmp_path: Path) -> None:
    home = tmp_path / "runs"
    done = _embedded(home).communicate(timeout=300)
    states = ResultStore(f"sqlite:///{home / 'store.db'}").work("tiny-smoke")
    assert {state.status for state in states} == {"done"}, done
    flows, tasks = _records(home)
    assert flows == [("tiny-smoke, embedded", "COMPLETED")]
    assert len(tasks) == len(states), "a task run a stage, none lost when the server ended"
    assert {state for _, state in tasks} == {"COMPLETED"}
    assert _processes_of(home) == []


def test_killing_or_stopping_an_embedded_run_leaves_no_server_and_loses_nothing(tmp_path: Path) -> None:
    home = tmp_path / "runs"
    for sent in (signal.SIGKILL, signal.SIGINT):
        process = _embedded(home)
        _wait_until(lambda: _is_running(home), 120)
        process.send_signal(sent)
        said = process.communicate(timeout=90)[1]
        # On a busy machine the last small cell may end before the signal arrives; then, and only then, the code is 0.
        states = ResultStore(f"sqlite:///{home / 'store.db'}").work("tiny-smoke")
        finished = all(state.status == "done" for state in states)
        stopped = -sent if sent == signal.SIGKILL else 130
        assert process.returncode == stopped or (finished and process.returncode == 0), said
        assert "Traceback" not in said
        _wait_until(lambda: not _processes_of(home), 30)
        assert _processes_of(home) == []
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
        preexec_fn=_with_parent,
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
