"""The container files, as far as they can be checked without running a container: structure, secrets, pins."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("sparseforge:")}
SERVERS = ("postgres", "prefect", "mlflow")
WORKERS = {"worker-cpu": ["cpu"], "worker-gpu": ["gpu"], "worker-gpu-8": ["gpu-8"]}
DOCKERFILES = ("infra/Dockerfile", "infra/mlflow.Dockerfile")


def _lock() -> dict[str, str]:
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return {name.lower(): version for name, version in pins}


def _environment(service: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = service.get("environment", {})
    return found


def test_every_part_is_there() -> None:
    assert set(SERVICES) == {*SERVERS, "register", "worker-grids", *WORKERS}
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == WORKERS, "a machine without a GPU must not wait for one"


def test_ports_are_open_to_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == len(SERVERS)
    assert all(port.startswith("127.0.0.1:") for port in ports), ports


def test_secrets_come_from_the_environment_and_have_no_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    uses = re.findall(r"\$\{(SPARSEFORGE_\w*(?:USER|PASSWORD|AUTH|SECRET))([^}]*)\}", text)
    assert {name for name, _ in uses} == set(_drawn())
    assert all(rest.startswith(f":?set {name}") for name, rest in uses), uses
    for name, service in SERVICES.items():
        for variable, value in _environment(service).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|AUTH_ADMIN", variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {variable}"
    assert not re.search(r"://\w+:\w+@", text), "a password in the clear"


def _drawn() -> dict[str, str]:
    """The secrets that infra/secrets.sh draws."""
    said = subprocess.run(["bash", str(ROOT / "infra" / "secrets.sh")], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in said.stdout.splitlines())


def test_drawn_secrets_are_long_never_the_same_and_fit_into_a_url() -> None:
    first, second = _drawn(), _drawn()
    for name in first:
        value, other = (drawn[name].rpartition(":")[2] for drawn in (first, second))
        if not name.endswith("_USER"):
            assert len(value) >= 32, name
            assert value != other, name
        assert re.fullmatch(r"[A-Za-z0-9]+", value), name


def test_servers_ask_for_a_login_and_clients_have_it() -> None:
    prefect, mlflow = _environment(SERVICES["prefect"]), _environment(SERVICES["mlflow"])
    assert "--app-name=basic-auth" in SERVICES["mlflow"]["command"]
    (bound,) = (v.split(":") for v in SERVICES["mlflow"]["volumes"] if v.startswith("./"))
    assert bound[1] == mlflow["MLFLOW_AUTH_CONFIG_PATH"]
    rules = configparser.ConfigParser()
    rules.read(ROOT / bound[0])
    assert rules["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert "admin_password" not in rules["mlflow"]
    assert f"mlauth:{SERVICES['mlflow']['working_dir']}" in SERVICES["mlflow"]["volumes"], "users outlive the container"
    for name in ("register", "worker-grids", *WORKERS):
        client = _environment(SERVICES[name])
        assert client["PREFECT_API_AUTH_STRING"] == prefect["PREFECT_SERVER_API_AUTH_STRING"]
        assert client["MLFLOW_TRACKING_USERNAME"] == mlflow["MLFLOW_AUTH_ADMIN_USERNAME"]
        assert client["MLFLOW_TRACKING_PASSWORD"] == mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"]


def test_services_wait_for_what_they_need() -> None:
    def needs(name: str) -> dict[str, str]:
        return {other: condition["condition"] for other, condition in SERVICES[name]["depends_on"].items()}

    for name in ("prefect", "mlflow"):
        assert needs(name) == {"postgres": "service_healthy"}
    assert needs("register") == {"prefect": "service_healthy"}
    for name in ("worker-grids", *WORKERS):
        assert needs(name)["register"] == "service_completed_successfully"
        assert needs(name)["mlflow"] == "service_healthy"


def test_health_is_asked_of_all_that_stay_and_only_they_are_restarted() -> None:
    for name, service in SERVICES.items():
        stays = name != "register"
        assert ("healthcheck" in service) == stays, name
        assert service["restart"] == ("unless-stopped" if stays else "no"), name


def test_nothing_runs_as_root_or_gains_rights() -> None:
    assert SERVICES["postgres"]["user"] == "postgres"
    for name, service in SERVICES.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service.get("privileged") is None, name
    for path in DOCKERFILES:
        users = re.findall(r"^USER (\S+)", (ROOT / path).read_text(), re.MULTILINE)
        assert users, f"{path} stays root"
        assert users[-1] not in ("root", "0")


def test_images_are_pinned_to_the_lock() -> None:
    lock = _lock()
    for service in SERVICES.values():
        tag = service["image"].partition(":")[2]
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?(-\w+)?", tag), service["image"]
    assert SERVICES["mlflow"]["image"] == f"sparseforge-mlflow:{lock['mlflow']}"
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert {service["image"] for service in OURS.values()} == {f"sparseforge:{version.group(1)}"}
    for path in DOCKERFILES:
        bases = re.findall(r"^FROM (\S+)", (ROOT / path).read_text(), re.MULTILINE)
        assert bases == ["python:3.11.13-slim-bookworm"], path


def test_one_database_for_each_of_the_three() -> None:
    made = set(re.findall(r"CREATE DATABASE (\w+);", (ROOT / "infra/postgres/init.sql").read_text()))
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"@postgres:5432/(\w+)", text))
    assert made == used == {"prefect", "mlflow", "sparseforge"}


def test_mlflow_lets_its_clients_in_by_name_and_keeps_their_artifacts() -> None:
    command = SERVICES["mlflow"]["command"]
    (allowed,) = (part.partition("=")[2] for part in command if part.startswith("--allowed-hosts="))
    client = _environment(SERVICES["worker-cpu"])["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert client in allowed.split(",")
    assert {"localhost:*", "127.0.0.1:*"} <= set(allowed.split(","))
    (artifacts,) = (part.partition("=")[2] for part in command if part.startswith("--artifacts-destination="))
    assert f"mlartifacts:{artifacts}" in SERVICES["mlflow"]["volumes"]


def test_volumes_and_networks_are_declared() -> None:
    named = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith((".", "/"))
    }
    assert named == set(COMPOSE["volumes"])
    assert {network for service in SERVICES.values() for network in service["networks"]} == set(COMPOSE["networks"])
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (ROOT / volume.partition(":")[0]).is_file(), volume


def test_workers_share_the_cells_and_record_in_one_store() -> None:
    workers = [SERVICES[name] for name in ("worker-grids", *WORKERS)]
    assert all(worker["volumes"] == ["home:/data"] for worker in workers)
    assert len({_environment(worker)["SPARSEFORGE_DB"] for worker in workers}) == 1
    assert "SPARSEFORGE_HOME=/data/runs" in (ROOT / "infra/Dockerfile").read_text()
    assert all(worker["command"][0] == "infra/worker.sh" for worker in workers)


@pytest.mark.parametrize("path", DOCKERFILES)
def test_what_a_build_copies_is_let_through(path: str) -> None:
    ignored = (ROOT / f"{path}.dockerignore").read_text().splitlines()
    assert "*" in ignored, "everything is left out unless named: no results, no .git, no .venv in an image"
    let = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert all((ROOT / name).exists() for name in let), let
    assert "requirements.lock" in let
