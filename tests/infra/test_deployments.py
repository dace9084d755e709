"""infra/prefect.yaml names flows, parameters and pools that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore

from flows.grids import GRIDS
from flows.sparseforge import DRAIN
from infra import register

ROOT = Path(__file__).resolve().parents[2]
FILE: dict[str, Any] = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())
DEPLOYMENTS: list[dict[str, Any]] = FILE["deployments"]


def _flows(path: str) -> dict[str, tuple[str, set[str]]]:
    """Function -> (flow name, parameters), read from the source so that prefect need not be imported."""
    found = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "flow":
                    (name,) = (ast.literal_eval(k.value) for k in decorator.keywords if k.arg == "name")
                    found[node.name] = (name, {argument.arg for argument in node.args.args})
    return found


def _flow_of(deployment: dict[str, Any]) -> tuple[str, set[str]]:
    path, _, function = deployment["entrypoint"].partition(":")
    return _flows(path)[function]


def test_the_promised_deployments_are_there() -> None:
    names = {f"{_flow_of(d)[0]}/{d['name']}" for d in DEPLOYMENTS}
    grids = {f"sparseforge/{name}" for name in ("full-grid", "demo", "table-2", "ablations")}
    assert names == grids | {f"sparseforge-cell/{name}" for name in ("cpu", "gpu-1", "gpu-8")}


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    _, parameters = _flow_of(deployment)
    assert set(deployment["parameters"]) <= parameters
    if "grid" in deployment["parameters"]:
        assert deployment["parameters"]["grid"] in GRIDS


def test_cells_run_on_the_pool_they_drain_and_grids_on_another() -> None:
    """A grid's run waits for its drains: in one pool of limit 1 it would wait for ever."""
    for deployment in DEPLOYMENTS:
        pool = deployment["work_pool"]["name"]
        if _flow_of(deployment)[0] == "sparseforge-cell":
            assert pool == deployment["name"] == deployment["parameters"]["pool"]
        else:
            assert pool == "grids"


def test_register_makes_the_pools_that_deployments_and_placements_name() -> None:
    made = register.pools()
    assert set(made) == {deployment["work_pool"]["name"] for deployment in DEPLOYMENTS}
    placed = set(re.findall(r'pool="([\w-]+)"', (ROOT / "flows" / "placements.py").read_text()))
    assert placed <= set(made)


def test_each_pool_has_a_worker_in_the_compose_file() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    commands = [
        service["command"] for service in services.values() if service.get("command", [""])[0].endswith("worker.sh")
    ]
    assert {command[1] for command in commands} == set(register.pools())


def test_pools_of_kubernetes_ask_for_their_gpus() -> None:
    def gpus(pool: str) -> str:
        return str(register.kubernetes_job(pool)["variables"]["properties"]["gpus"]["default"])

    assert {pool: gpus(pool) for pool in register.pools()} == {"cpu": "0", "gpu-1": "1", "gpu-8": "8", "grids": "0"}


def test_automations_are_what_prefect_takes_and_name_what_there_is() -> None:
    bodies = yaml.safe_load((ROOT / "infra" / "automations.yaml").read_text())["automations"]
    automations = {body["name"]: AutomationCore.model_validate(body) for body in bodies}
    assert set(automations) == {"crash-zombies", *(f"no-worker-for-{pool}" for pool in register.pools())}
    for late in (body for body in bodies if body["name"] != "crash-zombies"):
        pool = late["trigger"]["match_related"]["prefect.resource.name"]
        assert late["name"] == f"no-worker-for-{pool}"
        assert late["actions"][0]["name"].endswith(f"infra/worker.sh {pool}"), "what --watch prints"
        spared = late["trigger"]["match"].get("prefect.resource.name")
        assert spared == (None if pool == "grids" else f"!{DRAIN} *"), "what a grid starts may queue"
    worker = (ROOT / "infra" / "worker.sh").read_text()
    assert '[[ "$pool" == grids && -z "${2:-}" ]] ||' in worker, (
        "a full worker would make runs late, and they would fail"
    )
