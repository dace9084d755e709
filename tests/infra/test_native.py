"""docker-compose.yml as processes of one machine: addresses, paths, order, secrets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "infra"))  # as for `python infra/stack.py`

import native  # noqa: E402
import stack  # noqa: E402

SECRETS = {
    "SPARSEFORGE_DB_USER": "someone",
    "SPARSEFORGE_DB_PASSWORD": "word",
    "SPARSEFORGE_PREFECT_AUTH": "someone:key",
    "SPARSEFORGE_MLFLOW_USER": "someone",
    "SPARSEFORGE_MLFLOW_PASSWORD": "longer-word",
    "SPARSEFORGE_MLFLOW_SECRET": "x",
}
PORTS = {"SPARSEFORGE_DB_PORT": "15432", "SPARSEFORGE_PREFECT_PORT": "14200", "SPARSEFORGE_MLFLOW_PORT": "15000"}
HOME = Path("/srv/home")


def _services(*profiles: str) -> dict[str, native.Service]:
    found = native.services(HOME, {**SECRETS, **PORTS}, profiles or ("cpu",))
    return {service.name: service for service in found}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}-${A:-b}-${A:?c}", "1-1-1"),
        ("${EMPTY:-b}${NONE:-c}${NONE}", "bc"),
        ("$$A ${A}", "$A 1"),
        ("plain", "plain"),
    ],
)
def test_variables_are_those_of_compose(text: str, expected: str) -> None:
    assert native.expand(text, {"A": "1", "EMPTY": ""}) == expected


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_that_is_not_set_is_named(name: str) -> None:
    lacking = {key: value for key, value in SECRETS.items() if key != name}
    with pytest.raises(native.StackError, match=f"{name} is not set"):
        native.services(HOME, lacking, ("cpu",))


def test_services_come_after_what_they_need_and_only_those_of_the_profiles() -> None:
    order = list(_services())
    assert set(order) == {"postgres", "prefect", "mlflow", "register", "worker-grids", "worker-cpu"}
    for service in _services().values():
        assert all(order.index(needed) < order.index(service.name) for needed in service.needs)
    assert set(_services("gpu", "gpu-8")) - set(order) == {"worker-gpu", "worker-gpu-8"}


def test_no_name_port_or_path_of_a_container_is_left() -> None:
    for service in _services("cpu", "gpu", "gpu-8").values():
        said = " ".join([*service.command, *service.health, *service.environment.values(), str(service.folder)])
        for inside in (
            "postgres:5432",
            "prefect:4200",
            "mlflow:5000",
            "0.0.0.0",
            "/data/",
            ":8080",
            "/etc/sparseforge",
        ):
            assert inside not in said, (service.name, inside)


def test_each_command_is_the_compose_files_own() -> None:
    body = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, service in _services("cpu", "gpu", "gpu-8").items():
        asked = [part for part in body[name]["command"] if "$" not in part]
        kept = [part for part in asked if part in service.command or str(ROOT / part) in service.command]
        changed = set(asked) - set(kept)
        assert len(service.command) >= len(asked)
        assert all(any(char.isdigit() or char == "/" for char in part) for part in changed), (name, changed)


def test_addresses_ports_and_folders_are_those_of_this_machine() -> None:
    found = _services()
    prefect, mlflow, worker = found["prefect"], found["mlflow"], found["worker-cpu"]
    assert prefect.command[:3] == (sys.executable, "-m", "prefect")
    assert prefect.command[-4:] == ("--host", "127.0.0.1", "--port", "14200")
    assert prefect.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"].endswith("@127.0.0.1:15432/prefect")
    assert "127.0.0.1:14200/api/health" in prefect.health[-1]
    assert "--port=15000" in mlflow.command
    assert "--allowed-hosts=127.0.0.1:15000,localhost:*,127.0.0.1:*" in mlflow.command
    assert f"--artifacts-destination={HOME}/stack/mlartifacts" in mlflow.command
    assert mlflow.environment["MLFLOW_AUTH_CONFIG_PATH"] == str(ROOT / "infra" / "mlflow-auth.ini")
    assert mlflow.folder == HOME / "stack" / "mlauth"
    assert worker.command == ("bash", str(ROOT / "infra" / "worker.sh"), "cpu")
    assert worker.environment["PREFECT_API_URL"] == "http://127.0.0.1:14200/api"
    assert worker.environment["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"
    ports = {found[name].environment["PREFECT_WORKER_WEBSERVER_PORT"] for name in ("worker-cpu", "worker-grids")}
    assert len(ports) == 2


def test_a_port_that_a_container_has_inside_may_be_anothers_outside() -> None:
    """MLflow outside on 4200, where Prefect is inside: nothing is replaced twice."""
    crossed = {**SECRETS, "SPARSEFORGE_PREFECT_PORT": "5000", "SPARSEFORGE_MLFLOW_PORT": "4200"}
    found = {service.name: service for service in native.services(HOME, crossed, ("cpu",))}
    assert found["worker-cpu"].environment["PREFECT_API_URL"] == "http://127.0.0.1:5000/api"
    assert found["worker-cpu"].environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:4200"
    assert "--port=4200" in found["mlflow"].command
    assert "127.0.0.1:4200/health" in found["mlflow"].health[-1]


def test_what_is_published_beyond_this_machine_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "compose.yml"
    file.write_text('services: {a: {image: "a:1", command: [a], ports: ["0.0.0.0:1:1"]}}')
    with pytest.raises(native.StackError, match="only loopback"):
        native.services(tmp_path, {}, (), file)


def test_there_is_a_worker_for_each_device_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    sets = stack.device_sets()
    assert sets["gpu"] == list("01234567")
    assert sets["gpu-8"] == ["0,1,2,3,4,5,6,7"]
    started = stack.one_for_each_device_set(list(_services(*sets).values()))
    devices = {s.name: s.environment.get("CUDA_VISIBLE_DEVICES") for s in started if s.name.startswith("worker-gpu")}
    assert devices == {**{f"worker-gpu-{i}": str(i) for i in range(8)}, "worker-gpu-8": "0,1,2,3,4,5,6,7"}
    workers = [service for service in started if service.name.startswith("worker")]
    ports = [service.environment["PREFECT_WORKER_WEBSERVER_PORT"] for service in workers]
    assert len(set(ports)) == len(ports)
    assert all(port in " ".join(worker.health) for port, worker in zip(ports, workers))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert set(stack.device_sets()) == {"cpu"}


def test_secrets_of_the_environment_win_and_others_are_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    first = stack.secrets(tmp_path)
    assert set(first) == set(SECRETS)
    assert stack.secrets(tmp_path) == first
    path = tmp_path / "stack" / "secrets.env"
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("SPARSEFORGE_DB_PASSWORD", "mine")
    assert "SPARSEFORGE_DB_PASSWORD" not in stack.secrets(tmp_path)
    assert os.environ["SPARSEFORGE_DB_PASSWORD"] == "mine"


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        running = stack.Stack(tmp_path)
        running.environment |= {**SECRETS, **PORTS, "SPARSEFORGE_PREFECT_PORT": port}
        (prefect,) = (s for s in native.services(tmp_path, running.environment) if s.name == "prefect")
        with pytest.raises(native.StackError, match=f"port {port} is taken.*SPARSEFORGE_PREFECT_PORT"):
            running._begin(prefect)
        assert not running.processes
