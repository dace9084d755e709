"""The subcommands about results: tables, the report, what stands behind a number, and whether numbers add up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from flows.home import Home
from flows.running import FAILED, OK, show
from sparseforge_core.errors import SparseForgeError


def _tables(options: argparse.Namespace, home: Home) -> int:
    from analysis.make_tables import run_make_tables

    return run_make_tables(
        home.store_url,
        home.root,
        grid=options.grid,
        out=options.out,
        only=options.only,
        strict=options.strict,
        quiet=options.quiet,
        as_json=options.json,
    )


def _report(options: argparse.Namespace, home: Home) -> int:
    from analysis.report import write_report
    from sparseforge_core.store.results import Results

    results = Results(home.store_url)
    name = results.grid(options.grid)["name"]
    path = write_report(results, name, options.out or home.grid(name) / "report.html")
    if options.json:
        print(json.dumps({"grid": name, "file": str(path)}))
    elif not options.quiet:
        print(f"grid {name}: {path}")
    return OK


def _verify(options: argparse.Namespace, home: Home) -> int:
    from analysis.make_tables import collect
    from analysis.verify import find, trace_lines, verification_lines, verify
    from flows.mirror import runs_of
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
    runs = {} if trace is None else runs_of(home, (cell for cell, _ in trace.cell.sources))
    lines = [] if trace is None or options.json else trace_lines(trace, results, name, runs)
    show(options, {**found.as_json(), "mlflow_runs": runs}, lambda: [*lines, *verification_lines(found)])
    return FAILED if found.problems else OK


def _audit(options: argparse.Namespace, home: Home) -> int:
    from analysis.audit import audit_numbers, audit_table, numbers_of, report_lines

    aside: list[str] = []
    if options.what.endswith(".csv"):
        found = audit_numbers(numbers_of(Path(options.what)))
    elif options.what == "published":
        from flows.grids.published import FIGURE_2, NOT_AT_HAND, PUBLISHED, TWICE

        found = audit_numbers([*PUBLISHED, FIGURE_2], TWICE)
        aside += [f"not checked: {text}" for text in NOT_AT_HAND]
    else:
        from analysis.exhibits import TABLES
        from analysis.make_tables import collect
        from sparseforge_core.store.results import Results

        results = Results(home.store_url)
        exhibits = collect(results, results.grid(options.what)["name"]).exhibits
        tables = [build(exhibits[name]) for name, build in TABLES.items()]
        found = [finding for table in tables for finding in audit_table(table)]
    show(options, [finding.as_json() for finding in found], lambda: [*report_lines(found), *aside])
    return FAILED if found else OK


COMMANDS: dict[str, Callable[[argparse.Namespace, Home], int]] = {
    "tables": _tables,
    "report": _report,
    "verify": _verify,
    "audit": _audit,
}
"""What each of them does; gives the exit code."""
