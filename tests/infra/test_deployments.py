"""infra/prefect.yaml names flows, parameters and pools that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.grids import GRIDS

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


def test_register_creates_the_pools_that_deployments_and_placements_name() -> None:
    (created,) = re.findall(r"^for pool in ([^;]+);", (ROOT / "infra" / "register.sh").read_text(), re.MULTILINE)
    assert set(created.split()) == {deployment["work_pool"]["name"] for deployment in DEPLOYMENTS}
    placed = set(re.findall(r'pool="([\w-]+)"', (ROOT / "flows" / "placements.py").read_text()))
    assert placed <= set(created.split())
