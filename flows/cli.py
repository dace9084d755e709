"""The `sparseforge` command. Heavy libraries are imported by the subcommand that needs them.

Exit codes: 0 done; 1 some cells failed or something is partial; 2 bad input; 130 stopped, go on with the same command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.arguments import parser
from flows.home import Home, be_quiet
from sparseforge_core.errors import SparseForgeError

if TYPE_CHECKING:
    from flows.local import Summary

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Parse, dispatch, and turn our own errors into one sentence and exit code 2."""
    be_quiet()
    known = parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next, and takes no other answer
        import argcomplete

        argcomplete.autocomplete(known)
    options = known.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    home = Home.of(options.home, options.db)
    try:
        return int(HANDLERS[options.command](options, home))
    except SparseForgeError as error:
        print(f"sparseforge: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("sparseforge: stopped; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, for instance `| head`
        sys.stderr.close()
        return OK


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _run(options: argparse.Namespace, home: Home) -> int:
    from flows.local import run_grid

    if options.workers is not None and options.workers < 1:
        raise SparseForgeError(f"--workers {options.workers}: needs at least 1")
    if options.prefect and options.pool:
        raise SparseForgeError("--pool and --prefect: with Prefect, the work pools choose; see docs/prefect.md")
    if options.prefect and _pending(options.grid, home):
        from flows.home import prefect_environment

        prefect_environment(home)
        from flows.sparseforge import run_embedded

        summary = run_embedded(home, options.grid, workers=options.workers, quiet=options.quiet)
    else:
        summary = run_grid(home, options.grid, workers=options.workers, quiet=options.quiet, pool=options.pool)
    return _say(summary, "make demo" if options.command == "demo" else f"sparseforge run {options.grid}")


def _pending(grid: str, home: Home) -> bool:
    """Whether a grid has something to run: Prefect is not started for nothing."""
    from flows.local import open_grid

    store, states = open_grid(home, grid)
    store.close()
    return any(state.status != "done" for state in states)


def _say(summary: Summary, again: str) -> int:
    """Tell how a run ended, and what to do next; the exit code."""
    print(f"{summary.grid}: {summary.executed} cells executed now, {summary.total} planned", flush=True)
    for key, error in summary.failed.items():
        print(f"  failed {key}: {error}", file=sys.stderr)
    if summary.interrupted:
        print(f"stopped; nothing is lost. Go on with: {again}", file=sys.stderr)
        return INTERRUPTED
    for pool, count in sorted(summary.unserved.items()):
        what = f"{count} cells are placed on {pool}, which this machine cannot serve; left for workers of that pool"
        print(f"  {what}, or `sparseforge run {summary.grid} --pool {pool}`", file=sys.stderr)
    waiting = summary.blocked - sum(summary.unserved.values())
    if waiting > 0:
        print(f"  {waiting} cells are not done: `sparseforge status {summary.grid}` says why", file=sys.stderr)
    return OK if summary.complete else FAILED


def _demo(options: argparse.Namespace, home: Home) -> int:
    code = _run(options, home)
    if code == INTERRUPTED:
        return code
    options.out, options.only, options.strict, options.json = None, None, False, False
    _tables(options, home)
    table = home.grid("demo") / "tables" / "table-2.md"
    print("\n" + table.read_text())
    print(f"Tables  {home.grid('demo') / 'tables'}\nFigure  {home.grid('demo') / 'figures' / 'accuracy-vs-tokens.png'}")
    artifacts = f" --default-artifact-root {home.root / 'mlartifacts'}" if home.mlflow_uri.startswith("sqlite") else ""
    print(f"MLflow  {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {home.mlflow_uri}{artifacts}")
    return code


def _plan(options: argparse.Namespace, home: Home) -> int:
    from flows.grids import grid_named
    from flows.grids.planned import expand
    from flows.listing import plan_rows, print_plan

    plan = expand(grid_named(options.grid))
    rows = plan_rows(plan, home)
    if options.out:
        from sparseforge_core.files import write_text

        for cell in plan.cells:
            write_text(options.out / f"{cell.key}.json", cell.cell_json)
        for suite in plan.suites:
            write_text(options.out / "suites" / f"{suite.key}.json", suite.spec_json)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print_plan(options.grid, rows)
    return OK


def _bundle(options: argparse.Namespace, _home: Home) -> int:
    from flows.bundle import write_bundle
    from flows.grids import grid_named
    from flows.grids.planned import expand

    count = write_bundle(expand(grid_named(options.grid)), options.out, pool=options.pool)
    print(f"{options.out / 'bundle.json'}: {count} cells")
    return OK


def _ingest(options: argparse.Namespace, home: Home) -> int:
    if options.grid.endswith(".json"):
        from flows.benched import GRID, ingest_decode
        from sparseforge_core.store.store import ResultStore

        results = ResultStore(home.store_url)
        count = ingest_decode(results, Path(options.grid))
        print(f"{GRID}: {count} stages recorded; see `sparseforge tables --grid {GRID}`")
        return OK
    from flows.bundle import ingest
    from flows.local import open_grid

    store, _ = open_grid(home, options.grid)
    print(f"{options.grid}: {ingest(store, home, options.grid)} stages recorded")
    return OK


def _status(options: argparse.Namespace, home: Home) -> int:
    from flows.listing import print_status, status_of

    status = status_of(options.grid, home)
    if options.json:
        print(json.dumps(status, indent=1))
    else:
        print_status(status)
    return FAILED if status["failed"] else OK


def _tables(options: argparse.Namespace, home: Home) -> int:
    from analysis.make_tables import run_make_tables

    return run_make_tables(
        home.store_url,
        home.root,
        grid=options.grid,
        out=options.out,
        only=options.only,
        strict=options.strict,
        quiet=options.quiet or options.command == "demo",
        as_json=options.json,
    )


def _report(options: argparse.Namespace, home: Home) -> int:
    from analysis.report import write_report
    from sparseforge_core.store.results import Results

    results = Results(home.store_url)
    name = results.grid(options.grid)["name"]
    path = write_report(results, name, options.out or home.grid(name) / "report.html")
    if not options.quiet:
        print(f"grid {name}: {path}")
    return OK


def _verify(options: argparse.Namespace, home: Home) -> int:
    from analysis.make_tables import collect
    from analysis.verify import find, trace_lines, verification_lines, verify
    from sparseforge_core.store.results import Results

    results, trace = Results(home.store_url), None
    if options.place:
        if len(options.place) != 3:
            raise SparseForgeError(
                "verify: give a table, a row and a column, such as table-2 SparseForge Avg; or nothing"
            )
        name = results.grid(options.grid)["name"]
        trace = find(collect(results, name).exhibits, *options.place)
    found = verify(results, home.root / "cells", None if trace is None else trace.cell.sources)
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        lines = [] if trace is None else trace_lines(trace, results, name)
        print("\n".join([*lines, *verification_lines(found)]))
    return FAILED if found.problems else OK


def _audit(options: argparse.Namespace, home: Home) -> int:
    from analysis.audit import audit_numbers, audit_table, report_lines

    if options.what == "published":
        from flows.grids.published import FIGURE_2, NOT_AT_HAND, PUBLISHED, TWICE

        found, aside = audit_numbers([*PUBLISHED, FIGURE_2], TWICE), [f"not checked: {text}" for text in NOT_AT_HAND]
    else:
        from analysis.exhibits import TABLES
        from analysis.make_tables import collect
        from sparseforge_core.store.results import Results

        results = Results(home.store_url)
        exhibits = collect(results, results.grid(options.what)["name"]).exhibits
        tables = [build(exhibits[name]) for name, build in TABLES.items()]
        found, aside = [finding for table in tables for finding in audit_table(table)], []
    if options.json:
        print(json.dumps([finding.as_json() for finding in found], indent=1))
    else:
        print("\n".join([*report_lines(found), *aside]))
    return FAILED if found else OK


def _completion(options: argparse.Namespace, _home: Home) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["sparseforge"], shell=options.shell))
    return OK


def _doctor(options: argparse.Namespace, home: Home) -> int:
    if options.model is not None:
        from flows.outlook import outlook

        print(outlook(options))
        return OK
    from flows.doctor import doctor

    return doctor(home, as_json=options.json)


def _export(options: argparse.Namespace, home: Home) -> int:
    from flows.exporting import export_to, generation, verification

    if options.command == "generate":
        text, notes = generation(options)
        print(notes, file=sys.stderr)
    else:
        text = export_to(options, home) if options.command == "export" else verification(options)
    print(text)
    return OK


def _serve(options: argparse.Namespace, _home: Home) -> int:
    from flows.serving import serve

    serve(options)
    return OK


def _list(options: argparse.Namespace, home: Home) -> int:
    from flows.listing import listing

    rows = listing(options.command)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"{row['name']:<18}{row['about']}")
    return OK


HANDLERS = {
    "demo": _demo,
    "run": _run,
    "plan": _plan,
    "bundle": _bundle,
    "ingest": _ingest,
    "status": _status,
    "tables": _tables,
    "report": _report,
    "verify": _verify,
    "audit": _audit,
    "completion": _completion,
    "doctor": _doctor,
    **dict.fromkeys(("export", "verify-export", "generate"), _export),
    "serve": _serve,
    **dict.fromkeys(("methods", "presets", "families", "suites", "grids"), _list),
}
"""What each subcommand does."""


if __name__ == "__main__":
    sys.exit(main())
