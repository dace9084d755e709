"""What `run` and `demo` do: what they look at before anything is spent, the run, what they say when it is over."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.home import Home, prefect_environment, shown_url
from sparseforge_core.errors import SparseForgeError

if TYPE_CHECKING:
    from flows.local import Summary

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done; some cells failed or something is partial; bad input; stopped, go on with the same command."""


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


def execute(options: argparse.Namespace, home: Home) -> tuple[int, Summary]:
    """Run a grid and tell how it ended: the exit code, and the summary."""
    from flows.local import run_grid

    warning = prepare(options, home)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if options.prefect and options.pool:
        raise SparseForgeError("--pool and --prefect: with Prefect, the work pools choose; see docs/prefect.md")
    if options.prefect and pending(options.grid, home):
        prefect_environment(home)
        from flows.sparseforge import run_embedded

        summary = run_embedded(
            home,
            options.grid,
            workers=options.workers,
            quiet=options.quiet,
            retry_failed=options.retry_failed,
        )
    else:
        summary = run_grid(
            home,
            options.grid,
            workers=options.workers,
            quiet=options.quiet,
            pool=options.pool,
            retry_failed=options.retry_failed,
        )
    code = say_end(summary, "make demo" if options.command == "demo" else f"sparseforge run {options.grid}", options)
    return code, summary


def say_end(summary: Summary, again: str, options: argparse.Namespace | None = None) -> int:
    """Tell how a run ended, and what to do next; the exit code. With --json all of it goes to standard error."""
    out = sys.stderr if options is not None and options.json else sys.stdout
    print(f"{summary.grid}: {summary.executed} cells executed now, {summary.total} planned", file=out, flush=True)
    for key, error in summary.failed.items():
        print(f"  failed {key}: {error}", file=sys.stderr)
        if key in summary.reproduce:
            print(f"    reproduce with: {summary.reproduce[key]}", file=sys.stderr)
    for key, error in summary.diverged.items():
        print(f"  kept as diverged {key}: {error}", file=sys.stderr)
    if summary.interrupted:
        print(f"stopped; nothing is lost. Go on with: {again}", file=sys.stderr)
        return INTERRUPTED
    if summary.failed:
        what = f"{len(summary.failed)} cells are in quarantine; `sparseforge explain CELL` says all about one"
        print(f"  {what}. Once the cause is gone: sparseforge run {summary.grid} --retry-failed", file=sys.stderr)
    for pool, count in sorted(summary.unserved.items()):
        what = f"{count} cells are placed on {pool}, which this run does not serve; left for workers of that pool"
        print(f"  {what}, or `sparseforge run {summary.grid} --pool {pool}`", file=sys.stderr)
    waiting = summary.blocked - sum(summary.unserved.values())
    if waiting > 0:
        print(f"  {waiting} cells are not done: `sparseforge status {summary.grid}` says why", file=sys.stderr)
    return OK if summary.complete else FAILED


def say_links(options: argparse.Namespace, home: Home) -> None:
    """Where MLflow shows the grid: addresses of its saved views, or how to start its pages."""
    from flows.grids import grid_named
    from flows.mirror import MirrorError, links
    from flows.placements import model_name

    if options.quiet or options.json:
        return
    if not home.mlflow_uri.startswith(("http://", "https://")):
        artifacts = f" --default-artifact-root {home.root / 'mlartifacts'}" if "sqlite" in home.mlflow_uri else ""
        print(f"MLflow  {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {home.mlflow_uri}{artifacts}")
        return
    try:
        models = [model_name(entry.recipe.model) for entry in grid_named(options.grid).entries]
        for model, about, address in links(home, options.grid, models):
            print(f"MLflow  {model}, {about}:\n        {address}")
    except MirrorError as error:
        print(f"warning: {error}", file=sys.stderr)


def show(options: argparse.Namespace, found: Any, lines: Callable[[], Iterable[str]]) -> None:
    """The answer to a question: as JSON, as lines, or with --quiet as the exit code alone."""
    if options.json:
        print(json.dumps(found, indent=1))
    elif not options.quiet:
        print("\n".join(lines()))
