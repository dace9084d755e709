"""The mirror in MLflow: one run a cell, copied from the cell's journal and measurements. The only door to mlflow.

Mirroring is idempotent (a cursor beside the journal says what MLflow has), so an outage costs nothing: the next
mirror fills in what is missing. The process that trains never comes here.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from sparseforge_core import files
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.tracking.histograms import write_histograms
from sparseforge_core.tracking.tracker import read_journal
from sparseforge_core.tracking.views import BEST, TAG, views_of

log = logging.getLogger(__name__)

CURSOR = "mlflow.json"
BATCH = 1000
"""Metrics in one request, which is all that a server takes."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""The tag by which MLflow opens an experiment on its runs and charts instead of its pages for language-model apps."""

PARAMETERS = 100
"""Parameters in one request."""
LONGEST_PARAMETER = 6000
"""Characters of a parameter that MLflow keeps; we cut, so that it need not warn."""

CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""How we use MLflow's client, unless the user says otherwise. A server that is away is asked again after the next cell
and not waited for (the default is minutes), and it says only what went wrong."""

TROUBLE = {"mlflow", "sqlalchemy", "alembic", "sqlite3", "psycopg", "requests", "urllib3"}
"""Packages whose exceptions mean that MLflow did not take something."""

Status = Literal["RUNNING", "FINISHED", "FAILED"]

_prepared: set[str] = set()


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


def prepare(uri: str, home: Path) -> None:
    """Open MLflow once in this process, making its own database if need be, one process of a home at a time.

    Processes that race on a fresh database would crash each other. Raises MirrorError if it cannot be opened.
    """
    if uri in _prepared:
        return
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with files.only_one(home / "mlflow"), _refusals(uri):
        _client(uri).search_experiments(max_results=1)
    _prepared.add(uri)


def mirror_cell(
    uri: str,
    home: Path,
    folder: Path,
    grid: str,
    about: About,
    *,
    status: Status = "FINISHED",
    tags: Mapping[str, str] | None = None,
) -> str:
    """Copy what MLflow lacks of a cell's journal, histograms and measurements; returns the run's id.

    A cell that still runs may be mirrored too (status RUNNING): its histograms come when it ends. `tags` are further
    tags, such as the commit. Raises MirrorError if MLflow cannot be reached; nothing is lost then.
    """
    prepare(uri, home)
    with files.only_one(folder / CURSOR), _refusals(uri):
        client = _client(uri)
        experiment, run_id = _open_run(client, uri, home, about, folder)
        _Copy(client, experiment, run_id, uri, folder).up_to_now(status, _tags(about, folder, grid) | dict(tags or {}))
    return run_id


def save_views(uri: str, home: Path, grid: str, scores: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Put the saved views of a grid on the experiments of its models; their ids by model. Doing it again is harmless.

    `scores` are the names of the metrics that each model's suites gave. Raises MirrorError.
    """
    prepare(uri, home)
    found = {}
    with _refusals(uri):
        client = _client(uri)
        for model, names in scores.items():
            found[model] = _experiment(client, uri, home, model)
            for view in views_of(grid, names):
                client.set_experiment_tag(found[model], *view.tag(grid))
    return found


def saved_views(uri: str, home: Path, models: Iterable[str]) -> dict[str, tuple[str, frozenset[str]]]:
    """Id of the experiment of each model that has one, and the tags under which it keeps views. Raises MirrorError."""
    prepare(uri, home)
    with _refusals(uri):
        client = _client(uri)
        known = {model: client.get_experiment_by_name(model) for model in dict.fromkeys(models)}
    return {
        model: (str(found.experiment_id), frozenset(name for name in found.tags if name.startswith(TAG)))
        for model, found in known.items()
        if found is not None
    }


def score_names(folder: Path) -> list[str]:
    """The names under which MLflow has what suites have measured of a cell: means and perplexities."""
    names = []
    for path in sorted(folder.glob("*/measurements.json")):
        body = json.loads(path.read_text())
        if body["suite"] is not None:
            metrics = [row["metric"] for row in body["measurements"] if row["metric"].endswith(BEST)]
            names += [f"eval/{_metric_name(body['suite']['name'] + '/' + metric)}" for metric in metrics]
    return names


def run_of(folder: Path) -> dict[str, str] | None:
    """The MLflow run of a mirrored cell and where it is, as the cursor beside its files says; None for another cell."""
    cursor = _read_cursor(folder / CURSOR)
    return {"run": str(cursor["run"]), "uri": str(cursor["uri"])} if cursor else None


def is_mirrored(folder: Path, stages: Sequence[str], uri: str) -> bool:
    """Whether the cursor says that this MLflow has all of these stages; reads one small file and asks nobody."""
    cursor = _read_cursor(folder / CURSOR)
    return cursor.get("uri") == uri and cursor.get("status") == "FINISHED" and set(stages) <= set(cursor["stages"])


def run_place(folder: Path) -> tuple[str, str] | None:
    """Ids of the experiment and the run that hold a cell, by its cursor; None before it was mirrored."""
    cursor = _read_cursor(folder / CURSOR)
    return (cursor["experiment"], cursor["run"]) if "experiment" in cursor else None


class _Copy:
    """One cell on its way into its run; the cursor is written after each part, so that no part is sent twice."""

    def __init__(self, client: Any, experiment: str, run_id: str, uri: str, folder: Path) -> None:
        self.client, self.run_id, self.folder = client, run_id, folder
        self.cursor = _read_cursor(folder / CURSOR)
        if self.cursor.get("run") != run_id or self.cursor.get("uri") != uri:
            self.cursor = {"run": run_id, "uri": uri, "step": 0, "stages": [], "pictured": 0, "status": None}
        self.cursor["experiment"] = experiment

    def up_to_now(self, status: Status, tags: dict[str, str]) -> None:
        lines, _ = read_journal(self.folder / "train" / "journal.jsonl")
        self._scalars([line for line in lines if line.get("scalars") and line["step"] > self.cursor["step"]])
        if status != "RUNNING":
            self._histograms([line for line in lines if "histogram" in line])
        for path in sorted(self.folder.glob("*/measurements.json")):
            if path.parent.name not in self.cursor["stages"]:
                self._measurements(path)
        if tags != self.cursor.get("tags"):
            for name, value in tags.items():
                self.client.set_tag(self.run_id, name, value)
            self._move(tags=tags)
        if status != self.cursor["status"]:
            if status == "RUNNING":
                self.client.update_run(self.run_id, status="RUNNING")
            else:
                self.client.set_terminated(self.run_id, status, end_time=_ended(self.folder))
            self._move(status=status)

    def _scalars(self, lines: list[dict[str, Any]]) -> None:
        for some in _batches(lines, lambda line: len(line["scalars"])):
            rows = [(name, value, line) for line in some for name, value in line["scalars"].items()]
            metrics = [(_metric_name(n), v, _milliseconds(ln["t"]), ln["step"]) for n, v, ln in rows if v is not None]
            self._log(metrics)
            self._move(step=some[-1]["step"])

    def _histograms(self, lines: list[dict[str, Any]]) -> None:
        if len(lines) <= self.cursor["pictured"]:
            return
        with tempfile.TemporaryDirectory() as temporary:
            write_histograms(Path(temporary), lines)
            self.client.log_artifacts(self.run_id, temporary, "mask_histogram")
        self._move(pictured=len(lines))

    def _measurements(self, path: Path) -> None:
        body = json.loads(path.read_text())
        stage = path.parent.name
        suite = stage if body["suite"] is None else body["suite"]["name"]
        now = int(path.stat().st_mtime * 1000)
        rows = body["measurements"]
        self._log([(f"eval/{_metric_name(suite + '/' + r['metric'])}", r["value"], now, 0) for r in _finite(rows)])
        diverged = [row["metric"] for row in rows if row["value"] is None]
        if diverged:
            self.client.set_tag(self.run_id, "diverged", ", ".join(diverged)[:LONGEST_PARAMETER])
        self.client.log_artifact(self.run_id, str(path), f"measurements/{stage}")
        self._move(stages=[*self.cursor["stages"], stage])

    def _log(self, metrics: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=[Metric(*row) for row in metrics[start : start + BATCH]])

    def _move(self, **changes: Any) -> None:
        self.cursor |= changes
        files.write_json(self.folder / CURSOR, self.cursor)


@contextlib.contextmanager
def _refusals(uri: str) -> Iterator[None]:
    """Whatever MLflow, its database or its connection raises becomes a MirrorError; our own mistakes do not."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in TROUBLE:
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise MirrorError(f"MLflow at {uri} did not take it: {said}") from error


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _open_run(client: Any, uri: str, home: Path, about: About, folder: Path) -> tuple[str, str]:
    """Ids of the experiment (its model) and of the run tagged with a cell's key, made if there is none."""
    experiment = _experiment(client, uri, home, about.model)
    found = client.search_runs([experiment], f"tags.cell_key = '{about.cell_key}'", max_results=1)
    if found:
        return experiment, str(found[0].info.run_id)
    from mlflow.entities import Param

    tags = {"cell_key": about.cell_key}
    name = f"{_group(about)} · s{about.seed}"
    run = client.create_run(experiment, start_time=_began(folder), run_name=name, tags=tags)
    parameters = [Param(name, value) for name, value in _parameters(folder / "cell.json")]
    for start in range(0, len(parameters), PARAMETERS):
        client.log_batch(run.info.run_id, params=parameters[start : start + PARAMETERS])
    return experiment, str(run.info.run_id)


def _experiment(client: Any, uri: str, home: Path, name: str) -> str:
    """Id of the experiment of a model; artifacts go beside a database of ours, and where a server says otherwise."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        served = uri.startswith(("http://", "https://"))
        place = None if served else (home / "mlartifacts" / re.sub(r"[^\w.-]+", "-", name)).resolve().as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place, tags=KIND))
        except MlflowException:  # another process may have been faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _began(folder: Path) -> int | None:
    """When the cell's work began, in milliseconds, not when it was mirrored; None (now) where no file says so."""
    lines, _ = read_journal(folder / "train" / "journal.jsonl")
    times = [_milliseconds(line["t"]) for line in lines[:1]]
    times += [int(path.stat().st_mtime * 1000) for path in folder.glob("cell.json")]
    return min(times, default=None)


def _ended(folder: Path) -> int | None:
    """When the last of its measurements was written; None (now) where there is none."""
    times = [int(path.stat().st_mtime * 1000) for path in folder.glob("*/measurements.json")]
    return max(times, default=None)


def _tags(about: About, folder: Path, grid: str) -> dict[str, str]:
    """What runs are grouped and filtered by in the MLflow UI; `group` holds the seeds of one recipe together."""
    return {
        "cell_key": about.cell_key,
        "recipe_key": about.cell_key.rpartition("-s")[0],
        "group": _group(about),
        "grid": grid,
        "model": about.model,
        "method": about.method,
        "variant": about.variant,
        "pattern": _pattern(folder / "cell.json"),
        "seed": str(about.seed),
        "tokens": str(about.tokens),
        "mlflow.note.content": _description(about, grid),
    }


def _description(about: About, grid: str) -> str:
    """What stands at the top of a run's page."""
    return (
        f"Cell `{about.cell_key}` of grid `{grid}`: {about.model}, {about.variant}, seed {about.seed}. "
        f"`sparseforge explain {about.cell_key}` says why it ran, where its files are and how to repeat it; the "
        "numbers that count are those of the results store (`sparseforge tables`, `sparseforge verify`)."
    )


def _group(about: About) -> str:
    """Such as 'SparseForge w/ SLoRB · 61.4k tokens': what the seeds of a recipe have in common, for people.

    The model is the experiment's name, and columns show twenty letters: what tells runs apart comes first, once.
    """
    amount = _short(about.tokens)
    said = not about.tokens or about.variant.endswith(f" {amount}")
    return about.variant if said else f"{about.variant} · {amount} tokens"


def _short(number: int) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return str(number)


def _pattern(cell_file: Path) -> str:
    spec = _recipe(cell_file).get("pattern")
    if not spec:
        return "dense"
    rows, cols, keep = (spec.get(name, 1) for name in ("rows", "cols", "keep"))
    return f"{keep}:{cols}" if rows == 1 else f"{keep} of {rows}x{cols}"


def _parameters(cell_file: Path) -> list[tuple[str, str]]:
    """The whole recipe as dotted names, those of a model that another cell makes included."""
    return list(_flat("", _recipe(cell_file)))


def _recipe(cell_file: Path) -> dict[str, Any]:
    if not cell_file.is_file():
        return {}
    recipe: dict[str, Any] = json.loads(cell_file.read_text())["cell"]["recipe"]
    return recipe


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, item in sorted(value.items()):
            yield from _flat(f"{prefix}.{name}" if prefix else name, item)
    elif prefix:
        text = value if isinstance(value, str) else json.dumps(value)
        yield prefix, text[:LONGEST_PARAMETER]


def _metric_name(name: str) -> str:
    """As MLflow takes it: letters, digits, and '_-. :/', without empty path parts."""
    return re.sub(r"/{2,}", "/", re.sub(r"[^0-9A-Za-z_\-. :/]", "_", name)).strip("/")


def _finite(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["value"] is not None]


def _batches(lines: list[dict[str, Any]], size: Any) -> Iterator[list[dict[str, Any]]]:
    """Consecutive lines that together hold at most BATCH values; a step is never cut in two."""
    held: list[dict[str, Any]] = []
    total = 0
    for line in lines:
        if held and total + size(line) > BATCH and line["step"] != held[-1]["step"]:
            yield held
            held, total = [], 0
        held.append(line)
        total += size(line)
    if held:
        yield held


def _milliseconds(stamp: str) -> int:
    return int(datetime.datetime.fromisoformat(stamp).timestamp() * 1000)


def _read_cursor(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    cursor: dict[str, Any] = json.loads(path.read_text())
    return cursor
