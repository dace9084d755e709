"""The mirror in MLflow: one run a cell, copied from the cell's journal and measurements. The only door to mlflow.

Mirroring is idempotent (a cursor beside the journal says what MLflow has), so an outage costs nothing: the next
mirror fills in what is missing.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sparseforge_core import files
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.tracking.tracker import read_journal

log = logging.getLogger(__name__)

CURSOR = "mlflow.json"
BATCH = 1000
"""Values in one request."""
LONGEST_PARAMETER = 500


class MirrorError(SparseForgeError):
    """MLflow could not be reached or refused; the journal stays and a later mirror fills in."""


class About(Protocol):
    """What a listing knows of a cell."""

    @property
    def cell_key(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def tokens(self) -> int: ...


def prepare(uri: str) -> None:
    """Make or upgrade MLflow's own database once; processes that race on a fresh file would crash each other."""
    import mlflow.store.db.utils as database
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        SqlAlchemyStore(uri, default_artifact_root=str(artifact_root(uri)))
    elif not uri.startswith(("http://", "https://")):
        database._upgrade_db(database.create_sqlalchemy_engine_with_retry(uri))


def artifact_root(uri: str) -> Path:
    """Where artifacts live beside a SQLite MLflow."""
    return Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"


def mirror_cell(uri: str, home: Path, folder: Path, grid: str, about: About) -> str:
    """Copy what MLflow lacks of a cell's journal, histograms and measurements; returns the run's id.

    Raises MirrorError if MLflow cannot be reached; nothing is lost then.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        cursor = _read_cursor(folder / CURSOR)
        run_id = _open_run(client, uri, grid, about, folder)
        if cursor.get("run") != run_id:
            cursor = {"run": run_id, "offset": 0, "stages": []}
        lines, offset = read_journal(folder / "train" / "journal.jsonl", int(cursor["offset"]))
        _log_scalars(client, run_id, lines)
        for line in lines:
            if "histogram" in line:
                _log_histogram(client, run_id, line)
        cursor["offset"] = offset
        for path in sorted(folder.glob("*/measurements.json")):
            if path.parent.name not in cursor["stages"]:
                _log_measurements(client, run_id, path)
                cursor["stages"].append(path.parent.name)
        client.set_terminated(run_id, "FINISHED")
        files.write_json(folder / CURSOR, cursor)
    except (MlflowException, OSError) as error:
        raise MirrorError(f"MLflow at {uri} did not take it: {str(error).splitlines()[0]}") from error
    return run_id


def _read_cursor(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    cursor: dict[str, Any] = json.loads(path.read_text())
    return cursor


def _open_run(client: Any, uri: str, grid: str, about: About, folder: Path) -> str:
    """The run tagged with this cell's key, made if there is none; experiments are models."""
    name = about.model
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = artifact_root(uri) / re.sub(r"\W+", "-", name) if uri.startswith("sqlite:///") else None
        experiment_id = client.create_experiment(name, artifact_location=location.as_uri() if location else None)
    else:
        experiment_id = experiment.experiment_id
    found = client.search_runs([experiment_id], f"tags.cell_key = '{about.cell_key}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {
        "cell_key": about.cell_key,
        "recipe_key": about.cell_key.rpartition("-s")[0],
        "model": about.model,
        "method": about.method,
        "variant": about.variant,
        "seed": str(about.seed),
        "tokens": str(about.tokens),
        "grid": grid,
    }
    run = client.create_run(experiment_id, run_name=f"{about.variant} · seed {about.seed}", tags=tags)
    parameters = list(_parameters(folder / "cell.json"))
    from mlflow.entities import Param

    for start in range(0, len(parameters), 100):
        client.log_batch(run.info.run_id, params=[Param(k, v) for k, v in parameters[start : start + 100]])
    return str(run.info.run_id)


def _parameters(cell_file: Path) -> Iterator[tuple[str, str]]:
    """The whole recipe as dotted names; a model that another cell made is named by its parts of interest."""
    if not cell_file.is_file():
        return
    cell = json.loads(cell_file.read_text())["cell"]
    yield "seed", str(cell["seed"])
    yield from _flat("", cell["recipe"])


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if value.get("kind") == "trained":
            yield prefix.rstrip("."), f"trained by another cell (seed {value.get('seed', 0)})"
            return
        for name, item in sorted(value.items()):
            yield from _flat(f"{prefix}{name}.", item)
        return
    text = json.dumps(value) if isinstance(value, list) else str(value)
    yield prefix.rstrip("."), text[:LONGEST_PARAMETER]


def _log_scalars(client: Any, run_id: str, lines: list[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(name, value, _milliseconds(line["t"]), line["step"])
        for line in lines
        for name, value in line.get("scalars", {}).items()
        if value is not None
    ]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _milliseconds(stamp: str) -> int:
    import datetime

    return int(datetime.datetime.fromisoformat(stamp).timestamp() * 1000)


def _log_histogram(client: Any, run_id: str, line: dict[str, Any]) -> None:
    """As data and as a picture, under mask_histogram/<kind>/."""
    from matplotlib.figure import Figure

    histogram, step = line["histogram"], int(line["step"])
    kind = histogram["name"].rpartition("/")[2]
    folder = f"mask_histogram/{kind}"
    client.log_dict(run_id, histogram, f"{folder}/step_{step:06d}.json")
    figure = Figure(figsize=(4.0, 2.4), layout="constrained")
    axes = figure.add_subplot()
    edges, counts = histogram["edges"], histogram["counts"]
    total = max(sum(counts), 1)
    axes.bar(edges[:-1], [count / total for count in counts], width=edges[1] - edges[0], align="edge", color="#0072B2")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="mask value", ylabel="share of weights", title=f"{kind}, step {step}")
    axes.spines[["top", "right"]].set_visible(False)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"step_{step:06d}.png"
        figure.savefig(path, dpi=110)
        client.log_artifact(run_id, str(path), folder)


def _log_measurements(client: Any, run_id: str, path: Path) -> None:
    from mlflow.entities import Metric

    body = json.loads(path.read_text())
    stage = path.parent.name.rpartition("-")[0] or path.parent.name
    now = int(path.stat().st_mtime * 1000)
    rows = [row for row in body["measurements"] if row["value"] is not None]
    metrics = [Metric(f"eval/{stage}/{row['metric']}", row["value"], now, 0) for row in rows]
    client.log_batch(run_id, metrics=metrics)
    client.log_artifact(run_id, str(path), f"measurements/{path.parent.name}")
