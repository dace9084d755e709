"""The infrastructure files against the schemas of those who read them: Compose, Prefect, Kubernetes."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = Path(__file__).resolve().parent / "schemas"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
TEMPLATE: dict[str, Any] = json.loads((ROOT / "infra/kubernetes/base-job-template.json").read_text())
FIELDS: dict[str, dict[str, Any]] = json.loads((SCHEMAS / "kubernetes-fields.json").read_text())
KINDS = {
    "Namespace": "V1Namespace",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "ServiceAccount": "V1ServiceAccount",
    "Role": "V1Role",
    "RoleBinding": "V1RoleBinding",
    "Deployment": "V1Deployment",
    "Job": "V1Job",
}


def _compose_schema() -> Any:
    body = (SCHEMAS / "compose-spec.json").read_bytes()
    pinned = "d549057ebc2925f39f62799eab0db7b9e2c18b35b6c00595199116da3ed10e64"
    assert hashlib.sha256(body).hexdigest() == pinned, "the vendored schema was changed"
    return jsonschema.Draft202012Validator(json.loads(body))


def test_compose_file_follows_the_specification() -> None:
    errors = [f"{error.json_path}: {error.message}" for error in _compose_schema().iter_errors(COMPOSE)]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize(
    ("service", "key", "value"),
    [("mlflow", "prots", []), ("prefect", "healthcheck", {"tset": []}), ("postgres", "restart", 1)],
)
def test_a_mistake_in_the_compose_file_is_seen(service: str, key: str, value: Any) -> None:
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"][service][key] = value
    assert list(_compose_schema().iter_errors(wrong))


def _prefects_template() -> dict[str, Any]:
    """What `prefect work-pool create --type kubernetes` starts from, in the installed version."""
    import prefect

    path = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
    found: dict[str, Any] = json.loads(path.read_text())["prefect-kubernetes"]["kubernetes"]
    template: dict[str, Any] = found["default_base_job_configuration"]
    return template


def test_job_template_is_prefects_own_with_additions() -> None:
    """Nothing that Prefect's worker fills in or asks for was taken away or given another meaning."""
    own = _prefects_template()
    job = own["job_configuration"]["job_manifest"]["spec"]
    for misplaced in ("parallelism", "completions"):  # fields of the job, which Prefect's file has in its pod
        job[misplaced] = job["template"]["spec"].pop(misplaced)
    assert TEMPLATE["job_configuration"].keys() == own["job_configuration"].keys()
    _holds(TEMPLATE["job_configuration"], own["job_configuration"], "job_configuration")
    for name, variable in own["variables"]["properties"].items():
        ours = TEMPLATE["variables"]["properties"][name]
        assert {k: v for k, v in ours.items() if k != "default"} == {
            k: v for k, v in variable.items() if k != "default"
        }


def _holds(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            assert key in ours, f"{where}.{key} is missing"
            _holds(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list):
        for index, value in enumerate(theirs):
            _holds(ours[index], value, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def test_every_variable_of_the_template_is_declared_and_its_default_fits() -> None:
    variables = TEMPLATE["variables"]["properties"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used <= set(variables)
    schema = {"type": "object", "properties": variables, "definitions": TEMPLATE["variables"]["definitions"]}
    jsonschema.Draft7Validator.check_schema(schema)
    defaults = {name: body["default"] for name, body in variables.items() if "default" in body}
    jsonschema.Draft7Validator(schema).validate(defaults)
    with pytest.raises(jsonschema.ValidationError, match="eight"):
        jsonschema.Draft7Validator(schema).validate({"gpus": "eight"})


def _job() -> dict[str, Any]:
    """The manifest as Prefect's worker makes it of the defaults; what has no value is left out."""
    values = {name: body.get("default") for name, body in TEMPLATE["variables"]["properties"].items()}
    values |= {"name": "full-on-gpu-8", "labels": {"prefect.io/flow-run-id": "x"}, "gpus": "8"}
    values |= {"command": ["prefect", "flow-run", "execute"], "env": [{"name": "PREFECT_API_URL", "value": "http://p"}]}

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: value for key, raw in node.items() if (value := filled(raw)) is not None}
        if isinstance(node, list):
            return [filled(item) for item in node]
        if isinstance(node, str) and (whole := re.fullmatch(r"\{\{ (\w+) \}\}", node)):
            return values[whole[1]]
        return re.sub(r"\{\{ (\w+) \}\}", lambda m: str(values[m[1]]), node) if isinstance(node, str) else node

    job: dict[str, Any] = filled(TEMPLATE["job_configuration"]["job_manifest"])
    return job


def misfits(body: Any, kind: Any, where: str) -> list[str]:
    """What of a manifest is no field of its Kubernetes type, of another type, or missing."""
    if isinstance(kind, list):
        if not isinstance(body, list):
            return [f"{where}: a list is wanted"]
        return [found for index, item in enumerate(body) for found in misfits(item, kind[0], f"{where}[{index}]")]
    if isinstance(kind, dict):
        if not isinstance(body, dict):
            return [f"{where}: a map is wanted"]
        return [found for key, item in body.items() for found in misfits(item, kind["*"], f"{where}.{key}")]
    if kind not in FIELDS:
        plain = {"string": str, "integer": int, "boolean": bool}.get(kind, object)
        right = isinstance(body, plain) and not (kind == "integer" and isinstance(body, bool))
        return [] if right else [f"{where}: {body!r} is no {kind}"]
    fields, required = FIELDS[kind]["fields"], FIELDS[kind]["required"]
    found = [f"{where}: no {name}" for name in required if name not in body]
    for key, item in body.items():
        if key not in fields:
            found.append(f"{where}: {kind} has no field {key!r}")
        else:
            found += misfits(item, fields[key], f"{where}.{key}")
    return found


def _manifests() -> list[dict[str, Any]]:
    return [*yaml.safe_load_all((ROOT / "infra/kubernetes/workspace.yaml").read_text()), _job()]


@pytest.mark.parametrize("manifest", _manifests(), ids=lambda m: m["kind"])
def test_manifests_have_the_fields_of_their_kinds(manifest: dict[str, Any]) -> None:
    assert misfits(manifest, KINDS[manifest["kind"]], manifest["kind"]) == []


@pytest.mark.parametrize("manifest", _manifests(), ids=lambda m: m["kind"])
def test_pods_are_nobodys_and_gain_no_rights(manifest: dict[str, Any]) -> None:
    pod = manifest.get("spec", {}).get("template", {}).get("spec")
    if pod is None:
        assert manifest["kind"] not in ("Job", "Deployment")
        return
    assert pod["securityContext"]["runAsNonRoot"]
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert re.fullmatch(r".+:\d+\.\d+\.\d+(-[\w.-]+)?", container["image"]), "pinned"
        assert not any(re.search("PASSWORD|AUTH|SECRET", entry["name"]) for entry in container.get("env", []))


def test_a_mistake_in_a_manifest_is_seen() -> None:
    job = _job()
    job["spec"]["template"]["spec"]["containers"][0] |= {"volumeMount": [], "image": 3}
    del job["spec"]["template"]["spec"]["containers"][0]["name"]
    where = "Job.spec.template.spec.containers[0]"
    assert set(misfits(job, "V1Job", "Job")) == {
        f"{where}: V1Container has no field 'volumeMount'",
        f"{where}.image: 3 is no string",
        f"{where}: no name",
    }


def test_the_worker_image_and_the_claim_are_those_of_the_project() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    deployment = next(m for m in _manifests() if m["kind"] == "Deployment")
    image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"prefecthq/prefect:{pins['prefect']}-python3.11-kubernetes"
    pod = _job()["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == COMPOSE["services"]["worker-cpu"]["image"]
    claim = next(m for m in _manifests() if m["kind"] == "PersistentVolumeClaim")["metadata"]["name"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
