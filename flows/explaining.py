"""What `sparseforge explain CELL` says: everything about one cell, as data; `explanation.py` puts it in words."""

from __future__ import annotations

import datetime
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.cycle import LEASE
from flows.devices import served_here
from flows.failures import inputs_of, reproducer
from flows.home import Home
from flows.provenance import here, process_alive
from flows.stages import TRAIN
from flows.worker import BEGINS
from sparseforge_core import specs
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.identity import cell_key, loads
from sparseforge_core.recipe import Cell, Trained
from sparseforge_core.store.causes import POLICIES
from sparseforge_core.store.dossier import Dossier
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import AttemptRecord, StageState
from sparseforge_core.tracking.tracker import read_journal

CANDIDATES = 8
"""Cells that an ambiguous key names."""
LINES = 5
"""Last lines of a log, and of a journal, that are shown."""


class UnknownCell(SparseForgeError):
    """No cell of the store goes by this key, or several do."""


def explain(prefix: str, home: Home) -> dict[str, Any]:
    """Everything about the cell whose key begins so. Raises UnknownCell, naming candidates, unless that is one cell."""
    results = Results(home.store_url)
    key = _one_cell(results, prefix)
    found = results.dossier(key)
    attempts, now = results.attempts(key), results.now()
    cell = loads(found.body)
    body = {
        "key": key,
        "about": {**found.about, "seed": found.seed, "pool": found.pool, "device_hours": found.cost_hours},
        "recipe": list(recipe_lines(cell)),
        "wanted": {
            "grids": list(found.grids),
            "rows": [dict(zip(("grid", "exhibit", "row", "label"), row, strict=True)) for row in found.shown],
            "cells": list(found.wanted_by),
        },
        "requires": [{"cell": other, "training": state} for other, state in found.requires],
        "stages": [_stage(state, found, attempts, now) for state in found.states],
        "neighbour": _neighbour(results, found),
        "attempts": [_attempt(attempt) for attempt in attempts if not attempt.is_mark],
        "journal": journal_tail(home.cell(key) / TRAIN / "journal.jsonl"),
        "log": log_tail(home, key),
        "measurements": [
            dict(zip(("stage", "metric", "value", "stderr"), row, strict=True)) for row in found.measurements
        ],
        "files": _files(home.cell(key)),
        "folder": str(home.cell(key)),
        "reproduce": _reproduce(home, found),
    }
    results.close()
    return body


def _one_cell(results: Results, prefix: str) -> str:
    like = results.cells_like(prefix)
    exact = [key for key, *_ in like if key == prefix]
    if len(like) == 1 or exact:
        return exact[0] if exact else like[0][0]
    if not like:
        known = results.cells_like("")
        near = difflib.get_close_matches(prefix, [key for key, *_ in known], n=3, cutoff=0.4)
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise UnknownCell(
            f"no cell of this store begins with {prefix!r}.{hint} `sparseforge plan GRID` lists the cells of a grid"
        )
    named = ", ".join(f"{key} ({model} {variant} seed {seed})" for key, model, variant, seed in like[:CANDIDATES])
    more = f" and {len(like) - CANDIDATES} more" if len(like) > CANDIDATES else ""
    raise UnknownCell(f"{prefix!r} stands for {len(like)} cells: {named}{more}. Give more of the key")


# ---------------------------------------------------------------- what it is


def recipe_lines(cell: Cell) -> Iterator[str]:
    """The recipe's parts and every field that differs from its default, as `path = value`."""
    yield from _given("", specs.encode(cell.recipe), cell.seed)


def _given(path: str, value: Any, seed: int) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path} = {json.dumps(value)}"
        return
    if value.get("kind") == "trained":
        source = specs.decode(value, Trained, "model")
        yield f"{path} = the model of cell {cell_key(source.cell(seed))}"
        return
    if path:
        yield f"{path} = {value.get('kind', 'values')}"
    for name, item in value.items():
        if name not in ("kind", "revision", "spec_revision"):
            yield from _given(f"{path}.{name}" if path else name, item, seed)


def _neighbour(results: Results, found: Dossier) -> dict[str, Any] | None:
    """The recipe of the same grid that differs in the fewest fields, and how."""
    if not found.grids:
        return None
    recipes = results.recipes(found.grids[0])
    own = json.loads(recipes[found.recipe_key][1])
    best: tuple[int, str, list[str]] | None = None
    for key, (_, spec) in sorted(recipes.items()):
        if key != found.recipe_key:
            changes = list(_changes("", json.loads(spec), own))
            if best is None or len(changes) < best[0]:
                best = len(changes), key, changes
    if best is None:
        return None
    return {"recipe": best[1], "variant": recipes[best[1]][0], "grid": found.grids[0], "changes": best[2]}


def _changes(path: str, old: Any, new: Any) -> Iterator[str]:
    """Fields that differ; of a part that is another kind altogether, its kind alone."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield f"{path}: was {_short(old)}, now {_short(new)}"
    elif old.get("kind") != new.get("kind"):
        yield f"{path}: was {_short(old)}, now {_short(new)}"
    else:
        for name in sorted(old.keys() | new.keys()):
            yield from _changes(f"{path}.{name}" if path else name, old.get(name), new.get(name))


def _short(value: Any) -> str:
    return str(value["kind"]) if isinstance(value, dict) and "kind" in value else json.dumps(value)


# ---------------------------------------------------------------- what became of it, and why


def _stage(
    state: StageState, found: Dossier, attempts: Sequence[AttemptRecord], now: datetime.datetime
) -> dict[str, Any]:
    own = [a for a in attempts if a.stage == state.stage and not a.is_mark]
    return {
        "stage": state.stage,
        "suite": found.suites.get(state.stage),
        "status": "quarantined" if state.quarantined else state.status,
        "cause": state.cause,
        "tries": state.attempts,
        "why": why(state, found, own[-1] if own else None, now),
    }


def why(state: StageState, found: Dossier, last: AttemptRecord | None, now: datetime.datetime) -> str:
    """Why a stage ran, or why it has not (yet)."""
    run = f"sparseforge run {found.grids[0]}" if found.grids else "sparseforge run GRID"
    if last is not None and state.status == "done":
        origin = f"attempt {last.id} on {last.provenance.host or 'an unknown host'}"
        return f"diverged, and is kept so: {state.error}" if state.cause else f"done by {origin}"
    if last is not None and state.status == "running":
        return _held(last, now)
    if state.cause is not None and state.quarantined:
        said = (
            f"in quarantine after {state.attempts} tries ({state.cause}: {POLICIES[state.cause].says}): {state.error}"
        )
        return f"{said}. Once the cause is gone: {run} --retry-failed"
    waits = _waits_for(state, found)
    if waits:
        return waits
    if not served_here(found.pool):
        return f"is placed on {found.pool}, which this machine cannot serve: {run} on a machine of that pool"
    if state.cause is not None:
        return f"{state.status} ({state.cause}: {POLICIES[state.cause].says}): {state.error}. It goes on with: {run}"
    return f"may run now: {run}"


def _held(attempt: AttemptRecord, now: datetime.datetime) -> str:
    origin, silent = attempt.provenance, (now - attempt.heartbeat).total_seconds()
    said = f"claimed by attempt {attempt.id}, process {origin.pid} on {origin.host}, last heard of {silent:.0f} s ago"
    if origin.host == here() and not process_alive(origin.pid):
        return f"{said}; that process is gone, so the next run takes it over"
    if now - attempt.heartbeat > LEASE:
        return f"{said}; that is longer than its lease, so the next run takes it over"
    return said


def _waits_for(state: StageState, found: Dossier) -> str:
    blocked = [f"cell {cell} ({training})" for cell, training in found.requires if training not in ("done", "diverged")]
    if blocked:
        return f"waits for the model of {', '.join(blocked)}"
    training = next((s for s in found.states if s.stage == TRAIN), None)
    if state.stage != TRAIN and training is not None and training.status != "done":
        return f"waits for this cell's own training, which is {training.status}"
    return ""


def _attempt(attempt: AttemptRecord) -> dict[str, Any]:
    end = attempt.finished or attempt.heartbeat
    origin = attempt.provenance
    return {
        "id": attempt.id,
        "stage": attempt.stage,
        "status": attempt.status,
        "cause": attempt.cause,
        "started": attempt.started.isoformat(timespec="seconds"),
        "seconds": round((end - attempt.started).total_seconds(), 1),
        "host": origin.host,
        "pid": origin.pid,
        "device": origin.device,
        "commit": origin.git_sha,
        "dirty": origin.dirty,
        "error": attempt.error,
    }


# ---------------------------------------------------------------- what it left


def journal_tail(path: Path) -> list[str]:
    """The last lines of a training's journal, in words."""
    found = []
    for line in read_journal(path)[0]:
        if "event" in line:
            found.append(f"{line['event']}: {json.dumps(line['detail'])}")
        elif "scalars" in line:
            shown = {name: line["scalars"].get(name) for name in ("loss/total", "grad_norm", "lr")}
            values = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
            found.append(f"step {line['step']}: {values}")
    return found[-LINES:]


def log_tail(home: Home, key: str) -> list[str]:
    """The last lines that a worker of this machine logged while it was at this cell."""
    newest: tuple[float, list[str]] = (0.0, [])
    for path in sorted((home.root / "logs").glob("worker-*.log")):
        own: list[str] = []
        mine = False
        for line in path.read_text(errors="replace").splitlines():
            _, begins, rest = line.partition(BEGINS.partition("%s")[0])
            if begins:
                mine = rest.startswith(f"{key},")
            if mine:
                own.append(line)
        if own and path.stat().st_mtime > newest[0]:
            newest = path.stat().st_mtime, [f"{path.name}: {line}" for line in own[-LINES:]]
    return newest[1]


def _reproduce(home: Home, found: Dossier) -> list[str]:
    """A line for each stage whose inputs are on this machine; how to get them, if there is none."""
    ready = [s for s in found.states if all(path.is_file() for path in inputs_of(home, s.cell_key, s.stage))]
    if ready or not found.grids:
        return [reproducer(home, state) for state in ready]
    write = f"sparseforge plan {found.grids[0]} --out cells"
    return [f"{write} && python -m sparseforge_core.run --home {home.root} train cells/{found.key}.json reproduced"]


def _files(folder: Path) -> list[dict[str, Any]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return [{"path": str(path.relative_to(folder)), "bytes": path.stat().st_size} for path in found]
