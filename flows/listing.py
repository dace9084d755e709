"""What `plan`, `status` and the lists (methods, presets, families, ...) show: rows first, a screen of text second."""

from __future__ import annotations

import collections
import socket
from typing import Any

from flows.failures import reproducer
from flows.grids import GRIDS, grid_named
from flows.grids.planned import Plan
from flows.home import Home
from flows.provenance import process_alive
from sparseforge_core.errors import SparseForgeError, StoreError
from sparseforge_core.store.rows import StageState
from sparseforge_core.tracking.tracker import read_journal


def plan_rows(plan: Plan, home: Home) -> list[dict[str, Any]]:
    """One row a cell: what it is, where it would run, what it costs, and whether it is done."""
    states = _states(home, None)
    rows = []
    for cell in plan.cells:
        stages = plan.stages[cell.key]
        done = sum(states.get((cell.key, stage)) == "done" for stage in stages)
        rows.append(
            {
                "key": cell.key,
                "model": cell.model,
                "pattern": cell.pattern,
                "method": cell.method,
                "variant": cell.variant,
                "seed": cell.seed,
                "tokens": cell.tokens,
                "pool": cell.pool,
                "device_hours": round(cell.cost_hours, 4),
                "requires": list(cell.requires),
                "stages": list(stages),
                "status": "done" if done == len(stages) else f"{done}/{len(stages)} done" if done else "pending",
            }
        )
    return rows


def print_plan(grid: str, rows: list[dict[str, Any]]) -> None:
    """The rows and their totals."""
    left = f"{'key':<17}{'model':<18}{'pattern':<10}{'variant':<32}{'seed':>4}{'tokens':>16}"
    print(f"{left}  {'pool':<7}{'hours':>10}  status")
    for r in rows:
        print(
            f"{r['key']:<17}{r['model']:<18}{r['pattern']:<10}{r['variant']:<32}{r['seed']:>4}{r['tokens']:>16,}  "
            f"{r['pool']:<7}{r['device_hours']:>10.3f}  {r['status']}"
        )
    hours: dict[str, float] = collections.defaultdict(float)
    for r in rows:
        if r["status"] != "done":
            hours[r["pool"]] += r["device_hours"]
    left = ", ".join(f"{value:,.2f} h on {pool}" for pool, value in sorted(hours.items())) or "nothing"
    done = sum(r["status"] == "done" for r in rows)
    tokens = sum(r["tokens"] for r in rows)
    print(f"{grid}: {len(rows)} cells, {done} done, {tokens:,} tokens in all; estimated left (device hours): {left}")


def status_of(grid: str, home: Home) -> dict[str, Any]:
    """Counts of cells by state, what runs with its last loss, and what failed with its cause."""
    from sparseforge_core.store.results import Results
    from sparseforge_core.store.store import ResultStore

    grid_named(grid)
    Results(home.store_url).close()  # asking must not make a store where there is none
    store = ResultStore(home.store_url)
    store.release_dead(socket.gethostname(), process_alive)
    states = store.work(grid)
    if not states:
        raise StoreError(f"grid {grid} was never planned in this store; start it with `sparseforge run {grid}`")
    by_cell: dict[str, list[StageState]] = collections.defaultdict(list)
    for state in states:
        by_cell[state.cell_key].append(state)
    counts = collections.Counter(_cell_status(cell) for cell in by_cell.values())
    running = [_running(home, cell) for cell in by_cell.values() if _cell_status(cell) == "running"]
    failed = [
        {
            "key": s.cell_key,
            "stage": s.stage,
            "model": s.model,
            "variant": s.variant,
            "attempts": s.attempts,
            "error": s.error,
            "cause": s.cause,
            "quarantined": s.quarantined,
            "reproduce": reproducer(home, s),
        }
        for s in states
        if s.status in ("failed", "lost")
    ]
    cells = len(by_cell)
    # Of a cell whose training diverged, that is said once.
    ended = {s.cell_key: s for s in reversed(states) if s.cause == "diverged" and s.status == "done"}
    diverged = [{"key": s.cell_key, "stage": s.stage, "error": s.error} for s in reversed(ended.values())]
    about = {"counts": dict(counts), "running": running, "failed": failed, "diverged": diverged}
    return {"grid": grid, "cells": cells, **about}


def print_status(status: dict[str, Any]) -> None:
    """One screen."""
    counts = ", ".join(f"{number} {name}" for name, number in sorted(status["counts"].items()))
    print(f"{status['grid']}: {status['cells']} cells: {counts}")
    for cell in status["running"]:
        loss = f", step {cell['step']}, loss {cell['loss']:.3f}" if cell.get("loss") is not None else ""
        print(f"  running {cell['key']}  {cell['model']} {cell['variant']}  {cell['stage']}{loss}")
    for cell in status["failed"]:
        kept = f" (quarantined: {cell['cause']})" if cell["quarantined"] else ""
        print(f"  failed  {cell['key']}  {cell['model']} {cell['variant']}  {cell['stage']}{kept}: {cell['error']}")
        if kept:
            print(f"    reproduce with: {cell['reproduce']}")
    for cell in status["diverged"]:
        print(f"  diverged  {cell['key']}  {cell['stage']}: {cell['error']}")
    if any(cell["quarantined"] for cell in status["failed"]):
        print(f"  once the cause is gone: sparseforge run {status['grid']} --retry-failed")


def listing(what: str) -> list[dict[str, Any]]:
    """Rows of one list, with at least `name` and `about`; of families, the tiny model of each is built."""
    if what == "presets":
        from sparseforge_core.identity import diff
        from sparseforge_core.presets import IMPROVED, PRESETS
        from sparseforge_core.specs import encode

        usual = encode(IMPROVED.method, omit_defaults=False)
        return [
            {
                "name": preset.name,
                "about": preset.about,
                "method": encode(preset.method, omit_defaults=False),
                "differs": diff(usual, encode(preset.method, omit_defaults=False)),
                "objective": encode(preset.objective),
                "lr": encode(preset.lr),
                "slorb": None if preset.slorb is None else encode(preset.slorb, omit_defaults=False),
            }
            for preset in PRESETS.values()
        ]
    if what == "methods":
        import dataclasses

        from sparseforge_core import specs
        from sparseforge_core.methods import METHODS

        return [
            {
                "name": kind,
                "about": f"{cls.card.stage}; {cls.card.source}",
                "kind": cls.card.stage,
                "source": cls.card.source,
                "fields": {
                    f.name: {"type": str(f.type), "default": specs.encode(f.default, omit_defaults=False)}
                    for f in dataclasses.fields(cls)  # type: ignore[arg-type]
                },
            }
            for kind, cls in METHODS.items()
        ]
    if what == "families":
        from sparseforge_core.models.families.survey import survey

        return [
            {
                "name": row.model_type,
                "about": row.about,
                "model_type": row.model_type,
                "family": row.family,
                "sites": sum(row.sites.values()),
                "sites_by_rule": row.sites,
                "coverage": round(row.share, 4),
                "excluded": row.excluded,
            }
            for row in survey()
        ]
    if what == "suites":
        from sparseforge_core import specs
        from sparseforge_core.evaluate.suites import SUITES, suite_key

        return [
            {"name": name, "about": suite_key(suite), "suite": specs.encode(suite, omit_defaults=False)}
            for name, suite in SUITES.items()
        ]
    grids = {name: grid_named(name) for name in GRIDS}
    return [{"name": name, "about": f"{grid.title} ({len(grid.entries)} recipes)"} for name, grid in grids.items()]


def _states(home: Home, grid: str | None) -> dict[tuple[str, str], str]:
    """State of every stage in the store, or nothing if there is no store yet."""
    from sparseforge_core.store.results import Results

    try:
        results = Results(home.store_url)
    except SparseForgeError:  # planning needs no store: then nothing is done yet
        return {}
    return results.stage_statuses(grid)


def _cell_status(cell: list[StageState]) -> str:
    statuses = {state.status for state in cell}
    if statuses == {"done"}:
        return "done"
    for status in ("running", "failed", "lost", "interrupted"):
        if status in statuses:
            return status
    return "pending"


def _running(home: Home, cell: list[StageState]) -> dict[str, Any]:
    state = next(s for s in cell if s.status == "running")
    lines, _ = read_journal(home.cell(state.cell_key) / "train" / "journal.jsonl")
    last = next((line for line in reversed(lines) if "scalars" in line), None)
    row: dict[str, Any] = {"key": state.cell_key, "stage": state.stage, "model": state.model, "variant": state.variant}
    if last is not None:
        row |= {"step": last["step"], "loss": last["scalars"].get("loss/total")}
    return row


__all__ = ["listing", "plan_rows", "print_plan", "print_status", "status_of"]
