"""From a number in a table back to the single items, and proof that they match.

The chain: printed mean over seeds; each seed's measurement; the outcomes of its items, whose mean it must be; the
hash of the items file; that file, where it is at hand; and the entry of the hash-chained results log, which must say
the same of all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.exhibits import TABLES
from analysis.frames import NLL, ExhibitData
from analysis.table import Cell, Line, Table
from sparseforge_core.errors import SparseForgeError, unknown
from sparseforge_core.store.outcomes import mean, outcomes_of
from sparseforge_core.store.results import Results

CLOSE = 1e-9
"""Relative difference that the order of adding may make; anything else is another number."""
MEAN = "mean/acc"

Place = tuple[str, str]
"""Cell key and stage."""


@dataclass
class Verification:
    """What was looked at, and what does not match."""

    entries: int
    """Entries of the results log, each checked."""
    head: str
    """Hash of the last entry: keep it elsewhere, and nobody can rewrite the log unseen."""
    stages: int = 0
    measurements: int = 0
    """Numbers that were computed again from their items."""
    files: int = 0
    """Items files that were read."""
    without_items: list[str] = field(default_factory=list)
    """Stages recorded before outcomes of single items were: their numbers rest on the log alone."""
    absent: list[str] = field(default_factory=list)
    """Items files that are not on this machine."""
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {**self.__dict__, "sound": not self.problems}


def verify(results: Results, cells: Path | None, places: Iterable[Place] | None = None) -> Verification:
    """Check the whole results log, and every done stage of the store or only `places`.

    `cells` is the folder of the runs' files; without it only what the store holds is checked.
    """
    entries, head = results.log_head()
    found = Verification(entries, head)
    found.problems += [trouble.sentence for trouble in results.breaks()]
    values = results.values()
    hashes = results.items_hashes()
    chosen = sorted(set(places) if places is not None else hashes)
    measured: dict[Place, dict[str, tuple[float | None, dict[str, Any]]]] = {}
    for (cell, stage, metric), value in values.items():
        measured.setdefault((cell, stage), {})[metric] = value
    for place in chosen:
        found.stages += 1
        _check(found, results, cells, place, measured.get(place, {}), hashes.get(place))
    return found


def _check(
    found: Verification,
    results: Results,
    cells: Path | None,
    place: Place,
    measured: Mapping[str, tuple[float | None, dict[str, Any]]],
    digest: str | None,
) -> None:
    about = f"stage {place[1]} of cell {place[0]}"
    try:
        items = results.items(*place)
    except ValueError as error:
        found.problems.append(f"the outcomes of {about} cannot be read: {error}")
        return
    if digest is not None and not items:
        found.without_items.append(about)
    again = recomputed({metric: values for metric, (_, values) in items.items()}, measured)
    for metric, value in again.items():
        found.measurements += 1
        stored = measured[metric][0]
        if not _equal(stored, value):
            found.problems.append(f"{metric} of {about} is stored as {stored}, its items give {value}")
    if digest is not None and cells is not None:
        _check_file(found, cells / place[0] / place[1] / "items.jsonl", about, digest, items)


def recomputed(
    items: Mapping[str, tuple[float | None, ...]], measured: Mapping[str, tuple[float | None, dict[str, Any]]]
) -> dict[str, float | None]:
    """The measurements that follow from items, computed from them alone."""
    found = {metric: mean(values) for metric, values in items.items() if metric in measured}
    if NLL in items and "perplexity" in measured:
        nats = mean(items[NLL])
        found["perplexity"] = None if nats is None or nats >= 700 else math.exp(nats)
    tasks = measured[MEAN][1].get("tasks") if MEAN in measured else None
    if tasks and all(f"{task}/acc" in items for task in tasks):
        found[MEAN] = mean(mean(items[f"{task}/acc"]) for task in tasks)
    return found


def _equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-12)


def _check_file(
    found: Verification,
    path: Path,
    about: str,
    digest: str,
    items: Mapping[str, tuple[str, tuple[float | None, ...]]],
) -> None:
    if not path.is_file():
        found.absent.append(str(path))
        return
    found.files += 1
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        found.problems.append(f"{path} was altered: its hash is not the one recorded for {about}")
        return
    stored = {o.metric: (o.identity, o.values) for o in outcomes_of(json.loads(line) for line in data.splitlines())}
    for metric in sorted(items):
        if stored.get(metric) != items[metric]:
            found.problems.append(f"outcomes of {metric} in the store are not those of {path}")


@dataclass(frozen=True)
class Trace:
    """A cell of a table, found."""

    table: Table
    line: Line
    column: str
    cell: Cell


def find(exhibits: Mapping[str, ExhibitData], exhibit: str, row: str, column: str) -> Trace:
    """The cell of a table by exhibit, row (name or label) and column. Raises SparseForgeError naming the nearest."""
    if exhibit not in TABLES:
        raise SparseForgeError(unknown("table", exhibit, TABLES))
    table = TABLES[exhibit](exhibits[exhibit])
    lines = {line.name: line for line in table.lines} | {line.label: line for line in table.lines}
    if row not in lines:
        raise SparseForgeError(f"{exhibit}: " + unknown("row", row, lines))
    titles = [one.title for one in table.columns]
    if column not in titles:
        raise SparseForgeError(f"{exhibit}: " + unknown("column", column, titles))
    return Trace(table, lines[row], column, lines[row].cells[titles.index(column)])


def places_of(tables: Iterable[Table]) -> set[Place]:
    """Every (cell, stage) behind some tables."""
    return {place for table in tables for line in table.lines for cell in line.cells for place in cell.sources}


def trace_lines(trace: Trace, results: Results, grid: str, runs: Mapping[str, str] | None = None) -> list[str]:
    """The way from a printed number to its items, for a terminal; `runs` are MLflow's, by cell, where known."""
    cell, origins = trace.cell, results.origins(grid)
    shown = "no result yet" if cell.estimate is None else f"{cell.estimate.mean:.10g} (n {cell.estimate.n})"
    lines = [f"{trace.table.exhibit}, {trace.line.label}, {trace.column}: {shown}"]
    for place in dict.fromkeys(cell.sources):
        run = (runs or {}).get(place[0], "")
        lines += [f"  {line}" for line in origin_text(place, origins, run).splitlines()]
    return lines


def origin_text(place: Place, origins: Mapping[Place, Mapping[str, Any]], run: str = "") -> str:
    """Where the results of one stage come from, in a few lines; `run` names the cell's MLflow run where it is known."""
    head = f"cell {place[0]} (seed {place[0].rpartition('-s')[2]}), stage {place[1]}"
    origin = origins.get(place)
    if origin is None:
        return f"{head}: not done"
    context = origin["context"]
    dirty = f", with changes {origin['diff_sha'][:12] or '(not hashed)'}" if origin["dirty"] else ""
    versions = [f"{name} {context[key]}" for name, key in VERSIONS if context.get(key)]
    lock = f"; lock {origin['lock_sha'][:12]}" if origin["lock_sha"] else ""
    flow = f", Prefect flow run {origin['flow_run_id']}" if origin["flow_run_id"] else ""
    parts = [
        head,
        f"attempt {origin['attempt']} ({origin['attempts']} tried), finished {origin['finished']}",
        f"commit {origin['git_sha'] or 'unknown'}{dirty}{lock}",
        f"{context.get('device') or origin['device']}, {', '.join(versions) or 'no versions recorded'}",
        *_model_lines(place, origin, origins.get((place[0], TRAIN))),
        f"command {origin['command']} on {origin['host']}{flow}",
        f"MLflow run: {f'{run}, ' if run else ''}tags.cell_key = '{place[0]}'",
        f"items {origin['items_sha256'] or '(none)'}",
        f"results log, entry {origin['entry']}: {origin['digest']}",
    ]
    return "\n  ".join(parts)


def _model_lines(place: Place, origin: Mapping[str, Any], trained: Mapping[str, Any] | None) -> list[str]:
    """The hashes of text and model; of a measured model those of the stage that made it, and which attempt that was."""
    made = origin if trained is None else trained
    lines = [f"{name} {made['context'][key]}" for name, key in HASHES if made["context"].get(key)]
    if trained is not None and place[1] != TRAIN:
        commit = f"{trained['git_sha'] or 'unknown'}{', with changes' if trained['dirty'] else ''}"
        device = trained["context"].get("device") or trained["device"]
        lines.append(f"made by attempt {trained['attempt']} at commit {commit} on {device}")
    return lines


TRAIN = "train"
"""The stage that makes a cell's model."""
VERSIONS = (("lm-eval", "harness_version"), ("torch", "torch"), ("transformers", "transformers"), ("in", "dtype"))
HASHES = (("data", "data_sha256"), ("model", "model_sha256"))


def verification_lines(found: Verification) -> list[str]:
    """For a terminal."""
    lines = [
        f"results log: {found.entries} entries, last {found.head}",
        f"{found.stages} stages: {found.measurements:,} numbers computed again from their items, "
        f"{found.files:,} items files read",
    ]
    if found.without_items:
        lines.append(f"{len(found.without_items)} stages were recorded without outcomes of single items: log only")
    if found.absent:
        lines.append(f"{len(found.absent)} items files are not on this machine, for example {found.absent[0]}")
    lines += [f"  {problem}" for problem in found.problems]
    lines.append("everything matches" if not found.problems else f"{len(found.problems)} things do not match")
    return lines
