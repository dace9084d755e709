"""The mirror against the real MLflow: its SQLite, its server, and its absence."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sparseforge_core import files
from sparseforge_core.tracking import mlflow_tracker
from sparseforge_core.tracking.mlflow_tracker import MirrorError, is_mirrored, mirror_cell, prepare
from sparseforge_core.tracking.tracker import Journal

pytestmark = pytest.mark.slow

EDGES = [i / 20 for i in range(21)]


@dataclass(frozen=True)
class Described:
    """What a listing knows of a cell."""

    cell_key: str
    model: str = "llama-tiny"
    method: str = "sparseforge"
    variant: str = "SparseForge"
    seed: int = 0
    tokens: int = 98_304


@dataclass(frozen=True)
class Mirrored:
    """A home with an MLflow database."""

    home: Path
    uri: str

    def cell(self, key: str, steps: int = 40) -> Path:
        """A cell's folder as a finished run leaves it."""
        folder = self.home / "cells" / key
        recipe = {
            "kind": "recipe",
            "pattern": {"kind": "group", "rows": 1, "cols": 4, "keep": 2},
            "model": {"kind": "trained", "recipe": {"train": {"steps": 500}}},
            "corpus": {"kind": "text-files", "paths": ["x" * 7000]},
        }
        files.write_json(folder / "cell.json", {"cell": {"kind": "cell", "seed": 0, "recipe": recipe}})
        _train(folder, 1, steps)
        rows = [{"metric": "perplexity", "value": 25.5, "stderr": None, "n": 3, "detail": {}}]
        rows.append({"metric": "nll", "value": None, "stderr": None, "n": 3, "detail": {"status": "diverged"}})
        _measured(folder, "heldout-abc123", {"name": "heldout"}, rows)
        return folder

    def run(self, run_id: str) -> Any:
        """The run as MLflow tells it."""
        return self.client.get_run(run_id)

    @property
    def client(self) -> Any:
        """MLflow's own client."""
        return mlflow_tracker._client(self.uri)


def _train(folder: Path, first: int, last: int) -> None:
    journal = Journal(folder / "train" / "journal.jsonl", resume_step=first - 1)
    for step in range(first, last + 1):
        journal.scalars(step, {"loss/total": 5.0 - step / 100, "loss/kl": float("nan"), "mask/mid fraction%": 0.5})
        if step % 10 == 0:
            for name in ("mask/attention", "mask/mlp"):
                journal.histogram(step, name, EDGES, [10] * 20)
    journal.close()


def _measured(folder: Path, stage: str, suite: dict[str, Any] | None, rows: list[dict[str, Any]]) -> None:
    files.write_json(folder / stage / "measurements.json", {"stage": stage, "suite": suite, "measurements": rows})


@pytest.fixture(scope="module")
def mlflow_home(tmp_path_factory: pytest.TempPathFactory) -> Mirrored:
    home = tmp_path_factory.mktemp("home")
    uri = f"sqlite:///{home / 'mlflow.db'}"
    prepare(uri, home)
    return Mirrored(home, uri)


def test_a_cell_becomes_one_run_that_people_can_read(mlflow_home: Mirrored) -> None:
    folder = mlflow_home.cell("aaaaaaaaaaaa-s0")
    os.utime(folder / "cell.json", (1_000_000, 1_000_000))
    os.utime(folder / "heldout-abc123" / "measurements.json", (1_000_900, 1_000_900))
    run_id = mirror_cell(mlflow_home.uri, mlflow_home.home, folder, "demo", Described("aaaaaaaaaaaa-s0"))
    run = mlflow_home.run(run_id)
    assert run.info.end_time - run.info.start_time == 900_000, "the cell's own time, not that of the copying"
    kind = mlflow_home.client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    assert run.info.run_name == "SparseForge \u00b7 98.3k tokens \u00b7 s0"
    assert run.info.status == "FINISHED"
    wanted = {"pattern": "2:4", "seed": "0", "grid": "demo", "recipe_key": "aaaaaaaaaaaa", "diverged": "nll"}
    assert wanted.items() <= run.data.tags.items()
    assert run.data.tags["group"] == "SparseForge \u00b7 98.3k tokens", "the same for every seed"
    assert run.data.params["model.recipe.train.steps"] == "500"
    assert len(run.data.params["corpus.paths"]) == 6000
    assert run.data.metrics["eval/heldout/perplexity"] == 25.5
    assert "loss/kl" not in run.data.metrics
    history = mlflow_home.client.get_metric_history(run_id, "mask/mid fraction_")
    assert [point.step for point in history] == list(range(1, 41))
    names = {entry.path for entry in mlflow_home.client.list_artifacts(run_id, "mask_histogram/mlp")}
    assert "mask_histogram/mlp/step_000040.png" in names
    assert "mask_histogram/mlp/step_000020.json" in names
    assert is_mirrored(folder, ["heldout-abc123"], mlflow_home.uri)
    assert not is_mirrored(folder, ["heldout-abc123", "zero-shot-7-ffffff"], mlflow_home.uri)


def test_saved_views_lie_in_the_experiment_and_links_name_them(mlflow_home: Mirrored) -> None:
    folder, about = mlflow_home.cell("cccccccccccc-s0"), Described("cccccccccccc-s0", model="viewed-tiny")
    run = mirror_cell(mlflow_home.uri, mlflow_home.home, folder, "demo", about)
    assert mlflow_tracker.run_of(folder) == {"run": run, "uri": mlflow_home.uri}
    assert mlflow_tracker.run_of(mlflow_home.home) is None
    names = mlflow_tracker.score_names(folder)
    assert names == ["eval/heldout/perplexity"]
    for _ in range(2):
        mlflow_tracker.save_views(mlflow_home.uri, mlflow_home.home, "demo", {"viewed-tiny": names})
    wanted = ["viewed-tiny", "never seen"]
    ((model, (number, tags)),) = mlflow_tracker.saved_views(mlflow_home.uri, mlflow_home.home, wanted).items()
    assert (model, len(tags)) == ("viewed-tiny", 3)
    assert mlflow_home.client.get_experiment(number).name == "viewed-tiny"


def test_mirroring_twice_adds_nothing_even_without_its_cursor(mlflow_home: Mirrored) -> None:
    folder, about = mlflow_home.cell("bbbbbbbbbbbb-s0"), Described("bbbbbbbbbbbb-s0")
    first = mirror_cell(mlflow_home.uri, mlflow_home.home, folder, "demo", about)
    (folder / "mlflow.json").unlink()
    second = mirror_cell(mlflow_home.uri, mlflow_home.home, folder, "demo", about)
    assert first == second
    assert len(mlflow_home.client.get_metric_history(first, "loss/total")) == 40
    runs = mlflow_home.client.search_runs(
        [mlflow_home.run(first).info.experiment_id], "tags.cell_key = 'bbbbbbbbbbbb-s0'"
    )
    assert len(runs) == 1


def test_a_running_cell_is_followed_and_a_resume_repeats_no_step(mlflow_home: Mirrored) -> None:
    folder, about = mlflow_home.home / "cells" / "cccccccccccc-s0", Described("cccccccccccc-s0")
    _train(folder, 1, 25)
    run_id = mirror_cell(mlflow_home.uri, mlflow_home.home, folder, "demo", about, status="RUNNING")
    assert mlflow_home.run(run_id).info.status == "RUNNING"
    assert not mlflow_home.client.list_artifacts(run_id, "mask_histogram")
    _train(folder, 21, 30)  # killed after step 25, resumed from the checkpoint of step 20
    mirror_cell(mlflow_home.uri, mlflow_home.home, folder, "demo", about, status="FAILED", tags={"git_sha": "0123abc"})
    history = mlflow_home.client.get_metric_history(run_id, "loss/total")
    assert [point.step for point in history] == list(range(1, 31))
    assert mlflow_home.run(run_id).info.status == "FAILED"
    assert mlflow_home.run(run_id).data.tags["git_sha"] == "0123abc"


def test_a_longer_cell_costs_no_more_calls(mlflow_home: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mirror costs is its calls; points of curves go in batches, so that their number is not that of steps."""
    calls: collections.Counter[str] = collections.Counter()

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return call(*arguments, **named)

        return counting

    for name, call in inspect.getmembers(MlflowClient, inspect.isfunction):
        if not name.startswith("_"):
            monkeypatch.setattr(MlflowClient, name, counted(name, call))
    found = []
    for key, steps in (("dddddddddddd-s0", 20), ("eeeeeeeeeeee-s0", 60)):
        mirror_cell(mlflow_home.uri, mlflow_home.home, mlflow_home.cell(key, steps=steps), "demo", Described(key))
        found.append(dict(calls))
        calls.clear()
    assert found[0]["log_batch"] > 0
    assert found[1] == found[0]
    assert sum(found[0].values()) < 40


def test_processes_that_start_together_on_no_database_do_not_crash_each_other(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sparseforge_core.tracking.mlflow_tracker import prepare\n"
        "prepare(sys.argv[1], Path(sys.argv[2]))"
    )
    arguments = [sys.executable, "-c", code, f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path)]
    racing = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in racing:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def test_an_outage_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused while no server listens; filled in, through the same address, once there is one; and again later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    home = Mirrored(tmp_path, f"http://127.0.0.1:{port}")
    folder, about = home.cell("ffffffffffff-s0"), Described("ffffffffffff-s0")
    with pytest.raises(MirrorError, match=f"127.0.0.1:{port}"):
        mirror_cell(home.uri, tmp_path, folder, "demo", about)
    with _server(port, tmp_path):
        run_id = mirror_cell(home.uri, tmp_path, folder, "demo", about)
        assert len(home.client.get_metric_history(run_id, "loss/total")) == 40
        _train(folder, 41, 50)
    with pytest.raises(MirrorError):
        mirror_cell(home.uri, tmp_path, folder, "demo", about)
    with _server(port, tmp_path):
        assert mirror_cell(home.uri, tmp_path, folder, "demo", about) == run_id
        assert len(home.client.get_metric_history(run_id, "loss/total")) == 50
        assert home.client.list_artifacts(run_id, "mask_histogram/attention")
    assert json.loads((folder / "mlflow.json").read_text())["step"] == 50


@contextlib.contextmanager
def _server(port: int, folder: Path) -> Iterator[None]:
    """A real MLflow server on loopback, with its artifacts behind it."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination",
        str(folder / "served"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, preexec_fn=_end_with_parent, start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"no answer from {address}: {log.read_text()}"
            time.sleep(0.2)


def test_training_never_imports_mlflow() -> None:
    heavy = "{'mlflow', 'matplotlib', 'prefect', 'sqlalchemy'}"
    code = f"import sys, sparseforge_core.run; assert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_database_that_cannot_be_opened_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database at all, but long enough to be read as the header of one " * 20)
    home = Mirrored(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(MirrorError, match="did not take it"):
        mirror_cell(home.uri, tmp_path, home.cell("abababababab-s0"), "demo", Described("abababababab-s0"))
