"""A grid on work pools waits: for a store and a Prefect server that are away for a moment, for stages that run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import server, sparseforge
from flows.cycle import ready
from flows.home import Home
from flows.local import Summary, open_grid
from flows.provenance import provenance
from flows.stages import TRAIN
from sparseforge_core.store.store import ResultStore
from tests.processes import end_with_parent, processes_of, wait_until

ROOT = Path(__file__).resolve().parents[2]
GRID = "tiny-smoke"
ON_POOLS = "import json; from flows.home import Home; from flows import sparseforge as s\n"
ON_POOLS += f"print(json.dumps(s._run_on_pools(Home.of(), {GRID!r}, 1).as_json()))"

pytestmark = pytest.mark.slow


class Site:
    """A Prefect server that can be killed and started again, its pools, and a worker of the pool of CPUs."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.log = root, server._free_port(), root / "logs" / "prefect.log"
        self.log.parent.mkdir(parents=True)
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.home = Home(root, f"sqlite:///{root / 'store.db'}", "sqlite://")
        ours = {"SPARSEFORGE_HOME": str(root), "PREFECT_HOME": str(root / "prefect"), "PREFECT_API_URL": self.api}
        plain = {name: v for name, v in os.environ.items() if not name.startswith(("PREFECT", "SPARSEFORGE", "MLFLOW"))}
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PREFECT_LOGGING_LEVEL": "ERROR",
        }
        self.environment = {**plain, **quiet, **ours, "PREFECT": f"{sys.executable} -m prefect"}
        self.started: list[subprocess.Popen[Any]] = []
        self.serve()

    def serve(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("PREFECT_HOME", "PREFECT_LOGGING_LEVEL"):
                patch.setenv(name, self.environment[name])
            self.process = server._start(self.port, self.log)
        server._wait(self.api, self.process, self.log)

    def start(self, *command: str, **more: Any) -> subprocess.Popen[Any]:
        self.started.append(
            subprocess.Popen(command, env=self.environment, cwd=ROOT, text=True, preexec_fn=end_with_parent, **more)
        )
        return self.started[-1]

    def statuses(self) -> list[str]:
        return [state.status for state in ResultStore(self.home.store_url).work(GRID)]

    def close(self) -> None:
        for process in (*self.started, self.process):
            process.terminate()
            process.wait(60)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "runs")
    try:
        subprocess.run([sys.executable, "infra/register.py"], env=made.environment, cwd=ROOT, check=True)
        with (made.root / "logs" / "worker-of-test.log").open("w") as log:
            made.start("bash", "infra/worker.sh", "cpu", stdout=log, stderr=log)
        yield made
    finally:
        made.close()
        wait_until(lambda: not processes_of(made.root), 15)


def test_a_grid_on_pools_waits_for_a_store_and_for_a_prefect_server_that_are_away(site: Site) -> None:
    import httpx

    def online() -> bool:
        found = httpx.post(f"{site.api}/work_pools/cpu/workers/filter", json={}, timeout=20).json()
        return any(worker["status"] == "ONLINE" for worker in found)

    assert wait_until(online, 120)
    grid = site.start(sys.executable, "-c", ON_POOLS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    store, moved = site.root / "store.db", site.root / "moved.db"
    assert wait_until(lambda: store.is_file() and "running" in site.statuses(), 180), grid.communicate(timeout=10)
    store.rename(moved)
    time.sleep(4.5)  # more than a round of the loop, less than it waits
    assert not store.exists()
    moved.rename(store)
    os.killpg(site.process.pid, signal.SIGKILL)
    site.process.wait()
    time.sleep(4.5)
    site.serve()
    said, errors = grid.communicate(timeout=300)
    assert grid.returncode == 0, errors
    assert "does not answer" not in errors
    assert "asking again" in errors, "it never met a store or a server that was away"
    summary = json.loads(said.splitlines()[-1])
    assert summary["complete"], json.dumps(summary) + errors
    found = ResultStore(site.home.store_url)
    assert set(site.statuses()) == {"done"}
    assert found.fsck() == []
    done = [a for s in found.work(GRID) for a in found.attempts(s.cell_key) if (a.stage, a.status) == (s.stage, "done")]
    assert len(done) == len(found.work(GRID)), "a stage was recorded twice"


def test_a_grid_on_pools_does_not_end_while_a_stage_runs_whose_drain_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other cells need the one that runs: nothing is ready, no drain is there, and the grid is not done."""

    class AskedError(Exception):
        """Workers are asked for: there is something to run again."""

    def asked(pool: str) -> int:
        raise AskedError(pool)

    def without_a_server() -> Summary:
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server._free_port()}/api"}):
            return sparseforge._run_on_pools(home, GRID, 1)

    home = Home(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", "sqlite://")
    store, states = open_grid(home, GRID)
    first = ready(states)[0].key
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=end_with_parent)
    store.claim(first, TRAIN, dataclasses.replace(provenance(), pid=holder.pid))
    assert not ready(store.work(GRID))
    monkeypatch.setattr(sparseforge, "_polling_workers", asked)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(without_a_server)
        time.sleep(3.5)
        assert not run.done(), run.result()
        holder.kill()
        holder.wait()
        with pytest.raises(AskedError, match="cpu"):
            run.result(timeout=60)
    assert [attempt.status for attempt in store.attempts(first)] == ["lost"]
    store.close()
