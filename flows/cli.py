"""The `sparseforge` command. Heavy libraries are imported by the subcommand that needs them.

Exit codes: 0 done; 1 some cells failed or something is partial; 2 bad input; 130 stopped, go on with the same command.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from flows.home import Home, be_quiet
from sparseforge_core import __version__
from sparseforge_core.errors import SparseForgeError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Parse, dispatch, and turn our own errors into one sentence and exit code 2."""
    be_quiet()
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    home = Home.of(options.home, options.db)
    try:
        return int(options.run(options, home))
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


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest name for a mistyped command."""

    def error(self, message: str) -> Any:
        if "invalid choice" in message and "'" in message:
            tried = message.split("'")[1]
            near = difflib.get_close_matches(tried, COMMANDS, n=1)
            message += f". Did you mean {near[0]!r}?" if near else ""
        super().error(message)


COMMANDS = ("demo", "plan", "run", "status", "tables", "doctor", "methods", "suites", "grids")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparseforge",
        description="Make language models 2:4 sparse, measure every rival under one harness, and get the tables.",
        epilog="Exit codes: 0 done, 1 something failed or is partial, 2 bad input, 130 stopped (run again to go on).",
    )
    parser.add_argument("--version", action="version", version=f"sparseforge {__version__}")
    parser.add_argument("--home", type=Path, help="folder for everything that runs make (default $SPARSEFORGE_HOME or runs)")
    parser.add_argument("--db", help="results store (default $SPARSEFORGE_DB or sqlite:///HOME/store.db)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_running(commands)
    _add_reading(commands)
    return parser


def _add_running(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole path on tiny models: train, evaluate, tables, figure",
        description="Run the demo grid, then write its tables and figure. Running it again goes on where it stopped.",
        epilog="example: sparseforge demo --workers 2",
    )
    run = commands.add_parser(
        "run",
        help="run what is not done of a grid on this machine",
        description="Plan a grid and run every stage that is not done. A finished cell is never run twice.",
        epilog="example: sparseforge run smollm2-smoke",
    )
    run.add_argument("grid", help="a grid's name; `sparseforge grids` lists them")
    run.add_argument("--prefect", action="store_true", help="record each cell as a Prefect task run")
    demo.add_argument("--no-prefect", dest="prefect", action="store_false", help="leave Prefect out of it")
    for command in (demo, run):
        command.add_argument("--workers", type=int, help="worker processes (default: one a GPU, else one a core)")
        command.add_argument("--quiet", action="store_true", help="no progress")
    demo.set_defaults(run=_demo, grid="demo")
    run.set_defaults(run=_run)
    plan = commands.add_parser(
        "plan",
        help="every cell of a grid: key, tokens, placement, device hours, state",
        description="Show what a grid would run and what it costs, without running anything.",
        epilog="example: sparseforge plan full",
    )
    plan.add_argument("grid")
    plan.add_argument("--json", action="store_true", help="machine-readable")
    plan.add_argument("--out", type=Path, help="also write each cell as a file for `python -m sparseforge_core.run`")
    plan.set_defaults(run=_plan)


def _add_reading(commands: Any) -> None:
    status = commands.add_parser(
        "status", help="done, running, failed, pending of a grid", epilog="example: sparseforge status demo --json"
    )
    status.add_argument("grid")
    status.add_argument("--json", action="store_true", help="machine-readable")
    status.set_defaults(run=_status)
    tables = commands.add_parser(
        "tables",
        help="write Tables 1-7 and the figure from the store",
        epilog="example: sparseforge tables --grid demo --only table-2",
    )
    tables.add_argument("--grid", help="default: the grid planned last")
    tables.add_argument("--out", type=Path, help="folder (default HOME/GRID)")
    tables.add_argument("--only", action="append", help="an exhibit, such as table-2; may be repeated")
    tables.add_argument("--strict", action="store_true", help="exit 2 when anything is partial")
    tables.set_defaults(run=_tables)
    doctor = commands.add_parser("doctor", help="check this machine and installation, say what to do")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.set_defaults(run=_doctor)
    for name, what in (("methods", "pruning methods"), ("suites", "evaluation suites"), ("grids", "grids")):
        listing = commands.add_parser(name, help=f"list the {what}")
        listing.add_argument("--json", action="store_true", help="machine-readable")
        listing.set_defaults(run=_list)


def _run(options: argparse.Namespace, home: Home) -> int:
    from flows.local import run_grid

    if options.workers is not None and options.workers < 1:
        raise SparseForgeError(f"--workers {options.workers}: needs at least 1")
    if options.prefect:
        from flows.cycle import plan_grid
        from sparseforge_core.store.store import ResultStore

        store = ResultStore(home.store_url)
        plan_grid(store, options.grid)
        pending = any(state.status != "done" for state in store.work(options.grid))
    else:
        pending = False
    if pending:
        from flows.home import prefect_environment

        prefect_environment(home)
        from flows.sparseforge import run_embedded

        summary = run_embedded(home, options.grid, workers=options.workers, quiet=options.quiet)
    else:
        summary = run_grid(home, options.grid, workers=options.workers, quiet=options.quiet)
    again = "make demo" if options.command == "demo" else f"sparseforge run {options.grid}"
    print(f"{options.grid}: {summary.executed} cells executed now, {summary.total} planned", flush=True)
    for key, error in summary.failed.items():
        print(f"  failed {key}: {error}", file=sys.stderr)
    if summary.interrupted:
        print(f"stopped; nothing is lost. Go on with: {again}", file=sys.stderr)
        return INTERRUPTED
    if summary.blocked:
        print(f"  {summary.blocked} cells are not done: `sparseforge status {options.grid}` says why", file=sys.stderr)
    return OK if summary.complete else FAILED


def _demo(options: argparse.Namespace, home: Home) -> int:
    code = _run(options, home)
    if code == INTERRUPTED:
        return code
    options.out, options.only, options.strict = None, None, False
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
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print_plan(options.grid, rows)
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
        quiet=options.command == "demo",
    )


def _doctor(options: argparse.Namespace, home: Home) -> int:
    from flows.doctor import doctor

    return doctor(home, as_json=options.json)


def _list(options: argparse.Namespace, home: Home) -> int:
    from flows.listing import listing

    rows = listing(options.command)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"{row['name']:<18}{row['about']}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
