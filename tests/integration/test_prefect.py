"""`prefect deployment run sparseforge/full-grid` against a real server with real process workers, and embedded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """A Prefect server and its workers as child processes, with logs, ended with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.env = {
            **os.environ,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT": f"{sys.executable} -m prefect",
            "SPARSEFORGE_HOME": str(folder / "runs"),
            "SPARSEFORGE_CHECKOUT": str(ROOT),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
        }

    def start(self, name: str, *arguments: str) -> None:
        def own_signals() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        log = (self.folder / f"{name}.log").open("wb")
        command = [sys.executable, "-m", "prefect", *arguments]
        self.processes.append(
            subprocess.Popen(
                command,
                env=self.env,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=own_signals,
            )
        )

    def prefect(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect", *arguments]
        return subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=check)

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.env['PREFECT_API_URL']}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("prefect"))
    stack.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(stack.port))
    try:
        stack.wait_healthy()
        register(stack)
        yield stack
    finally:
        stack.stop()


def register(stack: Stack) -> None:
    """Twice, because registering has to be idempotent."""
    for _ in range(2):
        done = subprocess.run(
            ["bash", "infra/register.sh"], env=stack.env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_deployment_run_without_a_worker_for_the_cells_fails_with_the_command_to_start_one(stack: Stack) -> None:
    stack.start("grids", "worker", "start", "--pool", "grids", "--limit", "1", "--name", "grids-test")
    done = stack.prefect(
        "deployment",
        "run",
        "sparseforge/full-grid",
        "-p",
        "grid=tiny-smoke",
        "--watch",
        "--watch-timeout",
        "240",
        check=False,
    )
    assert done.returncode == 1, done.stdout
    log = (stack.folder / "grids.log").read_text()
    assert "start one with: infra/worker.sh cpu" in log


def test_deployment_run_fills_the_store_and_a_second_one_executes_nothing(stack: Stack) -> None:
    stack.start("cpu", "worker", "start", "--pool", "cpu", "--limit", "1", "--name", "cpu-test")
    time.sleep(6)  # a worker counts as online after its first poll
    for _ in range(2):
        done = stack.prefect(
            "deployment", "run", "sparseforge/full-grid", "-p", "grid=tiny-smoke", "--watch", "--watch-timeout", "280",
            check=False,
        )  # fmt: skip
        logs = "\n".join((stack.folder / f"{name}.log").read_text()[-3000:] for name in ("grids", "cpu"))
        assert done.returncode == 0, done.stdout + logs
    url = f"sqlite:///{stack.folder / 'runs' / 'store.db'}"
    states = ResultStore(url).work("tiny-smoke")
    assert {state.status for state in states} == {"done"}
    assert all(state.attempts == 1 for state in states)
    assert Results(url).missing("tiny-smoke").empty


def test_the_embedded_run_needs_no_server(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "--home",
        str(tmp_path / "runs"),
        "run",
        "tiny-smoke",
        "--prefect",
        "--quiet",
    ]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    status = subprocess.run(
        [*command[:5], "status", "tiny-smoke", "--json"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert json.loads(status.stdout)["counts"] == {"done": 4}
