#!/usr/bin/env python3
"""Make the work pools, automations and deployments on the Prefect server at $PREFECT_API_URL. Safe to call again.

    infra/register.sh                         pools of processes: grids, cpu, gpu-1, gpu-8
    infra/register.sh --kubernetes gpu-8 …    these pools as Kubernetes jobs (docs/prefect.md)

A pool that is there keeps its settings, for someone may have paused or limited it; automations and deployments are
replaced by what their files say.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

INFRA = Path(__file__).resolve().parent
JOB = INFRA / "kubernetes" / "base-job-template.json"


def pools(deployments: Path = INFRA / "prefect.yaml") -> list[str]:
    """The work pools that the deployments name."""
    listed = yaml.safe_load(deployments.read_text())["deployments"]
    return sorted({deployment["work_pool"]["name"] for deployment in listed})


def main() -> int:
    """Pools first, for deployments name them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kubernetes", nargs="+", default=[], choices=pools(), metavar="POOL")
    options = parser.parse_args()
    with get_client(sync_client=True) as client:
        for name in pools():
            make_pool(client, name, kubernetes=name in options.kubernetes)
        for body in yaml.safe_load((INFRA / "automations.yaml").read_text())["automations"]:
            make_automation(client, AutomationCore.model_validate(body))
    deploy = ["-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml"]
    checkout = {"SPARSEFORGE_CHECKOUT": os.environ.get("SPARSEFORGE_CHECKOUT", str(INFRA.parent))}
    done = subprocess.run([sys.executable, *deploy], env={**os.environ, **checkout}, cwd=INFRA.parent, check=False)
    return done.returncode


def make_pool(client: Any, name: str, *, kubernetes: bool) -> None:
    """The pool, if there is none of that name."""
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        kind, job = ("kubernetes", kubernetes_job(name)) if kubernetes else ("process", process_job())
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=job))
        return
    if kubernetes != (found.type == "kubernetes"):
        raise SystemExit(
            f"pool {name} is there and of type {found.type}; delete it first: prefect work-pool delete {name}"
        )


def process_job() -> dict[str, Any]:
    """What a pool of processes is made with by Prefect's own command."""
    from prefect.workers.process import ProcessWorker

    return ProcessWorker.get_default_base_job_template()


def kubernetes_job(pool: str) -> dict[str, Any]:
    """The template, with the GPUs of the pool: `gpu-8` has eight."""
    job: dict[str, Any] = json.loads(JOB.read_text())
    job["variables"]["properties"]["gpus"]["default"] = pool.removeprefix("gpu-") if pool.startswith("gpu-") else "0"
    return job


def make_automation(client: Any, automation: AutomationCore) -> None:
    """The automation, in place of any of its name."""
    body = automation.model_dump(mode="json", exclude_none=True)
    found = client.request("POST", "/automations/filter", json={"automations": {"name": {"any_": [automation.name]}}})
    for old in found.json():
        client.request("DELETE", "/automations/{id}", path_params={"id": old["id"]})
    client.request("POST", "/automations/", json=body).raise_for_status()


if __name__ == "__main__":
    sys.exit(main())
