"""What `run` and `demo` look at before they spend anything, and their last line for machines."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from flows.home import Home, shown_url
from sparseforge_core.errors import SparseForgeError

if TYPE_CHECKING:
    from flows.local import Summary


def prepare(options: argparse.Namespace, home: Home) -> str:
    """Refuse what cannot be meant, and tell whom to notify to what runs below; the warning of a disk too small."""
    from flows.devices import default_workers, served_here
    from flows.grids import grid_named
    from flows.grids.planned import expand
    from flows.listing import stages_done
    from flows.notify import VARIABLE, words_of
    from flows.planning import disk_of

    require_workers(options.workers)
    if options.notify is not None:
        words_of(options.notify)
        os.environ[VARIABLE] = options.notify  # Prefect's flow, where there is one, reads it there too
    plan = expand(grid_named(options.grid))
    ours = [c for c in plan.cells if (c.pool == options.pool if options.pool else served_here(c.pool))]
    return disk_of(plan, ours, stages_done(home), home, options.workers or default_workers()).warning


def require_workers(workers: int | None) -> None:
    """Raise SparseForgeError for a number of workers that nobody can start."""
    if workers is not None and workers < 1:
        raise SparseForgeError(f"--workers {workers}: needs at least 1")


def pending(grid: str, home: Home) -> bool:
    """Whether a grid has something to run: Prefect is not started for nothing."""
    from flows.local import open_grid

    store, states = open_grid(home, grid)
    store.close()
    return any(state.status != "done" for state in states)


def last_line(summary: Summary, home: Home, **more: Any) -> str:
    """How a run ended, as one line of JSON."""
    where = {"store": shown_url(home.store_url), "home": str(home.root), "mlflow": shown_url(home.mlflow_uri)}
    return json.dumps({**summary.as_json(), **where, **more})
