"""The whole stack from docker-compose.yml's own commands, without containers: PostgreSQL, Prefect, MLflow, workers.

One stack for all tests, brought up by `infra/stack.py` as people do; every process of it is gone when they are over.
First runs are asked for while nobody polls their pools, which must fail and say what to start; the one for grids is.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.grids import grid_named
from flows.sparseforge import DRAIN
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore
from tests import postgres
from tests.processes import end_with_parent, processes_of, wait_until

ROOT = Path(__file__).resolve().parents[2]
GRID = "full-shrunk-2"

pytestmark = [pytest.mark.slow, pytest.mark.postgres]


@dataclass
class Stack:
    """A running stack, and a shell that has read its `client.env`."""

    home: Path
    environment: dict[str, str]
    refused: list[subprocess.CompletedProcess[str]] = field(default_factory=list)
    """What was asked for while there was no worker."""

    def deployment_run(self, *parameters: str, watch: bool = True) -> subprocess.CompletedProcess[str]:
        """The documented command, with parameters."""
        given = [part for parameter in parameters for part in ("-p", parameter)]
        watching = ["--watch", "--watch-timeout", "280"] if watch else []
        return self.prefect("deployment", "run", "sparseforge/full-grid", *given, *watching)

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The prefect command against this server."""
        command = [sys.executable, "-m", "prefect", *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )

    def ask(self, path: str, body: object = None, *, login: bool = True) -> Any:
        """The Prefect API's answer."""
        secret = self.environment["PREFECT_API_AUTH_STRING"] if login else ""
        return _http(self.environment["PREFECT_API_URL"] + path, secret, {} if body is None else body)

    def states(self, grid: str) -> list[StageState]:
        """What the store says of a grid."""
        return ResultStore(self.environment["SPARSEFORGE_DB"]).work(grid)

    def logs(self) -> str:
        """The end of every log, for a failing test."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.home.glob("logs/*.log"))


def _http(url: str, login: str = "", body: object = None, **headers: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **headers}
    if login:
        given["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    with urllib.request.urlopen(urllib.request.Request(url, data, given), timeout=20) as answer:
        return json.load(answer)


def _code(url: str, login: str = "", body: object = None, **headers: str) -> int:
    try:
        _http(url, login, body, **headers)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def _free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _environment(home: Path) -> dict[str, str]:
    ours = ("PREFECT", "SPARSEFORGE", "MLFLOW")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    names = ("SPARSEFORGE_DB_PORT", "SPARSEFORGE_PREFECT_PORT", "SPARSEFORGE_MLFLOW_PORT")
    quick = {"SPARSEFORGE_QUERY_SECONDS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**plain, **quick, **dict(zip(names, _free_ports(3))), "SPARSEFORGE_HOME": str(home)}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    postgres.find_programs()  # says what to install where there is none
    home = Path(tempfile.mkdtemp(prefix="sf-stack-"))  # PostgreSQL's own user must be able to enter it
    home.chmod(0o755)
    environment = _environment(home)
    said = home / "stack.txt"
    command = [sys.executable, "infra/stack.py", "--home", str(home), "--profile", "cpu", "--without", "worker-grids"]
    with said.open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log, preexec_fn=end_with_parent)
    worker = None
    try:
        wait_until(lambda: "ready after" in said.read_text() or process.poll() is not None, 240)
        assert process.poll() is None, said.read_text()
        running = Stack(home, {**environment, **_exported(home / "stack" / "client.env")})
        drain = ("deployment", "run", "sparseforge-cell/gpu-8", "-p", f"grid={GRID}")
        queuing = running.prefect(*drain, "--flow-run-name", f"{DRAIN} {GRID} on gpu-8")
        assert queuing.returncode == 0, queuing.stdout
        with ThreadPoolExecutor() as pool:
            by_hand = pool.submit(running.prefect, *drain, "--watch", "--watch-timeout", "280")
            running.refused += [running.deployment_run("grid=tiny-smoke"), by_hand.result()]
        starting = {
            **running.environment,
            "PREFECT": f"{sys.executable} -m prefect",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        with (home / "logs" / "stack-worker-grids.log").open("w") as log:
            worker = subprocess.Popen(
                ["bash", "infra/worker.sh", "grids"],
                env=starting, cwd=ROOT, stdout=log, stderr=log, preexec_fn=end_with_parent,
            )  # fmt: skip
        yield running
    finally:
        for started in (worker, process):
            if started is not None:
                started.terminate()
                started.wait(120)
        gone = wait_until(lambda: not processes_of(home), 15)
        left = processes_of(home)
        shutil.rmtree(home, ignore_errors=True)
    assert gone, f"the stack left processes behind: {left}"


def _exported(path: Path) -> dict[str, str]:
    """What a shell gets by `source`."""
    words = (shlex.split(line)[1] for line in path.read_text().splitlines())
    return dict(word.split("=", 1) for word in words)


def test_a_run_that_nobody_polls_for_fails_and_says_what_to_start(stack: Stack) -> None:
    for refused, pool in zip(stack.refused, ("grids", "gpu-8"), strict=True):
        assert refused.returncode == 1, refused.stdout
        said = " ".join(refused.stdout.replace("\n", " ").split())
        assert f"NoWorker; start one with: infra/worker.sh {pool}" in said, refused.stdout
    assert stack.states("tiny-smoke") == [], "nothing ran"


def test_what_a_grid_starts_may_queue(stack: Stack) -> None:
    named = {"flow_runs": {"name": {"like_": f"{DRAIN} {GRID} on gpu-8"}}}
    assert wait_until(lambda: stack.ask("/flow_runs/filter", named)[0]["state"]["name"] == "Late", 60)
    time.sleep(2)  # in which the other one was told
    (waiting,) = stack.ask("/flow_runs/filter", named)
    assert waiting["state"]["type"] == "SCHEDULED", waiting["state"]


def test_the_full_grid_in_miniature_fills_every_table_in_postgresql(stack: Stack) -> None:
    done = stack.deployment_run("shrink=2", "workers=1")
    assert done.returncode == 0, done.stdout + stack.logs()
    states = stack.states(GRID)
    assert {state.status for state in states} == {"done"}
    assert all(state.attempts == 1 for state in states)
    results = Results(stack.environment["SPARSEFORGE_DB"])
    assert stack.environment["SPARSEFORGE_DB"].startswith("postgresql")
    assert results.missing(GRID) == []
    written = _tables(stack)
    assert set(written) >= set(grid_named("full").captions)
    assert "[missing" not in "".join(written.values())


def _tables(stack: Stack) -> dict[str, str]:
    out = stack.home / "tables-of-test"
    command = [sys.executable, "analysis/make_tables.py", "--db", stack.environment["SPARSEFORGE_DB"], "--grid", GRID]
    subprocess.run([*command, "--out", str(out), "--strict"], cwd=ROOT, check=True, capture_output=True)
    found = {path.stem: path.read_text() for path in out.rglob("tables/*.md")}
    return found | {path.stem: "" for path in out.rglob("figures/*.svg")}


def test_a_second_run_executes_nothing_and_both_left_a_table_and_a_link(stack: Stack) -> None:
    done = stack.deployment_run("shrink=2", "workers=1")
    assert done.returncode == 0, done.stdout + stack.logs()
    assert all(state.attempts == 1 for state in stack.states(GRID))
    artifacts = stack.ask("/artifacts/filter", {"artifacts": {"key": {"any_": [f"grid-{GRID}", f"mlflow-{GRID}"]}}})
    assert sorted(artifact["key"] for artifact in artifacts) == [f"grid-{GRID}"] * 2 + [f"mlflow-{GRID}"] * 2
    rows = json.loads(next(a["data"] for a in artifacts if a["key"] == f"grid-{GRID}"))
    assert {row["state"] for row in rows} == {"done"}
    assert all(row["MLflow"].startswith(stack.environment["MLFLOW_TRACKING_URI"]) for row in rows), rows


def test_the_servers_ask_who_is_there_and_mlflow_under_what_name(stack: Stack) -> None:
    api, secret = stack.environment["PREFECT_API_URL"], stack.environment["PREFECT_API_AUTH_STRING"]
    assert _code(f"{api}/flow_runs/filter", "", {}) == 401
    assert _code(f"{api}/flow_runs/filter", secret + "x", {}) == 401
    assert _code(f"{api}/flow_runs/filter", secret, {}) == 200
    mlflow = stack.environment["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/experiments/search?max_results=5"
    login = f"{stack.environment['MLFLOW_TRACKING_USERNAME']}:{stack.environment['MLFLOW_TRACKING_PASSWORD']}"
    assert _code(mlflow) == 401
    assert _code(mlflow, login + "x") == 401
    assert _code(mlflow, login, Host="elsewhere.example") == 403
    names = {experiment["name"] for experiment in _http(mlflow, login)["experiments"]}
    assert "llama-tiny" in names, "the workers logged in and copied their cells"
    with socket.socket() as probe:  # the server is not on the network
        assert probe.connect_ex((_address(), int(stack.environment["SPARSEFORGE_DB_PORT"]))) != 0


def _address() -> str:
    """This machine's address that others would use, or another of loopback where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.2"


def test_secrets_are_for_their_owner_alone(stack: Stack) -> None:
    for name in ("secrets.env", "client.env"):
        assert (stack.home / "stack" / name).stat().st_mode & 0o077 == 0, name
    assert (stack.home / "stack" / "postgres").stat().st_mode & 0o077 == 0
    secret = stack.environment["PREFECT_API_AUTH_STRING"].partition(":")[2]
    assert secret not in stack.logs()


def test_cancelling_a_grid_reaches_the_training_process_which_saves(stack: Stack) -> None:
    asked = stack.deployment_run("grid=long-smoke", "workers=1", watch=False)
    assert asked.returncode == 0, asked.stdout
    assert wait_until(lambda: _training(stack) is not None, 120), stack.logs()
    (run,) = stack.ask("/flow_runs/filter", {"flow_runs": {"name": {"any_": ["long-smoke"]}}})
    cancelled = stack.prefect("flow-run", "cancel", run["id"])
    assert cancelled.returncode == 0, cancelled.stdout
    assert wait_until(lambda: not any(s.status == "running" for s in stack.states("long-smoke")), 90), stack.logs()
    stopped = [state for state in stack.states("long-smoke") if state.status != "pending"]
    assert {state.status for state in stopped} <= {"interrupted", "done"}, stopped
    runs = {"flow_runs": {"name": {"any_": ["long-smoke", "long-smoke on cpu"]}}}
    assert wait_until(lambda: _ended(stack.ask("/flow_runs/filter", runs)), 90)
    assert {run["state_type"] for run in stack.ask("/flow_runs/filter", runs)} == {"CANCELLED"}
    workers = [line for _, line in processes_of(stack.home) if "spawn_main" in line]
    assert workers == [], "a training process goes on"
    assert list(stack.home.glob("cells/*/train/checkpoints/*")), "it was killed before it saved"


def _training(stack: Stack) -> Path | None:
    """The journal of a training that has made a step."""
    running = [s.cell_key for s in stack.states("long-smoke") if s.status == "running" and s.stage == "train"]
    journals = [stack.home / "cells" / key / "train" / "journal.jsonl" for key in running]
    return next((path for path in journals if path.is_file() and path.stat().st_size), None)


def _ended(runs: list[dict[str, Any]]) -> bool:
    return all(run["state_type"] in ("CANCELLED", "COMPLETED", "FAILED", "CRASHED") for run in runs)


def test_what_cannot_run_fails_at_once_and_says_what_to_do(stack: Stack) -> None:
    """Nobody polls the pools of GPUs here; and a grid of an unknown name has a nearest one."""
    expected = {"table-1": "start one with: infra/worker.sh gpu-", "tiny-smok": "Did you mean 'tiny-smoke'?"}
    for grid in expected:
        assert stack.deployment_run(f"grid={grid}", watch=False).returncode == 0
    runs = {"flow_runs": {"name": {"any_": list(expected)}, "state": {"type": {"any_": ["FAILED"]}}}}
    assert wait_until(lambda: len(stack.ask("/flow_runs/filter", runs)) == len(expected), 90), stack.logs()
    for run in stack.ask("/flow_runs/filter", runs):
        assert expected[run["name"]] in run["state"]["message"], run["state"]


def test_registering_again_changes_nothing(stack: Stack) -> None:
    def registered() -> tuple[str, list[str]]:
        automations = stack.ask("/automations/filter", {})
        return stack.prefect("deployment", "ls").stdout, sorted(automation["name"] for automation in automations)

    before = registered()
    assert before[1] == ["crash-zombies", *(f"no-worker-for-{pool}" for pool in ("cpu", "gpu-1", "gpu-8", "grids"))]
    assert stack.prefect("work-pool", "pause", "gpu-8").returncode == 0
    environment = {**stack.environment, "PYTHON": sys.executable}
    again = subprocess.run(
        ["bash", "infra/register.sh"], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert registered() == before
    assert stack.ask("/work_pools/filter", {"work_pools": {"name": {"any_": ["gpu-8"]}}})[0]["is_paused"]
