"""The doctor: each thing that can be wrong is seen, and comes with what to do."""

from __future__ import annotations

import dataclasses
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import doctor
from flows.home import Home
from flows.provenance import provenance
from sparseforge_core.store.rows import PlannedCell
from sparseforge_core.store.store import ResultStore


@pytest.fixture
def place(home: Path) -> Home:
    return Home.of(home)


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers 200 to /health and to nothing else."""

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/api"
    made.shutdown()
    thread.join()
    made.server_close()


def plan_one(store: ResultStore) -> None:
    cell = PlannedCell(
        key="aaaaaaaaaaaa-s0", recipe_key="aaaaaaaaaaaa", seed=0, model="m", pattern="", method="dense", variant="",
        tokens=0, family="llama", spec_json="{}", cell_json="{}", requires=(), pool="cpu", cost_hours=0.0,
    )  # fmt: skip
    store.plan("demo", "Demo", [cell], [], [], {cell.key: ["train"]})


def test_an_empty_home_is_no_problem(place: Home) -> None:
    assert doctor.store(place).status == "ok"
    assert doctor.disk(place).status == "ok"
    assert doctor.mlflow(place).status == "ok"
    assert not any(place.root.iterdir()), "looking must not make anything"


def test_this_machine_is_described(place: Home) -> None:
    assert doctor.python(place).status == "ok"
    assert "cores" in doctor.machine(place).found
    assert doctor.torch(place).status == "ok"


def test_json_has_every_check_and_the_exit_code_says_whether_all_is_well(
    place: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, doctor.store))
    assert doctor.doctor(place, as_json=True) == 0
    assert [check["name"] for check in json.loads(capsys.readouterr().out)] == ["python", "store"]

    monkeypatch.setattr(doctor, "PYTHONS", ((4, 0), (4, 1)))
    assert doctor.doctor(place) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("problem  python")
    assert "-> use 3.11" in first


def test_packages_that_differ_from_the_lock_are_named(
    place: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "requirements.lock"
    monkeypatch.setattr(doctor, "LOCK", lock)
    assert doctor.packages(place).status == "note"

    lock.write_text('# a comment\npytest==0.1\nno-such-package==2\nother==1 ; python_version < "3"\n')
    found = doctor.packages(place)
    assert found.status == "problem"
    assert "pytest" in found.found
    assert "no-such-package missing instead of 2" in found.found
    assert "other" not in found.found

    lock.write_text(f"pytest=={pytest.__version__}\n")
    assert doctor.packages(place).found == "all 1 as locked"


def test_a_store_that_is_none_is_a_problem(place: Home) -> None:
    file = place.root / "store.db"
    file.write_text("not a database, but long enough to be taken for one when only its length is looked at\n" * 9)
    found = doctor.store(place)
    assert found.status == "problem"
    assert "damaged or no SQLite database" in found.found


def test_an_attempt_whose_process_is_gone_is_seen(place: Home) -> None:
    store = ResultStore(place.store_url)
    plan_one(store)
    store.claim("aaaaaaaaaaaa-s0", "train", provenance())
    assert doctor.store(place).status == "ok", "this process is alive"

    process = subprocess.Popen(["true"])
    process.wait()
    store.release_dead(provenance().host, lambda pid: False)
    store.claim("aaaaaaaaaaaa-s0", "train", dataclasses.replace(provenance(), pid=process.pid))
    found = doctor.store(place)
    assert found.status == "problem"
    assert "stage train of cell aaaaaaaaaaaa-s0" in found.found
    store.close()


def test_servers_are_asked(place: Home, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert doctor.prefect(place).status == "ok"
    monkeypatch.setenv("PREFECT_API_URL", server)
    assert doctor.prefect(place).status == "ok"
    monkeypatch.setenv("PREFECT_API_URL", server.replace("/api", "/elsewhere"))
    assert doctor.prefect(place).status == "problem"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert doctor.mlflow(Home.of(place.root)).status == "ok"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = doctor.mlflow(Home.of(place.root))
    assert found.status == "problem"
    assert "mirrored later" in found.advice


def test_passwords_are_not_shown() -> None:
    assert doctor._shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


def test_a_full_disk_and_a_small_memory_are_problems(place: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_GIB", 1e9)
    monkeypatch.setattr(doctor, "MEMORY_GIB", 1e9)
    assert doctor.disk(place).status == "problem"
    assert doctor.machine(place).status == "problem"


def test_a_package_without_its_data_is_a_problem() -> None:
    assert doctor._packaged("model", "json", "*.gguf", "pytest").status == "problem"
    assert doctor._packaged("model", "no_such_module", "*", "pytest").status == "problem"
    assert doctor._packaged("model", "json", "*.py", "pytest").status == "ok"
