"""What a grid costs besides its work: planning ten thousand cells, and the time between two cells in a warm worker.

python benchmarks/grid.py [--cells 10000] [--run 200] [--json]

Planned are retraining recipes of the paper at many lengths, four seeds each, into an empty store, and again. Run are
cells with next to no work (a tiny dense model is built and left as it is), one after the other in one worker: what a
cell takes in all, less what its own clock says, is the overhead. `user` is this process's processor time.
benchmarks/results/grid.json keeps what was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script: the checkout takes the place of this folder, where a file is called like a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from flows import grids
from flows.grids.planned import Grid, Planned, Slot, expand
from flows.home import Home, be_quiet
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.methods import Dense
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.recipe import Recipe
from sparseforge_core.store.results import Results
from sparseforge_core.store.store import ResultStore

SEEDS = (0, 1, 2, 3)
PLANNED, RUN = "bench-planned", "bench-run"


def large(cells: int) -> Grid:
    """A grid of so many cells: the paper's retraining recipes, each at many lengths."""
    base = [entry for entry in grids.grid_named("full").entries if entry.recipe.train.steps]
    entries = []
    for number in range(-(-cells // len(SEEDS))):
        entry = base[number % len(base)]
        longer = replace(entry.recipe.train, steps=1000 + number)  # no two alike
        slot = Slot(exhibit="table-2", row=f"row-{number}", label=f"Row {number}")
        recipe = replace(entry.recipe, train=longer)
        entries.append(Planned(recipe=recipe, variant="bench", seeds=SEEDS, suites=entry.suites, slots=(slot,)))
    return Grid(name=PLANNED, title="Benchmark of planning", entries=tuple(entries), captions={})


def idle(cells: int) -> Grid:
    """A grid of so many cells with next to no work."""
    corpus = Synthetic(documents_count=20)
    tokenizer = TrainedBPE(corpus=corpus, size=300)
    tiny = Tiny(architecture="llama", tokenizer=tokenizer, width=16, layers=1, heads=2, positions=32)
    recipe = Recipe(model=tiny, method=Dense(), corpus=corpus)
    entry = Planned(recipe=recipe, variant="idle", seeds=tuple(range(cells)))
    return Grid(name=RUN, title="Benchmark of running", entries=(entry,), captions={})


def timed(what: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result, and how long it took."""
    wall, user = time.perf_counter(), time.process_time()
    result = what()
    return result, {"wall": time.perf_counter() - wall, "user": time.process_time() - user}


def planning(cells: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of every step of planning a grid, and of all of them."""
    from flows.cycle import ready
    from flows.listing import plan_rows
    from flows.planning import bill

    grid, home = large(cells), _home(folder)
    store = ResultStore(home.store_url)
    plan, made = timed(lambda: expand(grid))
    _, first = timed(lambda: _record(store, grid, plan))
    _, again = timed(lambda: _record(store, grid, plan))
    states, read = timed(lambda: store.work(grid.name))
    _, chosen = timed(lambda: ready(states))
    _, billed = timed(lambda: bill(plan, grid.name, home, workers=8, rows=plan_rows(plan, frozenset())))
    store.close()
    steps = {"expand": made, "record": first, "states": read, "ready": chosen, "cost, disk and time": billed}
    total = {kind: sum(step[kind] for step in steps.values()) for kind in ("wall", "user")}
    return {f"all of {len(plan.cells)} cells": total, **steps, "record again": again}


def _home(folder: Path) -> Home:
    return Home(folder, f"sqlite:///{folder / 'store.db'}", f"sqlite:///{folder / 'mlflow.db'}")


def _record(store: ResultStore, grid: Grid, plan: Any) -> None:
    store.plan(grid.name, grid.title, plan.cells, plan.suites, plan.slots, plan.stages)


def running(cells: int, folder: Path) -> dict[str, float]:
    """Milliseconds of a cell in one warm worker, of its work, and of the rest, over all cells but the first."""
    from flows.local import run_grid

    grids.GRIDS[RUN] = lambda: idle(cells)
    home = _home(folder)
    summary = run_grid(home, RUN, workers=1, quiet=True)
    if not summary.complete:
        raise SystemExit(f"not every cell was done: {summary.as_json()}")
    _, attempts = Results(home.store_url).progress(RUN)
    ended = sorted((a.finished or datetime.datetime.min, a) for a in attempts)
    whole = (ended[-1][0] - ended[0][0]).total_seconds() / (len(ended) - 1)
    work = sum(float((a.context or {})["wall_seconds"]) for _, a in ended[1:]) / (len(ended) - 1)
    return {"cell": 1000 * whole, "work": 1000 * work, "overhead": 1000 * (whole - work)}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000, help="to plan")
    parser.add_argument("--run", type=int, default=200, help="to run; 0 leaves that out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    be_quiet()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        found: dict[str, Any] = {"planning": planning(options.cells, Path(one))}
        if options.run:
            found["running"] = running(options.run, Path(two))
    if options.json:
        print(json.dumps(found))
        return 0
    for what, took in found["planning"].items():
        print(f"{what:<24}{took['wall']:8.2f} s wall {took['user']:8.2f} s user")
    if options.run:
        print(
            ", ".join(f"{what} {value:.1f} ms" for what, value in found["running"].items()) + f" ({options.run} cells)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
